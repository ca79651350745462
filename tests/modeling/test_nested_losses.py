"""Losses over nested sizes of an embedding: against NumPy, sentence-transformers and bare losses, over ranks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_ranks import on_ranks

from icone_hf import IConEConfig
from icone_hf.modeling import losses, objective, taught_losses
from icone_hf.modeling.losses import IGNORED_GROUP, nested_mean
from icone_hf.modeling.objective import Teachers
from icone_hf.modeling.sharded_classifier import ShardedClassifier

DIM, SIZES = 6, [4, 1]
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cross_entropy(scores, targets):
    return -np.mean([row[target] - np.log(np.exp(row).sum()) for row, target in zip(scores, targets, strict=True)])


def both_ways(loss):
    return lambda s: loss(s) + loss(s.T)


def divergence(targets, scores):
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (targets, scores))
    return (p * np.log(p / q)).sum() / len(p)


def hinges(scores, aggregate):
    """Of each row: other columns against its own."""
    count = len(scores)
    rows = [[max(0, 0.2 + s[j] - s[i]) for j in range(count) if j != i] for i, s in enumerate(scores)]
    return sum(map(aggregate, rows)) / count


def info_nce(scores):
    return cross_entropy(scores / 0.1, range(len(scores)))


def siglip(scores):
    signs = 2 * np.eye(len(scores)) - 1
    return np.log(1 + np.exp(-signs * (scores / 0.1 - 10))).sum() / len(scores)


# Of the cosines between images and captions.
CONTRASTIVE = {
    "infonce": both_ways(info_nce),
    "sigmoid": siglip,
    "max_hinge": both_ways(lambda s: hinges(s, max)),
    "sum_hinge": both_ways(lambda s: hinges(s, sum)),
}


def random_rows(count=5):
    """Features of images and captions, class vectors, and what teachers see."""
    rng = np.random.default_rng(3)
    return [rng.normal(size=(rows, DIM)) for rows in (count, count, 7, count, count)]


@pytest.mark.parametrize("dims", [SIZES, [DIM, *SIZES], None], ids=str)
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_losses_are_means_over_cuts_that_are_normalised_again(name, dims):
    images, texts, *_ = random_rows()
    cuts = [unit(images[:, :m]) @ unit(texts[:, :m]).T for m in ((DIM, *SIZES) if dims else (DIM,))]
    expected = np.mean([CONTRASTIVE[name](cosines) for cosines in cuts])
    config = IConEConfig(contrastive_loss=name, projection_dim=DIM, nested_dims=dims)
    embeds = (torch.tensor(unit(rows)) for rows in (images, texts))
    found = objective.contrastive_objective(config, 0.1, torch.tensor(-10.0), *embeds, torch.arange(5))
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_instance_losses_cut_class_vectors_too(logits):
    images, texts, class_vectors, *_ = random_rows()
    groups, expected = np.array([2, 0, 6, 3, 3]), 0.0
    for m in (DIM, *SIZES):
        for features in (images, texts):
            pair = features[:, :m], class_vectors[:, :m]
            scores = pair[0] @ pair[1].T if logits == "dot" else unit(pair[0]) @ unit(pair[1]).T / 0.1
            expected += cross_entropy(scores, groups) / 3
    config = IConEConfig(instance_logits=logits, temperature=0.1, projection_dim=DIM, nested_dims=SIZES)
    rows = [torch.tensor(one) for one in (images, texts, groups, class_vectors)]
    assert objective.instance_objective(config, *rows).item() == pytest.approx(expected, rel=1e-5)


def test_losses_with_teachers_cut_the_model_alone():
    images, texts, _, *teachers = random_rows()
    theirs = [unit(teacher) @ unit(teacher).T / 0.2 for teacher in teachers]
    cross = unit(teachers[0]) @ unit(teachers[1]).T / 0.2
    expected = dict.fromkeys(objective.TAUGHT_LOSSES, 0.0)
    for m in (DIM, *SIZES):
        i, t = unit(images[:, :m]), unit(texts[:, :m])
        s = i @ t.T / 0.2
        expected["soft_target_loss"] += (divergence(theirs[0], s) + divergence(theirs[1], s.T)) / 3
        within = divergence(theirs[0], i @ i.T / 0.2) + divergence(theirs[1], t @ t.T / 0.2)
        expected["uni_modal_loss"] += within / 3
        expected["distillation_loss"] += (divergence(cross, s) + divergence(cross.T, s.T)) / 3
    weights = dict.fromkeys(objective.TAUGHT_LOSSES.values(), 1.0)
    temperatures = {"temperature": 0.2, "soft_target_temperature": 0.2}
    config = IConEConfig(projection_dim=DIM, nested_dims=SIZES, **weights, **temperatures)
    embeds = (torch.tensor(unit(rows)) for rows in (images, texts))
    tensors = [torch.tensor(teacher) for teacher in teachers]
    found = objective.taught_objectives(config, *embeds, Teachers(*tensors, *tensors), torch.arange(5))
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-5)


def test_info_nce_is_that_of_sentence_transformers():
    """Its loss is a sum over sizes of the mean of both directions."""
    package = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

    class Model(torch.nn.Module):
        def get_embedding_dimension(self):
            return DIM

        def forward(self, features):
            return {"sentence_embedding": features["rows"]}

    model = Model()
    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    plain = package.MultipleNegativesRankingLoss(model, scale=1 / 0.05, **options)
    theirs = package.MatryoshkaLoss(model, plain, [DIM, *SIZES])
    images, texts = (torch.tensor(rows).float().requires_grad_() for rows in random_rows()[:2])
    expected = theirs([{"rows": images}, {"rows": texts}], None) * 2 / 3
    expected_gradients = torch.autograd.grad(expected, (images, texts))

    config = IConEConfig(projection_dim=DIM, nested_dims=SIZES)
    embeds = (torch.nn.functional.normalize(rows, dim=-1) for rows in (images, texts))
    found = objective.contrastive_objective(config, 0.05, None, *embeds, None)
    torch.testing.assert_close(found, expected, **CLOSE)
    for ours, gradient in zip(torch.autograd.grad(found, (images, texts)), expected_gradients, strict=True):
        torch.testing.assert_close(ours, gradient, **CLOSE)


# --- invariants ---


def rotation(sizes, seed):
    """An orthogonal matrix of blocks: one from each size to the next larger one."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [0, *sizes]
    widths = [end - start for start, end in itertools.pairwise(bounds)]
    return torch.block_diag(*[torch.linalg.qr(torch.randn(w, w, generator=generator))[0] for w in widths])


