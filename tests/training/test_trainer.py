import json
import logging as python_logging
import math
import threading
import weakref
from dataclasses import fields

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import STAGES, StopAt, losses, make_groups
from transformers import TrainerCallback

from icone_hf import (
    FeatureCache,
    IConEModel,
    IConEProcessor,
    IConETrainer,
    IConETrainingArguments,
    Stage,
    encode_groups,
    retrieval_metrics,
)
from icone_hf.errors import DivergedError
from icone_hf.modeling import ShardedClassifier
from icone_hf.training.run_folder import write_metrics
from icone_hf.training.stage_trainer import StageTrainer


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    def make(output="run", stages=STAGES, callbacks=None, train=None, validation=None, model=None, **arguments):
        train = make_groups(16) if train is None else train
        values = {
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_total_limit": None,
        }
        return IConETrainer(
            model or make_model(num_groups=len(train), text_pooling="mean"),
            IConETrainingArguments(str(tmp_path / output), **{**values, **arguments}),
            train,
            make_groups(10, start=16) if validation is None else validation,
            processor,
            stages,
            callbacks,
        )

    return make


def test_a_run_leaves_a_checkpoint_metrics_and_recipe(make_trainer, tmp_path):
    trainer = make_trainer()
    metrics = trainer.train()
    folder = tmp_path / "run"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert set(metrics) == {"validation", "stages"}
    assert not trainer.model.training  # what is used right after training has no dropout
    assert metrics["stages"]["joint"] == metrics["validation"]
    model, processor = IConEModel.from_pretrained(folder), IConEProcessor.from_pretrained(folder)
    again = retrieval_metrics(*encode_groups(model, processor, trainer.eval_dataset))
    assert again["rsum"] == pytest.approx(metrics["validation"]["rsum"], abs=1e-6)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert [stage["name"] for stage in recipe["decisive"]["stages"]] == ["instance", "joint"]
    assert recipe["decisive"]["global_train_batch_size"] == 8
    assert recipe["arguments"]["logging_steps"] == 1
    assert recipe["environment"]["processes"] == 1


def test_each_stage_keeps_its_best_epoch(make_trainer):
    trainer = make_trainer(stages=(Stage("joint", 6, 3e-2, 1, 1, True),))  # a rate that makes Rsum jump up and down
    metrics = trainer.train()
    result = json.loads((trainer.folder.stage(0) / "stage.json").read_text())
    sums = {e["step"]: e["eval_rsum"] for e in result["log_history"] if "eval_rsum" in e}
    assert len(sums) == 6
    best = max(sums.values())
    assert metrics["validation"]["rsum"] == best
    assert sums[int(result["best_checkpoint"].split("-")[1])] == best
    assert trainer.evaluate()["rsum"] == pytest.approx(best, abs=1e-6)


def test_frozen_towers_do_not_change_in_stage_one_and_do_in_stage_two(make_trainer):
    for stages, moves in ((STAGES[:1], False), (STAGES[1:], True)):
        trainer = make_trainer(f"run-{moves}", stages)
        model = trainer.model
        state = lambda tower: {name: value.clone() for name, value in tower.state_dict().items()}  # noqa: E731
        before = [state(model.vision_model), state(model.text_model)]
        heads = model.visual_projection.weight.detach().clone(), model.classifier.weight.detach().clone()
        trainer.train()
        after = [state(model.vision_model), state(model.text_model)]
        same = [all(torch.equal(b[name], a[name]) for name in b) for b, a in zip(before, after, strict=True)]
        assert same == [not moves, not moves]
        assert not torch.equal(heads[0], model.visual_projection.weight)
        assert not torch.equal(heads[1], model.classifier.weight)


def test_a_stage_without_instance_loss_leaves_the_class_vectors(make_trainer):
    trainer = make_trainer(stages=(Stage("contrastive", 1, 1e-2, 0, 1, True),))
    before = trainer.model.classifier.weight.detach().clone()
    trainer.train()
    assert torch.equal(before, trainer.model.classifier.weight)


