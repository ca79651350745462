"""All of IConE but the towers: projections, classifier, temperature, and their losses."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput

from .compat import LeftOutOfDDPMixin
from .configuration_icone import IConEConfig
from .dropout import drop_features
from .objective import (
    Teachers,
    check_pairs,
    contrastive_objective,
    instance_objective,
    taught_objectives,
    with_taught,
)
from .projections import Projection
from .ranks import count_ranks, rank_index
from .sharded_classifier import ShardedClassifier

LOWEST_TEMPERATURE = 0.01  # CLIP's bound for a learned one


@dataclass
class IConEOutput(ModelOutput):
    """Hold what [`IConEModel`] returns.

    A field is `None` if it was not asked for or can't be computed from the inputs.

    Args:
        loss: scalar, `instance_weight * instance_loss + contrastive_weight * contrastive_loss`, equation (9). Taught
            losses, each times its weight in the config, are added to `contrastive_loss` before it is weighted.
        instance_loss: scalar, equation (5). `None` if its weight is 0.
        contrastive_loss: scalar, equation (8). `None` if its weight is 0.
        soft_target_loss, uni_modal_loss, distillation_loss: scalars. `None` if their weight is 0, or that of
            `contrastive_loss`.
        logits_per_image: `(images, captions)`, cosine similarities divided by `model.temperature`; where the
            contrastive loss is the sigmoid loss, plus its bias, as SigLIP's.
        logits_per_text: `(captions, images)`, the transpose of `logits_per_image`.
        image_embeds: `(images, projection_dim)`, L2-normalised.
        text_embeds: `(captions, projection_dim)`, L2-normalised.
        vision_model_output: what the vision tower returned, its `pooler_output` replaced by the projected feature.
        text_model_output: the same for the text tower.
    """

    loss: torch.Tensor | None = None
    instance_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    soft_target_loss: torch.Tensor | None = None
    uni_modal_loss: torch.Tensor | None = None
    distillation_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in super().to_tuple())


class PairLosses(NamedTuple):
    """Hold equation (9), its two terms and taught losses.

    All are scalars; a term whose weight is 0 is `None`, and `taught_losses` lacks such a loss.
    """

    loss: torch.Tensor
    instance_loss: torch.Tensor | None
    contrastive_loss: torch.Tensor | None
    taught_losses: dict[str, torch.Tensor]


def teachers_of(
    named: tuple[torch.Tensor | None, ...], pooled_image: torch.Tensor | None, pooled_text: torch.Tensor | None
) -> Teachers:
    """Take frozen towers for the teachers that aren't given.

    Args:
        named: the fields of [`Teachers`].
        pooled_image, pooled_text: `(batch, width)`, the towers' pooled outputs.
    """
    teachers = Teachers(*named)
    image = pooled_image if teachers.image is None else teachers.image
    return teachers._replace(image=image, text=pooled_text if teachers.text is None else teachers.text)


class HeadsMixin(LeftOutOfDDPMixin):
    """Score projected features and compute their losses.

    [`IConEModel`] and [`IConEHeads`] share this code.
    """

    config: IConEConfig
    training: bool
    visual_projection: Projection
    text_projection: Projection
    classifier: "nn.Linear | ShardedClassifier | None"
    logit_scale: nn.Parameter | None
    logit_bias: nn.Parameter | None
    # What a stage may leave out of training, whatever the config says.
    drops_features: bool = True
    weighs_negatives: bool = True

    # The losses are means over the batch; a Trainer must divide them by the accumulation steps itself.
    accepts_loss_kwargs = False

    @property
    def temperature(self) -> float | torch.Tensor:
        """Return the temperature that divides the cosines.

        It is `config.temperature` or, where it is learned, a scalar tensor.
        """
        if self.logit_scale is None:
            return self.config.temperature
        # Not by clamp: from torch 2.14 on it has no gradient at the bound itself, where the temperature would stay.
        bound = torch.full_like(self.logit_scale, self._highest_logit_scale)
        return torch.exp(-torch.where(self.logit_scale > bound, bound, self.logit_scale))

    @torch.no_grad()
    def bound_temperature(self) -> None:
        """Put a learned temperature back within its bound.

        Training calls this after every step, as CLIP's does. Beyond the bound [`temperature`] has no gradient, so a
        parameter that stayed there would never come back.
        """
        if self.logit_scale is not None:
            self.logit_scale.clamp_(max=self._highest_logit_scale)

    @property
    def _highest_logit_scale(self) -> float:
        # SigLIP's temperature is below CLIP's bound: a model that starts there may stay.
        return -math.log(min(LOWEST_TEMPERATURE, self.config.temperature))

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature, also where it is learned.

        Args:
            temperature: the new one.
        """
        self.config.temperature = temperature
        if self.logit_scale is not None:
            self.logit_scale.data.fill_(-math.log(temperature))

    def project_image(self, pooled: torch.Tensor) -> torch.Tensor:
        """Project pooled image features, some of them dropped."""
        return self.visual_projection(self._dropped(pooled, self.config.vision_feature_dropout))

    def project_text(self, pooled: torch.Tensor) -> torch.Tensor:
        """Project pooled caption features, some of them dropped."""
        return self.text_projection(self._dropped(pooled, self.config.text_feature_dropout))

    def _dropped(self, pooled: torch.Tensor, share: float) -> torch.Tensor:
        return drop_features(pooled, share) if self.training and self.drops_features and share else pooled

    def left_out_of_ddp(self) -> list[str]:
        """Name the parameters that DDP must not average.

        The gradient of sampled classes is averaged inside the loss, and each rank has a shard of class vectors of its
        own.
        """
        is_sharded = isinstance(self.classifier, ShardedClassifier)
        return ["classifier.weight"] if self.config.instance_samples or is_sharded else []

    def score(
        self,
        image_features: torch.Tensor | None,
        text_features: torch.Tensor | None,
        group_ids: torch.Tensor | None = None,
        instance_weight: float = 1.0,
        contrastive_weight: float = 1.0,
        return_loss: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        teachers: Teachers = Teachers(),  # noqa: B008 - immutable
    ) -> IConEOutput:
        """Compare features and, for pairs, compute the losses.

        Args:
            image_features, text_features: `(batch, projection_dim)`, projected, not normalised; either may be `None`.
            group_ids, instance_weight, contrastive_weight, return_loss, num_items_in_batch: as in
                [`IConEModel.forward`].
            teachers: what teachers say of the pairs.

        Raises:
            ValueError: if a loss lacks what it needs, or if group ids are out of range.
        """
        # Embed what is given, and compare every caption with every image.
        image_embeds = None if image_features is None else F.normalize(image_features, dim=-1)
        text_embeds = None if text_features is None else F.normalize(text_features, dim=-1)
        logits_per_text = None
        if image_embeds is not None and text_embeds is not None:
            logits_per_text = text_embeds @ image_embeds.T / self.temperature
            if self.logit_bias is not None:
                logits_per_text = logits_per_text + self.logit_bias

        # Group ids ask for the losses, unless return_loss says otherwise.
        losses = None
        if return_loss or (return_loss is None and group_ids is not None):
            check_pairs(self.config, image_features, text_features, group_ids, instance_weight, contrastive_weight)
            pairs = image_features, text_features, image_embeds, text_embeds, group_ids
            weights = instance_weight, contrastive_weight
            losses = self.pair_losses(*pairs, *weights, num_items_in_batch, teachers)  # type: ignore[arg-type]

        return IConEOutput(
            loss=None if losses is None else losses.loss,
            instance_loss=None if losses is None else losses.instance_loss,
            contrastive_loss=None if losses is None else losses.contrastive_loss,
            **({} if losses is None else losses.taught_losses),  # type: ignore[arg-type]
            logits_per_image=None if logits_per_text is None else logits_per_text.T,
            logits_per_text=logits_per_text,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )

    def pair_losses(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        group_ids: torch.Tensor | None,
        instance_weight: float,
        contrastive_weight: float,
        num_items_in_batch: torch.Tensor | int | None = None,
        teachers: Teachers = Teachers(),  # noqa: B008 - immutable
    ) -> PairLosses:
        """Compute equation (9) for a batch of pairs.

        In training mode the batch is that of all ranks together.

        Args:
            image_features, text_features: `(batch, projection_dim)`, projected: the instance loss classifies them.
            image_embeds, text_embeds: the same, L2-normalised: the contrastive loss compares them.
            group_ids: `(batch,)`, or `None` if all pairs are of different groups and `instance_weight` is 0.
            instance_weight, contrastive_weight: lambda_1 and lambda_2. A term whose weight is 0 is not computed.
            num_items_in_batch: pairs that the instance loss is averaged over, if these are a chunk of a larger batch.
            teachers: what teachers say of the pairs.
        """
        num_ranks = count_ranks() if self.training else 1
        instance = contrastive = None

        # The instance loss classifies projected features: by all classes, by a sample, or by each rank's shard.
        if instance_weight:
            assert group_ids is not None  # check_pairs refuses such a batch
            assert self.classifier is not None
            pairs = self.config, image_features, text_features, group_ids
            if isinstance(self.classifier, ShardedClassifier):
                instance = self.classifier.objective(*pairs, num_items_in_batch)
            else:
                num_samples = self.config.instance_samples if self.training else 0
                class_vectors = self.classifier.weight
                instance = instance_objective(*pairs, class_vectors, num_ranks, num_samples, num_items_in_batch)

        # The contrastive loss compares normalised embeddings, and so do the losses that have teachers.
        taught: dict[str, torch.Tensor] = {}
        total = None
        if contrastive_weight:
            embeds, scale = (image_embeds, text_embeds), (self.temperature, self.logit_bias)
            options = num_ranks, self.weighs_negatives
            contrastive = contrastive_objective(self.config, *scale, *embeds, group_ids, *options)
            taught = taught_objectives(self.config, *embeds, teachers, group_ids, num_ranks)
            total = with_taught(self.config, contrastive, taught)

        weighted = ((instance_weight, instance), (contrastive_weight, total))
        loss = sum(weight * part for weight, part in weighted if part is not None)
        return PairLosses(loss, instance, contrastive, taught)  # type: ignore[arg-type]


