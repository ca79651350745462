import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_groups

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import figures, intra_modal, peers, recipes, recipes_report  # noqa: E402
from icone_hf import FeatureCache, GroupEmbeddings, IConETrainer, IConETrainingArguments, Stage  # noqa: E402
from icone_hf.modeling.losses import contrastive_loss  # noqa: E402

RECIPES = yaml.safe_load((ROOT / "benchmarks" / "recipes.yaml").read_text())
PEERS = yaml.safe_load((ROOT / "benchmarks" / "peers.yaml").read_text())


@pytest.mark.parametrize("arguments", [{}, {"neighbour_run": 4}, {"pairs_per_group": 2}])
def test_the_benchmarks_loop_trains_as_the_trainer_does(make_model, processor, tmp_path, arguments):
    """The comparison of recipes saves a Trainer's cost at each step, and must get the same numbers."""
    groups = {"train": make_groups(12), "validation": make_groups(8, start=12)}
    stage = Stage("heads", 2.5, 1e-2, instance_weight=1, contrastive_weight=1, train_encoders=False)
    config = {"several_positives": "pairs_per_group" in arguments, "text_pooling": "mean"}
    by_trainer, by_loop = make_model(num_groups=12, **config), make_model(num_groups=12, **config)
    args = IConETrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=8,
        feature_cache_dir=str(tmp_path / "cache"),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **arguments,
    )
    IConETrainer(by_trainer, args, *groups.values(), processor, [stage]).train()
    caches = {name: FeatureCache.build(tmp_path / "cache" / name, by_loop, processor, groups[name]) for name in groups}
    recipes.train_heads(by_loop, stage, caches, batch=8, seed=3, **arguments)
    for name in ("visual_projection", "text_projection", "classifier"):
        assert torch.allclose(getattr(by_loop, name).weight, getattr(by_trainer, name).weight, atol=1e-5), name


def test_every_recipe_is_a_grid_of_valid_points():
    for name, recipe in RECIPES.items():
        points = list(recipes.expand(recipe))
        assert 1 <= len(points) <= len(list(recipes.expand(RECIPES["infonce"]))), name
        assert sum(stage["share"] for stage in recipe["stages"]) == pytest.approx(1), name


def test_the_pages_show_what_was_measured():
    blocks, tables = list(recipes_report.blocks()), figures.tables()
    assert len(blocks) >= 2
    assert len(tables) >= 2
    for page, name, text in blocks:
        assert text in page.read_text(encoding="utf-8"), f"{name}: python -m benchmarks.recipes --report"
    for name, text in tables.items():
        assert text in figures.PAGE.read_text(encoding="utf-8"), f"{name}: python -m benchmarks.figures --report"


def test_the_parts_of_a_list_are_the_list_each_item_once():
    items = list("abcdefg")
    assert recipes.part_of(items, "2/3") == ["b", "e"]
    assert recipes.part_of(items, "1/1") == items
    assert sorted(item for i in (1, 2, 3) for item in recipes.part_of(items, f"{i}/3")) == items


def test_every_peer_has_a_trainer_and_no_larger_a_grid_than_infonce():
    largest = len(list(recipes.expand(RECIPES["infonce"])))
    for name, peer in PEERS.items():
        assert peer["trainer"] in peers.TRAINERS, name
        assert 1 <= len(list(recipes.expand(peer))) <= largest, name