def test_the_cached_stage_gives_the_losses_of_plain_forward_passes(make_trainer, processor, tmp_path):
    trainer = make_trainer(stages=STAGES[:1])
    model, groups = trainer.model, trainer.train_dataset
    stage = StageTrainer(
        model, trainer.args, STAGES[0], FeatureCache.build(tmp_path / "c", model, processor, groups), groups, processor
    )
    from icone_hf import GroupBatchSampler, PairCollator, PairDataset

    dataset = PairDataset(groups)
    plain = (
        PairCollator(processor)([dataset[p] for p in pairs])
        for pairs in GroupBatchSampler([3] * 16, 8, trainer.args.seed)
    )
    model.set_encoders_trainable(False)
    model.train()
    for cached_batch, batch in zip(stage.get_train_dataloader(), plain, strict=True):
        torch.testing.assert_close(model(**cached_batch).loss, model(**batch).loss, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("stage", "step", "arguments"),
    [
        ("0-instance", 3, {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}),
        ("0-instance", 9, {}),  # in the second of two epochs of 6 steps
        ("1-joint", 1, {}),  # between the stages: nothing of the second is saved yet
        ("1-joint", 8, {"dataloader_num_workers": 1}),
        ("1-joint", 5, {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}),
        (
            "1-joint",
            5,
            {
                "gradient_accumulation_steps": 2,
                "save_strategy": "steps",
                "eval_strategy": "steps",
                "save_steps": 1,
                "eval_steps": 1,
            },
        ),
        (
            "1-joint",
            5,
            {
                "per_device_chunk_size": 3,
                "dataloader_num_workers": 1,
                "save_strategy": "steps",
                "eval_strategy": "steps",
                "save_steps": 2,
                "eval_steps": 2,
            },
        ),
        ("1-joint", 8, {"per_device_chunk_size": 3}),
    ],
)
def test_an_interrupted_run_gives_the_losses_of_an_uninterrupted_one(make_trainer, stage, step, arguments):
    if "gradient_accumulation_steps" in arguments:
        arguments = {**arguments, "per_device_train_batch_size": 4}
    whole = make_trainer("whole", **arguments)
    whole_metrics = whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("cut", callbacks=[StopAt(stage, step)], **arguments).train()
    resumed = make_trainer("cut", **arguments)
    metrics = resumed.train(resume_from_checkpoint="auto")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    assert metrics["validation"]["rsum"] == pytest.approx(whole_metrics["validation"]["rsum"], abs=1e-6)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_resuming_from_a_named_checkpoint(make_trainer, index):
    trainer = make_trainer()
    trainer.train()
    expected = losses(trainer)
    again = make_trainer()
    again.train(resume_from_checkpoint=str(again.folder.stage(index) / "checkpoint-6"))
    assert losses(again) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("stages", [STAGES, STAGES[::-1], STAGES[:1]])
def test_a_finished_run_is_not_done_again(make_trainer, tmp_path, stages):
    metrics = make_trainer(stages=stages).train()
    write_metrics(tmp_path / "run", {"test": {"rsum": 1.0}})
    trainer = make_trainer(stages=stages, callbacks=[StopAt("", 1)])
    before = trainer.model.visual_projection.weight.detach().clone()
    assert trainer.train(resume_from_checkpoint="auto") == {**metrics, "test": {"rsum": 1.0}}
    assert not torch.equal(before, trainer.model.visual_projection.weight)  # the trained model is there
    assert trainer.evaluate()["rsum"] == pytest.approx(metrics["validation"]["rsum"], abs=1e-6)
    for name, value in IConEModel.from_pretrained(tmp_path / "run").state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name


def test_checkpoints_hold_what_their_stage_trains(make_trainer):
    trainer = make_trainer()
    trainer.train()
    frozen, joint = (
        set(load_file(trainer.folder.stage(index) / "checkpoint-6" / "model.safetensors")) for index in (0, 1)
    )
    assert frozen == {"visual_projection.weight", "text_projection.weight", "classifier.weight"}
    assert joint == set(trainer.model.state_dict())


def test_a_test_of_an_older_model_is_dropped(make_trainer, tmp_path):
    make_trainer().train()
    write_metrics(tmp_path / "run", {"test": {"rsum": 1.0}})
    trainer = make_trainer()
    metrics = trainer.train(resume_from_checkpoint=str(trainer.folder.stage(1) / "checkpoint-6"))
    assert "test" not in metrics


