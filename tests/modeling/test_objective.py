"""The loss that the config chooses, and the same over ranks. Wrong inputs are in test_modeling.py."""

import pytest
import torch
from thread_ranks import on_ranks

from icone_hf import IConEConfig
from icone_hf.modeling import class_sampling, losses, objective
from icone_hf.modeling.losses import IGNORED_GROUP
from icone_hf.modeling.ranks import count_ranks, rank_index


def unit_embeds(output):
    return output.image_embeds.detach(), output.text_embeds.detach()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"contrastive_loss": "max_hinge", "margin": 0.3}, lambda i, t, g: losses.hinge_loss(i, t, 0.3, g, True)),
        ({"contrastive_loss": "sum_hinge"}, lambda i, t, g: losses.hinge_loss(i, t, 0.2, g, False)),
        ({"hard_negative_beta": 0.5}, lambda i, t, g: losses.contrastive_loss(i, t, 0.05, g, hard_negative_beta=0.5)),
        ({"contrastive_loss": "sigmoid", "temperature": 0.1}, lambda i, t, g: losses.sigmoid_loss(i, t, 0.1, -10.0, g)),
        ({"several_positives": True}, lambda i, t, g: losses.contrastive_loss(i, t, 0.05, g, True)),
        (
            {"contrastive_loss": "sigmoid", "several_positives": True},
            lambda i, t, g: losses.sigmoid_loss(i, t, 0.05, -10.0, g, True),
        ),
        ({"learn_temperature": True, "temperature": 0.07}, lambda i, t, g: losses.contrastive_loss(i, t, 0.07, g)),
    ],
)
def test_the_config_chooses_the_loss(make_model, batch, config, expected):
    model, groups = make_model(**config).eval(), torch.tensor([0, 1, 0, 2])
    output = model(**batch, group_ids=groups, instance_weight=0)
    assert output.loss.item() == pytest.approx(expected(*unit_embeds(output), groups).item(), rel=1e-5)


# --- several ranks, against the bare losses of the whole batch ---

GROUPS = torch.tensor([3, 0, 7, 1, 3, 5, 2, 6, 0, 4, IGNORED_GROUP, IGNORED_GROUP])  # an uneven batch: two fillers
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def whole_batch(normalized=False):
    """Rows of both modalities, and the class vectors of nine groups."""
    images, texts, class_vectors = torch.randn(12, 5), torch.randn(12, 5), torch.randn(9, 5)
    if normalized:
        images, texts = (torch.nn.functional.normalize(rows, dim=-1) for rows in (images, texts))
    return images, texts, class_vectors


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [0, 100])  # all other classes: exact too
@pytest.mark.parametrize(
    ("config", "logits", "temperature"),
    [
        ({}, "dot", 1.0),
        ({"instance_logits": "cosine", "temperature": 0.2}, "cosine", 0.2),
        ({"instance_logits": "cosine", "temperature": 0.2, "instance_temperature": 0.1}, "cosine", 0.1),
        ({"instance_label_smoothing": 0.2}, "dot", 1.0),
    ],
)
def test_ranks_share_the_instance_loss(monkeypatch, num_ranks, num_samples, config, logits, temperature):
    config, (images, texts, class_vectors) = IConEConfig(num_groups=9, **config), whole_batch()
    kept, smoothing = GROUPS != IGNORED_GROUP, config.instance_label_smoothing
    expected_leaves = leaves(images, texts, class_vectors)
    expected = sum(
        losses.instance_loss(
            rows[kept], expected_leaves[2], GROUPS[kept], logits, temperature, label_smoothing=smoothing
        )
        for rows in expected_leaves[:2]
    )
    expected.backward()

    def of_rank(rank):
        mine = slice(rank * 12 // num_ranks, (rank + 1) * 12 // num_ranks)
        own = leaves(images[mine], texts[mine], class_vectors)
        loss = objective.instance_objective(config, *own[:2], GROUPS[mine], own[2], num_ranks, num_samples)
        loss.backward()
        return loss.detach(), [leaf.grad.to_dense() for leaf in own]

    found = on_ranks(num_ranks, of_rank, monkeypatch)
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).mean(), expected.detach(), **CLOSE)
    # DDP takes the mean of the ranks' gradients; for sampled classes it was taken already, over their rows.
    for place in (0, 1):
        gradient = torch.cat([gradients[place] for _, gradients in found]) / num_ranks
        torch.testing.assert_close(gradient, expected_leaves[place].grad, **CLOSE)
    of_classes = [gradients[2] for _, gradients in found]
    if not num_samples:
        of_classes = [torch.stack(of_classes).mean(dim=0)]
    for gradient in of_classes:
        torch.testing.assert_close(gradient, expected_leaves[2].grad, **CLOSE)


