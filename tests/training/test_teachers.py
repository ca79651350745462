"""Stages whose batches come with what teachers say, against the bare losses of their first batch."""

import pytest
import torch
from PIL import Image
from tiny import WORDS, StopAt, count_pooled, losses, make_run, tiny_text_config, tiny_vision_config
from transformers import (
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    MobileViTConfig,
    MobileViTModel,
    PegasusConfig,
    PegasusModel,
    SamConfig,
    SamModel,
)

from icone_hf import IConEModel, IConEProcessor, IConETrainingArguments, Stage
from icone_hf.data.batching import GroupBatchSampler
from icone_hf.errors import InputError
from icone_hf.modeling import taught_losses as bare
from icone_hf.training import feature_cache
from icone_hf.training.teachers import load_pair

WEIGHTS = {"soft_target_weight": 0.3, "uni_modal_weight": 0.7}
JOINT = (Stage("joint", 1, 5e-4, instance_weight=1, contrastive_weight=1, train_encoders=True),)
HEADS = (Stage("heads", 1, 5e-4, instance_weight=1, contrastive_weight=1, train_encoders=False),)
KINDS = [(HEADS, {}), (JOINT, {}), (JOINT, {"per_device_chunk_size": 3})]


def without_dropout(*models):
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0


def first_log(trainer, index=0):
    return trainer.folder.read_stage(index)["log_history"][0]


def first_batch(trainer):
    """The images and captions of a run's first batch."""
    (pairs, *_) = GroupBatchSampler([3] * 16, 8, seed=trainer.args.seed)
    groups = trainer.train_dataset
    captions = [groups[pair.row]["captions"][pair.caption] for pair in pairs]
    return [groups[pair.row]["image"] for pair in pairs], captions


def expected_log(trainer, model, image_teacher, text_teacher):
    """The losses of the first batch, by the towers and the bare functions.

    Args:
        image_teacher, text_teacher: from images, or captions, to features.
    """
    images, texts = first_batch(trainer)
    processor = trainer.processor
    with torch.no_grad():
        output = model.eval()(**processor(images=images, text=texts, return_tensors="pt"), return_loss=False)
        rows = output.image_embeds, output.text_embeds, image_teacher(images), text_teacher(texts)
        return {name: getattr(bare, name)(*rows).item() for name in ("soft_target_loss", "uni_modal_loss")}


@pytest.mark.parametrize(("stages", "chunks"), KINDS, ids=["heads", "joint", "chunks"])
def test_own_towers_teach_every_stage(make_model, processor, tmp_path, stages, chunks):
    fields = {**WEIGHTS, "num_groups": 16, "projection_dim": 8}
    model, reference = make_model(**fields), make_model(**fields)
    reference.load_state_dict(model.state_dict())
    without_dropout(model, reference)
    trainer = make_run(tmp_path / "run", model, processor, stages, **chunks)
    trainer.train()

    def image_teacher(images):
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return reference.pool_image(reference.run_vision_tower(pixels))

    def text_teacher(texts):
        inputs = processor(text=texts, return_tensors="pt")
        return reference.pool_text(reference.text_model(**inputs), inputs["attention_mask"])

    log = first_log(trainer)
    expected = expected_log(trainer, reference, image_teacher, text_teacher)
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    total = log["instance_loss"] + log["contrastive_loss"] + 0.3 * log["soft_target_loss"] + 0.7 * log["uni_modal_loss"]
    assert log["loss"] == pytest.approx(total, rel=1e-4)


def test_a_run_without_weights_logs_and_caches_nothing_of_it(make_model, processor, tmp_path):
    trainer = make_run(tmp_path / "run", make_model(num_groups=16), processor, JOINT)
    trainer.train()
    assert not {"soft_target_loss", "uni_modal_loss"} & first_log(trainer).keys()
    assert not (tmp_path / "run" / "feature_cache").exists()


