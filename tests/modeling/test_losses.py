import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icone_hf.modeling.losses import (
    IGNORED_GROUP,
    contrastive_loss,
    hinge_loss,
    instance_loss,
    instance_scores,
    sigmoid_loss,
)


def log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def numpy_instance_loss(features, class_vectors, groups, cosine_temperature=None):
    """Compute equations (1) and (2), row by row."""
    logits = features @ class_vectors.T
    if cosine_temperature:
        logits = unit(features) @ unit(class_vectors).T / cosine_temperature
    return -log_softmax(logits)[np.arange(len(groups)), groups].mean()


def numpy_info_nce(images, texts, tau):
    """Compute equations (6) to (8), with tau in both denominators."""
    s = unit(images) @ unit(texts).T / tau
    return -np.diag(log_softmax(s)).mean() - np.diag(log_softmax(s.T)).mean()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def normalized(x):
    return torch.nn.functional.normalize(torch.as_tensor(x), dim=-1)


@pytest.mark.parametrize("seed", range(3))
def test_instance_loss_is_the_papers_equation(seed):
    features, classes, groups = normal(6, 5, seed=seed), normal(9, 5, seed=seed + 10), np.array([0, 8, 3, 3, 1, 2])
    loss = instance_loss(torch.tensor(features), torch.tensor(classes), torch.tensor(groups))
    assert loss.item() == pytest.approx(numpy_instance_loss(features, classes, groups), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_cosine_instance_loss_normalises_and_divides(temperature):
    features, classes, groups = normal(6, 5), normal(9, 5, seed=1), np.array([0, 8, 3, 3, 1, 2])
    loss = instance_loss(torch.tensor(features), torch.tensor(classes), torch.tensor(groups), "cosine", temperature)
    assert loss.item() == pytest.approx(numpy_instance_loss(features, classes, groups, temperature), rel=1e-5)


def test_instance_loss_sum_is_mean_times_rows():
    args = torch.tensor(normal(6, 5)), torch.tensor(normal(9, 5)), torch.arange(6)
    assert instance_loss(*args, reduction="sum").item() == pytest.approx(6 * instance_loss(*args).item(), rel=1e-6)


def test_instance_loss_refuses_unknown_logits():
    with pytest.raises(ValueError, match="cosin"):
        instance_loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), "cosinus")


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_contrastive_loss_is_the_sum_of_both_directions(tau):
    images, texts = normal(7, 4), normal(7, 4, seed=1)
    loss = contrastive_loss(normalized(images), normalized(texts), tau)
    assert loss.item() == pytest.approx(numpy_info_nce(images, texts, tau), rel=1e-5)


def test_contrastive_loss_is_twice_transformers_clip_loss():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    images, texts = normalized(normal(7, 4)).float(), normalized(normal(7, 4, seed=1)).float()
    clip_loss = image_text_contrastive_loss(texts @ images.T / 0.05)  # CLIP takes the mean of both directions
    assert contrastive_loss(images, texts, 0.05).item() == pytest.approx(2 * clip_loss.item(), rel=1e-5)


def test_pairs_of_one_group_are_no_negatives():
    images, texts = normal(4, 6), normal(4, 6, seed=1)
    groups = np.array([0, 1, 0, 2])
    expected = 0.0
    for queries, items in ((unit(images), unit(texts)), (unit(texts), unit(images))):
        for i in range(4):
            rivals = [j for j in range(4) if j == i or groups[j] != groups[i]]
            scores = queries[i] @ items[rivals].T / 0.1
            expected += (np.log(np.exp(scores).sum()) - queries[i] @ items[i] / 0.1) / 4
    loss = contrastive_loss(normalized(images), normalized(texts), 0.1, torch.tensor(groups))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_distinct_groups_change_nothing():
    images, texts = normalized(normal(5, 4)), normalized(normal(5, 4, seed=1))
    assert contrastive_loss(images, texts, 0.05, torch.tensor([4, 2, 9, 0, 1])) == contrastive_loss(images, texts, 0.05)


@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_fillers_are_seen_by_no_loss(logits):
    images, texts, classes = normal(6, 4), normal(6, 4, seed=1), torch.tensor(normal(5, 4, seed=2))
    groups = torch.tensor([0, 1, IGNORED_GROUP, 2, 3, IGNORED_GROUP])
    kept = groups != IGNORED_GROUP
    features = torch.tensor(images)
    assert instance_loss(features, classes, groups, logits).item() == pytest.approx(
        instance_loss(features[kept], classes, groups[kept], logits).item(), rel=1e-6
    )
    embeds = normalized(images), normalized(texts)
    assert contrastive_loss(*embeds, 0.05, groups).item() == pytest.approx(
        contrastive_loss(embeds[0][kept], embeds[1][kept], 0.05).item(), rel=1e-6
    )