@pytest.fixture
def rows():
    """Pooled features of six images and of six captions."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((6, 10), dtype=np.float32), rng.standard_normal((6, 8), dtype=np.float32)


def embed(heads, image, text):
    features = heads["visual_projection"](torch.tensor(image)), heads["text_projection"](torch.tensor(text))
    return [torch.nn.functional.normalize(rows, dim=-1) for rows in features]


@pytest.mark.parametrize("symmetric", [False, True])
def test_sentence_transformers_loss_is_infonce_in_one_direction_or_the_mean_of_both(rows, symmetric):
    model, heads = peers.two_towers(*rows, dim=4)
    columns = [model.preprocess([0, 1, 2, 3, 4, 5], task="image"), model.preprocess([6, 7, 8, 9, 10, 11], task="text")]
    for column, task in zip(columns, ("image", "text"), strict=True):
        column["task"] = task
    loss = peers.ranking_loss(model, 0.1, symmetric)(columns, torch.empty(0))
    image, text = embed(heads, *rows)
    scores = (image @ text.T).detach().numpy() / 0.1
    one_direction = np.mean(np.log(np.exp(scores).sum(axis=1)) - scores.diagonal())
    assert loss.item() == pytest.approx(
        contrastive_loss(image, text, 0.1).item() / 2 if symmetric else one_direction, rel=1e-5
    )


def test_the_dual_encoders_loss_is_the_mean_of_both_directions_from_clips_temperature_on(rows):
    model = peers.dual_encoder(10, 8, dim=4)
    loss = model(pixel_values=torch.tensor(rows[0]), input_ids=torch.tensor(rows[1]), return_loss=True).loss
    heads = {"visual_projection": model.visual_projection, "text_projection": model.text_projection}
    expected = contrastive_loss(*embed(heads, *rows), temperature=float(np.exp(-2.6592)))
    assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"visual_projection.weight", "text_projection.weight", "logit_scale"}


class Features:
    """What the peers read of a cache: five captions to an image, each close to it."""

    autocast = None

    def __init__(self, groups, seed):
        rng = np.random.default_rng(seed)
        self.image = rng.standard_normal((groups, 12), dtype=np.float32)
        self.text = self.image.repeat(5, axis=0)[:, :8] + 0.1 * rng.standard_normal((5 * groups, 8), dtype=np.float32)
        self.text_to_image = torch.arange(groups).repeat_interleave(5)


@pytest.mark.parametrize("name", list(peers.TRAINERS))
def test_a_peer_trains_for_the_protocols_updates_and_gives_its_best_epoch_back(name):
    caches = {"train": Features(20, seed=0), "validation": Features(20, seed=1)}
    point = {"config": {"temperature": 0.1, "symmetric": True}, "learning_rate": 1e-2}
    seen = []

    class Watch(peers.BestEpoch):
        def on_epoch_end(self, *args, **kwargs):
            super().on_epoch_end(*args, **kwargs)
            seen.append(recipes.rsum_of(self.heads, self.cache)["rsum"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "BestEpoch", Watch)
        heads, updates = peers.TRAINERS[name](point, caches, epochs=3, batch=10, seed=0)
    assert updates == 30
    assert len(seen) == 3
    assert recipes.rsum_of(heads, caches["validation"])["rsum"] == max(seen)
    assert max(seen) > 300


def test_sentence_transformers_batches_hold_an_image_once(monkeypatch):
    batches = []

    class Watch(peers.CachedRows):
        def preprocess(self, inputs, prompt=None, **kwargs):
            if self.first == 0:  # images
                batches.append(list(inputs))
            return super().preprocess(inputs, prompt, **kwargs)

    monkeypatch.setattr(peers, "CachedRows", Watch)
    caches = {"train": Features(12, seed=0), "validation": Features(6, seed=1)}
    point = {"config": {"temperature": 0.1, "symmetric": False}, "learning_rate": 1e-2}
    peers.train_sentence_transformers(point, caches, epochs=1, batch=10, seed=0)
    assert batches
    assert all(len(set(batch)) == len(batch) for batch in batches)


def test_the_report_takes_no_tuning_run_nor_a_point_that_was_overtaken_and_sorts_by_test():
    def run(recipe, seed, rsum, rate=0.001):
        metrics = {"rsum": rsum, "t2i_r1": 1.0, "i2t_r1": 1.0, "t2t_r1": 1.0}
        point = {"config": {}, "arguments": {}, "learning_rate": rate}
        cell = {"recipe": recipe, "groups": 5, "batch": 4, "condition": "plain", "seed": seed, "point": point}
        return {**cell, "updates": 9, "seconds": 1, "validation": metrics, **({} if seed == 100 else {"test": metrics})}

    runs = [run("a", 100, 900.0), run("a", 0, 1.0), run("a", 1, 2.0)]
    runs += [run("b", 100, 3.0), run("b", 0, 9.0), run("b", 100, 3.5, rate=0.01), run("b", 0, 4.0, rate=0.01)]
    lines = recipes_report.tables({"a": {"label": "A"}, "b": {"label": "B"}}, runs).splitlines()
    assert [line for line in lines if line.startswith(("| A", "| B"))] == [
        "| B | rate 0.01 | 4.0 (4.0-4.0) | 4.0 (4.0-4.0) | 1.0 | 1.0 | 1.0 | 1 | 1 |",
        "| A | rate 0.001 | 1.5 (1.0-2.0) | 1.5 (1.0-2.0) | 1.0 | 1.0 | 1.0 | 2 | 1 |",
    ]


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0, 1), captions=st.integers(2, 60))
def test_noisy_pairs_keep_every_caption_and_move_no_more_than_the_share(share, captions):
    text = np.arange(captions, dtype=float)[:, None].repeat(3, axis=1)
    noisy = text.copy()
    recipes.exchange_captions(noisy, share)
    assert sorted(noisy[:, 0]) == sorted(text[:, 0])
    assert (noisy != text).any(axis=1).sum() <= round(share * captions)


def test_images_look_for_images_and_captions_for_the_others_of_their_group():
    rng = np.random.default_rng(0)
    scenes, texts = rng.standard_normal((20, 4)), rng.standard_normal((60, 4))
    views, owner = scenes + rng.standard_normal((20, 4)), np.arange(60) // 3
    found = intra_modal.measure(
        GroupEmbeddings(*(torch.tensor(rows) for rows in (scenes, texts, owner))), torch.tensor(views)
    )
    first = (views @ scenes.T).argmax(axis=1)
    assert found["i2i_r1"] == pytest.approx(100 * np.mean(first == np.arange(20)))
    nearest = (texts @ texts.T - 1e9 * np.eye(60)).argmax(axis=1)
    assert found["t2t_r1"] == pytest.approx(100 * np.mean(owner[nearest] == owner))


def test_caches_are_found_again_by_split(make_model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "WORK", tmp_path)
    built = {
        split: FeatureCache.build(recipes.cache_folder(4) / split, make_model(), processor, make_groups(4, start=start))
        for start, split in enumerate(("train", "validation", "test"))
    }
    for split, cache in recipes.open_caches(4, "plain").items():
        np.testing.assert_array_equal(cache.image, built[split].image)
        np.testing.assert_array_equal(cache.text, built[split].text)
