"""Successive halving: many candidates for a few epochs, the best of them for more.

A survivor is trained from scratch, with the longer schedule. So each trial is what `icone train` would do with its
values, which a run continued behind the end of its schedule isn't, and a candidate's figures do not depend on how far
the others came. Of a search's time this costs less than 1 / eta.

OUTPUT_DIR/
  search.json      what is searched: another search in the same folder is refused
  trials.jsonl     a line for each trial that is done, whole or not there; these are not run again
  tuning.json      all of it, with the best, once the search is done
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DivergedError, InputError
from ..progress import say
from .recipe import differences
from .whole_files import write_json

SEARCH_FILE = "search.json"
TRIALS_FILE = "trials.jsonl"
RESULT_FILE = "tuning.json"


@dataclass(frozen=True)
class Rung:
    """Hold how many candidates train for how many epochs."""

    candidates: int
    epochs: int


@dataclass(frozen=True)
class Outcome:
    """Hold what a trial has measured.

    Args:
        rsum: the validation Rsum of its best epoch. `None` if it diverged.
        best_epoch: of the epochs trained.
        validation: all validation metrics of that epoch.
        seconds: that it took.
        diverged: the message, if it did.
    """

    rsum: float | None
    best_epoch: float | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    diverged: str | None = None


@dataclass(frozen=True)
class Trial:
    """Hold one training of a candidate, and its outcome."""

    candidate: int
    rung: int
    epochs: int
    seed: int
    values: Mapping[str, Any]
    outcome: Outcome


@dataclass(frozen=True)
class Result:
    """Hold how a search has ended.

    Attributes:
        trials: all of them, in the order in which they ran.
        best: the number of the best candidate.
        rsums: of the best candidate on the last rung, one for each seed.
    """

    trials: list[Trial]
    best: int
    rsums: list[float]

    def last_trials(self) -> list[Trial]:
        """Return each candidate's last trial, the best first.

        Trials of further seeds are left out.
        """
        last = {trial.candidate: trial for trial in self.trials if trial.seed == self.trials[0].seed}
        order = sorted(last.values(), key=lambda trial: (-trial.rung, *_rank(trial)))
        return sorted(order, key=lambda trial: trial.candidate != self.best)


def plan_rungs(candidates: int, eta: int, max_epochs: int) -> list[Rung]:
    """Plan successive halving (Jamieson and Talwalkar, 2016).

    Each rung has 1 / eta of the candidates of the one before, for eta times the epochs; the last has `max_epochs`, and
    the first one epoch or more.

    Raises:
        InputError: for less than one candidate or epoch, or an eta below 2.
    """
    for name, value, least in (("trials", candidates, 1), ("eta", eta, 2), ("max_epochs", max_epochs, 1)):
        if value < least:
            raise InputError(f"{name}={value} must be {least} or more.")
    halvings = 0
    while max_epochs >= eta ** (halvings + 1) and candidates >= eta ** (halvings + 1):
        halvings += 1
    return [
        Rung(candidates // eta**rung, math.floor(max_epochs / eta ** (halvings - rung) + 0.5))
        for rung in range(halvings + 1)
    ]


class Search:
    """Search by successive halving.

    A folder keeps every trial.

    Args:
        folder: of the search; one that was stopped goes on there.
        key: what is searched: `decisive` holds what decides a run's numbers, the rest the search's own settings.
        candidates: their values.
        rungs: of [`plan_rungs`].
        seed: of every trial.
        run: trains the values for a number of epochs from a seed; it raises [`DivergedError`] if that fails.

    Raises:
        InputError: if the folder holds another search.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
        rungs: Sequence[Rung],
        seed: int,
        run: Callable[[Mapping[str, Any], int, int], Outcome],
    ):
        self.folder = folder
        self.key = json.loads(json.dumps(key, default=str))  # as a file gives it back
        self.candidates = candidates
        self.rungs = rungs
        self.seed = seed
        self._run = run
        self._check_folder()
        self._done = {(trial.candidate, trial.epochs, trial.seed): trial for trial in _read_trials(folder)}
        self._trials: list[Trial] = []

    def _check_folder(self) -> None:
        """Refuse another search's folder; mark a new one."""
        path = self.folder / SEARCH_FILE
        if not path.is_file():
            write_json(path, self.key)
            return
        saved = json.loads(path.read_text())
        found = differences(saved.get("decisive", {}), self.key["decisive"])
        others = {name for name in (*saved, *self.key) if name != "decisive"}
        found += [
            f"{k} was {saved.get(k)}, is {self.key.get(k)}" for k in sorted(others) if saved.get(k) != self.key.get(k)
        ]
        if found:
            raise InputError(
                f"{self.folder} holds another search ({'; '.join(found)}): go on with it as it was, or search in "
                "another output_dir."
            )

    def search(self, final_seeds: int = 1) -> Result:
        """Run all rungs, and find the best candidate.

        Args:
            final_seeds: number of seeds that the best of the last rung are trained from, at most eta of them; the mean
                decides. 1: the seed of the search alone.

        Raises:
            DivergedError: if every candidate of a rung diverges.
        """
        self._trials = []
        alive = list(range(len(self.candidates)))
        for number, rung in enumerate(self.rungs):
            trials = [self._trial(candidate, number, rung.epochs, self.seed) for candidate in alive[: rung.candidates]]
            order = sorted(trials, key=_rank)
            # What diverged counts as worst, and is not worth more epochs either.
            alive = [trial.candidate for trial in order if trial.outcome.rsum is not None]
            if not alive:
                raise DivergedError(
                    f"All {len(trials)} candidates of rung {number} have diverged: give lower values of learning_rate. "
                    f"The first: {order[0].outcome.diverged}"
                )
        best, rsums = self._settle(alive, final_seeds)
        result = Result(self._trials, best, rsums)
        content = {
            **self.key,
            "rungs": [asdict(rung) for rung in self.rungs],
            "trials": [asdict(trial) for trial in self._trials],
            "best": {"candidate": best, "values": dict(self.candidates[best]), "rsums": rsums},
        }
        write_json(self.folder / RESULT_FILE, content)
        return result

    def _settle(self, alive: Sequence[int], final_seeds: int) -> tuple[int, list[float]]:
        """Train the last rung's best from more seeds."""
        epochs, last = self.rungs[-1].epochs, len(self.rungs) - 1
        chosen = alive[: self.key["eta"]] if final_seeds > 1 else alive[:1]
        means = []
        for candidate in chosen:
            seeds = range(self.seed, self.seed + final_seeds)
            rsums = [self._trial(candidate, last, epochs, seed).outcome.rsum for seed in seeds]
            finite = [rsum for rsum in rsums if rsum is not None]
            mean = sum(finite) / len(finite) if len(finite) == len(rsums) else -math.inf
            means.append((mean, candidate, finite))
        _, best, rsums_of_best = max(means, key=lambda entry: entry[0])  # of equals the first, the better one so far
        return best, rsums_of_best

    def _trial(self, candidate: int, rung: int, epochs: int, seed: int) -> Trial:
        """Run a trial, unless it was run before."""
        trial = self._done.get((candidate, epochs, seed))
        if trial is None:
            values = self.candidates[candidate]
            try:
                outcome = self._run(values, epochs, seed)
            except DivergedError as error:
                outcome = Outcome(None, diverged=str(error))
            trial = Trial(candidate, rung, epochs, seed, values, outcome)
            _append(self.folder / TRIALS_FILE, asdict(trial))
            self._done[(candidate, epochs, seed)] = trial
            shown = "diverged" if outcome.rsum is None else f"Rsum {outcome.rsum:.1f}"
            say(f"trial {len(self._done)}: candidate {candidate}, {epochs} epochs, seed {seed}: {shown}")
        if trial not in self._trials:
            self._trials.append(trial)
        return trial


