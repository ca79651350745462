"""Private and undocumented parts of other packages that we build on, in one place.

What must travel with a checkpoint is in `icone_hf/modeling/compat.py`, its twin. Each part has a test that says which
package changed (tests/test_compat.py).
"""

import argparse
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

# Commands that never train import this file too: nothing heavy is imported before it is needed.
if TYPE_CHECKING:
    from tarfile import TarFile

    import torch
    from datasets import Dataset
    from mteb.models.model_meta import ModelMeta


class TrainerStepsMixin:
    """Give steps of transformers' Trainer public names.

    The Trainer stands behind this class in the order of classes. transformers has no public hook for any of them; by
    default each does what transformers does.
    """

    args: Any

    def load_weights(self, checkpoint: str, model: "torch.nn.Module | None" = None) -> None:
        """Load the weights that a run resumes from."""
        super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]

    def load_best_weights(self) -> None:
        """Load the best checkpoint's weights at the end."""
        super()._load_best_model()  # type: ignore[misc]

    def save_checkpoint(self, model: "torch.nn.Module") -> None:
        """Save a checkpoint, and remove old ones."""
        super()._save_checkpoint(model, None)  # type: ignore[misc]

    def save_optimizer(self, folder: str) -> None:
        """Save the states of the optimizer and the schedule."""
        super()._save_optimizer_and_scheduler(folder)  # type: ignore[misc]

    def load_optimizer(self, checkpoint: str | None) -> None:
        """Load the states of the optimizer and the schedule."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def clip_gradients(self, model: "torch.nn.Module", max_norm: float) -> "torch.Tensor | float":
        """Clip the gradients and return their norm.

        A `max_norm` of infinity clips none. The norm is that before clipping.
        """
        return super()._get_grad_norm(model) if math.isinf(max_norm) else super()._clip_grad_norm(model)  # type: ignore[misc]

    def prepare_inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Move a batch to the device of training."""
        return self._prepare_inputs(inputs)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: "torch.nn.Module | None" = None) -> None:
        self.load_weights(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self.load_best_weights()

    def _save_checkpoint(self, model: "torch.nn.Module", trial: Any) -> None:
        self.save_checkpoint(model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.save_optimizer(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_optimizer(checkpoint)

    def _clip_grad_norm(self, model: "torch.nn.Module") -> "torch.Tensor | float":
        return self.clip_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: "torch.nn.Module", grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, self.clip_gradients(model, math.inf) if grad_norm is None else grad_norm)  # type: ignore[misc]


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """List a parser's arguments."""
    # HfArgumentParser makes them from dataclasses, and argparse has no public list of them.
    return parser._actions


class ShortHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show each argument once and in short.

    The kind of its value is shown, and no default that says nothing. argparse documents the names of its formatters
    alone, none of their methods.
    """

    kinds: Mapping[Any, str] = {int: "N", float: "X"}
    flag_types: tuple[Any, ...] = (bool,)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next(option for option in action.option_strings if option.startswith("--"))
        takes_none = action.nargs == 0 or action.type in self.flag_types
        return name if takes_none else f"{name} {self.kinds.get(action.type, 'TEXT')}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", [], {}):
            return action.help
        return super()._get_help_string(action)


def embed_images(groups: "Dataset", batch_size: int, description: str) -> "Dataset":
    """Copy images that are files into memory."""
    # `push_to_hub` of datasets does it by this function; no public one does it for a local file.
    from datasets.table import embed_table_storage

    return groups.with_format("arrow").map(
        embed_table_storage, batched=True, batch_size=batch_size, desc=description, keep_in_memory=True
    )


def forget_members(tar: "TarFile") -> None:
    """Let an open tar forget what was read."""
    # It keeps a record of each file, a kilobyte. From Python 3.13 on `stream=True` does without.
    tar.members = []  # type: ignore[attr-defined]


def mteb_model_meta(facts: Mapping[str, Any]) -> "ModelMeta":
    """Describe a model to MTEB by known facts."""
    # ModelMeta itself has twenty required fields; MTEB fills the others in here.
    from mteb.models.model_meta import ModelMeta  # an extra

    return ModelMeta.create_empty(dict(facts))


def value_of_event(event: Any, name: str) -> Any:
    """Read what a browser said with Gradio's event.

    Args:
        event: a `gradio.EventData`.
        name: of the value; `None` is returned if the browser didn't say it.
    """
    # Only classes of Gradio's own components have attributes for it.
    return event._data.get(name) if isinstance(event._data, dict) else None
