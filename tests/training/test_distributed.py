"""Two processes against one: gathered losses, weights, and the gradient of the gathered losses.

No launcher starts them here: test_commands.py has torchrun, test_launchers.py accelerate.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import distributed_run
import pytest
import torch
from ranks import fork_ranks
from safetensors.torch import load_file
from tiny import free_port

from icone_hf import IConEModel, IConEProcessor

TESTS = Path(__file__).parents[1]


def launch(towers, output, processes, **options):
    """Runs distributed_run.py to its end; returns its exit code and what it wrote to stderr."""
    command = [str(TESTS / "distributed_run.py"), *towers, str(output), json.dumps(options)]
    if processes == 1:
        done = [children.run(command, with_ours=True)]
    else:
        done = children.ranks(processes, command, free_port())
    return max(one.returncode for one in done), "".join(one.stderr for one in done)


def run(towers, output, processes, per_device_train_batch_size, **options):
    code, errors = launch(towers, output, processes, per_device_train_batch_size=per_device_train_batch_size, **options)
    assert code == 0, errors[-3000:]
    return read(output, processes)


def read(output, processes):
    result = json.loads((output / "result.json").read_text())
    assert result["world_size"] == processes
    history = {}
    for stage in ("0-instance", "1-joint"):
        log = json.loads((output / "stages" / stage / "stage.json").read_text())["log_history"]
        names = ("loss", "instance_loss", "contrastive_loss", "grad_norm")
        history |= {(stage, e["step"], k): e[k] for e in log for k in names if k in e}
    return result["metrics"], history, IConEModel.from_pretrained(output).state_dict()


def assert_same(ours, expected):
    assert ours[1] == pytest.approx(expected[1], rel=1e-5)
    assert ours[0]["stages"]["start"] == pytest.approx(expected[0]["stages"]["start"], abs=1e-6)
    assert ours[0]["validation"]["rsum"] == pytest.approx(expected[0]["validation"]["rsum"], abs=1e-6)
    assert ours[2].keys() == expected[2].keys()
    for name, weight in expected[2].items():
        # A softmax does not see the key's bias: its gradient is zero but for rounding, which Adam turns into whole
        # steps.
        if not name.endswith(("key.bias", "k_proj.bias")):
            torch.testing.assert_close(ours[2][name], weight, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def alone(towers, tmp_path_factory):
    """One process with the whole batch, every class and no chunks."""
    result = run(towers, tmp_path_factory.mktemp("alone") / "run", 1, 128)
    assert len(result[1]) == 4 * 3 + 8 * 4
    return result


@pytest.mark.parametrize("shard_classifier", [False, True])
@pytest.mark.parametrize("chunk_size", [None, pytest.param(24, marks=pytest.mark.slow)])
def test_two_ranks_of_64_train_as_one_process_of_128(alone, towers, tmp_path, chunk_size, shard_classifier):
    """With the learned temperature, which in chunks (cached gradients) no forward of DDP sees."""
    options = {"per_device_chunk_size": chunk_size, "shard_classifier": shard_classifier}
    assert_same(run(towers, tmp_path / "two", 2, 64, **options), alone)


@pytest.mark.slow
def test_ranks_drop_hide_and_crop_what_one_process_does(towers, tmp_path):
    """In batches that need no fillers, for which features would be drawn too."""
    options = {"augment_crop_scale": 0.5, "augment_colour": 0.3, "mask_tokens": 0.2, "cached_views": 2}
    options |= {"feature_dropout": 0.3, "num_groups": 128}
    alone = run(towers, tmp_path / "one", 1, 128, **options)
    assert_same(run(towers, tmp_path / "two", 2, 64, **options), alone)


def test_all_ranks_score_the_sample_that_the_first_has_drawn(towers, tmp_path):
    expected = run(towers, tmp_path / "one", 1, 128, instance_samples=20)
    assert_same(run(towers, tmp_path / "two", 2, 64, instance_samples=20), expected)


def test_two_ranks_end_a_stage_early_where_one_does(towers, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options = {**steps, "early_stopping_patience": 1}
    expected = run(towers, tmp_path / "one", 1, 128, **options)
    assert len(expected[1]) < 4 * 3 + 8 * 4
    assert_same(run(towers, tmp_path / "two", 2, 64, **options), expected)


def test_shards_are_taken_up_again_by_another_number_of_ranks(alone, towers, tmp_path):
    """Killed on two ranks in the second stage's second epoch, ended on four: as if it had never stopped."""
    code, errors = launch(
        towers,
        tmp_path / "run",
        2,
        per_device_train_batch_size=64,
        shard_classifier=True,
        stop_at=["1-joint", 6],
    )
    assert code != 0
    assert "KeyboardInterrupt" in errors
    moments = load_file(tmp_path / "run" / "stages" / "1-joint" / "checkpoint-4" / "class_moments.safetensors")
    assert {name: tuple(rows.shape) for name, rows in moments.items()} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq"), (150, 16)
    )
    assert_same(run(towers, tmp_path / "run", 4, 32, shard_classifier=True), alone)