def test_a_checkpoint_that_was_cut_in_writing_is_passed_over(make_trainer):
    trainer = make_trainer()
    trainer.train()
    expected = losses(trainer)
    folder = trainer.folder.stage(1)
    (folder / "stage.json").unlink()
    (folder / "checkpoint-12" / "trainer_state.json").unlink()  # it is written last
    again = make_trainer()
    again.train(resume_from_checkpoint="auto")
    assert losses(again) == pytest.approx(expected, abs=1e-6)


def test_what_came_after_a_named_checkpoint_is_done_again(make_trainer):
    trainer = make_trainer()
    metrics = trainer.train()
    checkpoint = str(trainer.folder.stage(0) / "checkpoint-6")
    stages = trainer.folder.path / "stages"
    later = sorted(path.relative_to(stages).as_posix() for path in stages.glob("*/checkpoint-*"))
    later.remove("0-instance/checkpoint-6")
    assert len(later) > 2
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[StopAt("0-instance", 8)]).train(resume_from_checkpoint=checkpoint)
    assert not trainer.folder.is_done(0)
    assert not list(trainer.folder.stage(1).glob("checkpoint-*"))
    # The later checkpoints of this stage and of the next are kept aside, whole.
    aside = trainer.folder.path / "set_aside"
    whole = sorted(path.parent.relative_to(aside).as_posix() for path in aside.glob("*/*/trainer_state.json"))
    assert whole == later
    assert make_trainer().train(resume_from_checkpoint="auto") == metrics


def test_auto_starts_where_there_is_nothing(make_trainer):
    auto, plain = make_trainer("auto", STAGES[:1]), make_trainer("plain", STAGES[:1])
    assert auto.train(resume_from_checkpoint="auto") == plain.train()
    assert losses(auto) == losses(plain)


def test_a_stages_optimizer_is_gone_when_the_next_is_made(make_trainer):
    kept, alive = [], []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            alive.append([reference() is not None for reference in kept])
            kept.append(weakref.ref(optimizer.optimizer))

    make_trainer(callbacks=[Look()]).train()
    assert alive == [[], [False]]


def test_a_folder_with_another_run_is_refused(make_trainer):
    make_trainer(stages=STAGES[:1]).train()
    with pytest.raises(ValueError, match="holds another run: pass resume_from_checkpoint=auto"):
        make_trainer(stages=STAGES[:1]).train()
    with pytest.raises(ValueError, match=r"another recipe .*seed was 42, is 7"):
        make_trainer(stages=STAGES[:1], seed=7).train(resume_from_checkpoint="auto")
    with pytest.raises(ValueError, match=r"another recipe .*stages was"):
        make_trainer().train(resume_from_checkpoint="auto")


@pytest.mark.parametrize("checkpoint", ["nowhere", "stages/0-instance"])
def test_a_checkpoint_of_no_stage_is_refused(make_trainer, tmp_path, checkpoint):
    with pytest.raises(ValueError, match="is no checkpoint of this run"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "run" / checkpoint))


def test_logs_hold_one_series_for_each_loss_and_stage(make_trainer):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(report_to="tensorboard")
    trainer.train()
    for index, expected in enumerate(({"instance_loss"}, {"instance_loss", "contrastive_loss"})):
        (event_file,) = trainer.folder.stage(index).rglob("events.out.tfevents.*")
        events = EventAccumulator(str(event_file)).Reload()
        tags = {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}
        assert {tag for tag in tags if tag.endswith("_loss") and tag != "train_loss"} == expected
        assert "eval/rsum" in tags
        total = sum(events.Scalars(f"train/{name}")[3].value for name in expected)
        assert total == pytest.approx(events.Scalars("train/loss")[3].value, rel=1e-4)


def test_report_to_none_writes_no_events(make_trainer, tmp_path):
    make_trainer(stages=STAGES[:1]).train()
    assert not list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_each_stage_starts_its_own_schedule(make_trainer):
    trainer = make_trainer(warmup_steps=2)
    trainer.train()
    for index, stage in enumerate(STAGES):
        history = json.loads((trainer.folder.stage(index) / "stage.json").read_text())["log_history"]
        rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
        assert max(rates) == pytest.approx(stage.learning_rate)
        assert rates[0] < rates[1]
        assert rates[-1] < 0.1 * stage.learning_rate


