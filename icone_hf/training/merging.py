"""Checkpoints merged into one: interpolated weights (WiSE-FT), and means of several (soups).

`alpha` weighs what was tuned against the base that it was tuned from: `(1 - alpha) * base + alpha * tuned`. Between
the two, a model often keeps what the base knew and most of what training added (Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models"). Of several tuned checkpoints the mean counts (Wortsman et al. 2022, "Model soups").
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from ..data.captions import Captions
from ..embedding.digests import digest_pooling, digest_weights
from ..embedding.encoding import encode_groups
from ..errors import InputError
from ..evaluation.measure import measure_embeddings
from ..modeling.configuration_icone import IConEConfig
from ..modeling.modeling_icone import IConEModel
from ..modeling.processing_icone import IConEProcessor
from ..processes import together
from ..publishing.checkpoint_info import describe
from .run_folder import add_evaluation, write_metrics

ALPHAS = tuple(tenth / 10 for tenth in range(11))


@dataclass(frozen=True)
class Sweep:
    """Hold the metrics of every alpha on one split.

    Args:
        data: the source's name.
        split: of the source.
        sizes: the numbers of `groups` and `captions`.
        metrics: by alpha.
        dtype: what the model computed in.
    """

    data: str
    split: str
    sizes: Mapping[str, int]
    metrics: Mapping[float, Mapping[str, float]]
    dtype: str

    @property
    def best(self) -> float:
        """Return the alpha with the highest Rsum.

        Of several it is the first: the nearest to the base.
        """
        return max(self.metrics, key=lambda alpha: self.metrics[alpha]["rsum"])


class CheckpointMerge:
    """Compare checkpoints, and load what is merged.

    It takes the memory of three models, in float32, and of a fourth while it reads several tuned ones.

    Args:
        tuned: folders or Hub ids of checkpoints.
        base: of the checkpoint that they were tuned from. `None`: their mean, a soup, is all there is.

    Raises:
        InputError: if they differ in anything but the values of their weights, if one has adapters, or if there is
            nothing to merge.
    """

    def __init__(self, tuned: Sequence[str | os.PathLike], base: str | os.PathLike | None = None):
        self.base, self.tuned = None if base is None else str(base), [str(path) for path in tuned]
        checkpoints = [*([] if self.base is None else [self.base]), *self.tuned]
        if not self.tuned or len(checkpoints) < 2:
            raise InputError(
                f"tuned={self.tuned} and base={base!r} are nothing to merge: name two checkpoints or more."
            )
        # Configs, processors and recipes are small: compare them before any weight is read.
        infos = {name: describe(name) for name in checkpoints}
        self.class_vectors = _class_vectors(infos)
        self._train_captions = infos[self.tuned[0]]["train_captions"] if self.class_vectors == "merged" else None
        self.processor = _common_processor(checkpoints)
        # Read the weights: the base's, and the mean of the others.
        self._digests: dict[str, str] = {}
        self._base_weights = None if self.base is None else _weights(self._load(self.base))
        self.model = self._load(self.tuned[-1])
        self._tuned_weights = {name: value.clone() for name, value in _weights(self.model).items()}
        if self._base_weights is not None:
            self._check(str(self.base), self._base_weights)
        for count, name in enumerate(self.tuned[:-1], start=2):
            weights = _weights(self._load(name))
            self._check(name, weights)
            for key, mean in self._tuned_weights.items():
                mean.lerp_(weights[key], 1 / count)
            del weights  # before the next is read

    def interpolate(self, alpha: float) -> IConEModel:
        """Return the model with the weights of an alpha."""
        _check_alpha(alpha)
        base, tuned, state = self._base_weights, self._tuned_weights, self.model.state_dict()
        mixed = {name: mean if base is None else base[name].lerp(mean, alpha) for name, mean in tuned.items()}
        if self.model.logit_scale is None:
            temperature = math.exp(-mixed.pop("logit_scale").item())
            self.model.config.temperature = float(f"{temperature:.6g}")  # 0.05 stays 0.05 in float32
        for name, value in mixed.items():
            state[name].copy_(value)
        return self.model

    def sweep(
        self,
        groups: Dataset,
        data: str,
        split: str = "validation",
        batch_size: int = 64,
        num_workers: int = 0,
        autocast: torch.dtype | None = None,
    ) -> Sweep:
        """Measure the alphas 0, 0.1 ... 1 on groups.

        They are encoded once for each alpha. Under several processes each encodes its share.

        Args:
            groups: of a validation split: whoever picks by the test has no test any more.
            data, split: what they are called.
            batch_size, num_workers, autocast: see [`encode_groups`].
        """
        if self.base is None:
            raise InputError("A mean has no alpha to pick: name a base, or leave the sweep out.")
        self.model.to(PartialState().device)
        metrics = {}
        for alpha in ALPHAS:
            model = self.interpolate(alpha)
            embeds = encode_groups(model, self.processor, groups, batch_size, num_workers, autocast)
            metrics[alpha] = measure_embeddings(embeds)[0]
        sizes = {"groups": len(groups), "captions": len(Captions.read(groups))}
        dtype = str(autocast or torch.float32).removeprefix("torch.")
        return Sweep(data, split, sizes, metrics, dtype)

    def save(self, out: str | os.PathLike, alpha: float | None, sweep: Sweep | None = None) -> dict[str, Any]:
        """Save the checkpoint of an alpha.

        Its metrics.json says what was merged.

        Under several processes all call it, and the first saves.

        Args:
            out: a new folder.
            alpha: `None` for a mean.
            sweep: that has picked it.

        Returns:
            What metrics.json holds as `merge`.
        """
        merge = {
            "base": None if self.base is None else self._named(self.base),
            "tuned": [self._named(name) for name in self.tuned],
            "alpha": alpha,
            "class_vectors": self.class_vectors,
            "train_captions": self._train_captions,
            "sweep": None
            if sweep is None
            else {
                "data": sweep.data,
                "split": sweep.split,
                **sweep.sizes,
                "rsum": {str(one): metrics["rsum"] for one, metrics in sweep.metrics.items()},
            },
        }
        self.interpolate(1.0 if alpha is None else alpha)
        with together():
            if PartialState().is_main_process:
                self.model.save_pretrained(out)
                self.processor.save_pretrained(out)
                write_metrics(out, {"merge": merge})
                if sweep is not None and alpha is not None:
                    of_split = {sweep.split: sweep.metrics[alpha]}
                    add_evaluation(out, sweep.data, sweep.split, sweep.sizes, of_split, sweep.dtype)
        return merge

    def _load(self, checkpoint: str) -> IConEModel:
        """Load a model; note its weights' digest."""
        without = {} if self.class_vectors == "merged" else {"num_groups": 0}
        model = IConEModel.from_pretrained(checkpoint, dtype=torch.float32, **without)
        self._digests[checkpoint] = digest_weights(model.state_dict())
        return model.eval()

    def _named(self, checkpoint: str) -> dict[str, str]:
        return {"checkpoint": checkpoint, "weights": self._digests[checkpoint]}

    def _check(self, other: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Refuse weights of other names or shapes."""
        ours, theirs = ({k: tuple(v.shape) for k, v in one.items()} for one in (self._tuned_weights, weights))
        differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if differing:
            places = (ours, self.tuned[-1]), (theirs, other)
            first, second = (f"{shapes.get(differing[0], 'missing')} in {place}" for shapes, place in places)
            raise InputError(
                f"{differing[0]} is {first}, but {second} ({len(differing)} weights differ so): merge "
                "checkpoints that were trained from the same start."
            )


def merge_checkpoints(
    tuned: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    base: str | os.PathLike | None = None,
    alpha: float = 0.5,
) -> dict[str, Any]:
    """Merge checkpoints into a new one.

    It has the weights `(1 - alpha) * base + alpha * mean(tuned)` or, without a base, the mean. Class vectors are
    merged where all checkpoints were trained on the same groups, and left out otherwise.

    Args:
        tuned: folders or Hub ids of IConE checkpoints of one architecture.
        out: a folder that does not exist yet.
        base: of the checkpoint that they were trained from.
        alpha: between 0, the base, and 1. Without a base it does not count.

    Returns:
        What was merged, as `out`'s metrics.json says it under `merge`.

    Raises:
        InputError: if the checkpoints can't be merged; the message says in what they differ.
    """
    check_merge(out, alpha)
    return CheckpointMerge(tuned, base).save(out, None if base is None else alpha)


def check_merge(out: str | os.PathLike, alpha: float | None) -> None:
    """Refuse a folder that holds something, and impossible alphas."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out={str(out)!r} exists already: name a new folder.")
    if alpha is not None:
        _check_alpha(alpha)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha} must be between 0, the base, and 1, what was tuned.")