def test_ranks_score_the_same_few_classes_which_stand_for_the_others(monkeypatch):
    config, (images, texts, class_vectors) = IConEConfig(num_groups=9), whole_batch()
    groups = torch.tensor([3, 0, 0, 3, 5, 5, 3, 0, 0, 3, 5, IGNORED_GROUP])
    # Each rank draws other numbers among 1, 2, 4, 6, 7 and 8; those of the first count: 1 and 6.
    monkeypatch.setattr(class_sampling, "sample_integers", lambda *_: torch.tensor([[0, 3], [1, 2]][rank_index()]))
    scored, places = [0, 3, 5, 1, 6], {0: 0, 3: 1, 5: 2, IGNORED_GROUP: IGNORED_GROUP}
    counts = torch.tensor([1.0, 1, 1, 3, 3])  # the two stand for six
    expected = 0.0
    for rows in (images, texts):
        logits = rows @ class_vectors[scored].T + counts.log()
        expected += torch.nn.functional.cross_entropy(logits, torch.tensor([places[g] for g in groups.tolist()]))

    def of_rank(rank):
        mine = slice(6 * rank, 6 * rank + 6)
        return objective.instance_objective(config, images[mine], texts[mine], groups[mine], class_vectors, 2, 2)

    torch.testing.assert_close(sum(on_ranks(2, of_rank, monkeypatch)) / 2, expected, **CLOSE)


LOSSES = {
    "infonce": lambda i, t, g: losses.contrastive_loss(i, t, 0.1, g),
    "hard negatives": lambda i, t, g: losses.contrastive_loss(i, t, 0.1, g, hard_negative_beta=0.5),
    "sigmoid": lambda i, t, g: losses.sigmoid_loss(i, t, 0.1, -3.0, g),
    "max_hinge": lambda i, t, g: losses.hinge_loss(i, t, 0.4, g, True),
    "sum_hinge": lambda i, t, g: losses.hinge_loss(i, t, 0.4, g, False),
}


@pytest.mark.parametrize("groups", [GROUPS, None])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_every_rank_has_the_contrastive_loss_of_the_whole_batch(monkeypatch, name, num_ranks, groups):
    kind = {"hard_negative_beta": 0.5} if name == "hard negatives" else {"contrastive_loss": name}
    config, (images, texts, _) = IConEConfig(margin=0.4, **kind), whole_batch(normalized=True)
    expected_leaves = leaves(images, texts)
    expected = LOSSES[name](*expected_leaves, groups)
    expected.backward()

    def of_rank(rank):
        mine = slice(rank * 12 // num_ranks, (rank + 1) * 12 // num_ranks)
        own = leaves(images[mine], texts[mine])
        ids = None if groups is None else groups[mine]
        ranks = [num_ranks] if num_ranks > 1 else []  # one is the default
        loss = objective.contrastive_objective(config, 0.1, torch.tensor(-3.0), *own, ids, *ranks)
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in own]

    found = on_ranks(num_ranks, of_rank, monkeypatch)
    for loss, _ in found:
        torch.testing.assert_close(loss, expected.detach(), **CLOSE)
    for place in (0, 1):
        gradient = torch.cat([gradients[place] for _, gradients in found]) / num_ranks
        torch.testing.assert_close(gradient, expected_leaves[place].grad, **CLOSE)


