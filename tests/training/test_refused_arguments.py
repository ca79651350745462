"""Every field of TrainingArguments is honoured or refused; this file holds which is which."""

import os
from dataclasses import MISSING, fields

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers import TrainingArguments

from icone_hf import IConETrainingArguments
from icone_hf.errors import InputError
from icone_hf.training.engines import ENGINES, check_device
from icone_hf.training.refused_arguments import REFUSED, check_arguments

# Honoured by transformers' Trainer and accelerate, or by our own parts.
HONOURED = {
    *("output_dir", "per_device_train_batch_size", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32", "seed", "use_cpu"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("torch_empty_cache_steps", "full_determinism", "local_rank", "debug", "skip_memory_metrics"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica"),
    *("disable_tqdm", "report_to", "run_name", "project", "logging_dir"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "do_eval"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    "accelerator_config",
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout"),
}
OTHER_VALUES = {
    **{"train_sampling_strategy": "group_by_length", "length_column_name": "size", "label_names": ["x"]},
    **{"dataloader_multiprocessing_context": "spawn", "include_num_input_tokens_seen": "all", "data_seed": 1},
    **{"include_for_metrics": ["loss"], "liger_kernel_config": {"rope": True}, "neftune_noise_alpha": 5.0},
    **{"dataloader_prefetch_factor": 4, "eval_accumulation_steps": 2, "learning_rate": 1e-3, "num_train_epochs": 1},
    **{"label_smoothing_factor": 0.1, "fsdp_config": {"version": 2}},
}


def test_each_field_is_either_honoured_or_refused():
    names = {field.name for field in fields(TrainingArguments)}
    assert not HONOURED & set(REFUSED)
    unknown = names - HONOURED - set(REFUSED) - {name for name, _ in ENGINES.values()}
    assert not unknown, f"transformers has new fields, each to be honoured or refused: {sorted(unknown)}"


@pytest.mark.parametrize(
    ("argument", "value", "engine"),
    [
        ("fsdp", True, "FSDP"),
        ("fsdp", "full_shard", "FSDP"),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "DeepSpeed"),
        ("parallelism_config", ParallelismConfig(tp_size=2), "accelerate's parallelism_config"),
    ],
)
def test_an_argument_that_asks_for_an_engine_is_refused_with_the_way_out(argument, value, engine, tmp_path):
    with pytest.raises(InputError, match=rf"^{argument}=.* asks for {engine}.*shard_classifier, LoRA"):
        IConETrainingArguments(str(tmp_path), **{argument: value})


@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        (["--use_fsdp"], "FSDP"),
        (["--use_deepspeed"], "DeepSpeed"),
        (["--use_megatron_lm"], "Megatron-LM"),
        (["--use_parallelism_config", "--parallelism_config_dp_shard_size=2"], "accelerate's parallelism_config"),
    ],
)
def test_a_launcher_that_asks_for_an_engine_is_refused_with_the_way_out(flags, engine, tmp_path, monkeypatch):
    """By the variables that accelerate itself makes of its flags."""
    args = launch_command_parser().parse_args(
        ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", *flags, "train.py"]
    )
    args.deepspeed_fields_from_accelerate_config = ""  # as the launcher itself sets it
    made = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    for name in made.keys() - os.environ.keys():
        monkeypatch.setenv(name, made[name])
    with pytest.raises(InputError, match=rf"^ACCELERATE_USE_\w+, .* asks for {engine}.*shard_classifier, LoRA"):
        IConETrainingArguments(str(tmp_path))


def test_a_tpu_is_refused():
    with pytest.raises(InputError, match=r"^device=xla:0 asks for torch_xla"):
        check_device(torch.device("xla:0"))


def test_the_defaults_are_not_refused(tmp_path):
    check_arguments(IConETrainingArguments(str(tmp_path)))


@pytest.mark.parametrize(
    "field", [f for f in fields(IConETrainingArguments) if f.name in REFUSED], ids=lambda f: f.name
)
def test_a_field_without_effect_is_refused_when_set(field, tmp_path):
    default = field.default if field.default_factory is MISSING else field.default_factory()
    args = IConETrainingArguments(str(tmp_path))
    setattr(args, field.name, OTHER_VALUES.get(field.name, not default))
    with pytest.raises(ValueError, match=f"{field.name}=.* would have no effect, since "):
        check_arguments(args)