@st.composite
def nested_sizes(draw):
    width = draw(st.integers(2, 12))
    inner = draw(st.sets(st.integers(1, width - 1), min_size=1, max_size=4))
    return [*sorted(inner), width]


@given(nested_sizes(), st.integers(0, 10**6), st.sampled_from(["dot", "cosine"]), st.floats(0.1, 10))
def test_only_the_spaces_between_the_sizes_matter(sizes, seed, logits, length):
    """Turning the coordinates from one size to the next changes nothing; nor, on the cosine, does a row's length."""
    torch.manual_seed(seed)
    width, turn = sizes[-1], rotation(sizes, seed)
    images, texts, class_vectors = (torch.randn(count, width) for count in (4, 4, 5))
    fields = {"projection_dim": width, "nested_dims": sizes[:-1][::-1], "instance_logits": logits, "temperature": 0.5}
    config = IConEConfig(**fields)

    def both_losses(images, texts, class_vectors):
        embeds = (torch.nn.functional.normalize(rows, dim=-1) for rows in (images, texts))
        contrastive = objective.contrastive_objective(config, 0.5, None, *embeds, torch.arange(4))
        return contrastive, objective.instance_objective(config, images, texts, torch.arange(4), class_vectors)

    before = both_losses(images, texts, class_vectors)
    turned = both_losses(images @ turn, texts @ turn, class_vectors @ turn)
    torch.testing.assert_close(turned, before, atol=1e-3, rtol=1e-3)
    longer = both_losses(length * images, length * texts, class_vectors)
    torch.testing.assert_close(longer[0], before[0], atol=1e-4, rtol=1e-4)
    if logits == "cosine":
        torch.testing.assert_close(longer[1], before[1], atol=1e-4, rtol=1e-4)