def test_a_shared_feature_cache_is_reused(make_trainer, tmp_path):
    cache = tmp_path / "cache"
    make_trainer("a", STAGES[:1], feature_cache_dir=str(cache)).train()
    (features,) = cache.glob("train/*/image.npy")
    stamp = features.stat().st_mtime_ns
    make_trainer("b", STAGES[:1], feature_cache_dir=str(cache)).train()
    assert [path.stat().st_mtime_ns for path in cache.glob("train/*/image.npy")] == [stamp]
    assert not (tmp_path / "b" / "feature_cache").exists()


def test_the_last_epoch_is_kept_on_request(make_trainer):
    trainer = make_trainer(stages=(Stage("joint", 3, 3e-2, 1, 1, True),), load_best_model_at_end=False)
    metrics = trainer.train()
    history = json.loads((trainer.folder.stage(0) / "stage.json").read_text())["log_history"]
    assert metrics["validation"]["rsum"] == [e["eval_rsum"] for e in history if "eval_rsum" in e][-1]


def test_a_last_checkpoint_between_two_evaluations_is_measured(make_trainer):
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 5}
    trainer = make_trainer(stages=STAGES[1:], load_best_model_at_end=False, **steps)
    metrics = trainer.train()
    assert trainer.evaluate()["rsum"] == pytest.approx(metrics["validation"]["rsum"], abs=1e-6)


