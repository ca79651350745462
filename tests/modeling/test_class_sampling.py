"""A sample of the classes: counts, estimates, gradients. Ranks and the optimizer are in test_sparse_rows.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from icone_hf.modeling import class_sampling
from icone_hf.modeling.class_sampling import sample_classes, sample_integers, scored_rows
from icone_hf.modeling.losses import IGNORED_GROUP, instance_loss

LOGITS = [("dot", 1.0), ("cosine", 0.1)]


def sampled_loss(features, class_vectors, groups, num_samples, logits="dot", temperature=0.05, smoothing=0.0):
    scored = sample_classes(groups, len(class_vectors), num_samples)
    rows = scored_rows(class_vectors, scored.class_ids)
    args = features, rows, scored.positions(groups), logits, temperature
    return instance_loss(*args, log_counts=scored.log_counts, label_smoothing=smoothing), scored


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.data())
def test_sampled_integers_are_different_and_of_the_population(population, data):
    count = data.draw(st.integers(0, population))
    drawn = sample_integers(population, count)
    assert len(drawn) == len(set(drawn.tolist())) == count
    assert all(0 <= number < population for number in drawn.tolist())


def test_more_than_there_are_cannot_be_drawn():
    with pytest.raises(ValueError, match="5 different integers cannot be drawn from 4"):
        sample_integers(4, 5)


@pytest.mark.parametrize(("population", "count"), [(6, 2), (6, 3), (5, 3), (6, 5)])
def test_every_set_is_equally_likely(population, count):
    draws, sets = 6000, math.comb(population, count)
    seen: dict = {}
    for _ in range(draws):
        chosen = frozenset(sample_integers(population, count).tolist())
        seen[chosen] = seen.get(chosen, 0) + 1
    assert len(seen) == sets
    # Pearson's statistic has mean `sets - 1` and variance 2 (sets - 1): five deviations above it is one in a million.
    expected = draws / sets
    statistic = sum((n - expected) ** 2 / expected for n in seen.values())
    assert statistic < sets - 1 + 5 * math.sqrt(2 * (sets - 1))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, 39), max_size=20), st.integers(1, 60))
def test_the_batchs_classes_are_scored_and_others_stand_for_the_rest(rows, num_samples):
    groups = torch.tensor([IGNORED_GROUP if row < 0 else row for row in rows], dtype=torch.long)
    of_batch = {row for row in rows if row >= 0}
    scored = sample_classes(groups, 40, num_samples)
    ids = scored.class_ids.tolist()
    assert len(set(ids)) == len(ids) == min(40, len(of_batch) + num_samples)
    assert set(ids) <= set(range(40))
    assert set(ids[: len(of_batch)]) == of_batch
    counts = scored.log_counts.exp()
    assert counts[: len(of_batch)].tolist() == [1] * len(of_batch)
    assert counts.sum().item() == pytest.approx(40, rel=1e-5)
    positions = scored.positions(groups)
    assert [IGNORED_GROUP if p < 0 else ids[p] for p in positions.tolist()] == groups.tolist()


def test_classes_are_drawn_on_the_cpu_and_stay_on_the_batchs_device():
    """Where torch's default is another device: checkpoints hold the state of the CPU's generator alone."""
    groups = torch.tensor([2, 5, 5, IGNORED_GROUP])
    for num_samples in (4, 30):
        torch.manual_seed(0)
        expected = sample_classes(groups, 40, num_samples)
        torch.manual_seed(0)
        with torch.device("meta"):
            scored = sample_classes(groups, 40, num_samples)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(scored, expected, strict=True))


@pytest.mark.parametrize(("logits", "temperature"), LOGITS)
@pytest.mark.parametrize("num_samples", [25, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_with_all_others_it_is_the_exact_loss(logits, temperature, num_samples, smoothing):
    groups = torch.tensor([3, 3, 29, IGNORED_GROUP, 0, 7, 12])  # 5 classes of 30
    features = torch.randn(7, 8, requires_grad=True)
    class_vectors = torch.randn(30, 8, requires_grad=True)
    exact = instance_loss(features, class_vectors, groups, logits, temperature, label_smoothing=smoothing)
    exact_gradients = torch.autograd.grad(exact, (features, class_vectors))
    loss, scored = sampled_loss(features, class_vectors, groups, num_samples, logits, temperature, smoothing)
    loss.backward()
    assert sorted(scored.class_ids.tolist()) == list(range(30))
    assert torch.equal(scored.log_counts, torch.zeros(30))
    torch.testing.assert_close(loss, exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(features.grad, exact_gradients[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(class_vectors.grad.to_dense(), exact_gradients[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("logits", "temperature"), LOGITS)
def test_the_denominators_estimate_is_unbiased_and_the_loss_comes_near_from_below(logits, temperature):
    groups, draws = torch.tensor([2, 5, 5, 11]), 3000
    features, class_vectors = torch.randn(4, 6), torch.randn(60, 6)
    if logits == "cosine":
        features, class_vectors = (torch.nn.functional.normalize(x, dim=-1) for x in (features, class_vectors))
    exact = (features @ class_vectors.T / temperature).double().exp().sum(dim=1)
    own = (features * class_vectors[groups]).sum(dim=1) / temperature
    estimates, losses = [], []
    for _ in range(draws):
        loss, scored = sampled_loss(features, class_vectors, groups, 20, logits, temperature)
        scores = features @ class_vectors[scored.class_ids].T / temperature + scored.log_counts
        estimates.append(scores.double().exp().sum(dim=1))
        torch.testing.assert_close(loss.double(), (estimates[-1].log() - own).mean(), atol=1e-4, rtol=1e-4)
        losses.append(loss)
    estimates = torch.stack(estimates)
    # Five standard errors of the mean; four rows are looked at.
    error = estimates.std(dim=0) / math.sqrt(draws)
    assert ((estimates.mean(dim=0) - exact).abs() < 5 * error).all()
    assert torch.stack(losses).mean() <= (exact.log() - own).mean()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_ranks_score_what_the_first_has_drawn(monkeypatch, num_ranks):
    """Though each has drawn other numbers."""
    monkeypatch.setattr(class_sampling, "sample_integers", lambda *_: torch.tensor([10 + torch.distributed.get_rank()]))
    groups = torch.tensor([1, 4])
    scored = on_ranks(num_ranks, lambda rank: sample_classes(groups, 40, 1, num_ranks).class_ids.tolist(), monkeypatch)
    assert scored == [[1, 4, 12]] * num_ranks  # the batch's own, and the other class number 10


def test_the_gradient_touches_no_other_row():
    class_vectors = torch.randn(1000, 4, requires_grad=True)
    loss, scored = sampled_loss(torch.randn(5, 4), class_vectors, torch.tensor([0, 9, 999, 9, IGNORED_GROUP]), 16)
    loss.backward()
    assert class_vectors.grad.is_sparse
    touched = class_vectors.grad.coalesce().indices()[0].tolist()
    assert touched == sorted(scored.class_ids.tolist())
    assert len(touched) == 3 + 16


class LargestTensor(TorchDispatchMode):
    """Record the largest number of elements of a tensor made inside."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.size = max(self.size, tensor.numel())
        return made