def test_a_turn_across_sizes_changes_the_loss():
    images, texts = (torch.tensor(rows).float() for rows in random_rows()[:2])
    config, turn = IConEConfig(projection_dim=DIM, nested_dims=SIZES), rotation([DIM], 0)
    found = []
    for rows in ((images, texts), (images @ turn, texts @ turn)):
        embeds = (torch.nn.functional.normalize(one, dim=-1) for one in rows)
        found.append(objective.contrastive_objective(config, 0.05, None, *embeds, None).item())
    assert abs(found[0] - found[1]) > 0.1


@pytest.mark.parametrize("dims", [None, [16]], ids=str)
def test_without_nested_sizes_nothing_changes(make_model, batch, dims):
    """To the bit, losses and gradients: against the bare losses of the model's embeddings."""
    model = make_model(nested_dims=dims).eval()
    groups = torch.tensor([0, 1, 0, 2])
    output = model(**batch, group_ids=groups)
    features = [out.pooler_output for out in (output.vision_model_output, output.text_model_output)]
    contrastive = losses.contrastive_loss(output.image_embeds, output.text_embeds, 0.05, groups)
    weight = model.classifier.weight
    instance = sum(losses.instance_loss(rows, weight, groups, reduction="sum") for rows in features) / 4
    assert torch.equal(output.contrastive_loss, contrastive)
    assert torch.equal(output.instance_loss, instance)
    parameters = [weight, model.visual_projection.weight, model.text_projection.weight]
    ours = torch.autograd.grad(output.loss, parameters, retain_graph=True)
    for gradient, expected in zip(ours, torch.autograd.grad(instance + contrastive, parameters), strict=True):
        assert torch.equal(gradient, expected)


def test_the_whole_width_counts_once_and_is_left_as_it_is():
    seen = []
    rows = torch.ones(2, 4) * 3

    def loss(one):
        seen.append(one)
        return one.sum()

    assert nested_mean(loss, [4, 2], rows, normalize=True).item() == pytest.approx((24 + 2 * 2**0.5) / 2)
    assert seen[0] is rows
    assert [one.shape[1] for one in seen] == [4, 2]


@pytest.mark.parametrize("enabled", [False, True])
def test_cuts_are_normalised_in_float32(enabled):
    rows, seen = torch.randn(3, 8, dtype=torch.bfloat16), []
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        nested_mean(lambda one: seen.append(one) or one.sum(), [4], rows, normalize=True)
    expected = torch.nn.functional.normalize(rows[:, :4].float(), dim=-1)
    assert seen[1].dtype == torch.float32
    assert torch.equal(seen[1], expected)


# --- several ranks, a sample of the classes, shards ---

