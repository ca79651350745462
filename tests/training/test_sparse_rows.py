"""Sampled classes in training: the optimizer, clipping, resuming. Two processes: test_distributed.py."""

import io
import json

import pytest
import torch
from tiny import StopAt, make_groups
from torch.nn import functional as F
from transformers import get_scheduler

from icone_hf import IConETrainer, IConETrainingArguments, Stage
from icone_hf.training.sparse_rows import AdamWithSparseRows, with_dense_gradients

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
STAGES = (
    Stage("instance", 2, 1e-3, instance_weight=1, contrastive_weight=0, train_encoders=False),
    Stage("joint", 1, 5e-4, instance_weight=1, contrastive_weight=1, train_encoders=True),
)


class LazyAdam:
    """Adam that leaves rows without a gradient as they are, and their moments; dense throughout."""

    def __init__(self, rows):
        self.rows, self.mean, self.square, self.steps = rows.clone(), torch.zeros_like(rows), torch.zeros_like(rows), 0

    def step(self, gradient, touched, rate):
        self.steps += 1
        mask = torch.zeros(len(self.rows), 1, dtype=torch.bool).index_fill_(0, touched, True)
        self.mean = torch.where(mask, BETA1 * self.mean + (1 - BETA1) * gradient, self.mean)
        self.square = torch.where(mask, BETA2 * self.square + (1 - BETA2) * gradient**2, self.square)
        mean, square = self.mean / (1 - BETA1**self.steps), self.square / (1 - BETA2**self.steps)
        self.rows -= torch.where(mask, rate * mean / (square.sqrt() + EPS), torch.zeros(()))


def make_optimizer(rows, head):
    dense = torch.optim.AdamW([head], lr=1e-2, weight_decay=0.1, fused=True)
    return AdamWithSparseRows(dense, torch.optim.SparseAdam([rows], lr=1e-2, betas=(BETA1, BETA2), eps=EPS))


def test_it_is_adam_on_touched_rows_and_adamw_elsewhere_with_schedule_and_checkpoint():
    rows, head = torch.nn.Parameter(torch.randn(30, 4)), torch.nn.Parameter(torch.randn(4, 4))
    expected_rows, expected_head = LazyAdam(rows.detach()), torch.nn.Parameter(head.detach().clone())
    adamw = torch.optim.AdamW([expected_head], lr=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(rows, head)
    schedule, expected_schedule = (get_scheduler("cosine", o, 3, 20) for o in (optimizer, adamw))
    for step in range(20):
        touched, target = torch.randperm(30)[:7], torch.randn(7, 4)
        (F.embedding(touched, rows, sparse=True) @ head - target).pow(2).sum().backward()
        expected = expected_rows.rows.clone().requires_grad_()
        (expected[touched] @ expected_head - target).pow(2).sum().backward()
        expected_rows.step(expected.grad, touched, adamw.param_groups[0]["lr"])
        for part in (optimizer, schedule, adamw, expected_schedule):
            part.step()
        optimizer.zero_grad()
        adamw.zero_grad()
        if step == 8:  # saved and loaded as the Trainer does
            file = io.BytesIO()
            torch.save((optimizer.state_dict(), schedule.state_dict()), file)
            optimizer = make_optimizer(rows, head)
            schedule = get_scheduler("cosine", optimizer, 3, 20)
            file.seek(0)
            for part, state in zip((optimizer, schedule), torch.load(file, weights_only=True), strict=True):
                part.load_state_dict(state)
        torch.testing.assert_close(rows.detach(), expected_rows.rows, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(head, expected_head, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_the_norm_is_that_of_the_dense_gradients_and_they_are_clipped(largest):
    rows, head = torch.nn.Parameter(torch.randn(10, 3)), torch.nn.Parameter(torch.randn(3))
    for touched in ([1, 5, 7], [5, 2]):  # two backward passes: row 5 stands in the gradient twice
        (F.embedding(torch.tensor(touched), rows, sparse=True) * head).pow(2).sum().backward()
    dense_rows, dense_head = (torch.nn.Parameter(p.detach()) for p in (rows, head))
    dense_rows.grad, dense_head.grad = rows.grad.to_dense(), head.grad.clone()
    idle = torch.nn.Parameter(torch.ones(2))
    norm = torch.nn.utils.clip_grad_norm_(with_dense_gradients([rows, head, idle]), largest)
    expected = torch.nn.utils.clip_grad_norm_([dense_rows, dense_head], largest)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(rows.grad.to_dense(), dense_rows.grad)
    torch.testing.assert_close(head.grad, dense_head.grad)


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    def make(output, instance_samples, stages=STAGES, num_groups=16, callbacks=None, **arguments):
        values = {"per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "use_cpu": True}
        return IConETrainer(
            make_model(num_groups=num_groups, text_pooling="mean", instance_samples=instance_samples),
            IConETrainingArguments(
                str(tmp_path / output), disable_tqdm=True, save_total_limit=None, **{**values, **arguments}
            ),
            make_groups(num_groups),
            make_groups(10, start=num_groups),
            processor,
            stages,
            callbacks,
        )

    return make


def logged(trainer, name):
    """A value of every logged step of the run, by stage and step."""
    found = {}
    for index, stage in enumerate(trainer.stages):
        history = json.loads((trainer.folder.stage(index) / "stage.json").read_text())["log_history"]
        found |= {(stage.name, entry["step"]): entry[name] for entry in history if name in entry}
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_grad_norm": 0.5},
        {"max_grad_norm": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ],
)
def test_with_all_others_a_run_is_the_exact_one(make_trainer, arguments):
    exact, sampled = make_trainer("exact", 0, **arguments), make_trainer("sampled", 100, **arguments)
    for trainer in (exact, sampled):
        trainer.train()
    assert len(logged(exact, "loss")) == 18
    for name in ("loss", "instance_loss", "grad_norm"):
        # Sampling draws numbers too, so that dropout draws others in the second stage.
        first = {key: value for key, value in logged(exact, name).items() if key[0] == "instance"}
        ours = {key: value for key, value in logged(sampled, name).items() if key[0] == "instance"}
        assert ours == pytest.approx(first, rel=1e-4), name
    assert max(logged(exact, "grad_norm").values()) > 0.5  # so that clipping clips


def test_an_interrupted_run_ends_as_one_that_was_not(make_trainer):
    whole = make_trainer("whole", 4)
    metrics = whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer("cut", 4, callbacks=[StopAt("0-instance", 8)]).train()
    again = make_trainer("cut", 4)
    assert again.train(resume_from_checkpoint="auto") == metrics
    assert logged(again, "loss") == logged(whole, "loss")
    assert torch.equal(again.model.classifier.weight, whole.model.classifier.weight)


def test_a_stage_without_instance_loss_leaves_the_class_vectors(make_trainer):
    trainer = make_trainer("run", 4, stages=(Stage("contrastive", 1, 1e-2, 0, 1, False),))
    before = trainer.model.classifier.weight.detach().clone()
    trainer.train()
    assert torch.equal(before, trainer.model.classifier.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": 0.1}, r"instance_samples=4 .*weight_decay=0.1 would not reach"),
        ({"optim": "adafactor"}, "optim=adafactor: choose"),
        ({"per_device_chunk_size": 2}, "per_device_chunk_size=2 would draw one for each chunk"),
    ],
)
def test_what_sparse_gradients_do_not_go_with_is_refused(make_trainer, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer("run", 4, **arguments)
    make_trainer("run", 0, **arguments)
