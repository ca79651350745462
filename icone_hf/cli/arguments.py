"""The commands' arguments, as dataclasses."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import yaml

from ..data.fractions import Cuts
from ..data.groups import SPLITS
from ..errors import InputError
from ..training.stages import PAPER_STAGES, RECOMMENDED_CONFIG, RECOMMENDED_STAGES, Stage, parse_stages

# The recipes that have a name: their stages, and the fields of the config that go with them.
RECIPES: dict[str, tuple[tuple[Stage, ...], Mapping[str, Any]]] = {
    "recommended": (RECOMMENDED_STAGES, RECOMMENDED_CONFIG),
    "paper": (PAPER_STAGES, {}),
}
# Positional arguments of several commands.
CHECKPOINT = {"help": "Hub id or folder of an IConE checkpoint."}
SOURCE = {"help": "What load_groups takes: a Karpathy JSON, a Hub id, a folder, a CSV file, openmoji-scenes."}
PRIVATE = {"help": "Make a new repository private."}  # of several commands too
_NO_FIELDS = ("model", "projections", "jpeg_draft")  # of ModelArguments: no fields of the config
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Describe the towers and the common space; see [`IConEConfig`]."""

    _argument_group_name = "model"

    vision_model_name_or_path: str = field(
        default="openai/clip-vit-base-patch32", metadata={"help": "Hub id or folder of the vision tower."}
    )
    text_model_name_or_path: str = field(
        default="google-bert/bert-base-uncased", metadata={"help": "Hub id or folder of the text tower."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of an IConE checkpoint to train further, in the place of two towers."},
    )
    projections: str | None = field(
        default=None,
        metadata={
            "help": "own: a tower of a pair such as CLIP keeps its projection. new: none does. Default: new with the "
            "paper's stages, otherwise own."
        },
    )
    projection_dim: int | None = field(
        default=None,
        metadata={
            "help": "Dimensions of the common space. Default: those of a pair's own projection, otherwise 512 with the "
            "recommended stages and 2048 with others."
        },
    )
    vision_projection: str | None = field(
        default=None,
        metadata={"help": "A new projection for the vision tower: linear, linear_bias, identity or mlp."},
    )
    text_projection: str | None = field(default=None, metadata={"help": "The same for the text tower."})
    projection_dropout: float | None = field(default=None, metadata={"help": "Dropout between the layers of an mlp."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of InfoNCE and of the sigmoid loss. Default: a pair's own, otherwise 0.07 with the "
            "recommended stages and 0.05 with others."
        },
    )
    learn_temperature: bool | None = field(default=None, metadata={"help": "Train the temperature, as CLIP does."})
    contrastive_loss: str | None = field(
        default=None,
        metadata={
            "help": "infonce (the paper), sigmoid (SigLIP), max_hinge or sum_hinge (VSE++). Default: a pair's own, "
            "otherwise infonce."
        },
    )
    margin: float | None = field(default=None, metadata={"help": "Margin of the hinges. Default: 0.2."})
    hard_negative_beta: float | None = field(
        default=None,
        metadata={
            "help": "Weigh InfoNCE's negatives by how hard they are, 0.25 or 0.5 (HN-NCE). 0: alike. Default: for "
            "towers that weren't trained together 0.5 with the recommended stages, otherwise 0."
        },
    )
    soft_target_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of soft targets, beside a contrastive loss: how alike teachers find a batch's images, and "
            "its captions (CUSA: 0.1)."
        },
    )
    uni_modal_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the same targets for how alike the model itself finds them (CUSA: 0.5)."},
    )
    soft_target_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the teachers' similarities, in both. Default: 0.1."}
    )
    soft_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of the model's similarities, in both. Default: soft_target_temperature."},
    )
    distillation_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of learning the similarities of distillation_teacher, beside a contrastive loss."},
    )
    distillation_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of both models' similarities there. Default: temperature."}
    )
    several_positives: bool | None = field(
        default=None, metadata={"help": "Pairs of one group in a batch are positives too; see pairs_per_group."}
    )
    instance_logits: str | None = field(
        default=None,
        metadata={
            "help": "dot, as the paper prints it, or cosine. Default: cosine with the recommended stages, otherwise "
            "dot."
        },
    )
    instance_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of cosine instance logits. Default: 0.1 with the recommended stages, otherwise "
            "temperature."
        },
    )
    instance_label_smoothing: float | None = field(
        default=None, metadata={"help": "Share of the instance loss's target that lies on all classes alike."}
    )
    instance_samples: int | None = field(
        default=None,
        metadata={
            "help": "Score the classes of the batch and this many sampled others, whatever num_groups is. 0: all."
        },
    )
    nested_dims: list[int] | None = field(
        default=None,
        metadata={"help": "Sizes that embeddings can be cut to, from the largest down (Matryoshka): 256 128 64."},
    )
    vision_pooling: str | None = field(
        default=None,
        metadata={"help": "Global image feature: cls, mean, last, pooler. Default: by the tower's type."},
    )
    text_pooling: str | None = field(
        default=None,
        metadata={"help": "Global caption feature, likewise. Default: by the tower's 1_Pooling file or its type."},
    )
    lora_rank: int = field(
        default=0,
        metadata={"help": "Train LoRA adapters of this rank in both towers' linear layers, not the towers. 0: none."},
    )
    vision_feature_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Share of the vision tower's pooled features that training drops at random. Default: for towers "
            "that weren't trained together 0.3 with the recommended stages, otherwise 0."
        },
    )
    text_feature_dropout: float | None = field(
        default=None, metadata={"help": "The same for the text tower's. Default: likewise, 0.05 or 0."}
    )

    jpeg_draft: bool = field(
        default=False,
        metadata={"help": "Read large JPEG images at a part of their size: much faster, slightly other pixels."},
    )

    def __post_init__(self) -> None:
        if self.projections not in (None, "own", "new"):
            raise InputError(f"projections={self.projections!r} must be own or new.")
        if self.lora_rank < 0:
            raise InputError(f"lora_rank={self.lora_rank} must be 0 (no adapters) or more.")

    def config(self, defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """Return the fields of [`IConEConfig`]. `lora_alpha` is twice the rank.

        Args:
            defaults: of the recipe, for fields that were not given.
        """
        given = {name: value for name, value in asdict(self).items() if value is not None}
        values = {name: value for name, value in {**defaults, **given}.items() if not name.endswith("name_or_path")}
        rank = values.pop("lora_rank")
        for name in _NO_FIELDS:
            values.pop(name, None)
        for name in ("vision_lora", "text_lora"):
            values[name] = {"r": rank, "lora_alpha": 2 * rank} if rank else None
        return values

    def changes(self) -> dict[str, Any]:
        """Return what was given with `--model`, by name: whatever differs from the default."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}


@dataclass
class DataArguments:
    """Describe a source of groups; see [`load_groups`]."""

    _argument_group_name = "data"

    source: str | None = field(
        default=None, metadata={"help": "A table, JSON or token file, folder, Hub id, openmoji-scenes."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder of a file's images."})
    image_column: str | None = field(default=None, metadata={"help": "Column with the images, or their paths."})
    caption_column: str | None = field(default=None, metadata={"help": "Column with a caption or a list of captions."})
    id_column: str | None = field(default=None, metadata={"help": "Column that names an image; none: there is none."})
    split_column: str | None = field(default=None, metadata={"help": "Column that names a split. Default: split."})
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "Part of the training images to validate on, where the source has no such split."},
    )
    test_fraction: float | None = field(default=None, metadata={"help": "Part of the training images for the test."})
    split_seed: int = field(default=0, metadata={"help": "Seed of both fractions."})
    validation_names: str | None = field(
        default=None, metadata={"help": "Text file with the ids or file names of the images to validate on."}
    )
    test_names: str | None = field(default=None, metadata={"help": "The same for the test."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    streaming: bool = field(default=False, metadata={"help": "Read a stream: icone encode into shards alone."})
    image_size: int | None = field(default=None, metadata={"help": "Side of OpenMoji scenes in pixels."})
    num_train_groups: int | None = field(default=None, metadata={"help": "OpenMoji scenes for training."})
    num_validation_groups: int | None = field(default=None, metadata={"help": "OpenMoji scenes for validation."})
    num_test_groups: int | None = field(default=None, metadata={"help": "OpenMoji scenes for the test."})
    scenes_seed: int = field(default=0, metadata={"help": "Seed of OpenMoji scenes."})

    @property
    def cuts(self) -> Cuts:
        """Say what to cut off the training images."""
        return Cuts(**{field.name: getattr(self, field.name) for field in fields(Cuts)})

    def without_cuts(self) -> "DataArguments":
        """Describe the source as it is."""
        nothing: dict[str, Any] = dict.fromkeys(self.cuts.given)
        return replace(self, **nothing)

    def load_arguments(self, split: str) -> dict[str, Any]:
        """Return the keywords of [`load_groups`] for one split."""
        keywords = asdict(self)
        num_groups = {name: keywords.pop(f"num_{name}_groups") for name in SPLITS}
        seed = keywords.pop("scenes_seed")
        # Called as in transformers' scripts: a bare --name or --revision would seem to be the checkpoint's.
        keywords |= {"name": keywords.pop("dataset_config_name"), "revision": keywords.pop("dataset_revision")}
        # An unknown split is refused by load_groups.
        return {**keywords, "seed": seed, "split": split, "num_groups": num_groups.get(split)}


@dataclass
class RecipeArguments:
    """Name the stages to run; see [`Stage`]."""

    _argument_group_name = "recipe"

    stages: str = field(
        default="recommended",
        metadata={
            "help": "recommended, paper, or a list of stages: in YAML, or here as JSON '[{\"name\": ...}, ...]'."
        },
    )

    def parse(self) -> tuple[Stage, ...]:
        """Return the stages.

        Raises:
            ValueError: if the text is neither a recipe's name nor a list of stages.
        """
        if self.stages in RECIPES:
            return RECIPES[self.stages][0]
        stages = yaml.safe_load(self.stages)
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            names = " nor ".join(map(repr, RECIPES))
            raise InputError(f"stages={self.stages!r} is neither {names} nor a list of stages.")
        return parse_stages(stages)

    @property
    def default_projections(self) -> str:
        """Say whether a pair's own projections are kept: the paper's are new."""
        return "new" if self.stages == "paper" else "own"

    def config(self) -> Mapping[str, Any]:
        """Return the config that goes with a named recipe."""
        return RECIPES[self.stages][1] if self.stages in RECIPES else {}


@dataclass
class EncodeArguments:
    """Hold what `icone encode` and `icone evaluate` share."""

    _argument_group_name = "encoding"
    _former_names = MappingProxyType(
        {"batch_size": "per_device_eval_batch_size", "num_workers": "dataloader_num_workers"}
    )

    split: str = field(default="test", metadata={"help": "Which split to take."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images, or captions, encoded at a time."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode images ahead."})
    jpeg_draft: bool = field(
        default=False,
        metadata={
            "help": "Read large JPEG images at a part of their size, whether the model was trained so or not: much "
            "faster, slightly other pixels."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "What the model computes in: float32, or by autocast bfloat16 or float16, as with --bf16."},
    )

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTE_DTYPES:
            raise InputError(f"dtype={self.dtype!r} must be one of {', '.join(COMPUTE_DTYPES)}.")
        if self.per_device_eval_batch_size < 1:
            raise InputError(f"per_device_eval_batch_size={self.per_device_eval_batch_size} must be 1 or more.")
        if self.dataloader_num_workers < 0:
            raise InputError(f"dataloader_num_workers={self.dataloader_num_workers} must be 0 or more.")


@dataclass
class OutputArguments:
    """Hold how a command prints its result."""

    _argument_group_name = "output"

    json: bool = field(default=False, metadata={"help": "Print the result as JSON, for a program to read."})

    def print(self, facts: Mapping[str, Any] | list[dict[str, Any]], text: str) -> None:
        """Print the facts as JSON, or as text."""
        print(json.dumps(facts, indent=2) if self.json else text)