class IConEHeads(HeadsMixin, nn.Module):
    """Embed pooled outputs without the towers.

    A stage with frozen towers trains this module. Its parameters are the model's own, under the same names in
    `state_dict`.

    Args:
        model: an [`IConEModel`].
    """

    def __init__(self, model: HeadsMixin):
        super().__init__()
        self.config = model.config
        self.visual_projection = model.visual_projection
        self.text_projection = model.text_projection
        self.classifier = model.classifier
        self.logit_scale = model.logit_scale
        self.logit_bias = model.logit_bias

    def forward(
        self,
        pooled_image: torch.Tensor | None = None,
        pooled_text: torch.Tensor | None = None,
        group_ids: torch.Tensor | None = None,
        instance_weight: float = 1.0,
        contrastive_weight: float = 1.0,
        return_loss: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        teacher_image: torch.Tensor | None = None,
        teacher_text: torch.Tensor | None = None,
        teacher_image_embeds: torch.Tensor | None = None,
        teacher_text_embeds: torch.Tensor | None = None,
    ) -> IConEOutput:
        """Embed and score the towers' pooled outputs, `(batch, width)`.

        The arguments are those of [`IConEModel.forward`].
        """
        named = teacher_image, teacher_text, teacher_image_embeds, teacher_text_embeds
        teachers = teachers_of(named, pooled_image, pooled_text)
        return self.score(
            None if pooled_image is None else self.project_image(pooled_image),
            None if pooled_text is None else self.project_text(pooled_text),
            group_ids,
            instance_weight,
            contrastive_weight,
            return_loss,
            num_items_in_batch,
            teachers,
        )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save the weights, without a config.

        With a sharded classifier every rank must call it.
        """
        folder = Path(save_directory)
        sharded = self.classifier if isinstance(self.classifier, ShardedClassifier) else None
        # The first rank writes what all ranks share; then each adds its own class vectors.
        if rank_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            left_out = ("classifier.",) if sharded is not None else ()
            weights = {name: value for name, value in self.state_dict().items() if not name.startswith(left_out)}
            save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if sharded is not None:
            sharded.add_to_checkpoint(folder)
