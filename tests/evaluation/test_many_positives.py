"""mAP@R, R-Precision and R@K, beside ten lines of NumPy and the code of ECCV Caption's authors."""

import importlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from icone_hf import retrieval_metrics
from icone_hf.embedding.encoding import GroupEmbeddings
from icone_hf.errors import InputError, MissingPackageError
from icone_hf.evaluation.coco_positives import load_judgements, place_judgements
from icone_hf.evaluation.many_positives import metrics_of_positive_ranks, pairs_of, positive_metrics, positive_ranks
from icone_hf.evaluation.measure import measure_positives, measure_within_modalities


def reference(queries, items, positives, is_among_itself=False):
    """Sort by score, wrong items first where scores are the same; then follow the definitions."""
    scores, found = queries @ items.T, []
    for query, answers in positives.items():
        right = {answer for answer in answers if answer >= 0}
        rest = [item for item in range(len(items)) if not (is_among_itself and item == query)]
        hits = [item in right for item in sorted(rest, key=lambda item: (-scores[query, item], item in right))]
        count = len(right) + sum(answer < 0 for answer in answers)
        precisions = np.cumsum(hits) / np.arange(1, len(hits) + 1) * hits
        recalls = {f"r{k}": any(hits[:k]) for k in (1, 5, 10)}
        found.append(
            {"map_at_r": precisions[:count].sum() / count, "r_precision": sum(hits[:count]) / count, **recalls}
        )
    return {name: 100 * np.mean([one[name] for one in found]) for name in found[0]}


