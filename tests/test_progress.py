import contextlib
import io
import os
import pty
import re
import threading

import children
import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from tiny import StopAt, make_groups

from icone_hf import IConEProcessor, IConETrainer, IConETrainingArguments, Stage, progress
from icone_hf.progress import duration
from icone_hf.progress import progress as show

COUNT = """
import sys
from icone_hf.progress import progress
with progress("Counting outside", 2) as outside:
    for _ in range(2):
        with progress("Counting inside", 50) as inside:
            for _ in range(50):
                inside(1)
        print("above the bars", file=sys.stderr)
        outside(1)
"""


def on_a_terminal(code):
    """Run a program on a terminal of its own and return what it writes there."""
    watched, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    wait = children.start(["-c", code], env=environment, stdout=os.ttyname(terminal))
    codes, seen = [], b""

    def close_when_done():
        codes.append(wait().returncode)
        os.close(terminal)

    threading.Thread(target=close_when_done, daemon=True).start()
    with contextlib.suppress(OSError):  # how Linux says that the terminal has been closed
        while part := os.read(watched, 65536):
            seen += part
    assert codes == [0], seen
    return seen.decode()


def test_a_terminal_shows_bars_even_one_in_another():
    seen = on_a_terminal(COUNT)
    for said in ("Counting outside", "Counting inside", "50/50", "2/2", "━", "above the bars"):
        assert said in seen, said
    assert re.search(r"2/2\S* [\d.,]+/s", seen)


def test_a_log_has_lines_and_no_bars(capsys, monkeypatch):
    now = iter(range(0, 10_000, 10))  # every look at the clock is ten seconds later
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with show("Encoding images", 4000) as advance:
        for _ in range(8):
            advance(500)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Encoding images: 1,500 of 4,000, 50/s, 50 s to go",
        "Encoding images: 3,000 of 4,000, 50/s, 20 s to go",
        "Encoding images: 4,000 in 90 s",
    ]


def test_what_is_short_or_of_another_process_leaves_no_line(capsys, monkeypatch):
    with show("Encoding images", 2) as advance:
        advance(2)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with show("Encoding images", 2, is_shown=False) as advance:
        advance(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("rate", "said"), [(0, ""), (0.25, "0.25/s"), (3.21, "3.2/s"), (48.6, "49/s"), (1234, "1,234/s")]
)
def test_rates(rate, said):
    assert progress.per_second(rate) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3540, "59 min"), (5400, "1 h 30 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_a_stage_says_its_losses_and_validations(make_model, towers, tmp_path, capsys):
    args = IConETrainingArguments(tmp_path, use_cpu=True, per_device_train_batch_size=6, logging_steps=2)
    stage = Stage("joint", 2, 1e-3, 1, 1, True)
    processor = IConEProcessor.from_encoders(*towers)
    trainer = IConETrainer(make_model(12), args, make_groups(12), make_groups(6, start=12), processor, [stage])
    metrics = trainer.train()
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("joint")]
    losses, validations = ([line for line in lines if word in line] for word in (": loss ", ": validation "))
    assert len(losses) == 6  # 12 updates
    assert losses[0].startswith("joint, update 2 of 12, epoch 0.3333: loss ")
    assert all(part in losses[0] for part in ("(instance ", ", contrastive ", ", learning rate ", " to go"))
    assert any(f"validation Rsum {metrics['validation']['rsum']:.1f}" in line for line in validations)
    assert lines[-1].startswith("joint: 12 updates in ")
    assert "/12 [" not in captured.err + captured.out  # transformers' own bar


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_on_a_terminal_has_a_bar_that_is_gone_at_its_end(make_model, towers, tmp_path, monkeypatch, fails):
    screen, made = io.StringIO(), []

    def new_bars():
        console = Console(file=screen, force_terminal=True, width=120)
        made.append(Progress(TextColumn("{task.description}"), MofNCompleteColumn(), console=console))
        return made[-1]

    monkeypatch.setattr("icone_hf.training.progress.is_terminal", lambda: True)
    monkeypatch.setattr("icone_hf.training.progress.new_bars", new_bars)
    args = IConETrainingArguments(tmp_path, use_cpu=True, per_device_train_batch_size=6, logging_steps=2)
    processor, stage = IConEProcessor.from_encoders(*towers), Stage("joint", 1, 1e-3, 1, 1, True)
    callbacks = [StopAt("0-joint", 4)] if fails else None
    trainer = IConETrainer(
        make_model(12), args, make_groups(12), make_groups(6, start=12), processor, [stage], callbacks
    )
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        trainer.train()
    (bars,) = made
    assert not bars.live.is_started
    (task,) = bars.tasks
    assert task.description.startswith("joint: loss ")
    assert (task.completed, task.total) == ((3 if fails else 6), 6)