@pytest.mark.parametrize("stop", [pytest.param(("0-instance", 5), marks=pytest.mark.slow), ("1-joint", 8)])
def test_a_run_that_goes_on_has_the_teachers_of_one_that_never_stopped(make_model, processor, tmp_path, stop):
    """In mid-stage, with towers that have moved on since: the teachers are still those of the beginning."""
    fields = {**WEIGHTS, "num_groups": 16, "projection_dim": 8}
    start = make_model(**fields).state_dict()

    def run(folder, callbacks=None, moved=0.0):
        model = make_model(**fields)
        model.load_state_dict(start)
        for tower in (model.vision_model, model.text_model):
            for weights in tower.parameters():
                weights.data += moved
        stages = (Stage("instance", 2, 1e-3, 1, 1, False), Stage("joint", 2, 5e-4, 1, 1, True))
        steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
        return make_run(tmp_path / folder, model, processor, stages, callbacks, **steps)

    whole = run("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run("cut", [StopAt(*stop)]).train()
    with pytest.raises(InputError, match="started from towers of other weights"):  # a notebook's model, trained since
        run("cut", moved=1e-3).train(resume_from_checkpoint="auto")
    again = run("cut")
    again.train(resume_from_checkpoint="auto")
    assert losses(again) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


# --- teachers by name ---


@pytest.fixture
def others(tmp_path):
    """Other towers, larger than the run's, that see larger images: (vision, text) folders."""
    torch.manual_seed(7)
    vision, text = tmp_path / "other_vision", tmp_path / "other_text"
    CLIPVisionModel(tiny_vision_config(hidden_size=40, image_size=48)).save_pretrained(vision)
    CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False).save_pretrained(vision)
    BertModel(tiny_text_config(hidden_size=36)).save_pretrained(text)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(text)
    return str(vision), str(text)


@pytest.mark.parametrize(
    ("stages", "named"),
    [(HEADS, (True, True)), (JOINT, (True, False)), (JOINT, (False, True))],
    ids=["both", "image", "text"],
)
def test_other_towers_teach_by_name(make_model, processor, towers, others, tmp_path, stages, named):
    fields = {**WEIGHTS, "num_groups": 16, "projection_dim": 8, "text_pooling": "mean"}
    model, reference = make_model(**fields), make_model(**fields)
    without_dropout(model, reference)
    names = dict(zip(("image_teacher", "text_teacher"), others, strict=True))
    given = {name: value for is_named, (name, value) in zip(named, names.items(), strict=True) if is_named}
    trainer = make_run(tmp_path / "run", model, processor, stages, **given)
    trainer.train()

    # The reference asks the towers themselves, as transformers loads them.
    def image_teacher(images):
        folder = others[0] if named[0] else towers[0]
        pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
        return CLIPVisionModel.from_pretrained(folder).eval()(pixels).pooler_output

    def text_teacher(texts):
        folder = others[1] if named[1] else towers[1]
        inputs = BertTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        tokens = BertModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
        if named[1]:  # BERT's default; the run's own tower is pooled as the run pools it
            return tokens[:, 0]
        mask = inputs["attention_mask"][:, :, None]
        return (tokens * mask).sum(dim=1) / mask.sum(dim=1)

    expected = expected_log(trainer, reference, image_teacher, text_teacher)
    log = first_log(trainer)
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert trainer.recipe()["decisive"].items() >= given.items()


def test_an_own_tower_with_adapters_teaches_as_it_is(make_model, processor, others, tmp_path):
    """Beside one that is named: peft would draw new adapters for a tower of another model."""
    pytest.importorskip("peft")
    model = make_model(num_groups=16, text_lora={"r": 2, "lora_alpha": 4})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = IConETrainingArguments(str(tmp_path), use_cpu=True, image_teacher=str(others[0]))
    teachers, _ = load_pair(model, processor, args)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    taught = teachers.text_model.state_dict()
    assert taught.keys() == model.text_model.state_dict().keys()
    assert all(torch.equal(taught[name], weight) for name, weight in model.text_model.state_dict().items())


