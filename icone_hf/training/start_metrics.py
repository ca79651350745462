"""Measures a model before its first update: what training adds to, or costs."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from datasets import Dataset
from transformers.utils import logging

from ..embedding.encoding import GroupEmbeddings
from ..evaluation.measure import measure_embeddings
from ..modeling.modeling_icone import IConEModel
from ..processes import by_main_process
from .feature_cache import FeatureCache
from .run_folder import RunFolder
from .stage_trainer import embed_cached

logger = logging.get_logger(__name__)


def measure_start(
    folder: RunFolder,
    model: IConEModel,
    eval_data: Dataset | FeatureCache,
    encode: Callable[[Dataset], GroupEmbeddings],
) -> None:
    """Measure validation before the first update, once a run.

    All processes call it. What a run that is taken up again has measured before stays.

    Args:
        folder: of the run, which keeps the metrics.
        model: as it starts.
        eval_data: the first stage's: groups, or their cached features where its towers are frozen.
        encode: embeds groups by `model`.
    """
    if by_main_process(folder.read_start) is not None:
        return
    _share_projections(model)
    metrics = measure_embeddings(
        embed_cached(model, eval_data) if isinstance(eval_data, FeatureCache) else encode(eval_data)
    )[0]
    by_main_process(folder.write_start, metrics)
    if PartialState().is_main_process:
        logger.warning(
            f"Before training: validation Rsum {metrics['rsum']:.1f}, t2i R@1 {metrics['t2i_r1']:.1f}, i2t R@1 "
            f"{metrics['i2t_r1']:.1f}."
        )


@torch.no_grad()
def _share_projections(model: IConEModel) -> None:
    """Give all processes the first one's projections.

    They are drawn at random, in each process anew unless it was seeded. DDP would do this with the first update.
    """
    for projection in (model.visual_projection, model.text_projection):
        for parameter in projection.parameters():
            parameter.copy_(broadcast(parameter.detach().to(PartialState().device)))