@st.composite
def galleries(draw):
    """Draw integer embeddings, so that scores are exact and ties are many; some answers are not there."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    num_queries, num_items, dim = draw(st.integers(1, 9)), draw(st.integers(2, 14)), draw(st.integers(1, 3))
    queries = rng.integers(-2, 3, (num_queries, dim))
    items = rng.integers(-2, 3, (num_items, dim))
    asked = rng.permutation(num_queries)[: rng.integers(1, num_queries + 1)].tolist()
    positives = {}
    for query in asked:
        positives[query] = rng.permutation(num_items)[: rng.integers(1, num_items + 1)].tolist()
        positives[query] += [-1] * int(rng.integers(0, 3))
    return queries, items, positives


def floats(*arrays):
    return [torch.tensor(array).float() for array in arrays]


@given(galleries(), st.one_of(st.none(), st.integers(1, 15)))
def test_metrics_are_those_of_the_definitions_with_ties_and_any_chunk(gallery, chunk_size):
    queries, items, positives = gallery
    assert positive_metrics(*floats(queries, items), positives, chunk_size=chunk_size) == pytest.approx(
        reference(*gallery)
    )


@given(galleries(), st.integers(1, 4))
def test_a_query_among_the_items_does_not_find_itself(gallery, chunk_size):
    _, items, positives = gallery
    positives = {query: [a for a in answers if a != query] for query, answers in positives.items()}
    positives = {query: answers for query, answers in positives.items() if answers and query < len(items)}
    if not positives:
        return
    found = positive_metrics(*floats(items, items), positives, is_among_itself=True, chunk_size=chunk_size)
    assert found == pytest.approx(reference(items, items, positives, is_among_itself=True))


@given(galleries())
def test_with_one_answer_a_query_all_three_are_r_at_1_and_retrievals_own(gallery):
    queries, items, _ = gallery
    owner = np.arange(len(queries)) % len(items)
    found = positive_metrics(*floats(queries, items), {query: [int(item)] for query, item in enumerate(owner)})
    assert found["map_at_r"] == pytest.approx(found["r_precision"]) == pytest.approx(found["r1"])
    items = items[: len(queries)]  # every image needs a caption there
    owner = np.arange(len(queries)) % len(items)
    of_retrieval = retrieval_metrics(*floats(items, queries), torch.tensor(owner))
    found = positive_metrics(*floats(queries, items), {query: [int(item)] for query, item in enumerate(owner)})
    for k in (1, 5, 10):
        assert found[f"r{k}"] == pytest.approx(of_retrieval[f"t2i_r{k}"])


@given(galleries())
def test_no_precision_is_more_than_r_precision_and_all_right_is_100(gallery):
    queries, items, positives = gallery
    found = positive_metrics(*floats(queries, items), positives)
    assert 0 <= found["map_at_r"] <= found["r_precision"] + 1e-9 <= 100 + 1e-9
    everything = dict.fromkeys(positives, range(len(items)))
    assert list(positive_metrics(*floats(queries, items), everything).values()) == pytest.approx([100.0] * 5)


@given(galleries(), st.integers(2, 4), st.integers(1, 3))
def test_shares_of_the_queries_sum_to_the_whole(gallery, count, chunk_size):
    queries, items, positives = gallery
    pairs = pairs_of(positives, len(queries), len(items))
    of_shares = [
        positive_ranks(*floats(queries, items), *pairs, chunk_size=chunk_size, share=(k, count)) for k in range(count)
    ]
    assert torch.equal(sum(of_shares), positive_ranks(*floats(queries, items), *pairs))
    assert metrics_of_positive_ranks(pairs[0], sum(of_shares)) == pytest.approx(reference(*gallery))


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONES, ONES, {}), "positives is empty"),
        ((ONES, ONES, {0: []}), r"positives\[0\] is empty"),
        ((ONES, ONES, {2: [0]}), "query 2, but query rows are 0..1"),
        ((ONES, ONES, {0: [2]}), r"positives\[0\] holds 2, but item rows are 0..1, or -1"),
        ((ONES, ONES, {0: [-2]}), r"positives\[0\] holds -2"),
        ((ONES, ONES[:, :2], {0: [0]}), "with the same dim"),
        ((ONES, ONES * torch.nan, {0: [0]}), "item_embeds holds NaN"),
        ((ONES, ONES, {0: [0]}, True), "among its own right answers"),
        ((ONES, torch.ones(3, 3), {0: [1]}, True), "not 2 and 3"),
        ((ONES, ONES, {0: [0]}, False, 0), "chunk_size=0 must be 1 or more"),
    ],
)
def test_what_has_no_metrics_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        positive_metrics(*arguments)


# --- ECCV Caption and CxC ---


@pytest.fixture(scope="module")
def authors():
    return pytest.importorskip("eccv_caption", reason="make test installs it: pip install eccv-caption").Metrics()


def theirs_of(authors, name):
    """A function of the authors' that is no public one."""
    return getattr(importlib.import_module(f"{type(authors).__module__.partition('.')[0]}._metrics"), name)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_eccv_captions_authors(authors, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, items = torch.randn(40, 8, generator=generator), torch.randn(90, 8, generator=generator)
    scores = queries @ items.T
    assert len(scores.unique()) == scores.numel()
    # Half of what a query finds among its first 30 is right, and so is something that is not there.
    near = scores.argsort(descending=True)[:, :30]
    answers = {q: near[q, torch.randperm(30, generator=generator)[: 1 + q % 15]].tolist() for q in range(0, 40, 2)}
    answers[4] = [*answers[4], 1000]
    ours = positive_metrics(queries, items, {q: [a if a < 90 else -1 for a in of] for q, of in answers.items()})
    ranked = {query: scores[query].argsort(descending=True).tolist() for query in answers}
    theirs = theirs_of(authors, "compute_eccv_metrics")(ranked, answers)
    assert ours["map_at_r"] == pytest.approx(100 * theirs["eccv_map_at_r"])
    assert ours["r_precision"] == pytest.approx(100 * theirs["eccv_rprecision"])
    assert ours["r_precision"] == pytest.approx(100 * theirs_of(authors, "compute_rprecision")(ranked, answers))
    for k in (1, 5, 10):
        assert ours[f"r{k}"] == pytest.approx(100 * theirs_of(authors, "compute_r_at_k")(ranked, answers, K=k))
    assert 5 < ours["map_at_r"] < ours["r_precision"] < 95


@pytest.fixture(scope="module")
def coco(authors):
    """COCO's test images in another order, with captions of other images among them, and embeddings of all."""
    generator = torch.Generator().manual_seed(0)
    images = [authors.coco_gts["t2i"][number][0] for number in authors.coco_ids[::5]]
    images = [images[place] for place in torch.randperm(len(images), generator=generator)]
    captions = [[int(number) for number in authors.coco_gts["i2t"][image]] for image in images]
    images, captions = [17, *images], [[3, 4], *captions]
    captions[9] = [*captions[9], 5]  # some have a sixth
    rows = {"image_id": list(map(str, images)), "sentids": captions, "captions": [["a"] * len(c) for c in captions]}
    owner = torch.arange(len(images)).repeat_interleave(torch.tensor(list(map(len, captions))))
    centres = torch.randn(len(images), 12, generator=generator)
    texts = centres[owner] + torch.randn(len(owner), 12, generator=generator)
    return Dataset.from_dict(rows), GroupEmbeddings(centres, texts, owner)


@pytest.mark.parametrize("protocol", ["eccv", "cxc"])
def test_protocols_are_those_of_the_package_in_any_order_of_the_images(authors, coco, protocol):
    """What the test split has besides is neither searched nor a query. A part of the queries will do."""
    groups, embeds = coco
    judged, of_coco = load_judgements(protocol)
    absent = {query for query, answers in judged["i2t"].items() if not of_coco["t2i"].keys() >= set(answers)}
    assert len(absent) == (2 if protocol == "eccv" else 0)  # their answers are sixth captions, which nobody searches
    judged = {
        direction: {query: of[query] for query in [*list(of)[::30], *(absent & of.keys())]}
        for direction, of in judged.items()
    }
    ours = measure_positives(embeds, place_judgements(groups, "coco", judged, of_coco))
    image_row = {int(image): row for row, image in enumerate(groups["image_id"])}
    caption_row = {number: row for row, number in enumerate(n for numbers in groups["sentids"] for n in numbers)}
    ranked = {}
    for direction, (queries, query_row, items, item_row, searched) in {
        "i2t": (embeds.image_embeds, image_row, embeds.text_embeds, caption_row, list(authors.coco_gts["t2i"])),
        "t2i": (embeds.text_embeds, caption_row, embeds.image_embeds, image_row, list(authors.coco_gts["i2t"])),
    }.items():
        gallery = items[[item_row[number] for number in searched]]
        best = (queries[[query_row[query] for query in judged[direction]]] @ gallery.T).topk(100).indices
        ranked[direction] = dict(zip(judged[direction], torch.tensor(searched)[best].tolist(), strict=True))
    for direction in ("t2i", "i2t"):
        for k in (1, 5, 10):
            theirs = theirs_of(authors, "compute_r_at_k")(ranked[direction], judged[direction], K=k)
            assert ours[f"{direction}_r{k}"] == pytest.approx(100 * theirs)
        theirs = theirs_of(authors, "compute_eccv_metrics")(ranked[direction], judged[direction])
        assert ours[f"{direction}_map_at_r"] == pytest.approx(100 * theirs["eccv_map_at_r"])
        assert ours[f"{direction}_r_precision"] == pytest.approx(100 * theirs["eccv_rprecision"])
    assert 5 < ours["t2i_r1"] < 95


def test_groups_that_lack_ids_or_images_are_refused(authors, coco):
    groups, _ = coco
    judgements = load_judgements("eccv")
    with pytest.raises(InputError, match=r"photos has no COCO ids of its captions \(sentids\)"):
        place_judgements(groups.remove_columns("sentids"), "photos", *judgements)
    with pytest.raises(InputError, match="1 of the 5000 images that --protocol searches are not in"):
        place_judgements(groups.select([*range(7), *range(8, len(groups))]), "photos", *judgements)
    cut = groups.map(lambda row, n: {"sentids": row["sentids"][: 4 if n == 3 else None]}, with_indices=True)
    with pytest.raises(InputError, match="5 of the 25000 captions that --protocol searches"):
        place_judgements(cut, "photos", *judgements)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'icone_hf\[eccv\]'"):
        load_judgements("eccv")


# --- within a modality ---


@given(st.integers(0, 10**6), st.booleans())
def test_captions_find_captions_and_images_images_by_the_definition(seed, has_labels):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(5), rng.integers(1, 4, 5))
    images, texts = rng.integers(-2, 3, (5, 3)), rng.integers(-2, 3, (len(owner), 3))
    labels = [[None, "a", "b"][number] for number in rng.integers(0, 3, 5)] if has_labels else None
    embeds = GroupEmbeddings(*floats(images, texts), torch.tensor(owner))
    found = measure_within_modalities(embeds, labels)
    expected = {}
    for direction, rows, groups in (("t2t", texts, owner.tolist()), ("i2i", images, labels or [])):
        same = {
            q: [other for other, group in enumerate(groups) if group == groups[q] and other != q]
            for q in range(len(groups))
            if groups[q] is not None
        }
        if same := {query: answers for query, answers in same.items() if answers}:
            of_direction = reference(rows, rows, same, is_among_itself=True)
            expected |= {f"{direction}_r{k}": of_direction[f"r{k}"] for k in (1, 5, 10)}
    assert {name: value for name, value in found.items() if "_r" in name} == pytest.approx(expected)