def tiny_pair(folder, dim):
    """A CLIP of both towers, with its processors."""
    text_config = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text_config |= {"num_attention_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
    vision_config = tiny_vision_config().to_dict()
    config = CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=dim)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


def test_towers_of_pairs_with_other_spaces_teach_together(make_model, processor, tmp_path):
    """Two CLIPs, of 16 and 12 dimensions: what they pool teaches, and their projections have no part in it."""
    pairs = [tiny_pair(tmp_path / str(dim), dim) for dim in (16, 12)]
    args = IConETrainingArguments(str(tmp_path / "run"), use_cpu=True, image_teacher=pairs[0], text_teacher=pairs[1])
    teachers, of_teachers = load_pair(make_model(**WEIGHTS), processor, args)
    inputs = of_teachers(images=[Image.new("RGB", (32, 32), "red")], text=["a red square"], return_tensors="pt")
    images, texts = (CLIPModel.from_pretrained(name).eval() for name in pairs)
    with torch.no_grad():
        image = teachers.pool_image(teachers.run_vision_tower(inputs["pixel_values"]))
        of_texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        text = teachers.pool_text(teachers.text_model(**of_texts), inputs["attention_mask"])
        assert torch.equal(image, images.vision_model(inputs["pixel_values"]).pooler_output)
        assert torch.equal(text, texts.text_model(**of_texts).pooler_output)


def test_a_checkpoint_teaches_as_it_pools(make_model, processor, others, tmp_path):
    IConEModel.from_encoders(*others, text_pooling="mean", vision_pooling="cls").save_pretrained(tmp_path / "pair")
    IConEProcessor.from_encoders(*others).save_pretrained(tmp_path / "pair")
    pair = str(tmp_path / "pair")
    args = IConETrainingArguments(str(tmp_path / "run"), use_cpu=True, image_teacher=pair, text_teacher=pair)
    config = load_pair(make_model(**WEIGHTS), processor, args)[0].config
    assert (config.vision_pooling, config.text_pooling) == ("cls", "mean")


def refusal(folder, make_model, processor, **named):
    """What a run with this teacher says before it has written anything."""
    with pytest.raises(ValueError, match=r"teacher|tower|specify") as refused:
        make_run(folder, make_model(num_groups=16, **WEIGHTS), processor, **named).train()
    assert not (folder / "recipe.json").exists()
    return str(refused.value)


