"""Rates by part and depth: which parameter is where, what the optimizer makes of it, and what a step moves."""

import json
import math
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import StopAt, make_groups, make_run, tiny_text_config, tiny_vision_config
from torch import nn
from tower_kinds import CONV, RECURRENT, SHAPE, TEXT, TOKENS, VISION
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from icone_hf import (
    EfficientNetLiteConfig,
    IConEConfig,
    IConEModel,
    IConETrainingArguments,
    RecurrentTextConfig,
    Stage,
)
from icone_hf.data.batching import PairDataset
from icone_hf.training import stage_optimizer
from icone_hf.training.parameter_groups import StageParameters, check_rates, find_places
from icone_hf.training.stage_trainer import StageTrainer

JOINT = Stage("joint", 1, 1e-2, instance_weight=1, contrastive_weight=1, train_encoders=True)
DEPTHS = CONV["depths"]
SWIN = {"patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}
VISION_CONFIGS = {name: tower.config for name, tower in VISION.items()} | {
    "swin": lambda: transformers.SwinConfig(image_size=32, **SWIN),
    "efficientnet": lambda: transformers.EfficientNetConfig(
        image_size=32, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, hidden_size=128
    ),
    "efficientnet_lite": lambda: EfficientNetLiteConfig(width_coefficient=0.1, depth_coefficient=0.4, hidden_size=24),
}
TEXT_CONFIGS = {name: tower.config for name, tower in TEXT.items() if name != "e5"} | {
    "mpnet": lambda: transformers.MPNetConfig(**{**SHAPE, **TOKENS, "max_position_embeddings": 40, "pad_token_id": 0}),
    "opt": lambda: transformers.OPTConfig(ffn_dim=48, word_embed_proj_dim=24, **SHAPE, **TOKENS),
    "gru of two layers": lambda: RecurrentTextConfig(cell="gru", num_hidden_layers=2, **RECURRENT),
}
BELOW = re.compile(
    r"(embed|stem|pre_layrnorm|wte|wpe|tok|decoder\.embed|encoder\.relative|.*stages\.0\.downsample_layers)"
)


def model_of(vision=None, text=None, **config):
    configs = {"vision_config": vision or tiny_vision_config(), "text_config": text or tiny_text_config()}
    return IConEModel(IConEConfig(**configs, projection_dim=16, num_groups=8, **config))


def depth_by_name(name, depths):
    """The place of a parameter as its name tells it: 0, a block's number, or infinity for what follows."""
    firsts = [sum(depths[:stage]) + 1 for stage in range(len(depths))]
    if found := re.search(r"stages\.(\d+)\.layers\.(\d+)\.", name) or re.search(r"layers\.(\d+)\.blocks\.(\d+)", name):
        return firsts[int(found[1])] + int(found[2])
    if BELOW.match(name):
        return 0
    if found := re.search(r"stages\.(\d+)\.downsampl", name):
        return firsts[int(found[1])]
    if found := re.search(r"layers\.(\d+)\.downsample", name):  # Swin's stands at a stage's end
        return firsts[int(found[1]) + 1] - 1
    if found := re.search(r"(?:layers?|blocks|h)\.(\d+)\.", name) or re.search(r"_l(\d)", name):
        return int(found[1]) + 1
    return math.inf


def check_places(model, part, depths):
    places = find_places(model, replace(JOINT, layer_decay=0.5))
    tower = getattr(model, f"{part}_model")
    expected = {name: depth_by_name(name, depths) for name, _ in tower.named_parameters() if "mask_token" not in name}
    num_blocks = max(depth for depth in expected.values() if depth < math.inf)
    assert num_blocks > 0
    for name, parameter in tower.named_parameters():
        if name in expected:
            place = places[parameter]
            assert (place.part, place.block) == (part, min(expected[name], num_blocks + 1)), name
            assert place.num_blocks == num_blocks
    assert {0, 1, num_blocks} <= set(expected.values())
    assert places.keys() == set(model.parameters())
    heads = {parameter for parameter, place in places.items() if place.part == "heads"}
    assert heads == set(model.heads().parameters())


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_blocks_of_every_vision_tower(name):
    model = model_of(vision=VISION_CONFIGS[name](), vision_pooling=VISION[name].pooling if name in VISION else "pooler")
    check_places(model, "vision", SWIN["depths"] if name == "swin" else DEPTHS)


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_blocks_of_every_text_tower(name):
    check_places(model_of(text=TEXT_CONFIGS[name](), text_pooling=None if name in TEXT else "mean"), "text", [])


def test_finding_blocks_leaves_weights_modes_and_random_numbers():
    model = model_of().train()
    model.set_encoders_trainable(False)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    find_places(model, replace(JOINT, layer_decay=0.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


MIXED = {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8] * 7}  # MobileViT: convolutions and transformers in a list


def test_a_tower_whose_blocks_are_not_found_is_refused_by_name(make_model):
    model = model_of(transformers.MobileViTConfig(image_size=32, hidden_size=8, **MIXED), vision_pooling="mean")
    args = IConETrainingArguments("unused", use_cpu=True, report_to="none")
    for change in ({"layer_decay": 0.5}, {"trained_blocks": 1}, {"train_embeddings": False}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=f"'joint': {name}={value} needs .*vision tower .MobileViTModel"):
            check_rates(model, args, [replace(JOINT, **change)])
    check_rates(model, args, [replace(JOINT, vision_learning_rate=1e-3, text_frozen_epochs=0.5)])
    args = IConETrainingArguments("unused", use_cpu=True, report_to="none", optim="lomo")
    with pytest.raises(ValueError, match="optim=lomo has one rate"):
        check_rates(make_model(), args, [replace(JOINT, layer_decay=0.5)])


def test_blocks_in_another_order_than_in_their_list_are_refused(monkeypatch):
    def backwards(self, hidden_states, *args, **kwargs):
        for block in reversed(self.layer):
            output = block(hidden_states)
            hidden_states = output[0] if isinstance(output, tuple) else output
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)

    model = model_of()
    monkeypatch.setattr(type(model.text_model.encoder), "forward", backwards)
    with pytest.raises(ValueError, match=r"text tower .BertModel.* one after the other"):
        find_places(model, replace(JOINT, layer_decay=0.5))


# --- rates ---


@pytest.fixture(scope="module")
def deep_model():
    deep = {"num_hidden_layers": 4}
    torch.manual_seed(0)
    return model_of(tiny_vision_config(**deep), tiny_text_config(num_hidden_layers=3), learn_temperature=True)


rates = st.none() | st.floats(1e-6, 1e-2)


@given(
    st.builds(
        replace,
        st.just(replace(JOINT, num_train_epochs=5)),
        vision_learning_rate=rates,
        text_learning_rate=rates,
        layer_decay=st.just(1.0) | st.floats(0.1, 1.0),
        trained_blocks=st.none() | st.integers(1, 6),
        train_embeddings=st.booleans(),
        vision_frozen_epochs=st.sampled_from([0, 0.5, 5]),
        text_frozen_epochs=st.sampled_from([0, 1]),
    )
)
@settings(max_examples=25)
def test_every_parameter_is_in_one_group_at_its_rate_or_frozen(deep_model, stage):
    model = deep_model
    model.set_encoders_trainable(True)
    parameters = StageParameters(model, stage, SimpleNamespace(max_steps=-1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2]}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, weight_decay=0.0)
    parameters.split_groups(optimizer)
    found = [(p, group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len({p for p, _ in found}) == len(trained)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[p] for p in trained] == [0.1, 0.0] * (len(trained) // 2) + [0.1] * (len(trained) % 2)
    assert optimizer.param_groups[0]["lr"] == stage.learning_rate
    rate_of = dict(found)
    rows = parameters.table(optimizer)
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    yes = sum(row["parameters"] for row in rows if row["trained"] not in ("no", "unused"))
    assert yes == sum(p.numel() for p in trained)
    for name, parameter in model.named_parameters():
        part, _, inner = name.partition("_model.")
        if not inner:
            assert rate_of[parameter] == stage.learning_rate, name
            continue
        num_blocks = {"vision": 4, "text": 3}[part]
        depth = depth_by_name(inner, [])
        above = num_blocks - min(depth, num_blocks)
        keeps = (stage.trained_blocks is None and (stage.train_embeddings or depth > 0)) or (
            stage.trained_blocks is not None and depth > max(0, num_blocks - stage.trained_blocks)
        )
        keeps = keeps and not (part == "vision" and stage.vision_frozen_epochs == 5) and "pooler" not in inner
        assert (parameter in rate_of) is parameter.requires_grad is keeps, name
        if keeps:
            peak = getattr(stage, f"{part}_learning_rate") or stage.learning_rate
            assert rate_of[parameter] == pytest.approx(peak * stage.layer_decay**above), name


def stage_trainer(model, processor, folder, stage, groups=8, **arguments):
    values = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1}
    values |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": stage.learning_rate}
    values |= {"max_grad_norm": 0.0, "per_device_train_batch_size": 8, "max_steps": 1, "warmup_steps": 0}
    args, data = IConETrainingArguments(str(folder), **{**values, **arguments}), make_groups(groups)
    return StageTrainer(model, args, stage, PairDataset(data), data, processor)


def moves(model, act):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    act()
    return {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}


BY_DEPTH = replace(JOINT, vision_learning_rate=1e-3, text_learning_rate=4e-4, layer_decay=0.5, trained_blocks=1)


@pytest.mark.parametrize("config", [{}, {"instance_samples": 4}])
def test_adams_first_step_is_the_rate_of_each_parameter(make_model, processor, tmp_path, config):
    model = make_model(learn_temperature=True, **config)
    trainer = stage_trainer(model, processor, tmp_path, BY_DEPTH)
    moved = moves(model, trainer.train)
    for name, distance in moved.items():
        if name.startswith(("vision_model.encoder.layers.1", "vision_model.post_", "vision_model.vision_model.post_")):
            expected = 1e-3
        elif name.startswith("text_model.encoder.layer.1."):
            expected = 4e-4
        else:
            expected = 0.0 if "_model." in name else 1e-2
        assert distance <= expected * 1.001, name
        if not name.endswith("bias"):  # a softmax does not see the keys' bias
            assert distance >= expected * 0.9, name


def test_adapters_have_their_towers_rate(make_model, processor, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    model.add_adapter(peft.LoraConfig(r=2))
    model.set_encoders_trainable(True)
    stage = replace(JOINT, vision_learning_rate=1e-3, text_learning_rate=1e-4, layer_decay=0.1)
    moved = moves(model, stage_trainer(model, processor, tmp_path, stage).train)
    for name, distance in moved.items():
        if ".lora_B." in name and "pooler" not in name:
            below = 0.1 if re.search(r"layers?\.0\.", name) else 1
            below = 0.01 if "embedding" in name else below
            assert distance == pytest.approx((1e-3 if "vision" in name else 1e-4) * below, rel=0.1), name
        elif "_model." in name:
            assert not distance, name


class Rates(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.found.append({g["lr"] for g in optimizer.param_groups})


def test_all_rates_follow_the_schedule(make_model, processor, tmp_path):
    stage, rates = replace(JOINT, vision_learning_rate=1e-3, text_learning_rate=1e-4, layer_decay=0.5), Rates()
    trainer = stage_trainer(make_model(), processor, tmp_path, stage, max_steps=8, warmup_steps=2)
    trainer.add_callback(rates)
    trainer.train()
    peaks = {1e-2, *(1e-3 * 0.5**i for i in range(3)), *(1e-4 * 0.5**i for i in range(3))}
    factors = [0, 0.5, *((1 + math.cos(math.pi * step / 6)) / 2 for step in range(6))]
    for step, factor in enumerate(factors):
        assert sorted(rates.found[step]) == pytest.approx(sorted({peak * factor for peak in peaks})), step
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([1e-2 * factor for factor in factors])


# --- what decays ---

DECAY = {"weight_decay": 0.3, "load_best_model_at_end": False}


def spared_by_kind(model):
    """By the kind of module that a parameter is in."""
    spared = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            is_norm = any(word in type(module).__name__ for word in ("Norm", "GRN", "Grn"))
            is_position = isinstance(module, nn.Embedding) and "position" in prefix
            is_own = not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | nn.RNNBase)
            alone = is_own and any(
                word in name for word in ("token", "position", "probe", "embedding", "scale", "lambda")
            )
            if "bias" in name or is_norm or is_position or alone:
                spared.add(f"{prefix}.{name}".lstrip("."))
    return spared


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ("vit", "bert"),
        ("clip", "clip"),
        ("siglip", "siglip2"),
        ("dinov2", "gru"),
        ("convnext", "qwen2"),
        ("convnextv2", "modernbert"),
        ("resnet", "bert"),
        ("efficientnet", "bert"),
        ("efficientnet_lite", "bert"),
    ],
)
def test_weight_decay_spares_biases_norms_tokens_and_positions(processor, tmp_path, vision, text):
    config = {"contrastive_loss": "sigmoid", "learn_temperature": True}
    config["vision_pooling"] = VISION[vision].pooling if vision in VISION else "pooler"
    model = model_of(VISION_CONFIGS[vision](), TEXT_CONFIGS[text](), **config)
    trainer = stage_trainer(model, processor, tmp_path, JOINT, optim="sgd", weight_decay=0.5)
    optimizer = trainer.create_optimizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1  # nothing is 0
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    moved = moves(model, optimizer.step)
    spared = spared_by_kind(model)
    for name, parameter in model.named_parameters():
        assert (moved[name] == 0) is (name in spared or not parameter.requires_grad), name
    assert {"logit_scale", "logit_bias"} <= spared


