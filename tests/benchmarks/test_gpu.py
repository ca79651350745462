"""The code of `make gpu`, on a CPU and tiny towers: each check passes, and the verdicts are honest."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, gpu_parity, gpu_training, harness, summary  # noqa: E402
from benchmarks.gpu import Setting, Verdict  # noqa: E402

ON_CPU = {"training_fp16": "on accelerators alone", "tests": "the default tests' own"}
SLOW = ("ranks",)  # three launches of two ranks


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting("cpu", str(tmp_path_factory.mktemp("gpu")), is_tiny=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in gpu.checks()]
)
def test_every_check_runs_on_a_cpu(name, setting):
    verdict, works = gpu.judge(gpu.checks()[name], setting)
    assert works
    if name in ON_CPU:
        assert verdict.outcome == "skipped"
        assert ON_CPU[name] in verdict.reason
    else:
        assert verdict.outcome == "passed", verdict.reason
        assert verdict.figures
        json.dumps(verdict.as_dict())
    if name in ("losses", "gradients", "training", "pinned_memory", "metrics"):  # against itself: exact
        differences = [value for key, value in verdict.figures.items() if key in ("loss", "gradient", "rsum")]
        differences += [value for key, value in verdict.figures.items() if key.endswith("apart")]
        assert differences
        assert not any(differences)
    if name == "resume":
        assert verdict.figures["same_to_the_bit"]


@pytest.mark.parametrize(
    ("name", "target", "broken"),
    [
        ("losses", "icone_hf.modeling.losses.contrastive_loss", lambda *args: torch.tensor(float("nan"))),
        ("metrics", "benchmarks.gpu_parity.retrieval_metrics", iter([{"rsum": 1.0}, {"rsum": 2.0}])),
        ("cached_gradients", "benchmarks.gpu_parity.apart", lambda *args: 0.5),
        ("training", "benchmarks.gpu_training.furthest", lambda *args: 0.5),
        ("resume", "benchmarks.gpu_training.StopAt.on_step_end", lambda *args, **kwargs: None),
    ],
)
def test_a_check_fails_where_something_is_wrong(name, target, broken, setting, tmp_path, monkeypatch):
    function = (lambda *args: next(broken)) if hasattr(broken, "__next__") else broken
    monkeypatch.setattr(target, function)
    setting = setting if name != "resume" else Setting("cpu", str(tmp_path), is_tiny=True)
    verdict, _ = gpu.judge(gpu.checks()[name], setting)
    assert verdict.outcome == "failed"
    assert verdict.reason


def test_gradients_of_a_loss_are_compared_on_tensors_of_their_own(setting, monkeypatch):
    """The loss is the same on both sides, its gradient is not."""
    calls = itertools.count(1)

    def drifting(image, text, *args, **keywords):
        return image.sum() + next(calls) * (image - image.detach()).sum()

    monkeypatch.setattr(gpu_parity.losses, "hinge_loss", drifting)
    verdict, _ = gpu.judge(gpu.checks()["losses"], setting)
    assert "gradients of max_hinge differ" in verdict.reason


def test_float16_is_compared_before_its_scaler_leaves_out_updates(monkeypatch):
    whole = {"heads 1": 24.0, "heads 2": 23.0, "joint 1": 16.0, "joint 2": 15.0}
    for precision, changed, is_right in (
        ("fp16", "joint 1", True),
        ("fp16", "heads 1", False),
        ("bf16", "joint 1", False),
    ):
        runs = iter([whole, {**whole, changed: 1.2 * whole[changed]}])
        monkeypatch.setattr(
            gpu_training, "train", lambda *args, runs=runs, **keywords: (next(runs), {"w": torch.ones(1)})
        )
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        verdict, _ = gpu.judge(gpu.checks()[f"training_{precision}"], Setting("cuda", ""))
        assert ("first losses differ" not in verdict.reason) == is_right, (precision, changed)


def test_the_tests_count_as_passed_once_they_say_so(monkeypatch):
    """Here they are skipped; with a card they run."""
    verdict, _ = gpu.judge(gpu.checks()["tests"], Setting("cuda", ""))
    if torch.cuda.is_available():
        assert "passed" in verdict.figures["pytest"]
    else:
        assert "skipped" in verdict.reason


def test_a_difference_that_is_no_number_is_too_large():
    cuda = Setting("cuda", "")
    assert gpu_parity.within(cuda, "x", 1e-6, 1e-5) == 1e-6
    for difference in (1e-4, float("nan")):
        with pytest.raises(AssertionError, match="x differ by"):
            gpu_parity.within(cuda, "x", difference, 1e-5)


def test_two_ranks_need_two_cards():
    verdict, _ = gpu.judge(gpu_training.check_ranks, Setting("cuda", "", cards=1))
    assert (verdict.outcome, verdict.reason) == ("failed" if torch.cuda.is_available() else "skipped", verdict.reason)
    assert "1 card: NCCL needs one for each of two ranks" in verdict.reason


def die(names, setting, sender):
    """Do what a crash of CUDA does to a process: the second of the checks kills it."""
    for name in names:
        sender.send((name, None))
        if name == "kills":
            sys.exit(139)
        if name == "hangs":
            time.sleep(60)
        sender.send((name, Verdict("passed")))


def test_no_check_hides_the_others(tmp_path):
    names = ["first", "kills", "second", "hangs", "third"]
    verdicts = gpu.run(names, Setting("cpu", ""), budget=60, longest=2, work=die, start_method="fork")
    assert {name: verdict.outcome for name, verdict in verdicts.items()} == {
        "first": "passed",
        "kills": "failed",
        "second": "passed",
        "hangs": "failed",
        "third": "passed",
    }
    assert verdicts["kills"].reason == "its process died with exit code 139"
    assert verdicts["hangs"].reason == "it didn't end in 2 s"


def test_what_the_time_is_not_enough_for_is_not_run():
    verdicts = gpu.run(["first", "hangs", "third"], Setting("cpu", ""), budget=2, work=die, start_method="fork")
    assert [verdict.outcome for verdict in verdicts.values()] == ["passed", "not run", "not run"]
    assert all("for all checks were over" in verdicts[name].reason for name in ("hangs", "third"))


@pytest.mark.slow
def test_the_command_runs_checks_in_a_process_and_tells_skipped_from_passed():
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "losses", "training_fp16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    outcomes = [json.loads(line.partition(": ")[2])["outcome"] for line in done.stdout.splitlines()]
    assert outcomes == ["passed", "skipped"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_and_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu.main(["no_such_check"])


def test_results_name_the_card_and_become_a_table(tmp_path):
    path = tmp_path / "gpu.json"
    assert gpu.table(path) == gpu.NEVER
    verdicts = {
        "losses": Verdict("passed", seconds=1.26, figures={"loss": 1e-7}),
        "ranks": Verdict("skipped", "1 card"),
    }
    gpu.write_results(verdicts, 0, path)
    content = json.loads(path.read_text())
    assert {"card", "driver", "versions", "date", "checks"} <= content.keys()
    assert content["checks"]["losses"] == {"outcome": "passed", "seconds": 1.3, "loss": 1e-7}
    assert content["checks"]["ranks"] == {"outcome": "skipped", "reason": "1 card", "seconds": 0.0}
    assert "| losses | passed | 1 | loss 1e-07 |" in gpu.table(path)
    assert "| ranks | skipped | 0 | 1 card |" in gpu.table(path)


def test_the_page_says_what_has_run_on_a_gpu():
    page = harness.PAGE.read_text(encoding="utf-8")
    marks = summary.GPU_MARKS
    assert page.split(marks[0])[1].split(marks[1])[0].strip() == gpu.table().strip()