def trials_table(trials: Sequence[Trial], rungs: Sequence[Rung]) -> str:
    """Write trials as a Markdown table, a line each."""
    names = list(trials[0].values)
    rows = [["candidate", *names, "rung", "epochs", "best epoch", "validation Rsum"]]
    for trial in trials:
        out = trial.outcome
        found = ["-", "diverged"] if out.rsum is None else [f"{out.best_epoch:g}", f"{out.rsum:.1f}"]
        rung = f"{trial.rung + 1} of {len(rungs)}"
        rows.append([str(trial.candidate), *(_shown(trial.values[n]) for n in names), rung, str(trial.epochs), *found])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    lines = [" | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rank(trial: Trial) -> tuple[float, int]:
    """Order trials: the best first, what diverged last, equals as they were drawn."""
    rsum = trial.outcome.rsum
    return math.inf if rsum is None else -rsum, trial.candidate


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line: whole, or none for a reader."""
    with open(path, "ab") as file:
        # What a kill has cut is no line: it must not join the next one.
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write(b"\n")
        file.write(json.dumps(line, default=str).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_trials(folder: Path) -> list[Trial]:
    """Read the trials that are done.

    A line that was cut is none.
    """
    path = folder / TRIALS_FILE
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found.append(Trial(**{**entry, "outcome": Outcome(**entry["outcome"])}))
    return found
