"""What a GPU computes beside what a CPU computes: losses, gradients, embeddings, metrics, class vectors.

Each tolerance is relative to the largest number of the tensor, in float32 without TF32. On a CPU, against itself, it is
zero.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from benchmarks.gpu import Check, Setting, Skipped
from benchmarks.recipes import TOWERS
from icone_hf import GroupEmbeddings, IConEModel, IConEProcessor, PairCollator, PairDataset, encode_groups
from icone_hf.data.batching import Pair
from icone_hf.evaluation.metrics import fold_ranks, retrieval_metrics
from icone_hf.modeling import losses
from icone_hf.modeling.class_sampling import sample_classes
from icone_hf.modeling.objective import instance_objective
from icone_hf.modeling.sharded_classifier import ShardedClassifier
from icone_hf.training.gradient_cache import backward_in_chunks

TOLERANCES = {"losses": 1e-5, "gradients": 1e-4, "embeddings": 1e-4, "autocast": 0.02}
WORDS = ("red", "green", "blue", "square", "ground", "left", "right", "of", "a", "on", "the", "under")


# --- towers and groups that need no download ---


def towers(setting: Setting) -> tuple[str, str]:
    """Return the quickstart's towers, or write tiny ones."""
    if not setting.is_tiny:
        if not all((Path(tower) / "config.json").is_file() for tower in TOWERS):
            raise Skipped(f"{' and '.join(TOWERS)} are not there: run make gpu, or examples/prepare_offline_towers.py")
        return TOWERS
    vision, text = (Path(setting.folder) / name for name in ("vision", "text"))
    if not text.is_dir():
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=8)).save_pretrained(vision)
        CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(vision)
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
        BertModel(BertConfig(**shape, vocab_size=len(vocabulary), max_position_embeddings=24)).save_pretrained(text)
        BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(text)
    return str(vision), str(text)


def groups_of(count: int, side: int = 96, first: int = 0) -> Dataset:
    """Draw groups: smooth images, no two alike, three captions each."""
    y, x = np.mgrid[:side, :side] / side
    rows: dict[str, list[Any]] = {"image": [], "captions": [], "image_id": []}
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        waves = [np.sin(9 * a * x + 9 * b * y + c) for a, b, c in rng.random((3, 3)) * 2]
        rows["image"].append(Image.fromarray((np.stack(waves, -1) * 120 + 128).astype(np.uint8)))
        rows["captions"].append([" ".join(rng.choice(WORDS, 4 + k)) for k in range(3)])
        rows["image_id"].append(str(number))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
        }
    )
    return Dataset.from_dict(rows, features=features)


def model_of(setting: Setting, num_groups: int, dropout: bool = False, **config: Any) -> IConEModel:
    """Build the same model at every call, on the CPU."""
    both = towers(setting)  # writing them draws numbers, so the seed comes after
    torch.manual_seed(0)
    fields = {"projection_dim": 64, "text_pooling": "mean", "instance_logits": "cosine", **config}
    model = IConEModel.from_encoders(*both, num_groups=num_groups, **fields)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    return model


def moved(model: IConEModel, device: str) -> IConEModel:
    return cast(Any, model).to(device)


def processor_of(setting: Setting) -> IConEProcessor:
    return IConEProcessor.from_encoders(*towers(setting))


def chunks_of(setting: Setting, groups: Dataset, size: int) -> list[dict[str, torch.Tensor]]:
    """Collate one pair of each group, in chunks."""
    pairs, collator = PairDataset(groups), PairCollator(processor_of(setting))
    rows = [Pair(row, 0) for row in range(len(groups))]
    return [collator([pairs[pair] for pair in rows[start : start + size]]) for start in range(0, len(rows), size)]