def test_activation_checkpointing_runs_layers_twice_and_changes_no_loss(make_trainer):
    known = {field.name for field in fields(IConETrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    found, runs = [], []
    for is_on in (False, True):
        trainer = make_trainer(f"run-{is_on}", STAGES[1:], **{name: is_on})
        training = []
        trainer.model.text_model.encoder.layer[1].attention.register_forward_pre_hook(
            lambda module, args, training=training: training.append(module.training)
        )
        trainer.train()
        found.append(losses(trainer))
        runs.append(sum(training))
    assert runs == [12, 24]  # 12 updates
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_mixed_precision_in_both_stages_leaves_a_plain_model(make_trainer, batch, tmp_path):
    exact = make_trainer("exact")
    exact.train()
    trainer = make_trainer(bf16=True)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(exact), rel=0.02)  # bfloat16 has 8 bits
    assert not {key for key, loss in losses(trainer).items() if loss == losses(exact)[key]}
    loaded = IConEModel.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():  # no autocast is left in the trained model's forward
        assert torch.equal(trainer.model.eval()(**batch).image_embeds, loaded(**batch).image_embeds)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": make_groups(15), "num_groups": 16}, "classifier has 16 classes, the training split 15 groups"),
        ({"validation": make_groups(0)}, "no validation groups"),
        ({"validation": make_groups(3, start=10)}, "stand in both train and validation"),
        ({"train": make_groups(16).remove_columns("captions")}, "train_dataset lacks the columns captions"),
        ({"train": make_groups(16, captions=[0] + [2] * 15)}, r"1 groups of train_dataset have no caption"),
        ({"stages": ()}, "no stages"),
        ({"stages": STAGES[:1] * 2}, "must differ"),
        (
            {"save_strategy": "no", "load_best_model_at_end": False},
            "save_strategy=no and eval_strategy=epoch must be the same",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(make_trainer, make_model, tmp_path, change, message):
    change = dict(change)
    if "num_groups" in change:
        change["model"] = make_model(num_groups=change.pop("num_groups"))
    elif "train" in change:
        change["model"] = make_model(num_groups=16)
    with pytest.raises(ValueError, match=message):
        make_trainer(**change)
    assert not (tmp_path / "run" / "stages").exists()


def test_a_stage_list_without_instance_loss_needs_no_classifier(make_trainer, make_model):
    trainer = make_trainer(stages=(Stage("contrastive", 1, 1e-3, 0, 1, True),), model=make_model(num_groups=0))
    projection = trainer.model.visual_projection.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.visual_projection.weight, projection)
    assert IConEModel.from_pretrained(trainer.folder.path).classifier is None


def test_a_temperature_of_0_is_refused_also_if_it_was_assigned_later(make_trainer, make_model):
    model = make_model(num_groups=16)
    model.config.temperature = 0
    with pytest.raises(ValueError, match="temperature=0 must be greater than 0"):
        make_trainer(model=model)


def test_an_unlimited_tokenizer_is_limited_to_the_text_tower(make_trainer, processor, caplog):
    python_logging.getLogger("transformers").propagate = True
    processor.tokenizer.model_max_length = 10**30
    trainer = make_trainer()
    assert processor.tokenizer.model_max_length == 10**30  # not before the run begins
    trainer.evaluate()
    assert processor.tokenizer.model_max_length == 24


def test_nothing_is_changed_before_everything_is_checked(make_trainer, make_model, processor, tmp_path):
    model = make_model(num_groups=16, text_pooling="mean")
    classifier, processor.tokenizer.model_max_length = model.classifier, 10**30
    with pytest.raises(ValueError, match="neighbour_run=4"):
        make_trainer(model=model, shard_classifier=True, neighbour_run=4)
    trainer = make_trainer(model=model, shard_classifier=True)
    assert model.classifier is classifier
    assert processor.tokenizer.model_max_length == 10**30
    assert not (tmp_path / "run").exists()
    trainer.train()
    assert isinstance(model.classifier, ShardedClassifier)


def test_a_run_is_tested_and_described_from_python_as_by_the_command(make_trainer, tmp_path):
    trainer = make_trainer(stages=STAGES[:1])
    metrics = trainer.train()
    test = trainer.test(make_groups(9, start=20))
    assert test == trainer.evaluate(make_groups(9, start=20))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == {**metrics, "test": test}
    assert (tmp_path / "run" / "retrieval.png").stat().st_size > 10_000
    trainer.write_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"{test['rsum']:.1f}" in card
    assert "retrieval.png" in card


def test_the_captions_of_a_run_are_read_once(make_trainer, monkeypatch):
    """Six places need them: checks, recipe, log, cache, batches and validation."""
    train, validation = make_groups(16), make_groups(10, start=16)
    read = []
    whole_column = Dataset.__getitem__

    def counting(self, key):
        if key == "captions":
            read.append(self)
        return whole_column(self, key)

    monkeypatch.setattr(Dataset, "__getitem__", counting)
    make_trainer(train=train, validation=validation).train()
    assert sorted(map(len, read)) == [10, 16]


def test_write_metrics_keeps_other_splits(tmp_path):
    write_metrics(tmp_path, {"validation": {"rsum": 1.0}})
    assert write_metrics(tmp_path, {"test": {"rsum": 2.0}}) == {"validation": {"rsum": 1.0}, "test": {"rsum": 2.0}}


def test_class_vectors_start_from_the_groups_means(make_trainer, make_model):
    """The first stage that uses them starts from the mean of each group's embeddings, as the model embeds them then."""
    stages = (
        Stage("contrastive", 1, 1e-3, instance_weight=0, contrastive_weight=1, train_encoders=False),
        Stage("both", 1, 1e-9, instance_weight=1, contrastive_weight=1, train_encoders=False),
        Stage("again", 1, 1e-9, instance_weight=1, contrastive_weight=1, train_encoders=True),
    )
    train = make_groups(16, captions=[1, 2, 3, 4] * 4)
    trainer = make_trainer(stages=stages, train=train, class_vectors="group_means")
    trainer.train()
    images, texts, text_to_image = encode_groups(trainer.model, trainer.processor, train)
    for row in range(16):
        captions = texts[text_to_image == row].mean(0)
        expected = images[row] + captions / captions.norm()
        assert torch.allclose(trainer.model.classifier.weight[row], expected / expected.norm(), atol=1e-5)


@pytest.mark.parametrize("neighbour_run", [0, 4])
def test_several_positives_and_neighbours_train(make_trainer, make_model, neighbour_run):
    model = make_model(num_groups=16, text_pooling="mean", several_positives=True, contrastive_loss="sigmoid")
    trainer = make_trainer(model=model, stages=STAGES[1:], pairs_per_group=2, neighbour_run=neighbour_run)
    seen = []

    def watch(module, args, inputs, output):
        if module.training:
            embeds = (one.detach().double().numpy() for one in (output.image_embeds, output.text_embeds))
            seen.append((*embeds, inputs["group_ids"].numpy(), module.logit_bias.item()))

    model.register_forward_hook(watch, with_kwargs=True)
    trainer.train()
    assert len(losses(trainer)) == len(seen) == 2 * 8  # 16 groups of 3 captions: portions of 2 and 1, four a batch
    history = json.loads((trainer.folder.stage(0) / "stage.json").read_text())["log_history"]
    logged = [entry["contrastive_loss"] for entry in history if "contrastive_loss" in entry]
    for loss, (images, texts, groups, bias) in zip(logged, seen, strict=True):
        # SigLIP's loss, written down once more: every pair of one group matches.
        signs = np.where(groups[:, None] == groups[None, :], 1, -1)
        logits = images @ texts.T / model.config.temperature + bias
        assert loss == pytest.approx(np.logaddexp(0, -signs * logits).sum() / len(groups), rel=1e-4)
    assert any(len(set(groups)) < len(groups) for _, _, groups, _ in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_vectors": "mean"}, "class_vectors='mean' must be one of random, group_means"),
        ({"pairs_per_group": 2}, "set several_positives"),
    ],
)
def test_options_that_fit_nothing_are_refused(make_trainer, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**arguments)