def test_a_run_from_before_more_was_spared_goes_on_as_it_was(make_model, processor, tmp_path, monkeypatch):
    def run(name, callbacks=None):
        model = make_model(16, learn_temperature=True)
        return make_run(tmp_path / name, model, processor, [replace(JOINT, num_train_epochs=2)], callbacks, **DECAY)

    with monkeypatch.context() as patch:  # transformers' own rule, as it was
        patch.setattr(stage_optimizer, "never_decays", lambda *_: False)
        whole = run("whole")
        whole.train()
        with pytest.raises(KeyboardInterrupt):
            run("cut", [StopAt("joint", 9)]).train()
    trainer = run("cut")
    trainer.train(resume_from_checkpoint="auto")
    state = trainer.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


# --- the table ---


def test_the_table_is_logged_and_kept(make_model, processor, tmp_path, caplog):
    import logging

    logging.getLogger("transformers").propagate = True
    stages = [
        Stage("heads", 1, 1e-3, instance_weight=1, contrastive_weight=1, train_encoders=False),
        replace(JOINT, vision_learning_rate=1e-3, trained_blocks=1, text_frozen_epochs=0.5),
    ]
    trainer = make_run(tmp_path / "run", make_model(16), processor, stages, weight_decay=0.1)
    trainer.train()
    lines = [line.split() for record in caplog.records for line in record.getMessage().splitlines()]
    heads = str(sum(parameter.numel() for parameter in trainer.model.heads().parameters()))
    assert ["heads", f"{int(heads):,}", "yes", "0.001", "0.1"] in lines
    assert ["part", "blocks", "parameters", "trained", "peak", "rate", "weight", "decay"] in lines
    text = trainer.model.text_model
    lower = sum(p.numel() for p in [*text.embeddings.parameters(), *text.encoder.layer[0].parameters()])
    assert ["text", "embeddings,", "1", f"{lower:,}", "no"] in lines
    kept = json.loads((tmp_path / "run" / "stages" / "1-joint" / "stage.json").read_text())
    rows = kept["parameter_groups"]
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in trainer.model.parameters())
    last = [row for row in rows if row["part"] == "text" and row["trained"] == "after 0.5 epochs"]
    assert {(row["blocks"], row["peak_rate"], row["weight_decay"]) for row in last} == {
        ("2", 1e-2, 0.1),
        ("2", 1e-2, 0.0),
    }
    assert [row["blocks"] for row in rows if row["trained"] == "unused"] == ["end"]
    assert kept["stage"] == asdict(stages[1])