def test_fillers_get_no_gradient():
    images = normalized(normal(4, 3)).float().requires_grad_()
    texts = normalized(normal(4, 3, seed=1)).float().requires_grad_()
    contrastive_loss(images, texts, 0.1, torch.tensor([0, IGNORED_GROUP, 1, 2])).backward()
    for gradient in (images.grad, texts.grad):
        assert gradient[1].abs().sum() == 0
        assert gradient[0].abs().sum() > 0


@given(st.integers(2, 12), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_permuting_a_batch_changes_nothing(size, seed):
    images, texts, classes = normal(size, 5, seed=seed), normal(size, 5, seed=seed + 1), torch.tensor(normal(8, 5))
    rng = np.random.default_rng(seed)
    groups, order = torch.tensor(rng.integers(0, 8, size)), torch.tensor(rng.permutation(size))
    features, embeds = torch.tensor(images), (normalized(images), normalized(texts))
    for logits in ("dot", "cosine"):
        before = instance_loss(features, classes, groups, logits).item()
        assert instance_loss(features[order], classes, groups[order], logits).item() == pytest.approx(before, rel=1e-4)
    before = contrastive_loss(*embeds, 0.05, groups).item()
    after = contrastive_loss(embeds[0][order], embeds[1][order], 0.05, groups[order]).item()
    assert after == pytest.approx(before, rel=1e-4, abs=1e-5)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_cosine_logits_ignore_lengths(feature_scale, class_scale):
    features, classes, groups = torch.tensor(normal(5, 4)), torch.tensor(normal(6, 4, seed=1)), torch.arange(5)
    before = instance_loss(features, classes, groups, "cosine", 0.1).item()
    after = instance_loss(features * feature_scale, classes * class_scale, groups, "cosine", 0.1).item()
    assert after == pytest.approx(before, rel=1e-5)


def test_losses_are_float32_for_bfloat16_inputs():
    x, classes = torch.randn(4, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    assert instance_loss(x, classes, torch.arange(4)).dtype == torch.float32
    assert contrastive_loss(x, x, 0.05).dtype == torch.float32


def test_gradients_are_those_of_finite_differences():
    images = torch.tensor(normal(3, 4), requires_grad=True)
    classes = torch.tensor(normal(5, 4, seed=2), requires_grad=True)
    groups = torch.tensor([0, 4, 2])
    loss = lambda a, w: instance_loss(a, w, groups, "cosine", 0.5).double()  # noqa: E731
    assert torch.autograd.gradcheck(loss, (images, classes), eps=1e-3, atol=1e-2, rtol=1e-2)


GROUPS = np.array([0, 1, 0, 2, 1, 0])


def numpy_hinges(images, texts, margin, groups, aggregate):
    """Average VSE++'s equations (5) and (6) over the batch, pair by pair."""
    s, size, total = unit(images) @ unit(texts).T, len(images), 0.0
    for i in range(size):
        others = [j for j in range(size) if groups[j] != groups[i]]
        total += aggregate([max(0, margin - s[i, i] + s[i, j]) for j in others])
        total += aggregate([max(0, margin - s[i, i] + s[j, i]) for j in others])
    return total / size


@pytest.mark.parametrize("margin", [0.2, 1.0])
@pytest.mark.parametrize(("hardest", "aggregate"), [(True, max), (False, sum)])
@pytest.mark.parametrize("groups", [np.arange(6), GROUPS])
def test_hinge_loss_is_vsepps(margin, hardest, aggregate, groups):
    images, texts = normal(6, 4), normal(6, 4, seed=1)
    loss = hinge_loss(normalized(images), normalized(texts), margin, torch.tensor(groups), hardest)
    assert loss.item() == pytest.approx(numpy_hinges(images, texts, margin, groups, aggregate), rel=1e-5)


def test_sigmoid_loss_is_siglips_algorithm_1():
    images, texts = normal(6, 4), normal(6, 4, seed=1)
    logits = unit(images) @ unit(texts).T / 0.1 - 3.0
    labels = 2 * np.eye(6) - 1
    expected = np.log1p(np.exp(-labels * logits)).sum() / 6
    assert sigmoid_loss(normalized(images), normalized(texts), 0.1, -3.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_sigmoid_loss_of_groups(several):
    images, texts = normal(6, 4), normal(6, 4, seed=1)
    logits, expected = unit(images) @ unit(texts).T / 0.1 - 3.0, 0.0
    for i in range(6):
        for j in range(6):
            if i == j or (several and GROUPS[i] == GROUPS[j]):
                expected += np.log1p(np.exp(-logits[i, j])) / 6
            elif GROUPS[i] != GROUPS[j]:
                expected += np.log1p(np.exp(logits[i, j])) / 6
    loss = sigmoid_loss(normalized(images), normalized(texts), 0.1, -3.0, torch.tensor(GROUPS), several)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_several_positives_are_supervised_contrasts():
    """Khosla et al., equation 2, with the other modality's embeddings as the contrasts."""
    images, texts = normal(6, 4), normal(6, 4, seed=1)
    expected = 0.0
    for anchors, items in ((unit(images), unit(texts)), (unit(texts), unit(images))):
        probabilities = np.exp(log_softmax(anchors @ items.T / 0.1))
        for i in range(6):
            own = [p for p in range(6) if GROUPS[p] == GROUPS[i]]
            expected -= np.log(probabilities[i, own]).mean() / 6
    loss = contrastive_loss(normalized(images), normalized(texts), 0.1, torch.tensor(GROUPS), several_positives=True)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_several_positives_of_distinct_groups_are_plain_info_nce():
    images, texts = normalized(normal(5, 4)), normalized(normal(5, 4, seed=1))
    several = contrastive_loss(images, texts, 0.05, torch.arange(5), several_positives=True)
    assert several.item() == pytest.approx(contrastive_loss(images, texts, 0.05).item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"^several_positives needs group_ids"):
        contrastive_loss(images, texts, several_positives=True)


def numpy_hard_negatives(images, texts, tau, beta, groups):
    """Compute HN-NCE's equation with alpha = 1, anchor by anchor; other pairs of an anchor's group are left out."""
    total = 0.0
    for scores in (unit(images) @ unit(texts).T / tau, unit(texts) @ unit(images).T / tau):
        losses = []
        for i, row in enumerate(scores):
            negatives = [j for j in range(len(row)) if groups[j] != groups[i]]
            hardness = np.exp(beta * row[negatives])
            weights = len(negatives) * hardness / hardness.sum()
            losses.append(-np.log(np.exp(row[i]) / (np.exp(row[i]) + (weights * np.exp(row[negatives])).sum())))
        total += np.mean(losses)
    return total


@pytest.mark.parametrize("beta", [0.25, 0.5, 2.0])
@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 3], None])
def test_hard_negatives_weigh_as_hn_nce_says(beta, groups):
    images, texts = normal(6, 4), normal(6, 4, seed=1)
    ids = None if groups is None else torch.tensor(groups)
    loss = contrastive_loss(normalized(images), normalized(texts), 0.2, ids, hard_negative_beta=beta)
    expected = numpy_hard_negatives(images, texts, 0.2, beta, groups or range(6))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_negatives_has_no_hard_ones():
    images, texts = (normalized(normal(3, 4, seed=s)).requires_grad_() for s in (0, 1))
    loss = contrastive_loss(images, texts, 0.2, torch.tensor([7, 7, 7]), hard_negative_beta=0.5)
    loss.backward()
    assert loss.item() == 0
    assert images.grad.abs().sum() == 0
    with pytest.raises(ValueError, match="several_positives must be False"):
        contrastive_loss(images, texts, 0.2, torch.arange(3), several_positives=True, hard_negative_beta=0.5)