def test_a_killed_rank_ends_the_others_and_another_number_of_ranks_goes_on(alone, towers, tmp_path):
    """Killed in mid-step on four ranks that no launcher looks after, ended on one: as if it had never stopped."""
    output, options = tmp_path / "run", {"kill_at": ["1-joint", 5, 2], "dataloader_num_workers": 1}
    codes, errors, ends = fork(towers, output, 4, global_batch_size=128, **options)
    assert codes[2] == -signal.SIGKILL, errors[2][-3000:]
    assert all(codes[rank] not in (0, None) and ends[rank] - ends[2] < 60 for rank in (0, 1, 3)), (codes, ends)
    for rank in (0, 1, 3):
        assert "rank 2 (process " in errors[rank].splitlines()[-1], errors[rank][-3000:]
        assert errors[rank].splitlines()[-1].endswith("without a word: it was killed, or its computer is lost.")
    codes, errors, _ = fork(towers, output, 1, global_batch_size=128)
    assert codes == [0], errors
    assert_same(read(output, 1), alone)


@pytest.mark.slow
def test_torchrun_ends_the_ranks_beside_a_killed_one(towers, tmp_path):
    start = time.monotonic()
    options = json.dumps({"global_batch_size": 128, "kill_at": ["0-instance", 2, 1]})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(TESTS / "distributed_run.py"), *towers, str(tmp_path / "run"), options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "exitcode  : -9" in done.stderr
    assert time.monotonic() - start < 120  # the start of the run among them


IN_STEPS = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}


@pytest.fixture(scope="module")
def alone_in_steps(towers, tmp_path_factory):
    return run(towers, tmp_path_factory.mktemp("alone-in-steps") / "run", 1, 128, **IN_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 2)])