def test_neighbours_need_class_vectors(make_trainer, make_model):
    stages = (Stage("contrastive", 1, 1e-3, instance_weight=0, contrastive_weight=1, train_encoders=False),)
    with pytest.raises(ValueError, match="neighbour_run=4 batches groups"):
        make_trainer(stages=stages, model=make_model(num_groups=0), neighbour_run=4)


class Collector(TrainerCallback):
    """Collects logs, and holds what can't be copied."""

    def __init__(self):
        self.lock, self.logs = threading.Lock(), []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


def test_callbacks_are_the_users_own_objects(make_trainer):
    collector = Collector()
    trainer = make_trainer(callbacks=[collector])
    trainer.train()
    results = [json.loads((trainer.folder.stage(index) / "stage.json").read_text()) for index in range(2)]
    assert len(collector.logs) == sum(len(result["log_history"]) for result in results) > 4


def test_a_diverging_run_stops_at_its_first_loss_that_is_not_finite(make_trainer):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 8:  # the ninth update: one epoch and its checkpoint are done
                kwargs["model"].visual_projection.weight.data.fill_(float("nan"))

    trainer = make_trainer(stages=(Stage("joint", 2, 1e-3, 1, 1, True),), callbacks=[Spoil()])
    with pytest.raises(DivergedError, match=r"Update 9 of stage 'joint' has a loss of nan.*checkpoint-6"):
        trainer.train()
    assert [path.name for path in trainer.folder.stage(0).glob("checkpoint-*")] == ["checkpoint-6"]


def test_weights_that_embed_nothing_are_neither_measured_nor_saved(make_trainer):
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 5:  # the sixth update, the epoch's last: no loss comes after it
                kwargs["model"].visual_projection.weight.data.fill_(float("nan"))

    trainer = make_trainer(stages=(Stage("joint", 1, 1e-3, 1, 1, True),), callbacks=[Spoil()])
    with pytest.raises(DivergedError, match="Update 6 of stage 'joint' has left weights that embed nothing"):
        trainer.train()
    assert not list(trainer.folder.stage(0).glob("checkpoint-*"))


def test_a_learned_temperature_is_kept_within_its_bound(make_trainer, make_model):
    model = make_model(num_groups=16, text_pooling="mean", learn_temperature=True, temperature=0.0101)
    make_trainer(model=model, stages=(Stage("joint", 1, 0.5, 0, 1, False),)).train()
    assert model.logit_scale.item() <= math.log(100) + 1e-6


def test_one_process_with_several_gpus_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(IConETrainingArguments, "n_gpu", 4)
    with pytest.raises(ValueError, match=r"One process sees 4 GPUs.*accelerate launch --num_processes 4"):
        make_trainer()
