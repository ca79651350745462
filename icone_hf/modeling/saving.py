"""How a model becomes a checkpoint folder, and is loaded from one."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .compat import BeforeUploadMixin
from .configuration_icone import IConEConfig, give_up_hard_negatives
from .errors import MissingWeightsError, ModelError
from .heads import LOWEST_TEMPERATURE
from .lora import merged_state_dict
from .ranks import rank_index
from .sentence_transformers_files import write_sentence_transformers_files
from .sharded_classifier import ShardedClassifier

logger = logging.get_logger(__name__)


# Say where a checkpoint is, among the arguments of `from_pretrained`.
OF_PLACE = (
    *("subfolder", "variant", "revision", "use_safetensors"),
    *("cache_dir", "token", "force_download", "local_files_only"),
)


class LearnedTemperature(PreTrainedModel):
    """Read a checkpoint's learned temperature, and no other weight."""

    config_class = PreTrainedConfig
    _keys_to_ignore_on_load_unexpected = [r"^(?!logit_scale$)"]  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.post_init()


class SavingMixin(BeforeUploadMixin):
    """Save and load a model as transformers does.

    Beyond that it leaves out the class vectors if asked to, merges adapters, writes a sharded classifier by all ranks
    and adds the files of sentence-transformers.
    """

    config: IConEConfig
    classifier: "nn.Linear | ShardedClassifier | None"
    record_adapters: Callable[[], None]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, as in transformers.

        Its weights are read from safetensors files alone, unless `use_safetensors=False` is passed. `num_groups=0`
        leaves the class vectors on disk. With another `num_groups` than the checkpoint's the classifier starts fresh,
        and a warning is logged. `learn_temperature=False` fixes a learned temperature where it is, unless `temperature`
        is passed too. Another loss than the checkpoint's gives up its hard negatives.

        Raises:
            RuntimeError: if any other weight differs in shape, unless `ignore_mismatched_sizes=True` is passed; if a
                tower has no weights, as in the checkpoints of a stage with frozen towers.
            ValueError: if adapters are asked for that the checkpoint doesn't have.
            ImportError: if the checkpoint has adapters (`config.vision_lora`, `text_lora`) and peft is missing.
        """
        kwargs.setdefault("use_safetensors", True)  # any other format is a pickle
        # Let transformers accept every shape, then refuse all mismatches but the classifier's.
        return_info = kwargs.pop("output_loading_info", False)
        is_any_shape_fine = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, **kwargs, ignore_mismatched_sizes=True, output_loading_info=True
        )
        model, info = loaded
        if not is_any_shape_fine:
            cls._check_loaded(model, info, pretrained_model_name_or_path)
        config = model.config
        names = ("contrastive_loss", "several_positives", "hard_negative_beta")
        fitting = give_up_hard_negatives({name: getattr(config, name) for name in names}, kwargs)
        config.hard_negative_beta = fitting["hard_negative_beta"]
        if "logit_scale" in info["unexpected_keys"]:
            cls._keep_learned_temperature(model, pretrained_model_name_or_path, kwargs)
            info["unexpected_keys"].discard("logit_scale")  # it was of use
        return (model, info) if return_info else model

    @staticmethod
    def _check_loaded(model: Any, info: dict[str, Any], checkpoint: Any) -> None:
        """Refuse weights that are missing or of other shapes.

        Raises what [`from_pretrained`] says.
        """
        # A stage with frozen towers saves the heads alone, whose towers would be random here.
        for tower in ("vision_model", "text_model"):
            names = {f"{tower}.{name}" for name, _ in getattr(model, tower).named_parameters()}
            if names and names <= set(info["missing_keys"]):
                raise MissingWeightsError(
                    f"{checkpoint} has no weights of the {tower.removesuffix('_model')} tower. If "
                    "it is a checkpoint of a stage with frozen towers (OUTPUT_DIR/stages/*/checkpoint-*), it holds the "
                    "heads alone, to resume from: the model is in OUTPUT_DIR itself once the run is done."
                )
        # peft renames an adapted layer's own weights, so the checkpoint's weights don't find their layers.
        if any(".base_layer." in name for name in info["missing_keys"]):
            raise ModelError(
                f"{checkpoint} has no adapters, but vision_lora or text_lora was asked for: load it "
                "without, then call model.add_adapter(LoraConfig(...))."
            )
        for name, saved, wanted in sorted(info["mismatched_keys"]):
            if name != "classifier.weight":
                raise MissingWeightsError(
                    f"{name} is {tuple(saved)} in {checkpoint} but {tuple(wanted)} in the config. "
                    "Load it with the config it was saved with, or pass ignore_mismatched_sizes=True to start it fresh."
                )
            logger.warning(
                f"The checkpoint has class vectors for {saved[0]} groups, {wanted[0]} are wanted: the classifier "
                "starts fresh, everything else is the checkpoint's."
            )

    @staticmethod
    def _keep_learned_temperature(model: Any, name: Any, options: dict[str, Any]) -> None:
        """Fix a checkpoint's learned temperature where it is.

        A temperature that was asked for stays: as an option, or in a config that differs from the checkpoint's.

        Args:
            model: loaded from the checkpoint, without its `logit_scale`.
            name: of the checkpoint.
            options: keywords of `from_pretrained`.
        """
        place = {key: value for key, value in options.items() if key in OF_PLACE}
        weights, start = options.get("state_dict"), model.config.temperature
        if weights is None:
            weights = LearnedTemperature.from_pretrained(name, config=PreTrainedConfig(), **place).state_dict()
            start = IConEConfig.from_pretrained(name, **place).temperature
        if "temperature" not in options and model.config.temperature == start:
            learned = torch.exp(-weights["logit_scale"].float()).item()
            model.config.temperature = max(learned, min(LOWEST_TEMPERATURE, start))  # as it was used

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        with_classifier: bool = True,
        merge_lora: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save a checkpoint, as in transformers.

        It always holds all weights, those of adapters too, and the files that sentence-transformers reads.

        Args:
            save_directory: folder of the checkpoint.
            with_classifier: `False` leaves the class vectors out: searching needs none.
            merge_lora: adds the adapters to the weights that they adapt. The checkpoint then loads without peft.
            kwargs: arguments of transformers' `save_pretrained`.
        """
        # Choose the weights, and the config's fields that must say so.
        self.record_adapters()
        changed: dict[str, Any] = {} if with_classifier else {"num_groups": 0}
        if merge_lora:
            changed |= {"vision_lora": None, "text_lora": None}
        state_dict = kwargs.pop("state_dict", None)
        if merge_lora:
            state_dict = merged_state_dict(self)  # type: ignore[arg-type]
        sharded = self.classifier if isinstance(self.classifier, ShardedClassifier) else None
        if sharded is not None or not with_classifier:
            state_dict = self.state_dict() if state_dict is None else state_dict  # type: ignore[attr-defined]
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith("classifier.")}
        if sharded is not None:
            kwargs["max_shard_size"] = "1000TB"  # keep the rest in one file, beside which the class vectors are put

        # transformers writes only one Auto class of a model into the config. A pipeline asks for this one.
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {"AutoModelForZeroShotImageClassification": "modeling_icone.IConEModel", **auto_map}

        # Save with the changed config, and give the model its own config back, also after an error.
        before = {name: getattr(self.config, name) for name in changed}
        try:
            for name, value in changed.items():
                setattr(self.config, name, value)
            if sharded is None or rank_index() == 0:
                super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)  # type: ignore[misc]
                write_sentence_transformers_files(save_directory)
        finally:
            for name, value in before.items():
                setattr(self.config, name, value)

        # All ranks add their rows of the class vectors.
        if sharded is not None and with_classifier:
            sharded.add_to_checkpoint(save_directory)

    def before_upload(self, folder: str | os.PathLike) -> None:
        """Write sentence-transformers' files before an upload.

        [`save_pretrained`] itself writes them after transformers has uploaded the folder.
        """
        write_sentence_transformers_files(folder)
