"""Losses whose targets come from teachers: against NumPy, over ranks, in the model."""

import numpy as np
import pytest
import torch
from thread_ranks import on_ranks

from icone_hf import IConEConfig
from icone_hf.modeling import objective, taught_losses
from icone_hf.modeling.errors import ModelError
from icone_hf.modeling.losses import IGNORED_GROUP
from icone_hf.modeling.objective import TAUGHT_LOSSES, Teachers
from icone_hf.modeling.taught_losses import distillation_loss, soft_target_loss, uni_modal_loss

CLOSE = {"atol": 1e-6, "rtol": 1e-5}
GROUPS = torch.tensor([3, 0, 7, 1, 3, 5, 2, 6, 0, 4, IGNORED_GROUP, IGNORED_GROUP])


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def softmax(row):
    return np.exp(row) / np.exp(row).sum()


def divergence(targets, scores):
    """The mean over rows of KL(softmax of the target || softmax of the score), by its definition."""
    total = 0.0
    for target, score in zip(targets, scores, strict=True):
        p, q = softmax(target), softmax(score)
        total += (p * np.log(p / q)).sum()
    return total / len(targets)


def numpy_soft_targets(images, texts, image_teacher, text_teacher, tau, target_tau):
    """CUSA's cross-modal term, both directions added."""
    cross = unit(images) @ unit(texts).T / tau
    of_images, of_texts = (unit(rows) @ unit(rows).T / target_tau for rows in (image_teacher, text_teacher))
    return divergence(of_images, cross) + divergence(of_texts, cross.T)


def numpy_uni_modal(images, texts, image_teacher, text_teacher, tau, target_tau):
    """CUSA's uni-modal term, both modalities added."""
    total = 0.0
    for rows, teacher in ((images, image_teacher), (texts, text_teacher)):
        total += divergence(unit(teacher) @ unit(teacher).T / target_tau, unit(rows) @ unit(rows).T / tau)
    return total


def numpy_distillation(images, texts, teacher_images, teacher_texts, tau):
    """Both directions of the teacher's and the student's distributions over the batch."""
    ours, theirs = (unit(i) @ unit(t).T / tau for i, t in ((images, texts), (teacher_images, teacher_texts)))
    return divergence(theirs, ours) + divergence(theirs.T, ours.T)


def random_rows(count, seed=0):
    """Embeddings of images and captions, and teachers' features of other widths and any length."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(count, 4)),
        rng.normal(size=(count, 4)),
        rng.normal(size=(count, 7)) * 9,
        rng.random((count, 3)),
    )


def as_tensors(images, texts, *teachers):
    return [torch.tensor(rows) for rows in (unit(images), unit(texts), *teachers)]


@pytest.mark.parametrize(("tau", "target_tau"), [(0.1, 0.1), (0.05, 0.3), (0.45, 1.0)])
@pytest.mark.parametrize(
    ("loss", "expected"), [(soft_target_loss, numpy_soft_targets), (uni_modal_loss, numpy_uni_modal)]
)
def test_losses_of_soft_targets_are_cusas(loss, expected, tau, target_tau):
    rows = random_rows(6)
    ours = loss(*as_tensors(*rows), tau, target_tau)
    assert ours.item() == pytest.approx(expected(*rows, tau, target_tau), rel=1e-5)
    # Without fillers group ids change nothing: pairs of one group stay in.
    alike = loss(*as_tensors(*rows), tau, target_tau, torch.tensor([0, 0, 1, 2, 2, 2]))
    assert alike.item() == pytest.approx(ours.item(), rel=1e-6)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_distillation_is_the_divergence_from_the_teacher(tau):
    rows = (*random_rows(6)[:2], *random_rows(6, seed=1)[:2])
    ours = distillation_loss(*as_tensors(*rows), tau)
    assert ours.item() == pytest.approx(numpy_distillation(*rows, tau), rel=1e-5)
    assert ours.dtype == torch.float32
    alike = distillation_loss(*as_tensors(*rows), tau, torch.tensor([0, 0, 1, 2, 2, 2]))
    assert alike.item() == pytest.approx(ours.item(), rel=1e-6)
    assert distillation_loss(*as_tensors(*rows[:2], *rows[:2]), tau).item() == pytest.approx(0, abs=1e-6)


LOSSES = [soft_target_loss, uni_modal_loss, distillation_loss]


def rows_for(loss, count):
    """Embeddings and what the loss's teachers say."""
    rows = random_rows(count)
    return as_tensors(*rows[:2], *(random_rows(count, seed=1)[:2] if loss is distillation_loss else rows[2:]))