def test_a_chunk_counts_for_its_part_of_the_batch():
    """Losses of chunks, each divided by the pairs of all, add up to the batch's."""
    config, (images, texts, class_vectors) = IConEConfig(num_groups=9), whole_batch()
    whole = objective.instance_objective(config, images, texts, GROUPS, class_vectors)
    chunks = [
        objective.instance_objective(config, images[s], texts[s], GROUPS[s], class_vectors, num_items_in_batch=10)
        for s in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(sum(chunks), whole)


def test_pairs_are_counted_over_all_ranks_and_rows_come_in_their_order(monkeypatch):
    def of_rank(rank):
        ids = torch.tensor([[4, IGNORED_GROUP], [5, 6], [IGNORED_GROUP, IGNORED_GROUP]][rank])
        return objective.count_pairs(ids, 3).item(), objective.gather_rows(ids, 3).tolist(), rank_index()

    order = [4, IGNORED_GROUP, 5, 6, IGNORED_GROUP, IGNORED_GROUP]
    assert on_ranks(3, of_rank, monkeypatch) == [(3, order, rank) for rank in range(3)]
    assert objective.count_pairs(torch.tensor(order)).item() == 3
    assert (count_ranks(), rank_index()) == (1, 0)


def test_gathered_rows_pass_their_gradient_on_times_the_factor(monkeypatch):
    def of_rank(rank):
        rows = torch.full((2, 1), float(rank), requires_grad=True)
        gathered = objective.GatherRows.apply(rows, 3)
        (gathered * torch.arange(4.0)[:, None] * (rank + 1)).sum().backward()
        return rows.grad.flatten().tolist()

    assert on_ranks(2, of_rank, monkeypatch) == [[0.0, 9.0], [18.0, 27.0]]  # 3 x (1 + 2) x the row's weight
    rows = torch.ones(2, 1, requires_grad=True)
    (2 * objective.GatherRows.apply(rows, 5)).sum().backward()
    assert rows.grad.flatten().tolist() == [10.0, 10.0]


@pytest.mark.parametrize("group_ids", [[0, 8], [IGNORED_GROUP, 3]])
def test_group_ids_in_range_are_taken(group_ids):
    objective.check_group_ids(torch.tensor(group_ids), 9)


@pytest.mark.parametrize(("group_ids", "named"), [([0, 9, 10], 9), ([-1, 3], -1), ([IGNORED_GROUP - 1], -101)])
def test_the_first_group_id_out_of_range_is_named(group_ids, named):
    with pytest.raises(ValueError, match=rf"^group_ids holds {named}, but the classifier's classes are 0\.\.8 \(num"):
        objective.check_group_ids(torch.tensor(group_ids), 9)


def test_ids_on_an_accelerator_are_not_looked_at():
    objective.check_group_ids(torch.tensor([99], device="meta"), 9)


PAIRS = {"image_features": torch.ones(3, 2), "text_features": torch.ones(3, 2), "group_ids": torch.tensor([0, 1, 2])}
WEIGHTS = {"instance_weight": 0.5, "contrastive_weight": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"instance_weight": 0, "contrastive_weight": 0},
            "instance_weight and contrastive_weight are both 0: there is no loss to compute.",
        ),
        (
            {"image_features": None},
            "The losses need pairs: pass pixel_values and input_ids, or return_loss=False.",
        ),
        (
            {"text_features": None},
            "The losses need pairs: pass pixel_values and input_ids, or return_loss=False.",
        ),
        ({"text_features": torch.ones(4, 2)}, "The losses need pairs, but there are 3 images and 4 captions."),
        ({"group_ids": None}, "The instance loss needs group_ids: pass them, or instance_weight=0."),
        ({"group_ids": torch.ones(2)}, "group_ids is (2,), one for each of 3 pairs is needed."),
        ({"group_ids": torch.ones(3, 1)}, "group_ids is (3, 1), one for each of 3 pairs is needed."),
        (
            {"num_groups": 0},
            "The instance loss needs the classifier, and this model has none (num_groups=0): build or load it with "
            "num_groups=, or pass instance_weight=0.",
        ),
        ({"num_groups": 2}, "group_ids holds 2, but the classifier's classes are 0..1 (num_groups=2)."),
    ],
)
def test_what_a_loss_lacks_is_named(change, message):
    arguments = {**PAIRS, **WEIGHTS, "num_groups": 3, **change}
    config = IConEConfig(num_groups=arguments.pop("num_groups"))
    with pytest.raises(ValueError, match=r".") as caught:
        objective.check_pairs(config, **arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"contrastive_weight": 0},
        {"instance_weight": 0},
        {"instance_weight": 0, "group_ids": None},
        {"instance_weight": 0, "num_groups": 0},
        {"instance_weight": 0, "group_ids": torch.tensor([7, 8, 9])},  # no class is looked up
    ],
)
def test_what_has_all_that_a_loss_needs_is_taken(change):
    arguments = {**PAIRS, **WEIGHTS, "num_groups": 3, **change}
    objective.check_pairs(IConEConfig(num_groups=arguments.pop("num_groups")), **arguments)
