"""The folder of a run: what it holds, and where an interrupted run goes on.

OUTPUT_DIR/
  config.json, model.safetensors, ...    the trained model and its processor
  metrics.json                           retrieval metrics: validation, stages, test; evaluations
  recipe.json                            all that decides the numbers
  splits.json                            which images are of which split, where these were cut (see kept_splits.py)
  feature_cache/SPLIT/DIGEST/            frozen towers' outputs (see cache_folder.py)
  stages/start.json                      validation metrics before the first update
  stages/0-NAME/checkpoint-*/            transformers' checkpoints; without the towers where these are frozen. One
                                         counts if it is whole, by its files.json (see whole_files.py)
  stages/0-NAME/stage.json               there once the stage is done: its best epoch, metrics and logs
  set_aside/0-NAME/checkpoint-*/         checkpoints later than one that a run was resumed from by name
  set_aside/metrics.json                 the metrics of the model that they led to
  upload/                                what is on its way to the Hub (see checkpoint_pushes.py)
"""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import InputError
from .recipe import decisive_of, differences
from .whole_files import WEIGHTS, checkpoint_fault, checkpoints_of, last_whole_checkpoint, step_of, write_json

METRICS_FILE = "metrics.json"
RECIPE_FILE = "recipe.json"
STAGE_FILE = "stage.json"
START_FILE = "start.json"
SET_ASIDE = "set_aside"

logger = logging.get_logger(__name__)