@pytest.mark.parametrize("loss", LOSSES)
def test_fillers_count_nowhere(loss):
    rows = rows_for(loss, 12)
    kept = GROUPS != IGNORED_GROUP
    leaves = [part.clone().requires_grad_() for part in rows]
    ours = loss(*leaves, group_ids=GROUPS)
    ours.backward()
    assert ours.item() == pytest.approx(loss(*[part[kept] for part in rows]).item(), rel=1e-6)
    for leaf in leaves[:2]:
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[~kept].any()
        assert leaf.grad[kept].abs().sum(dim=1).min() > 0
    assert [leaf.grad for leaf in leaves[2:]] == [None, None]  # no teacher learns


@pytest.mark.parametrize("loss", LOSSES)
def test_they_are_computed_in_float32_under_autocast(loss):
    rows = [part.float() for part in rows_for(loss, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = loss(*rows)
    assert torch.equal(under, loss(*rows))


def test_whoever_embeds_as_the_teacher_sees_has_no_loss():
    _, _, image_teacher, _ = random_rows(5)
    rows = torch.tensor(unit(image_teacher))
    for loss in (soft_target_loss, uni_modal_loss):
        assert loss(rows, rows, rows * 3, rows).item() == pytest.approx(0, abs=1e-6)


# --- the objective, over ranks ---

WEIGHTS = {"soft_target_weight": 0.3, "uni_modal_weight": 0.7, "distillation_weight": 1.5}


def batch_rows(count):
    """Embeddings, and what all teachers say."""
    rows, embeds = as_tensors(*random_rows(count)), as_tensors(*random_rows(count, seed=1))[:2]
    return [part.float() for part in (*rows, *embeds)]


@pytest.mark.parametrize("groups", [GROUPS, None])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_has_the_taught_losses_of_the_whole_batch(monkeypatch, num_ranks, groups):
    temperatures = {"soft_target_temperature": 0.2, "soft_temperature": 0.3, "distillation_temperature": 0.4}
    config = IConEConfig(**temperatures, **WEIGHTS)
    rows = batch_rows(12)
    leaves = [part.clone().requires_grad_() for part in rows[:2]]
    expected = {
        "soft_target_loss": soft_target_loss(*leaves, *rows[2:4], 0.3, 0.2, groups),
        "uni_modal_loss": uni_modal_loss(*leaves, *rows[2:4], 0.3, 0.2, groups),
        "distillation_loss": distillation_loss(*leaves, *rows[4:], 0.4, groups),
    }
    sum(expected.values()).backward()

    def of_rank(rank):
        mine = slice(rank * 12 // num_ranks, (rank + 1) * 12 // num_ranks)
        own = [part[mine].clone().requires_grad_() for part in rows[:2]]
        teachers = Teachers(*[part[mine] for part in rows[2:]])
        ids = None if groups is None else groups[mine]
        found = objective.taught_objectives(config, *own, teachers, ids, num_ranks)
        sum(found.values()).backward()
        return {name: loss.detach() for name, loss in found.items()}, [leaf.grad for leaf in own]

    everyones = on_ranks(num_ranks, of_rank, monkeypatch)
    for found, _ in everyones:
        assert found.keys() == expected.keys()
        for name, loss in found.items():
            torch.testing.assert_close(loss, expected[name].detach(), **CLOSE)
    for place in (0, 1):
        gradient = torch.cat([gradients[place] for _, gradients in everyones]) / num_ranks
        torch.testing.assert_close(gradient, leaves[place].grad, **CLOSE)


@pytest.mark.parametrize(("loss", "field"), TAUGHT_LOSSES.items())
def test_a_loss_without_weight_is_not_computed(loss, field, monkeypatch):
    rows = batch_rows(4)
    found = objective.taught_objectives(IConEConfig(**{field: 2.0}), *rows[:2], Teachers(*rows[2:]), None)
    assert set(found) == {loss}
    monkeypatch.setattr(taught_losses, "_mean_divergence", None)
    assert objective.taught_objectives(IConEConfig(), *rows[:2], Teachers(), None) == {}


def test_temperatures_have_the_defaults_that_are_said():
    """Of soft targets the same for both sides, of distillation that of InfoNCE."""
    rows = batch_rows(4)
    config = IConEConfig(temperature=0.2, soft_target_temperature=0.5, **WEIGHTS)
    found = objective.taught_objectives(config, *rows[:2], Teachers(*rows[2:]), None)
    assert torch.equal(found["soft_target_loss"], soft_target_loss(*rows[:4], 0.5, 0.5))
    assert torch.equal(found["distillation_loss"], distillation_loss(*rows[:2], *rows[4:], 0.2))


@pytest.mark.parametrize("field", WEIGHTS)
def test_teachers_that_are_missing_are_named(field):
    rows, config = batch_rows(4), IConEConfig(**{field: 0.5})
    ending = "_embeds" if field == "distillation_weight" else ""
    pair = f"teacher_image{ending} and teacher_text{ending}"
    image, text = f"image{ending}", f"text{ending}"
    for teachers in (Teachers(), Teachers(**{image: torch.ones(4, 2)}), Teachers(**{text: torch.ones(4, 2)})):
        with pytest.raises(ModelError, match=f"^{field}=0.5 needs what teachers say of the batch: pass {pair}, or"):
            objective.taught_objectives(config, *rows[:2], teachers, None)
    teachers = Teachers(**{image: torch.ones(4, 2), text: torch.ones(3, 2)})
    with pytest.raises(ModelError, match=f"^{pair} have 4 and 3 rows, one for each of 4 pairs is needed"):
        objective.taught_objectives(config, *rows[:2], teachers, None)


# --- in the model ---


def test_the_model_adds_them_to_its_contrastive_loss(make_model, batch):
    model, groups = make_model(num_groups=3, **WEIGHTS).eval(), torch.tensor([0, 1, 0, 2])
    features = {"teacher_image": torch.randn(4, 5), "teacher_text": torch.randn(4, 6)}
    theirs = {"teacher_image_embeds": torch.randn(4, 7), "teacher_text_embeds": torch.randn(4, 7)}
    teachers = {**features, **theirs}
    output = model(**batch, **teachers, group_ids=groups, instance_weight=0.5, contrastive_weight=2.0)
    embeds = output.image_embeds, output.text_embeds
    soft, uni = (loss(*embeds, *features.values(), 0.1, 0.1) for loss in (soft_target_loss, uni_modal_loss))
    distilled = distillation_loss(*embeds, *theirs.values(), model.config.temperature)
    assert output.soft_target_loss.item() == pytest.approx(soft.item(), rel=1e-5)
    assert output.uni_modal_loss.item() == pytest.approx(uni.item(), rel=1e-5)
    assert output.distillation_loss.item() == pytest.approx(distilled.item(), rel=1e-5)
    taught = 0.3 * soft + 0.7 * uni + 1.5 * distilled
    expected = 0.5 * output.instance_loss + 2 * (output.contrastive_loss + taught)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # A stage without contrastive loss has none, and needs no teacher.
    bare = model(**batch, group_ids=groups, contrastive_weight=0)
    assert [bare[name] for name in TAUGHT_LOSSES if name in bare] == []
    with pytest.raises(ModelError, match="teacher_image"):
        model(**batch, group_ids=groups)


def test_frozen_towers_are_teachers_where_no_other_is_given(make_model):
    model = make_model(num_groups=3, soft_target_weight=0.3, uni_modal_weight=0.7).eval()
    pooled = {"pooled_image": torch.randn(4, 32), "pooled_text": torch.randn(4, 24)}
    teachers = {"teacher_image": pooled["pooled_image"], "teacher_text": pooled["pooled_text"]}
    for part in (model, model.heads()):
        ours = part(**pooled, group_ids=torch.arange(4) % 3)
        assert torch.equal(ours.loss, part(**pooled, **teachers, group_ids=torch.arange(4) % 3).loss)
        other = part(**pooled, teacher_text=torch.randn(4, 5), group_ids=torch.arange(4) % 3)
        assert other.soft_target_loss != ours.soft_target_loss
