import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import fidelity, parameters, recipes, recipes_report  # noqa: E402
from icone_hf.modeling.losses import contrastive_loss  # noqa: E402

PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")


def test_the_page_shows_what_was_measured():
    assert fidelity.table(fidelity.RESULTS.read()) in PAGE, "python -m benchmarks.fidelity --report"
    assert parameters.table() in PAGE, "python -m benchmarks.fidelity --report"


def test_every_change_was_trained_at_the_rate_that_validation_chose():
    runs = fidelity.RESULTS.read()
    for name in fidelity.CHANGES:
        of_change = [run for run in runs if run["recipe"] == name]
        tuned = [run for run in of_change if run["seed"] == recipes.TUNING_SEED]
        best = max(tuned, key=lambda run: run["validation"]["rsum"])
        final = recipes_report.final_runs(of_change)
        assert {run["point"]["learning_rate"] for run in tuned} >= set(fidelity.RATES), name
        assert [run["point"] for run in final] == [best["point"]] * len(recipes.SEEDS), name
        assert {run["seed"] for run in final} == set(recipes.SEEDS), name


def test_the_page_speaks_of_every_change_and_of_no_other():
    sentences = PAGE.split("## Sentence by sentence")[1].split("## What the other choices give")[0]
    named = {name for line in sentences.splitlines() for name in re.findall(r"`(\w+)`", line.rpartition(" | ")[2])}
    assert named == set(fidelity.CHANGES) - {"base"}


def test_one_kind_of_head_comes_near_the_papers_count_and_only_without_class_vectors():
    counts = {
        (dim, depth, data): parameters.count(dim, depth, groups)
        for dim in parameters.DIMS
        for depth in parameters.DEPTHS
        for data, groups in parameters.GROUPS.items()
    }
    near = [which for which, value in counts.items() if abs(value - 225) < 2.25]
    assert near == [(2048, 4, "without")]
    assert parameters.table().count("**") == 2


def test_equation_6_as_printed():
    image, text = (torch.nn.functional.normalize(torch.randn(5, 7), dim=-1) for _ in range(2))
    scores, tau = (image @ text.T).double().numpy(), 0.05
    v2t = -np.mean([np.log(np.exp(scores[i, i] / tau) / np.exp(scores[i]).sum()) for i in range(5)])
    t2v = -np.mean([np.log(np.exp(scores[i, i] / tau) / np.exp(scores[:, i] / tau).sum()) for i in range(5)])
    assert fidelity.printed_loss(image, text, tau).item() == pytest.approx(v2t + t2v, rel=1e-5)
    # At a temperature of 1 both readings are one.
    torch.testing.assert_close(fidelity.printed_loss(image, text, 1.0), contrastive_loss(image, text, 1.0))


def test_the_printed_equation_replaces_the_corrected_one_in_the_model(make_model):
    plain, printed = make_model(text_pooling="mean"), fidelity.as_printed(make_model(text_pooling="mean"))
    pairs = {"pooled_image": torch.randn(4, 32), "pooled_text": torch.randn(4, 24), "group_ids": torch.arange(4)}
    corrected, as_printed = (model(**pairs, contrastive_weight=0.5) for model in (plain, printed))
    expected = fidelity.printed_loss(corrected.image_embeds, corrected.text_embeds, 0.05)
    torch.testing.assert_close(as_printed.loss, corrected.instance_loss + 0.5 * expected)
    stage_one = [model(**pairs, contrastive_weight=0).loss for model in (plain, printed)]
    torch.testing.assert_close(*stage_one)


def test_deeper_projections_embed_as_the_plain_ones_do(make_model):
    model = fidelity.deepen(make_model())
    image = torch.randn(4, 32)
    first, _, second = model.visual_projection
    expected = torch.nn.functional.gelu(image @ first.weight.T) @ second.weight.T
    embeds = model(pooled_image=image).image_embeds
    torch.testing.assert_close(embeds, torch.nn.functional.normalize(expected, dim=-1))
    assert model.visual_projection.weight.dtype == torch.float32


def rates_of(schedule, updates):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = schedule(optimizer, updates), []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_one_schedule_over_both_stages_goes_on_where_the_first_stopped():
    parts = rates_of(fidelity.one_cosine(0, 80), 50) + rates_of(fidelity.one_cosine(50, 80), 30)
    assert parts == pytest.approx(rates_of(recipes.cosine, 80))


def test_every_change_is_one_change_and_its_schedule_can_be_made():
    base = fidelity.CHANGES["base"]
    for name, change in fidelity.CHANGES.items():
        fields = [field for field in vars(base) if field not in ("label", "build")]
        differing = [field for field in fields if getattr(change, field) != getattr(base, field)]
        differing += ["build"] if change.build in (fidelity.deepen, fidelity.as_printed) else []
        assert len(differing) == (name != "base"), name
        assert max(rates_of(change.schedule, 60)) == pytest.approx(1.0), name
    restarted = rates_of(fidelity.CHANGES["restarts"].schedule, 60)
    jumps = [later > earlier for earlier, later in itertools.pairwise(restarted[3:])]  # after the warm-up
    assert sum(jumps) == 2


def test_the_parameters_are_counted_as_on_paper():
    vit, bert = 87_456_000, 109_482_240  # CLIP ViT-B/32's vision tower and BERT-base, as their checkpoints hold them
    assert parameters.count(2048, 1, 0) == pytest.approx((vit + bert + 2 * 768 * 2048) / 1e6)
    assert parameters.count(2048, 1, 29_783) - parameters.count(2048, 1, 0) == pytest.approx(29_783 * 2048 / 1e6)
    deeper = 2 * (768 * 512 + 512 + 512 * 512 + 512)
    assert parameters.count(512, 2, 0) == pytest.approx((vit + bert + deeper) / 1e6)
