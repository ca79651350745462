"""What no embedding depends on is left out of training, so that DDP waits for nothing and searches for nothing."""

import gc
import json
import os
from dataclasses import fields

import children
import pytest
import torch
import transformers
from tiny import free_port, make_groups, tiny_text_config, tiny_vision_config
from tower_kinds import SHAPE, TEXT, TOKENS, VISION
from transformers import AutoModel

from icone_hf import IConEConfig, IConEModel, IConETrainingArguments, Stage
from icone_hf.data.batching import PairDataset
from icone_hf.training.stage_trainer import StageTrainer
from icone_hf.training.unused_parameters import leave_out_unused

ROBERTA = {**SHAPE, **TOKENS, "max_position_embeddings": 40, "pad_token_id": 0}
TEXT_CONFIGS = {name: tower.config for name, tower in TEXT.items()} | {
    "roberta": lambda: transformers.RobertaConfig(**ROBERTA),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**ROBERTA),
    "mpnet": lambda: transformers.MPNetConfig(**ROBERTA),
    "distilbert": lambda: transformers.DistilBertConfig(dim=24, hidden_dim=48, n_layers=2, n_heads=2, **TOKENS),
}
VISION_CONFIGS = {name: tower.config for name, tower in VISION.items()} | {
    "swin": lambda: transformers.SwinConfig(
        image_size=32, patch_size=4, window_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2]
    ),
    "deit": lambda: transformers.DeiTConfig(**SHAPE, image_size=32, patch_size=8),
}
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}
CHECKPOINTING = {"activation_checkpointing", "gradient_checkpointing"} & {
    f.name for f in fields(IConETrainingArguments)
}


def model_of(vision=None, text=None, **config):
    configs = {"vision_config": vision or tiny_vision_config(), "text_config": text or tiny_text_config()}
    return IConEModel(IConEConfig(**configs, projection_dim=16, num_groups=4, **config))


def left_out(model):
    """Names of the parameters that are left out of training, by tower."""
    model.set_encoders_trainable(True)
    unused = leave_out_unused(model)
    names = {name for name, parameter in model.named_parameters() if any(parameter is other for other in unused)}
    assert names == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return names


def without_gradient(model):
    """The same by a backward pass of both losses."""
    model.set_encoders_trainable(True)
    ids = torch.randint(4, 12, (4, 6))
    pixels = torch.randn(4, 3, 32, 32)
    model.train()(ids, torch.ones_like(ids), pixels, group_ids=torch.arange(4)).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_of_every_vision_tower_what_has_no_gradient(name):
    model = model_of(vision=VISION_CONFIGS[name]())
    assert left_out(model) == without_gradient(model)


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_of_every_text_tower_what_has_no_gradient(name):
    model = model_of(text=TEXT_CONFIGS[name]())
    assert left_out(model) == without_gradient(model)


@pytest.mark.parametrize(
    ("tower", "config", "names"),
    [
        ({"text": "bert"}, {}, POOLER),
        ({"text": "bert"}, {"text_pooling": "pooler"}, set()),
        ({"text": "roberta"}, {}, POOLER),
        ({"text": "mpnet"}, {}, POOLER),
        ({"text": "clip"}, {}, set()),
        ({"vision": "vit"}, {}, POOLER),
        ({"vision": "dinov2"}, {}, {"embeddings.mask_token"}),
        ({"vision": "clip"}, {"vision_pooling": "mean"}, {"post_layernorm.weight", "post_layernorm.bias"}),
    ],
)
def test_it_is_what_the_pooling_passes_by(tower, config, names):
    ((side, name),) = tower.items()
    model = model_of(**{side: (VISION_CONFIGS if side == "vision" else TEXT_CONFIGS)[name]()}, **config)
    prefix = f"{side}_model."
    assert {n.removeprefix(prefix) for n in left_out(model) if n.startswith(prefix)} == names


def test_neither_weights_nor_modes_nor_random_numbers_change():
    model = model_of().train()
    model.set_encoders_trainable(True)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    leave_out_unused(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.set_encoders_trainable(False)
    assert leave_out_unused(model) == []


def test_of_adapters_those_of_the_pooler_are_left_out():
    peft = pytest.importorskip("peft")
    model = model_of()
    model.add_adapter(peft.LoraConfig(r=2))
    model.set_encoders_trainable(True)
    adapters = {name for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad}
    unused = leave_out_unused(model)
    names = {name for name, p in model.named_parameters() if any(p is other for other in unused)}
    assert names == {name for name in adapters if "pooler" in name} != set()


# --- in the Trainer ---


def stage_trainer(model, processor, folder, groups=8, **arguments):
    values = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1}
    values |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": 1e-3, "max_steps": 3}
    args = IConETrainingArguments(str(folder), **{**values, **arguments})
    stage, data = Stage("joint", 1, 1e-3, 1, 1, train_encoders=True), make_groups(groups)
    return StageTrainer(model, args, stage, PairDataset(data), data, processor)


def test_what_is_left_out_keeps_its_place_in_the_optimizer_and_never_decays(make_model, processor, tmp_path):
    """AdamW's state in a checkpoint is known by place: one from before this was done must fit."""
    model = make_model()
    pooler = model.text_model.pooler.dense.weight
    before = pooler.detach().clone()
    trainer = stage_trainer(model, processor, tmp_path, per_device_train_batch_size=8, weight_decay=0.5)
    trainer.train()
    assert not pooler.requires_grad
    assert torch.equal(pooler, before)
    stepped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in stepped} == {id(p) for p in model.parameters()}
    assert pooler not in trainer.optimizer.state
    assert all(p in trainer.optimizer.state for p in stepped if p.requires_grad)


def tower_pair(name):
    """Two towers, at least one with a pooler that nothing uses; no dropout, which would differ between ranks."""
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {"bert": tiny_text_config(**still), "roberta": transformers.RobertaConfig(**{**ROBERTA, **still})}
    vision = VISION["vit"].config() if name == "roberta" else tiny_vision_config()
    return AutoModel.from_config(vision), AutoModel.from_config(text[name])


def losses_of(processor, folder, name, batch, **arguments):
    model = IConEModel.from_encoders(*tower_pair(name), num_groups=8, projection_dim=16)
    trainer = stage_trainer(model, processor, folder, per_device_train_batch_size=batch, **arguments)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _train_on_rank(rank, port, towers, folder):
    from icone_hf import IConEProcessor

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found, processor = {}, IConEProcessor.from_encoders(*towers)
    for name in ("bert", "roberta"):
        for checkpointing in (False, True):
            arguments = dict.fromkeys(sorted(CHECKPOINTING)[:1], checkpointing)
            trainer, losses = losses_of(processor, folder, name, 4, **arguments)
            wrapped = trainer.model_wrapped
            assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
            found[f"{name}, {checkpointing}"] = (losses, wrapped.find_unused_parameters)
            del trainer, wrapped
            gc.collect()  # DDP must let go of the process group before it ends
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_ranks_checkpoint_activations_and_search_for_nothing(towers, processor, tmp_path):
    """With BERT; with ViT and RoBERTa. Losses are those of one process with the whole batch."""
    children.spawn(_train_on_rank, (free_port(), towers, tmp_path), 2)
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("bert", "roberta"):
        _, expected = losses_of(processor, tmp_path / "alone", name, 8)
        for checkpointing in (False, True):
            losses, searches = found[f"{name}, {checkpointing}"]
            assert searches is False
            assert losses == pytest.approx(expected, rel=1e-5)