def test_a_run_goes_on_in_mid_epoch_with_more_ranks_and_with_fewer(alone_in_steps, towers, tmp_path, before, after):
    stop_at = ["1-joint", 7]  # in the second epoch, after checkpoint-6
    code, errors = launch(towers, tmp_path / "run", before, global_batch_size=128, stop_at=stop_at, **IN_STEPS)
    assert code != 0
    assert "KeyboardInterrupt" in errors
    assert_same(run(towers, tmp_path / "run", after, 128 // after, **IN_STEPS), alone_in_steps)


def test_ranks_that_have_no_group_of_their_own_train_as_one_process(towers, tmp_path):
    """Three groups and two for validation on four ranks: each batch leaves one rank with a filler alone."""
    few = {"num_groups": 3, "num_eval": 2}
    expected = run_few(towers, tmp_path / "one", 1, **few)
    assert_same(run_few(towers, tmp_path / "four", 4, **few), expected)


def test_two_ranks_average_their_weights_as_one_process_does(towers, tmp_path):
    """Of a sharded classifier each averages its rows. Killed on two ranks in mid-stage, ended on four."""
    options = {"num_groups": 6, "num_eval": 4, "weight_average": 0.5}
    expected = run_few(towers, tmp_path / "one", 1, **options)
    options |= {"shard_classifier": True, "global_batch_size": 8}
    codes, errors, _ = fork(towers, tmp_path / "run", 2, **options, stop_at=["1-joint", 4])
    assert 0 not in codes, errors
    assert (tmp_path / "run" / "stages" / "1-joint" / "checkpoint-3" / "raw_class_vectors.safetensors").is_file()
    codes, errors, _ = fork(towers, tmp_path / "run", 4, **options)
    assert set(codes) == {0}, errors
    assert_same(read(tmp_path / "run", 4), expected)


@pytest.mark.parametrize("options", [{}, {"per_device_chunk_size": 1}, {"shard_classifier": True}], ids=str)
def test_ranks_learn_from_the_teachers_of_all(towers, tmp_path, options):
    """Five groups on two ranks: each batch has a filler. All that is added to the plain losses is on.

    A tower that is named teaches beside the run's own, and a checkpoint beside both.
    """
    IConEModel.from_encoders(*towers, projection_dim=12).save_pretrained(tmp_path / "teacher")
    IConEProcessor.from_encoders(*towers).save_pretrained(tmp_path / "teacher")
    few = {
        "num_groups": 5,
        "num_eval": 3,
        "image_teacher": towers[0],
        "distillation_teacher": str(tmp_path / "teacher"),
    }
    few["config"] = {"soft_target_weight": 0.5, "uni_modal_weight": 1.0, "distillation_weight": 1.0}
    few["config"] |= {"hard_negative_beta": 0.5, "instance_label_smoothing": 0.1}
    expected = run_few(towers, tmp_path / "one", 1, **few)
    assert_same(run_few(towers, tmp_path / "two", 2, **few, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"shard_classifier": True}, {"per_device_chunk_size": 1}], ids=str)
@pytest.mark.parametrize("num_groups", [1, 3, 5])
def test_fewer_groups_than_the_batch_in_other_ways(towers, tmp_path, num_groups, options):
    expected = run_few(towers, tmp_path / "one", 1, num_groups=num_groups, num_eval=3)
    assert_same(run_few(towers, tmp_path / "four", 4, num_groups=num_groups, num_eval=3, **options), expected)


def run_few(towers, output, processes, **options):
    codes, errors, _ = fork(towers, output, processes, global_batch_size=8, **options)
    assert set(codes) == {0}, errors
    return read(output, processes)


def fork(towers, output, processes, **options):
    """Trains as `launch` does, in forked processes that no launcher looks after."""
    output.parent.mkdir(exist_ok=True)
    return fork_ranks(lambda rank: distributed_run.main(*towers, str(output), **options), processes, output.parent)


def _gradients(rank, folder, group_ids, towers):
    """One of two processes: the gradient of its half of a batch, averaged over both as DDP does."""
    from tiny import make_groups

    from icone_hf import IConEModel, IConEProcessor

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, num_groups=8, projection_dim=16).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    groups = make_groups(8)
    inputs = IConEProcessor.from_encoders(*towers)(
        images=groups["image"][:], text=[captions[0] for captions in groups["captions"]], return_tensors="pt"
    )
    half = slice(4 * rank, 4 * rank + 4)
    output = model(**{name: value[half] for name, value in inputs.items()}, group_ids=group_ids[half])
    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            gradients[name] = parameter.grad / 2
    loss = output.loss.detach()
    torch.distributed.all_reduce(loss)
    if rank == 0:
        torch.save({"gradients": gradients, "loss": loss / 2}, f"{folder}/gathered.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("last_is_filler", [False, True])
def test_gradients_of_the_gathered_losses_are_those_of_one_process(
    towers, make_model, processor, tmp_path, last_is_filler
):
    from tiny import make_groups

    group_ids = torch.arange(8)
    if last_is_filler:
        group_ids[-1] = -100
    children.spawn(_gradients, (str(tmp_path), group_ids, towers), 2)
    gathered = torch.load(tmp_path / "gathered.pt")
    model = make_model().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    groups = make_groups(8)
    inputs = processor(images=groups["image"][:], text=[c[0] for c in groups["captions"]], return_tensors="pt")
    kept = group_ids >= 0
    output = model(**{name: value[kept] for name, value in inputs.items()}, group_ids=group_ids[kept])
    output.loss.backward()
    torch.testing.assert_close(gathered["loss"], output.loss.detach(), atol=1e-5, rtol=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == gathered["gradients"].keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gathered["gradients"][name], gradient, atol=1e-5, rtol=1e-4)


def _chunked_gradients(rank, folder, towers):
    """One of two processes: its half of a batch of fourteen, fillers at the end, in chunks, behind a DDP wrapper."""
    from tiny import make_groups

    from icone_hf import IConEModel, IConEProcessor
    from icone_hf.training.gradient_cache import backward_in_chunks

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, num_groups=12, projection_dim=16, **SIGMOID).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    rows = [*range(12), 0, 0]
    group_ids = torch.tensor([*range(12), -100, -100])
    groups, processor = make_groups(12), IConEProcessor.from_encoders(*towers)

    def chunk(places):
        texts = [groups[rows[place]]["captions"][0] for place in places]
        inputs = processor(images=[groups[rows[place]]["image"] for place in places], text=texts, return_tensors="pt")
        return {**inputs, "group_ids": group_ids[list(places)]}

    share = range(7 * rank, 7 * rank + 7)
    chunks = [chunk(share[start : start + 5]) for start in (0, 5)]  # the second rank's last chunk is fillers alone
    output = backward_in_chunks(wrapped.module, lambda: chunks, group_ids[7 * rank : 7 * rank + 7], 1.0, 1.0)
    loss = output.loss.clone()
    torch.distributed.all_reduce(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save({"gradients": gradients, "loss": loss / 2}, f"{folder}/{rank}.pt")
    # If DDP were the last to let go of the process group, it would join gloo's threads without letting go of the GIL,
    # and one of these may be waiting for it.
    del wrapped
    torch.distributed.destroy_process_group()


SIGMOID = {"contrastive_loss": "sigmoid", "learn_temperature": True, "text_pooling": "mean"}


def test_chunks_on_two_ranks_have_the_gradients_of_one_process(towers, make_model, processor, tmp_path):
    """Those of the learned temperature and bias too, on every rank."""
    from tiny import make_groups

    children.spawn(_chunked_gradients, (str(tmp_path), towers), 2)
    model = make_model(num_groups=12, **SIGMOID).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    groups = make_groups(12)
    inputs = processor(images=groups["image"][:], text=[c[0] for c in groups["captions"]], return_tensors="pt")
    output = model(**inputs, group_ids=torch.arange(12))
    output.loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {"logit_scale", "logit_bias"} <= expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for rank in range(2):
        ours = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(ours["loss"], output.loss.detach(), rtol=1e-5, atol=1e-6)
        assert ours["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert (ours["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * largest, name