def test_a_teacher_that_cant_teach_is_refused_before_any_work(make_model, processor, others, tmp_path):
    run = tmp_path / "run", make_model, processor
    # A tower of an unknown kind serves a run that names its pooling; nothing names a teacher's.
    name = str(tmp_path / "mobilevit")
    MobileViTModel(MobileViTConfig(image_size=32)).save_pretrained(name)
    said = refusal(*run, image_teacher=name)
    assert said.startswith(f"image_teacher={name!r} can't teach, since how it is pooled can't be told")
    # A pooling of sentence-transformers that IConE has not.
    text = tmp_path / "max"
    BertModel(tiny_text_config()).save_pretrained(text)
    (text / "1_Pooling").mkdir()
    (text / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    assert "asks for the pooling pooling_mode_max_tokens" in refusal(*run, text_teacher=str(text))
    # A tower with a decoder, which asks for more than captions.
    text = tmp_path / "pegasus"
    half = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in half.items()}
    PegasusModel(PegasusConfig(vocab_size=len(WORDS), d_model=16, **sizes)).save_pretrained(text)
    (text / "1_Pooling").mkdir()
    (text / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    refusal(*run, text_teacher=str(text))
    # A model whose parts have other names.
    name = str(tmp_path / "sam")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vision = {**small, "output_channels": 16, "global_attn_indexes": [0], "mlp_dim": 16}
    SamModel(SamConfig(vision_config=vision)).save_pretrained(name)
    assert "is a SamModel with parts of other names" in refusal(*run, image_teacher=name)


@pytest.fixture
def stronger(others, tmp_path):
    """A larger IConE checkpoint, and its folder."""
    torch.manual_seed(5)
    model = IConEModel.from_encoders(*others, num_groups=4, projection_dim=12).eval()
    model.save_pretrained(tmp_path / "stronger")
    IConEProcessor.from_encoders(*others).save_pretrained(tmp_path / "stronger")
    return model, str(tmp_path / "stronger")


@pytest.mark.parametrize(("stages", "chunks"), KINDS, ids=["heads", "joint", "chunks"])
def test_a_stronger_checkpoint_teaches_every_stage(make_model, processor, stronger, tmp_path, stages, chunks):
    fields = {"distillation_weight": 2.0, "num_groups": 16, "projection_dim": 8}
    model, reference = make_model(**fields), make_model(**fields)
    without_dropout(model, reference)
    teacher, folder = stronger
    trainer = make_run(tmp_path / "run", model, processor, stages, distillation_teacher=folder, **chunks)
    trainer.train()

    of_teacher = IConEProcessor.from_pretrained(folder)
    images, texts = first_batch(trainer)
    with torch.no_grad():
        ours = reference.eval()(**processor(images=images, text=texts, return_tensors="pt"), return_loss=False)
        theirs = teacher(**of_teacher(images=images, text=texts, return_tensors="pt"), return_loss=False)
    embeds = ours.image_embeds, ours.text_embeds, theirs.image_embeds, theirs.text_embeds
    expected = bare.distillation_loss(*embeds, reference.config.temperature).item()
    log = first_log(trainer)
    assert log["distillation_loss"] == pytest.approx(expected, rel=1e-4)
    assert log["loss"] == pytest.approx(log["instance_loss"] + log["contrastive_loss"] + 2 * expected, rel=1e-4)


def test_teachers_run_once(make_model, processor, others, stronger, tmp_path, monkeypatch):
    counts = count_pooled(monkeypatch, feature_cache)
    fields = {**WEIGHTS, "distillation_weight": 2.0, "num_groups": 16}
    for folder in ("a", "b"):
        make_run(
            tmp_path / folder,
            make_model(**fields),
            processor,
            JOINT,
            image_teacher=others[0],
            distillation_teacher=stronger[1],
            feature_cache_dir=str(tmp_path / "cache"),
            max_steps=1,
            save_strategy="steps",
            eval_strategy="steps",
        ).train()
    assert counts == {"image": 2 * 16, "text": 2 * 48}  # two teachers, and the training split alone


# --- refused before any work ---


@pytest.mark.parametrize("name", [*WEIGHTS, "distillation_weight"])
def test_a_weight_that_no_stage_uses_is_refused(make_model, processor, tmp_path, name):
    stages = (Stage("instance", 1, 1e-3, instance_weight=1, contrastive_weight=0, train_encoders=False),)
    with pytest.raises(InputError, match=f"{name}=0.5 counts beside a contrastive loss"):
        make_run(tmp_path, make_model(num_groups=16, **{name: 0.5}), processor, stages)


@pytest.mark.parametrize("name", ["image_teacher", "text_teacher", "distillation_teacher"])
def test_teachers_that_teach_nothing_or_are_none_are_refused(make_model, processor, towers, tmp_path, name):
    with pytest.raises(InputError, match=rf"{name}='x' would teach nothing: set .*_weight"):
        make_run(tmp_path, make_model(num_groups=16), processor, **{name: "x"})
    weights = {"distillation_weight" if name == "distillation_teacher" else "uni_modal_weight": 1.0}
    missing = str(tmp_path / "nothing_here")
    with pytest.raises(InputError, match=f"{name}='{missing}' can't be loaded"):
        make_run(tmp_path, make_model(num_groups=16, **weights), processor, **{name: missing})
    if name == "distillation_teacher":
        with pytest.raises(InputError, match="is of type 'bert': an IConE checkpoint is needed"):
            make_run(tmp_path, make_model(num_groups=16, **weights), processor, **{name: towers[1]})
        with pytest.raises(InputError, match="distillation_weight=1 needs a teacher: name an IConE checkpoint"):
            make_run(tmp_path, make_model(num_groups=16, **weights), processor)
