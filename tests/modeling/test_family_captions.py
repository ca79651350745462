"""Captions of each family's own processor and model, beside ours of the same checkpoint folder."""

import pytest
import torch
import transformers
from modeling.test_dual_encoders import FAMILIES, patches
from torch.nn import functional as F

from icone_hf import IConEModel, IConEProcessor

CAPTIONS = ["A Red square!", "a red square", "red.", "the white square under a tree, and another one"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!"]
WORDS = [*"aA.,!", "red", "Red", "square", "the", "white", "under", "tree", "and", "another", "one"]


def numbered(*pieces):
    return {piece: row for row, piece in enumerate(pieces)}


def clip_tokenizer(folder):
    ends = [f"{letter}</w>" for letter in LETTERS]
    return transformers.CLIPTokenizer(numbered("<|startoftext|>", "<|endoftext|>", *LETTERS, *ends), merges=[])


def xlm_roberta_tokenizer(folder):
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, "<mask>"]
    return transformers.XLMRobertaTokenizer([(piece, -1.0) for piece in pieces])


def bert_tokenizer(folder):
    return transformers.BertTokenizer(numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS), do_lower_case=False)


def siglip_2_tokenizer(folder):
    pieces = numbered("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS)
    # As its checkpoints have it.
    return transformers.Siglip2Tokenizer(pieces, merges=[], padding_side="right", model_input_names=["input_ids"])


def tipsv2_tokenizer(folder):
    return transformers.Tipsv2Tokenizer(numbered("<pad>", "<unk>", "▁", *LETTERS))


def siglip_tokenizer(folder):
    """Its vocabulary is a file of sentencepiece, and its checkpoints give no mask."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*(caption.lower().strip("!.") for caption in CAPTIONS), "a tree"] * 9),
        model_prefix=str(folder / "spiece"),
        vocab_size=24,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        minloglevel=2,
    )
    return transformers.SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"])


# Of each family: whose processor it has, what its documentation asks of it, and a small tokenizer of its kind.
OWN = {
    "CLIP": ("CLIP", {"padding": True}, clip_tokenizer),
    "CLIPSeg": ("CLIPSeg", {"padding": True}, clip_tokenizer),
    "Aimv2": ("CLIP", {"padding": True}, clip_tokenizer),
    "MetaClip2": ("CLIP", {"padding": True}, xlm_roberta_tokenizer),
    "AltCLIP": ("AltCLIP", {"padding": True}, xlm_roberta_tokenizer),
    "Align": ("Align", {}, bert_tokenizer),
    "Blip": ("Blip", {"padding": True}, bert_tokenizer),
    "ChineseCLIP": ("ChineseCLIP", {"padding": True}, bert_tokenizer),
    "Siglip": ("Siglip", {"padding": "max_length"}, siglip_tokenizer),
    "Siglip2": ("Siglip2", {}, siglip_2_tokenizer),
    "Tipsv2": ("Tipsv2", {}, tipsv2_tokenizer),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_embedded_as_the_familys_own_processor_and_model_do(family, tmp_path):
    """Capitals and points, which some families drop; lengths that differ, which some pad to 64."""
    processor_of, asked, make_tokenizer = OWN[family]
    tokenizer = make_tokenizer(tmp_path)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ids = {name: 0 if value is None else value for name, value in ids.items()}
    longest = 64 if family.startswith("Siglip") else 68  # some number positions from behind the padding token on
    text_config = {**FAMILIES[family]["text_config"], "vocab_size": 128, "max_position_embeddings": longest, **ids}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], "text_config": text_config})
    original = getattr(transformers, f"{family}Model")(config).eval()
    folder = tmp_path / "pair"
    original.save_pretrained(folder)
    images = "Siglip2ImageProcessorPil" if family == "Siglip2" else "CLIPImageProcessorPil"
    image_processor = getattr(transformers, images)()
    getattr(transformers, f"{processor_of}Processor")(image_processor, tokenizer).save_pretrained(folder)

    theirs = transformers.AutoProcessor.from_pretrained(folder)
    assert type(theirs).__name__ == f"{processor_of}Processor"
    inputs = theirs(text=CAPTIONS, return_tensors="pt", **asked)
    pixels = torch.randn(len(CAPTIONS), 3, 32, 32)
    of_images = patches(pixels) if family == "Siglip2" else {"pixel_values": pixels}
    with torch.no_grad():
        expected = F.normalize(original(**inputs, **of_images).text_embeds, dim=-1)

    model = IConEModel.from_encoders(folder, folder).eval()
    processor = IConEProcessor.from_encoders(folder, folder)
    with torch.no_grad():
        ours = model(**processor(text=CAPTIONS, return_tensors="pt")).text_embeds
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    is_lowered = bool(torch.isclose(ours[0], ours[1], atol=1e-5).all())
    assert is_lowered == (family == "Siglip")  # the point of "A Red square!" goes as well
