"""LoRA adapters in the towers, by peft.

LoRA (E. J. Hu et al., 2021) trains small matrices beside frozen weights.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_icone import IConEConfig
from .errors import MissingAdaptersPackageError, ModelError

ALL_LINEAR = "all-linear"


def _lora_config_class() -> Any:
    # This is the only import of peft: a checkpoint that carries this file must load without peft.
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingAdaptersPackageError(
            "LoRA adapters (vision_lora, text_lora in the config) need peft: pip install 'icone_hf[lora]'. A "
            "checkpoint saved with merge_lora=True needs none."
        ) from error
    return LoraConfig


def add_lora(tower: PreTrainedModel, settings: dict[str, Any], modality: str) -> None:
    """Put new LoRA adapters into a tower.

    New adapters change none of the tower's outputs.

    Args:
        tower: changed in place; its own weights are frozen from then on.
        settings: keywords of peft's `LoraConfig`. `target_modules` is every linear layer unless given.
        modality: `vision` or `text`, for errors.

    Raises:
        ImportError: if peft is missing.
        ValueError: if the tower has no linear layer and no other is named, or for `modules_to_save`.
    """
    settings = {"target_modules": ALL_LINEAR, **copy.deepcopy(settings)}
    if settings.get("modules_to_save"):
        raise ModelError(f"{modality}_lora has modules_to_save, which IConE doesn't support: leave it out.")
    # Say what to do about a tower without linear layers, such as a ResNet, before peft fails.
    layers = (nn.Linear, Conv1D)
    if settings["target_modules"] == ALL_LINEAR and not any(isinstance(module, layers) for module in tower.modules()):
        raise ModelError(
            f"The {modality} tower ({type(tower).__name__}) has no linear layer for LoRA: name other layers in "
            f"{modality}_lora's target_modules, or train this tower in full ({modality}_lora=None)."
        )
    tower.add_adapter(_lora_config_class()(**settings))


def has_lora(tower: nn.Module) -> bool:
    """Say whether a tower has adapters."""
    return bool(getattr(tower, "peft_config", None))


def lora_settings(adapter_config: Any) -> dict[str, Any]:
    """Return the keywords that make a `LoraConfig`.

    Only those that differ from peft's defaults are returned, in types that JSON can hold.

    Raises:
        TypeError: if it is another kind of adapter.
    """
    lora_config_class = _lora_config_class()
    if not isinstance(adapter_config, lora_config_class):
        raise TypeError(f"IConE's towers take peft's LoraConfig, not {type(adapter_config).__name__}.")
    default = lora_config_class().to_dict()
    ignored = ("base_model_name_or_path", "peft_version", "inference_mode")
    changed = {k: v for k, v in adapter_config.to_dict().items() if k not in ignored and v != default.get(k)}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()}


def recorded_lora(tower: PreTrainedModel, modality: str) -> dict[str, Any] | None:
    """Return the settings of a tower's adapter.

    A tower without adapters gives `None`.

    Raises:
        ValueError: if there are several: a checkpoint holds one.
    """
    if not has_lora(tower):
        return None
    if list(tower.peft_config) != ["default"]:
        raise ModelError(
            f"The {modality} tower has the adapters {', '.join(tower.peft_config)}; an IConE checkpoint holds one, "
            "named default."
        )
    return lora_settings(tower.peft_config["default"])


class LoraTowersMixin:
    """Give a model adapters in both towers.

    The model's config keeps their settings in `vision_lora` and `text_lora`.
    """

    config: IConEConfig
    vision_model: PreTrainedModel
    text_model: PreTrainedModel
    training: bool
    train: Callable[[bool], Any]

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Put LoRA adapters into both towers.

        `from_encoders(..., vision_lora={"r": 8})` puts them into one.

        The towers' own weights are frozen from then on: a stage with `train_encoders=True` trains the towers' adapters
        alone. Projections and classifier, which are new, train in full. Save with `merge_lora=True` for a checkpoint
        that loads without peft.

        Args:
            adapter_config: peft's `LoraConfig`; `target_modules` is every linear layer unless given.
            adapter_name: `default`, or `None` for the same.

        Raises:
            TypeError: for another kind of adapter.
            ValueError: if there are adapters already, a tower has no layer to adapt, or for another name.
        """
        if adapter_name not in (None, "default"):
            raise ModelError(f"adapter_name={adapter_name!r}: an IConE model has one adapter, named default.")
        settings = lora_settings(adapter_config)
        for modality, tower in (("vision", self.vision_model), ("text", self.text_model)):
            add_lora(tower, settings, modality)
            setattr(self.config, f"{modality}_lora", settings)
        self.train(self.training)  # the adapters' dropout starts in training mode, whatever the model's mode is

    def add_configured_adapters(self) -> None:
        """Add the adapters that the config asks for.

        A tower that has adapters keeps them.
        """
        for modality, tower in (("vision", self.vision_model), ("text", self.text_model)):
            settings = getattr(self.config, f"{modality}_lora")
            if settings is not None and not has_lora(tower):
                add_lora(tower, settings, modality)

    def record_adapters(self) -> None:
        """Write into the config which adapters the towers have.

        A tower's own `add_adapter` doesn't tell the model's config.
        """
        for modality, tower in (("vision", self.vision_model), ("text", self.text_model)):
            if getattr(self.config, f"{modality}_lora") is None:
                setattr(self.config, f"{modality}_lora", recorded_lora(tower, modality))


def set_trainable(tower: nn.Module, trainable: bool) -> None:
    """Freeze a tower, or make it trainable.

    Of a tower with adapters only these become trainable.
    """
    only_adapters = has_lora(tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(trainable and (not only_adapters or ".lora_" in name))


def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Compute a model's weights with its adapters merged in.

    `model` itself doesn't change.

    Returns:
        The state dict of a model without adapters that computes the same.
    """
    # Recognise peft's layers without importing peft.
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}
    prefixes = tuple(f"{name}." for name in adapted)
    # Take all other weights unchanged.
    merged = {name: value for name, value in model.state_dict().items() if not name.startswith(prefixes)}
    # Merge a copy of each adapted layer, so that the model keeps its adapters.
    for name, module in adapted.items():
        layer: Any = copy.deepcopy(module)
        layer.merge()
        merged |= {f"{name}.{key}": value for key, value in layer.get_base_layer().state_dict().items()}
    return merged
