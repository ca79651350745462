"""When a save is uploaded, and how checkpoints get into what is uploaded. The uploads are in publishing/test_hub.py."""

import os
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from icone_hf.training import checkpoint_pushes
from icone_hf.training.checkpoint_pushes import CheckpointPushes


@pytest.mark.parametrize(("is_first", "always"), [(True, False), (False, True), (False, False)])
def test_a_save_is_left_out_while_another_is_uploaded_and_on_other_ranks(tmp_path, is_first, always):
    saved = []
    pushes = CheckpointPushes(tmp_path, "ada/run", saved.append)
    pushes._upload = Future()  # never done: waiting for it would hang
    pushes.on_save(SimpleNamespace(hub_always_push=always), SimpleNamespace(is_world_process_zero=is_first), None)
    assert not saved


@pytest.mark.parametrize("has_links", [True, False])
def test_checkpoints_are_linked_or_copied(tmp_path, monkeypatch, has_links):
    def refuse(source, target):
        raise OSError("no links on this disk")

    (tmp_path / "a").write_text("weights")
    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    checkpoint_pushes._link(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_text() == "weights"
    assert os.path.samefile(tmp_path / "a", tmp_path / "b") == has_links