GROUPS = torch.tensor([3, 0, 7, 1, 3, 5, 2, 6, 0, 4, IGNORED_GROUP, IGNORED_GROUP])  # an uneven batch: two fillers


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def mean_over_cuts(loss, *rows):
    return sum(loss(*(one[:, :m] for one in rows)) for m in (DIM, *SIZES)) / 3


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [0, 100])  # all other classes: exact too
@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_ranks_share_the_nested_losses(monkeypatch, num_ranks, num_samples, logits):
    fields = {"instance_logits": logits, "instance_label_smoothing": 0.1, "temperature": 0.2}
    config = IConEConfig(num_groups=9, projection_dim=DIM, nested_dims=SIZES, **fields)
    images, texts, class_vectors = (torch.randn(count, DIM) for count in (12, 12, 9))
    kept, wanted = GROUPS != IGNORED_GROUP, leaves(images, texts, class_vectors)

    def instance(rows, vectors):
        return losses.instance_loss(rows[kept], vectors, GROUPS[kept], logits, 0.2, label_smoothing=0.1)

    def contrastive(images, texts):
        return losses.contrastive_loss(*(torch.nn.functional.normalize(rows) for rows in (images, texts)), 0.2, GROUPS)

    expected = sum(mean_over_cuts(instance, rows, wanted[2]) for rows in wanted[:2])
    expected = expected + mean_over_cuts(contrastive, *wanted[:2])
    expected.backward()

    def of_rank(rank):
        mine = slice(rank * 12 // num_ranks, (rank + 1) * 12 // num_ranks)
        own = leaves(images[mine], texts[mine], class_vectors)
        loss = objective.instance_objective(config, *own[:2], GROUPS[mine], own[2], num_ranks, num_samples)
        embeds = (torch.nn.functional.normalize(rows) for rows in own[:2])
        loss = loss + objective.contrastive_objective(config, 0.2, None, *embeds, GROUPS[mine], num_ranks)
        loss.backward()
        return loss.detach(), [leaf.grad.to_dense() for leaf in own]

    found = on_ranks(num_ranks, of_rank, monkeypatch)
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).mean(), expected.detach(), **CLOSE)
    for place in (0, 1):
        gradient = torch.cat([gradients[place] for _, gradients in found]) / num_ranks
        torch.testing.assert_close(gradient, wanted[place].grad, **CLOSE)
    of_classes = [gradients[2] for _, gradients in found]
    if not num_samples:
        of_classes = [torch.stack(of_classes).mean(dim=0)]
    for gradient in of_classes:
        torch.testing.assert_close(gradient, wanted[2].grad, **CLOSE)


def test_every_size_scores_the_same_sample(monkeypatch):
    """One draw for a batch, as without nested sizes."""
    drawn = []
    sample = objective.sample_classes
    monkeypatch.setattr(objective, "sample_classes", lambda *args: drawn.append(sample(*args)) or drawn[-1])
    config = IConEConfig(num_groups=9, projection_dim=DIM, nested_dims=SIZES)
    images, texts, class_vectors = (torch.randn(count, DIM) for count in (3, 3, 9))
    found = objective.instance_objective(config, images, texts, torch.tensor([0, 4, 0]), class_vectors, 1, 2)
    (scored,) = drawn

    def loss(rows, vectors):
        scores = rows @ vectors[scored.class_ids].T + scored.log_counts
        return torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 0]))

    expected = sum(mean_over_cuts(loss, rows, class_vectors) for rows in (images, texts))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_a_sharded_classifier_is_cut_like_a_whole_one(logits):
    """On one rank. Several: test_sharded_classifier.py."""
    config = IConEConfig(num_groups=9, projection_dim=DIM, nested_dims=SIZES, instance_logits=logits)
    classifier, rows = ShardedClassifier(9, DIM, std=1.0), [torch.randn(12, DIM) for _ in range(2)]
    weight = classifier.weight.detach().clone().requires_grad_()
    found = classifier.objective(config, *rows, GROUPS)
    expected = objective.instance_objective(config, *rows, GROUPS, weight)
    torch.testing.assert_close(found, expected, **CLOSE)
    found.backward()
    expected.backward()
    torch.testing.assert_close(classifier.weight.grad, weight.grad, **CLOSE)


def test_teachers_losses_are_the_bare_ones_without_nested_sizes():
    images, texts, _, *teachers = (torch.tensor(rows) for rows in random_rows())
    embeds = [torch.nn.functional.normalize(rows, dim=-1) for rows in (images, texts)]
    config = IConEConfig(projection_dim=DIM, soft_target_weight=1.0)
    found = objective.taught_objectives(config, *embeds, Teachers(*teachers), None)
    assert torch.equal(found["soft_target_loss"], taught_losses.soft_target_loss(*embeds, *teachers, 0.1, 0.1, None))