def test_nothing_of_the_classifiers_size_is_made():
    class_vectors = torch.randn(200_000, 4, requires_grad=True)
    with LargestTensor() as largest:
        loss, _ = sampled_loss(torch.randn(8, 4), class_vectors, torch.arange(8), 64)
        loss.backward()
    assert largest.size <= (8 + 64) * 8
    with LargestTensor() as largest:
        instance_loss(torch.randn(8, 4), class_vectors, torch.arange(8))
    assert largest.size >= 200_000


def test_the_model_samples_in_training_alone(make_model, batch):
    groups = torch.arange(4)
    sampling, exact = make_model(num_groups=50, instance_samples=5), make_model(num_groups=50)
    exact.load_state_dict(sampling.state_dict())
    for model in (sampling, exact):
        model.set_encoders_trainable(False)  # no dropout
    losses = {sampling.train()(**batch, group_ids=groups, contrastive_weight=0).loss.item() for _ in range(5)}
    assert len(losses) == 5
    expected = exact.eval()(**batch, group_ids=groups).loss.item()
    assert sampling.eval()(**batch, group_ids=groups).loss.item() == pytest.approx(expected, rel=1e-6)
    all_others = make_model(num_groups=50, instance_samples=46).train()
    all_others.load_state_dict(sampling.state_dict())
    all_others.set_encoders_trainable(False)
    assert all_others(**batch, group_ids=groups).loss.item() == pytest.approx(expected, rel=1e-5)


def test_smoothed_labels_of_a_sample_have_the_mean_of_all_classes():
    """A class that stands for k others has k of their parts: on average, over samples, the mean logit of all."""
    groups, features, class_vectors = torch.tensor([2, 5]), torch.randn(2, 6), torch.randn(20, 6)
    torch.manual_seed(0)
    # Twice the smoothing less once: what is left is the mean logit of the scored classes, weighed.
    parts = []
    for seed in range(400):
        torch.manual_seed(seed)
        smoothed, _ = sampled_loss(features, class_vectors, groups, 4, smoothing=0.5)
        torch.manual_seed(seed)
        plain, _ = sampled_loss(features, class_vectors, groups, 4)
        parts.append((smoothed - plain).item() / 0.5)
    logits = features @ class_vectors.T
    expected = (logits[torch.arange(2), groups] - logits.mean(dim=1)).mean().item()
    assert np.mean(parts) == pytest.approx(expected, abs=4 * np.std(parts) / 20)
