"""Uploads of a run's checkpoints while it goes on, by transformers' `hub_strategy`."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..publishing.hub import UPLOAD_FOLDER, write_card
from .run_folder import RECIPE_FILE, RunFolder, write_metrics
from .stage_trainer import validation_metrics
from .stages import START

logger = logging.get_logger(__name__)


class CheckpointPushes(TrainerCallback):
    """Upload the run's model and card at every save.

    Processor, metrics and recipe go with them. The upload runs beside the training. A save that finds one under way is
    skipped or, with `hub_always_push`, waits for it. A failed upload is logged and does not end the training. With the
    strategy `checkpoint` the repository also holds the run's `stages/` as they are on disk, with `all_checkpoints`
    every checkpoint that was ever saved: whoever downloads it into an `output_dir` can go on with the run there
    (`resume_from_checkpoint="auto"`).

    Args:
        folder: of the run.
        repo_id: of a repository that exists.
        save_model: saves model and processor into a folder.
    """

    def __init__(self, folder: Path, repo_id: str, save_model: Callable[[Path], None]):
        self.folder = folder
        self.repo_id = repo_id
        self.save_model = save_model
        self._upload: Future[Any] | None = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._upload is not None and not self._upload.done() and not args.hub_always_push:
            return
        self.wait()
        # Put together what is uploaded, in a folder of its own: training changes the run's.
        staging = self.folder / UPLOAD_FOLDER
        shutil.rmtree(staging, ignore_errors=True)
        self.save_model(staging)
        shutil.copy(self.folder / RECIPE_FILE, staging)
        metrics: dict[str, Any] = {}
        of_this = (entry for entry in state.log_history if "eval_rsum" in entry and entry["step"] == state.global_step)
        if measured := next(of_this, None):  # what SIGTERM has saved was not measured
            metrics["validation"] = validation_metrics(measured)
        if (start := RunFolder(self.folder, ()).read_start()) is not None:
            metrics["stages"] = {START: start}
        if metrics:
            write_metrics(staging, metrics)
        # Of the checkpoints on disk the strategy may ask for the last or for all.
        deleted = None
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            # Links, for the trainer may remove a checkpoint before it has been uploaded; not of logs that still grow.
            growing = shutil.ignore_patterns("runs", "emissions.csv")
            shutil.copytree(self.folder / "stages", staging / "stages", ignore=growing, copy_function=_link)
            deleted = "stages/**" if args.hub_strategy == HubStrategy.CHECKPOINT else None
        write_card(staging, self.repo_id)
        # Upload in a thread of huggingface_hub's, so that training goes on.
        self._upload = HfApi(token=args.hub_token).upload_folder(
            repo_id=self.repo_id,
            folder_path=staging,
            revision=args.hub_revision,
            commit_message=f"Training in progress: {Path(str(args.output_dir)).name}, step {state.global_step}",
            delete_patterns=deleted,
            run_as_future=True,
        )

    def wait(self) -> None:
        """Wait for the upload under way.

        A failed one is logged.
        """
        if self._upload is None:
            return
        if error := self._upload.exception():
            logger.warning(f"A checkpoint was not uploaded to {self.repo_id}: {error}")
        self._upload = None
        shutil.rmtree(self.folder / UPLOAD_FOLDER, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """Link a file, or copy it without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
