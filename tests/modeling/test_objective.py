"""The loss that the config chooses. Several processes are in test_distributed.py, wrong inputs in test_modeling.py."""

import pytest
import torch

from icone_hf.modeling import losses


def unit_embeds(output):
    return output.image_embeds.detach(), output.text_embeds.detach()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"contrastive_loss": "max_hinge", "margin": 0.3}, lambda i, t, g: losses.hinge_loss(i, t, 0.3, g, True)),
        ({"contrastive_loss": "sum_hinge"}, lambda i, t, g: losses.hinge_loss(i, t, 0.2, g, False)),
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