def _weights(model: IConEModel) -> dict[str, torch.Tensor]:
    """Return a model's weights, without counters and the like.

    The temperature is one of them, as its logarithm's negative, whether it is learned or not.
    """
    weights = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    if model.logit_scale is None:
        weights["logit_scale"] = torch.tensor(-math.log(model.config.temperature))
    return weights


def _class_vectors(infos: Mapping[str, Mapping[str, Any]]) -> str:
    """Say what becomes of the class vectors: `merged`, or why not."""
    for name, info in infos.items():
        if not info["num_groups"]:
            return f"left out: {name} has none"
        if not info["train_captions"]:
            return f"left out: no recipe.json says which groups those of {name} are of"
    if len({(info["num_groups"], info["train_captions"]) for info in infos.values()}) > 1:
        return "left out: they are of different groups"
    return "merged"


def _common_processor(checkpoints: Sequence[str]) -> IConEProcessor:
    """Load the last processor; refuse others that differ."""
    first: dict[str, str] = {}
    for name in checkpoints:
        config, processor = IConEConfig.from_pretrained(name), IConEProcessor.from_pretrained(name)
        if config.vision_lora or config.text_lora:
            raise InputError(
                f"{name} has LoRA adapters, whose mean is not the mean of what they do: merge them into the weights "
                "first, by IConEModel.from_pretrained(...).save_pretrained(folder, merge_lora=True)."
            )
        # The base may never have been trained: compare it as training leaves a checkpoint.
        processor.limit_text_length(config.text_config)
        _align_special_tokens(config, processor)
        digests = digest_pooling(config, processor)
        differing = [part for part, digest in digests.items() if digest != first.get(part, digest)]
        if differing:
            raise InputError(
                f"{checkpoints[0]} and {name} differ in {', '.join(differing)}: what one weight means in the one, it "
                "does not mean in the other. Merge checkpoints that were trained from the same start."
            )
        first = digests
    return processor


def _align_special_tokens(config: IConEConfig, processor: IConEProcessor) -> None:
    """Name special tokens as transformers' Trainer does."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(processor.tokenizer, name)
        if token is not None:
            setattr(config.text_config, name, token)