@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_labels_are_smoothed_over_all_classes(epsilon):
    features, classes, groups = normal(6, 5), normal(9, 5, seed=1), np.array([0, 8, 3, 3, 1, 2])
    targets = (1 - epsilon) * np.eye(9)[groups] + epsilon / 9
    expected = -(targets * log_softmax(unit(features) @ unit(classes).T / 0.1)).sum(axis=1).mean()
    args = torch.tensor(features), torch.tensor(classes), torch.tensor(groups), "cosine", 0.1
    assert instance_loss(*args, label_smoothing=epsilon).item() == pytest.approx(expected, rel=1e-5)


LOSSES = {
    "hard negatives": lambda i, t, g: contrastive_loss(i, t, 0.3, g, hard_negative_beta=0.5),
    "several": lambda i, t, g: contrastive_loss(i, t, 0.1, g, several_positives=True),
    "max": lambda i, t, g: hinge_loss(i, t, 3.0, g, hardest=True),
    "sum": lambda i, t, g: hinge_loss(i, t, 3.0, g, hardest=False),
    "sigmoid": lambda i, t, g: sigmoid_loss(i, t, 0.1, -3.0, g),
    "sigmoid, several": lambda i, t, g: sigmoid_loss(i, t, 0.1, -3.0, g, several_positives=True),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_no_loss_sees_fillers(loss):
    images, texts = (normalized(normal(6, 4, seed=s)).float().requires_grad_() for s in (0, 1))
    groups = torch.tensor([0, 1, IGNORED_GROUP, 0, 3, IGNORED_GROUP])
    kept = groups != IGNORED_GROUP
    value = loss(images, texts, groups)
    assert value.item() == pytest.approx(loss(images[kept], texts[kept], groups[kept]).item(), rel=1e-5)
    value.backward()
    for gradient in (images.grad, texts.grad):
        assert gradient.isfinite().all()
        assert gradient[~kept].abs().sum() == 0
        assert (gradient[kept].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@given(size=st.integers(2, 10), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_order_of_a_batch_does_not_matter(loss, size, seed):
    rng = np.random.default_rng(seed)
    images, texts = (normalized(normal(size, 5, seed=seed + i)) for i in (0, 1))
    groups, order = torch.tensor(rng.integers(0, 4, size)), torch.tensor(rng.permutation(size))
    before, after = loss(images, texts, groups), loss(images[order], texts[order], groups[order])
    assert after.item() == pytest.approx(before.item(), rel=1e-4, abs=1e-6)


def test_defaults_are_the_papers_and_vsepps():
    images, texts = (normalized(normal(5, 4, seed=s)) for s in (0, 1))
    classes, groups = torch.tensor(normal(6, 4, seed=2)), torch.arange(5)
    for logits, temperature in (("dot", 1.0), ("cosine", 0.05)):
        expected = instance_loss(images, classes, groups, logits, temperature, "mean", None)
        assert instance_loss(images, classes, groups, logits) == expected
    assert instance_loss(images, classes, groups) == instance_loss(images, classes, groups, "dot")
    torch.testing.assert_close(instance_scores(images, classes).double(), images @ classes.T, atol=1e-6, rtol=1e-6)
    assert torch.equal(
        instance_scores(images, classes, "cosine"), instance_scores(images, classes, "cosine", temperature=0.05)
    )
    assert contrastive_loss(images, texts) == contrastive_loss(images, texts, 0.05, None, False)
    assert hinge_loss(images, texts) == hinge_loss(images, texts, 0.2, None, True)
    assert sigmoid_loss(images, texts, 0.1, -3.0) == sigmoid_loss(images, texts, 0.1, -3.0, None, False)


def test_losses_stay_on_the_device_of_their_inputs():
    """Where torch's default is another device: what a loss makes itself must not land there."""
    images, texts = (normalized(normal(5, 4, seed=s)) for s in (0, 1))
    groups, classes = torch.tensor([0, 1, 0, 2, IGNORED_GROUP]), torch.tensor(normal(6, 4, seed=2))
    losses = {
        "instance": lambda: instance_loss(images, classes, groups, "cosine", 0.1),
        "infonce": lambda: contrastive_loss(images, texts, 0.1),
        **{name: lambda loss=loss: loss(images, texts, groups) for name, loss in LOSSES.items()},
    }
    for name, loss in losses.items():
        expected = loss()
        with torch.device("meta"):
            assert torch.equal(loss(), expected), name


@pytest.mark.parametrize("name", ["dot", "cosine", "infonce", "hard negatives", "sigmoid", "hinge"])
def test_autocast_does_not_round_the_products(name):
    """Gradients near convergence, where the scores of a row differ little, against those without autocast."""
    images = torch.nn.functional.normalize(torch.tensor(normal(16, 64)), dim=-1)
    texts = torch.nn.functional.normalize(images + 0.05 * torch.tensor(normal(16, 64, seed=1)), dim=-1)
    functions = {
        "dot": lambda a, b: instance_loss(20 * a, b, torch.arange(16)),
        "cosine": lambda a, b: instance_loss(a, b, torch.arange(16), "cosine", 0.05),
        "infonce": lambda a, b: contrastive_loss(a, b, 0.05),
        "hard negatives": lambda a, b: contrastive_loss(a, b, 0.05, hard_negative_beta=0.5),
        "sigmoid": lambda a, b: sigmoid_loss(a, b, 0.1, -10.0),
        "hinge": lambda a, b: hinge_loss(a, b, 0.9, hardest=False),
    }
    gradients = []
    for enabled in (False, True):
        leaves = [embeds.float().clone().requires_grad_() for embeds in (images, texts)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = functions[name](*leaves)
        assert loss.dtype == torch.float32
        gradients.append(torch.autograd.grad(loss, leaves))
    for rounded, exact in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(rounded, exact, atol=1e-6, rtol=1e-5)
