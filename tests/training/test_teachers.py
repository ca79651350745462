"""Stages whose batches come with what teachers say, against the bare losses of their first batch."""

import pytest
import torch
from tiny import StopAt, losses, make_run

from icone_hf import Stage
from icone_hf.data.batching import GroupBatchSampler
from icone_hf.errors import InputError
from icone_hf.modeling import losses as bare

WEIGHTS = {"soft_target_weight": 0.3, "uni_modal_weight": 0.7}
JOINT = (Stage("joint", 1, 5e-4, instance_weight=1, contrastive_weight=1, train_encoders=True),)
HEADS = (Stage("heads", 1, 5e-4, instance_weight=1, contrastive_weight=1, train_encoders=False),)


def first_log(trainer, index=0):
    return trainer.folder.read_stage(index)["log_history"][0]


def expected_log(trainer, model, image_teacher, text_teacher):
    """The losses of the first batch, by the towers and the bare functions.

    Args:
        image_teacher, text_teacher: from images, or captions, to features.
    """
    groups, processor = trainer.train_dataset, trainer.processor
    (pairs, *_) = GroupBatchSampler([3] * 16, 8, seed=trainer.args.seed)
    images = [groups[pair.row]["image"] for pair in pairs]
    texts = [groups[pair.row]["captions"][pair.caption] for pair in pairs]
    with torch.no_grad():
        output = model.eval()(**processor(images=images, text=texts, return_tensors="pt"), return_loss=False)
        rows = output.image_embeds, output.text_embeds, image_teacher(images), text_teacher(texts)
        return {name: getattr(bare, name)(*rows).item() for name in ("soft_target_loss", "uni_modal_loss")}


@pytest.mark.parametrize("stages", [HEADS, JOINT], ids=["heads", "joint"])
@pytest.mark.parametrize("chunks", [{}, {"per_device_chunk_size": 3}], ids=["whole", "chunks"])
def test_own_towers_teach_every_stage(make_model, processor, tmp_path, stages, chunks):
    fields = {**WEIGHTS, "num_groups": 16, "projection_dim": 8}
    model, reference = make_model(**fields), make_model(**fields)
    reference.load_state_dict(model.state_dict())
    for part in (model, reference):  # dropout would draw others
        for module in part.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    trainer = make_run(tmp_path / "run", model, processor, stages, **chunks)
    trainer.train()

    def image_teacher(images):
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return reference.pool_image(reference.run_vision_tower(pixels))

    def text_teacher(texts):
        inputs = processor(text=texts, return_tensors="pt")
        return reference.pool_text(reference.text_model(**inputs), inputs["attention_mask"])

    log = first_log(trainer)
    expected = expected_log(trainer, reference, image_teacher, text_teacher)
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    total = log["instance_loss"] + log["contrastive_loss"] + 0.3 * log["soft_target_loss"] + 0.7 * log["uni_modal_loss"]
    assert log["loss"] == pytest.approx(total, rel=1e-4)


def test_a_run_without_weights_logs_and_caches_nothing_of_it(make_model, processor, tmp_path):
    trainer = make_run(tmp_path / "run", make_model(num_groups=16), processor, JOINT)
    trainer.train()
    assert not {"soft_target_loss", "uni_modal_loss"} & first_log(trainer).keys()
    assert not (tmp_path / "run" / "feature_cache").exists()


@pytest.mark.parametrize("stop", [("0-instance", 5), ("1-joint", 8)], ids=["heads", "joint"])
def test_a_run_that_goes_on_has_the_teachers_of_one_that_never_stopped(make_model, processor, tmp_path, stop):
    """In mid-stage, with towers that have moved on since: the teachers are still those of the beginning."""
    fields = {**WEIGHTS, "num_groups": 16, "projection_dim": 8}
    start = make_model(**fields).state_dict()

    def run(folder, callbacks=None):
        model = make_model(**fields)
        model.load_state_dict(start)
        stages = (Stage("instance", 2, 1e-3, 1, 1, False), Stage("joint", 2, 5e-4, 1, 1, True))
        steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
        return make_run(tmp_path / folder, model, processor, stages, callbacks, **steps)

    whole = run("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run("cut", [StopAt(*stop)]).train()
    again = run("cut")
    again.train(resume_from_checkpoint="auto")
    assert losses(again) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_no_stage_uses_is_refused(make_model, processor, tmp_path, name):
    stages = (Stage("instance", 1, 1e-3, instance_weight=1, contrastive_weight=0, train_encoders=False),)
    with pytest.raises(InputError, match=f"{name}=0.5 counts beside a contrastive loss"):
        make_run(tmp_path, make_model(num_groups=16, **{name: 0.5}), processor, stages)