def to(device: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


# --- comparing ---


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def within(setting: Setting, what: str, difference: float, tolerance: float) -> float:
    """Check a difference against its tolerance, zero on a CPU."""
    allowed = 0.0 if setting.device == "cpu" else tolerance
    if not difference <= allowed:  # NaN is no difference that is small
        raise AssertionError(f"{what} differ by {difference:.2e}, allowed is {allowed:.0e}")
    return difference


def exact_float32() -> None:
    """Turn TF32 off: it rounds to 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


# --- the checks ---


def check_losses(setting: Setting) -> dict[str, Any]:
    """Compare every loss and its gradients, fillers among the rows."""
    exact_float32()
    rows, dim, classes = (16, 8, 20) if setting.is_tiny else (512, 512, 10_000)
    generator = torch.Generator().manual_seed(0)
    image, text, vectors = (torch.randn(n, dim, generator=generator) for n in (rows, rows, classes))
    ids = torch.arange(rows) % (rows // 2)
    ids[-2:] = losses.IGNORED_GROUP
    unit = nn.functional.normalize
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "dot": lambda i, t, v, g: losses.instance_loss(i, v, g),
        "cosine": lambda i, t, v, g: losses.instance_loss(i, v, g, "cosine", 0.1),
        "infonce": lambda i, t, v, g: losses.contrastive_loss(unit(i), unit(t), 0.05, g),
        "several_positives": lambda i, t, v, g: losses.contrastive_loss(unit(i), unit(t), 0.05, g, True),
        "sigmoid": lambda i, t, v, g: losses.sigmoid_loss(unit(i), unit(t), 0.1, -10.0, g),
        "max_hinge": lambda i, t, v, g: losses.hinge_loss(unit(i), unit(t), 0.2, g),
        "sum_hinge": lambda i, t, v, g: losses.hinge_loss(unit(i), unit(t), 0.2, g, hardest=False),
    }

    def evaluated(function: Callable[..., torch.Tensor], device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        # Copies: tensors that are on the device already would be the same for all functions, and add up gradients.
        inputs = [tensor.detach().clone().to(device).requires_grad_() for tensor in (image, text, vectors)]
        loss = function(*inputs, ids.to(device))
        loss.backward()
        return loss, [tensor.grad for tensor in inputs if tensor.grad is not None]

    worst = {"loss": 0.0, "gradient": 0.0}
    for name, function in functions.items():
        (loss, gradients), (expected, of_cpu) = evaluated(function, setting.device), evaluated(function, "cpu")
        worst["loss"] = max(worst["loss"], within(setting, name, apart(loss, expected), TOLERANCES["losses"]))
        for ours, theirs in zip(gradients, of_cpu, strict=True):
            difference = within(setting, f"gradients of {name}", apart(ours, theirs), TOLERANCES["gradients"])
            worst["gradient"] = max(worst["gradient"], difference)
    return worst


def check_gradients(setting: Setting) -> dict[str, Any]:
    """Compare the model's losses, and all parameters' gradients."""
    exact_float32()
    groups = groups_of(8 if setting.is_tiny else 64)
    (inputs,) = chunks_of(setting, groups, len(groups))
    results = []
    for device in (setting.device, "cpu"):
        model = moved(model_of(setting, len(groups)), device).train()
        loss = model(**to(device, inputs)).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, ours), (expected, theirs) = results
    # Relative to the largest gradient of all: some are rounding alone (a softmax does not see a key's bias).
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    worst = max((ours[name].cpu() - gradient).abs().max().item() / largest for name, gradient in theirs.items())
    return {
        "loss": within(setting, "losses", apart(loss, expected), TOLERANCES["gradients"]),
        "gradient": within(setting, "gradients", worst, 10 * TOLERANCES["gradients"]),
        "parameters": len(theirs),
    }


def check_embeddings(setting: Setting) -> dict[str, Any]:
    """Compare embeddings in float32, bfloat16 and float16."""
    exact_float32()
    groups, processor = groups_of(8 if setting.is_tiny else 128), processor_of(setting)

    def embed(device: str, dtype: torch.dtype | None = None) -> GroupEmbeddings:
        model = moved(model_of(setting, 0), device).eval()
        with torch.autocast(device, dtype, enabled=dtype is not None):
            return encode_groups(model, processor, groups, batch_size=32)

    expected = embed("cpu")
    figures = {}
    for name, ours, theirs in zip(("images", "captions"), embed(setting.device), expected, strict=False):
        figures[name] = within(setting, name, apart(ours, theirs), TOLERANCES["embeddings"])
    for dtype in (torch.bfloat16, torch.float16):
        embeds = embed(setting.device, dtype)
        cosines = [(a * b).sum(dim=1).min().item() for a, b in zip(embeds[:2], expected[:2], strict=True)]
        lowest = min(cosines)
        if not lowest > 1 - TOLERANCES["autocast"]:
            raise AssertionError(f"embeddings in {dtype} have a cosine of {lowest:.4f} with those in float32")
        figures[f"lowest_cosine_{str(dtype).split('.')[1]}"] = lowest
    return figures


def check_metrics(setting: Setting) -> dict[str, Any]:
    """Rank integers, whose scores are exact; then real numbers."""
    exact_float32()
    images, dim = (30, 8) if setting.is_tiny else (1000, 256)
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images * 5)[torch.randperm(images * 5, generator=generator)] // 5
    whole = [torch.randint(-2, 3, (count, dim), generator=generator) for count in (images, len(owner))]
    devices = (setting.device, "cpu")
    ranks = [fold_ranks(whole[0].to(device), whole[1].to(device), owner.to(device), 5) for device in devices]
    for ours, theirs in zip(*ranks, strict=True):
        if not torch.equal(ours.cpu(), theirs):
            raise AssertionError(f"{(ours.cpu() != theirs).sum()} ranks of integers differ")
    real = [nn.functional.normalize(torch.randn(tensor.shape, generator=generator)) for tensor in whole]
    rsums = [retrieval_metrics(real[0].to(device), real[1].to(device), owner.to(device))["rsum"] for device in devices]
    return {"rsum": within(setting, "Rsums", abs(rsums[0] - rsums[1]), 0.2), "queries": images + len(owner)}


def check_cached_gradients(setting: Setting) -> dict[str, Any]:
    """Compare a batch in chunks with the plain batch, dropout included."""
    exact_float32()
    groups = groups_of(8 if setting.is_tiny else 96)
    chunks = [to(setting.device, chunk) for chunk in chunks_of(setting, groups, 4 if setting.is_tiny else 24)]
    ids = torch.arange(len(groups), device=setting.device)
    model = moved(model_of(setting, len(groups), dropout=True), setting.device).train()

    # Plain: a graph through all chunks at once, which draws each chunk's dropout one time.
    torch.manual_seed(5)
    outputs = [model(**chunk, return_loss=False) for chunk in chunks]
    features = [
        torch.cat([getattr(output, f"{name}_model_output").pooler_output for output in outputs])
        for name in ("vision", "text")
    ]
    vectors, temperature = cast(nn.Linear, model.classifier).weight, model.config.temperature
    image, text = (nn.functional.normalize(rows, dim=-1) for rows in features)
    loss = losses.contrastive_loss(image, text, temperature, ids)
    for rows in features:
        loss = loss + losses.instance_loss(rows, vectors, ids, "cosine", temperature)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    torch.manual_seed(5)
    output = backward_in_chunks(model, lambda: chunks, ids, 1.0, 1.0)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    worst = max((model.get_parameter(n).grad - g).abs().max().item() / largest for n, g in expected.items())  # type: ignore[operator]
    assert output.loss is not None
    # Sums over chunks are added in another order: not zero, even on a CPU.
    difference = apart(output.loss, loss)
    if not max(difference, worst) < TOLERANCES["gradients"]:
        raise AssertionError(f"in chunks the loss differs by {difference:.1e}, gradients by {worst:.1e}")
    return {"loss": difference, "gradient": worst, "chunks": len(chunks)}


def check_class_vectors(setting: Setting) -> dict[str, Any]:
    """Compare sampled and sharded class vectors with all of them."""
    exact_float32()
    rows, dim, classes = (8, 8, 40) if setting.is_tiny else (128, 512, 20_000)
    generator = torch.Generator().manual_seed(0)
    image, text, vectors = (torch.randn(n, dim, generator=generator) for n in (rows, rows, classes))
    image, text, vectors = (tensor.to(setting.device) for tensor in (image, text, vectors))
    ids = torch.arange(rows, device=setting.device)
    config = model_of(setting, 0, instance_temperature=0.1).config
    exact = instance_objective(config, image, text, ids, vectors)

    # A sample of all other classes is all classes. One of a few is near.
    every = instance_objective(config, image, text, ids, vectors, num_samples=classes)
    weight = vectors.clone().requires_grad_()
    torch.manual_seed(0)
    few = instance_objective(config, image, text, ids, weight, num_samples=classes // 2)
    few.backward()
    assert weight.grad is not None
    if not weight.grad.is_sparse or weight.grad.coalesce().indices().shape[1] != rows + classes // 2:
        raise AssertionError("the gradient of sampled classes is not sparse, or has rows that were not scored")
    scored = sample_classes(ids, classes, classes // 2)
    if len(scored.class_ids.unique()) != rows + classes // 2:
        raise AssertionError("a class was sampled twice")
    classifier = ShardedClassifier(classes, dim).to(setting.device)
    classifier.weight.data.copy_(vectors)
    sharded = classifier.objective(config, image, text, ids)
    figures = {"every_class_sampled": apart(every, exact), "sharded": apart(sharded, exact)}
    if not max(figures.values()) < TOLERANCES["losses"]:
        raise AssertionError(f"losses differ: {figures}")
    figures["half_of_the_classes"] = apart(few, exact)
    if not figures["half_of_the_classes"] < math.log(2):
        raise AssertionError(f"the loss of half of the classes is far off: {figures}")
    return figures


CHECKS: dict[str, Check] = {
    "losses": check_losses,
    "gradients": check_gradients,
    "embeddings": check_embeddings,
    "metrics": check_metrics,
    "cached_gradients": check_cached_gradients,
    "class_vectors": check_class_vectors,
}
