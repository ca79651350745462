"""Refuses engines that spread a model over processes: training here is by DDP, with whole towers in each process.

Validation and the feature cache run the towers outside of the model's `forward`, where FSDP, ZeRO-3 and tensor
parallelism put no weights together. Stages save, load and resume whole weights.
"""

from typing import Any

from accelerate.utils import parse_flag_from_env

from ..errors import InputError

# By engine: the field of TrainingArguments that asks for it, and the variable by which `accelerate launch` does.
ENGINES = {
    "FSDP": ("fsdp", "ACCELERATE_USE_FSDP"),
    "DeepSpeed": ("deepspeed", "ACCELERATE_USE_DEEPSPEED"),
    "Megatron-LM": (None, "ACCELERATE_USE_MEGATRON_LM"),
    "accelerate's parallelism_config": ("parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG"),
}
WAY_OUT = (
    "Train with DDP (accelerate launch --multi_gpu, or torchrun). What saves memory there: bf16, "
    "activation_checkpointing, per_device_chunk_size, shard_classifier, LoRA (--lora_rank)."
)


def check_engine(args: Any) -> None:
    """Refuse engines that spread a model over processes.

    An argument or the launcher asks for them.

    Args:
        args: transformers' TrainingArguments, which need not be complete.
    """
    for engine, (name, variable) in ENGINES.items():
        if name is not None and getattr(args, name, None):
            raise _refusal(engine, f"{name}={' '.join(repr(getattr(args, name)).split())}")
        if parse_flag_from_env(variable):
            raise _refusal(engine, f"{variable}, set by accelerate launch,")


def check_device(device: Any) -> None:
    """Refuse TPUs.

    accelerate has no collectives for objects there, with which validation is shared out.
    """
    if device.type == "xla":
        raise _refusal("torch_xla", f"device={device}")


def _refusal(engine: str, reason: str) -> InputError:
    return InputError(f"{reason} asks for {engine}, with which stages can't be trained here. {WAY_OUT}")