class RunFolder:
    """Read and write the folder of one run.

    Args:
        path: `OUTPUT_DIR`; made when something is written.
        stage_names: of the recipe's stages, in order.
    """

    def __init__(self, path: str | os.PathLike, stage_names: Sequence[str]):
        self.path = Path(path)
        self.stage_names = tuple(stage_names)

    def stage(self, index: int) -> Path:
        """Return the folder of a stage."""
        return self.path / "stages" / f"{index}-{self.stage_names[index]}"

    def is_done(self, index: int) -> bool:
        """Say whether a stage has run to its end."""
        return (self.stage(index) / STAGE_FILE).is_file()

    def read_stage(self, index: int) -> dict[str, Any]:
        """Read what [`write_stage`] wrote."""
        return json.loads((self.stage(index) / STAGE_FILE).read_text())

    def write_stage(self, index: int, result: Mapping[str, Any]) -> None:
        """Write a stage's result, which marks it as done."""
        write_json(self.stage(index) / STAGE_FILE, result)

    def read_start(self) -> dict[str, float] | None:
        """Read the start's metrics; `None` without any."""
        path = self.path / "stages" / START_FILE
        return json.loads(path.read_text()) if path.is_file() else None

    def write_start(self, metrics: Mapping[str, float]) -> None:
        """Write metrics from before the first update."""
        write_json(self.path / "stages" / START_FILE, metrics)

    def forget_start(self) -> None:
        """Remove these metrics: they are of another run."""
        (self.path / "stages" / START_FILE).unlink(missing_ok=True)

    def read_recipe(self) -> dict[str, Any] | None:
        """Read the recipe; `None` if there is none."""
        path = self.path / RECIPE_FILE
        return json.loads(path.read_text()) if path.is_file() else None

    def write_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Write the recipe.

        A later run in this folder must share it.
        """
        write_json(self.path / RECIPE_FILE, recipe)

    def last_checkpoint(self, index: int) -> Path | None:
        """Return a stage's last whole checkpoint."""
        return last_whole_checkpoint(self.stage(index))

    def best_checkpoint(self, index: int) -> Path:
        """Return the checkpoint that a finished stage keeps.

        Raises:
            ValueError: if it isn't whole.
        """
        stage = self.stage(index)
        best = stage / self.read_stage(index)["best_checkpoint"]
        if fault := checkpoint_fault(best, WEIGHTS):
            raise InputError(
                f"Stage {self.stage_names[index]!r} is done, but {best}, which it keeps, is not whole: {fault} Delete "
                f"{stage / STAGE_FILE} to train on from the last whole checkpoint before it, or put the file back."
            )
        return best

    def resume_point(
        self, resume_from_checkpoint: str | bool | None, recipe: Mapping[str, Any]
    ) -> tuple[int, Path | None]:
        """Find the stage and checkpoint to start from.

        Args:
            resume_from_checkpoint: see [`IConETrainer.train`].
            recipe: of the run that wants to go on; its `"decisive"` part must be that of the run in this folder.

        Raises:
            ValueError: if the folder holds another run, or the checkpoint is not one of this run's.
        """
        saved = self.read_recipe()
        # A new run needs a folder without another one.
        if resume_from_checkpoint in (None, False):
            if saved is not None:
                raise InputError(
                    f"{self.path} holds another run: pass resume_from_checkpoint=auto to go on with it, or another "
                    "output_dir."
                )
            return 0, None
        # A resumed run needs the recipe of the run that it goes on with.
        if saved is not None and (differing := differences(decisive_of(saved), recipe["decisive"])):
            raise InputError(
                f"{self.path} holds a run of another recipe ({'; '.join(differing)}): resume it as it was, or start "
                "anew in another output_dir."
            )
        # "auto" takes the last checkpoint of the first stage that is not done.
        if resume_from_checkpoint in ("auto", True):
            first = next((i for i in range(len(self.stage_names)) if not self.is_done(i)), len(self.stage_names))
            return first, self.last_checkpoint(first) if first < len(self.stage_names) else None
        # A path must be a checkpoint of this run, and all stages before it done.
        checkpoint = Path(str(resume_from_checkpoint))
        folders = [self.stage(index).resolve() for index in range(len(self.stage_names))]
        if checkpoint.resolve().parent not in folders or not checkpoint.is_dir():
            raise InputError(
                f"resume_from_checkpoint={str(checkpoint)!r} is no checkpoint of this run: give a folder "
                f"{self.path}/stages/*/checkpoint-*, or auto."
            )
        if fault := checkpoint_fault(checkpoint):
            raise InputError(
                f"resume_from_checkpoint={str(checkpoint)!r} is not whole: {fault} Give an earlier one, or auto, which "
                "takes the last whole one."
            )
        # Whatever the earlier stages have learned is loaded from their own best checkpoints.
        first = folders.index(checkpoint.resolve().parent)
        for earlier in range(first):
            if not self.is_done(earlier):
                raise InputError(f"Stage {self.stage_names[earlier]!r} is not done: resume it first, or pass auto.")
        return first, checkpoint

    def forget_after(self, first: int, checkpoint: Path | None) -> None:
        """Set aside what was made after a resume point.

        So nothing stale is taken for the run's result, and no checkpoint is lost: whoever resumes from an earlier one
        by name finds the later ones in `OUTPUT_DIR/set_aside`. One that was cut in writing is removed. Metrics go too:
        without them a run that is killed while it saves the model saves it again.
        """
        if first < len(self.stage_names) and (self.path / METRICS_FILE).is_file():
            (self.path / SET_ASIDE).mkdir(exist_ok=True)
            (self.path / METRICS_FILE).replace(self.path / SET_ASIDE / METRICS_FILE)
        for index in range(first, len(self.stage_names)):
            # The mark that the stage is done, then every checkpoint after the one to start from.
            (self.stage(index) / STAGE_FILE).unlink(missing_ok=True)
            kept = step_of(checkpoint) if checkpoint is not None and index == first else -1
            for later in checkpoints_of(self.stage(index)):
                if step_of(later) > kept:
                    self._set_aside(later)

    def _set_aside(self, checkpoint: Path) -> None:
        """Move a whole checkpoint out of its stage."""
        if checkpoint_fault(checkpoint):
            shutil.rmtree(checkpoint)
            return
        aside = self.path / SET_ASIDE / checkpoint.parent.name / checkpoint.name
        shutil.rmtree(aside, ignore_errors=True)  # one that was set aside before; only the newest of a step is kept
        aside.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.rename(aside)
        logger.warning(f"{checkpoint} is later than what the run goes on from: it is kept as {aside}.")

    def read_metrics(self) -> dict[str, Any] | None:
        """Read `metrics.json`; `None` if there is none."""
        path = self.path / METRICS_FILE
        return json.loads(path.read_text()) if path.is_file() else None

    def replace_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write a new model's metrics.

        A test of an older model goes: it says nothing of this one.
        """
        write_json(self.path / METRICS_FILE, metrics)


def write_metrics(folder: str | os.PathLike, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Add metrics to a checkpoint's `metrics.json`; other keys stay."""
    run = RunFolder(folder, ())
    merged = {**(run.read_metrics() or {}), **metrics}
    run.replace_metrics(merged)
    return merged


def add_evaluation(
    folder: str | os.PathLike,
    data: str,
    split: str,
    sizes: Mapping[str, int],
    metrics: Mapping[str, Any],
    dtype: str = "float32",
) -> None:
    """Add an evaluation to a checkpoint's `metrics.json`.

    It stands in the list `evaluations`, with what was measured, so it never takes the place of the run's own
    validation and test. Of an earlier one of the same data, split and sizes what was measured by other protocols stays.

    Args:
        folder: of the checkpoint.
        data: the source's name.
        split: of the source.
        sizes: the numbers of `groups` and `captions`.
        metrics: by protocol: the whole split, and the mean over folds.
        dtype: what the model computed in.
    """
    what = {"data": data, "split": split, **sizes}
    earlier = (RunFolder(folder, ()).read_metrics() or {}).get("evaluations", [])
    others = [one for one in earlier if any(one[name] != value for name, value in what.items())]
    same = [one for one in earlier if one not in others and one.get("dtype", dtype) == dtype]
    kept = {protocol: values for one in same for protocol, values in one["metrics"].items()}
    evaluation = {**what, "dtype": dtype, "date": time.strftime("%Y-%m-%d"), "metrics": {**kept, **metrics}}
    write_metrics(folder, {"evaluations": [*others, evaluation]})
