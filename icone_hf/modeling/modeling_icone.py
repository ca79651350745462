"""The model: two towers, a common space, and one classifier for both modalities."""

# Don't import annotations from __future__ here: transformers reads the real type of `config: IConEConfig`.
import copy
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForZeroShotImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_icone import IConEConfig, give_up_hard_negatives, tower_width
from .dual_encoders import keep_own, load_halves
from .errors import ModelError
from .heads import HeadsMixin, IConEHeads, IConEOutput, teachers_of
from .lora import LoraTowersMixin, set_trainable
from .projections import make_projection, start_linear
from .saving import SavingMixin
from .sharded_classifier import ShardedClassifier
from .towers import build_tower, max_text_tokens, pool, pooled_positions, run_vision_tower, saved_pooling

SIGMOID_BIAS = -10.0  # where SigLIP's bias starts


class IConEModel(HeadsMixin, LoraTowersMixin, SavingMixin, PreTrainedModel):  # type: ignore[misc]
    """Embed images and captions in one common space.

    This is the paper's Instance Contrastive Embedding. `visual_projection` and `text_projection` map the towers' pooled
    outputs into the common space; `classifier.weight`, of shape `(num_groups, projection_dim)` and without bias, is the
    paper's `W_share`. A model with `num_groups=0` has no classifier.

    In training mode a frozen tower (none of whose parameters requires a gradient) stays in eval mode. Batch norm always
    stays there: its statistics are those of the pretrained tower, so that k processes train as one.

    Example:
        >>> from transformers import BertConfig, CLIPVisionConfig
        >>> vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> text = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = IConEModel(IConEConfig(vision_config=vision, text_config=text, projection_dim=16, num_groups=10))
        >>> tuple(model.classifier.weight.shape)
        (10, 16)
    """

    config: IConEConfig
    config_class = IConEConfig
    base_model_prefix = "icone"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.weight$"]  # noqa: RUF012 - num_groups=0 leaves it on disk
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: IConEConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_model = vision_model if vision_model is not None else build_tower(config.vision_config)
        self.text_model = text_model if text_model is not None else build_tower(config.text_config)
        # The towers' configs become parts of the model's: a change to one is a change to both.
        for name, tower in (("vision_config", self.vision_model), ("text_config", self.text_model)):
            setattr(config, name, tower.config)

        dim, dropout = config.projection_dim, config.projection_dropout
        vision_width = tower_width(self.vision_model.config, config.vision_pooling)
        self.visual_projection = make_projection(config.vision_projection, vision_width, dim, dropout)
        text_width = tower_width(self.text_model.config, config.text_pooling)
        self.text_projection = make_projection(config.text_projection, text_width, dim, dropout)
        self.classifier: nn.Linear | ShardedClassifier | None = None
        if config.num_groups:
            self.classifier = nn.Linear(config.projection_dim, config.num_groups, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(())) if config.learn_temperature else None
        self.logit_bias = nn.Parameter(torch.empty(())) if config.contrastive_loss == "sigmoid" else None

        # Adapters come last: post_init would give random values to their weights that must start at 0.
        self.post_init()
        self.add_configured_adapters()

    def _init_weights(self, module: nn.Module) -> None:
        layers = (*self.visual_projection.modules(), *self.text_projection.modules())
        if isinstance(module, nn.Linear) and any(module is layer for layer in layers):
            start_linear(module)
        elif module is self:  # parameters that belong to no layer
            if self.logit_scale is not None:
                init.constant_(self.logit_scale, -math.log(self.config.temperature))
            if self.logit_bias is not None:
                init.constant_(self.logit_bias, SIGMOID_BIAS)
        else:
            super()._init_weights(module)

    # --- building ---

    @classmethod
    def from_encoders(
        cls,
        vision: str | os.PathLike | PreTrainedModel,
        text: str | os.PathLike | PreTrainedModel,
        num_groups: int = 0,
        *,
        projections: str = "own",
        defaults: Mapping[str, Any] | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        **config: Any,
    ) -> "IConEModel":
        """Build a model from two pretrained towers.

        A tower of a dual encoder (CLIP, SigLIP, ALIGN and every other model of transformers with `get_image_features`
        and `get_text_features`) keeps the projection and the pooling that it was trained with. If both towers are of
        the same one, its temperature, loss and bias are kept too: the model then is that dual encoder. Other
        projections are new, and so is the classifier.

        Of what is stated twice the first wins: a keyword, the dual encoder, `defaults`, [`IConEConfig`].

        Args:
            vision: Hub id, local folder or module, of a tower or of a dual encoder.
            text: the same for the text tower. A sentence-transformers checkpoint also gives the pooling that its
                `1_Pooling/config.json` states, unless `text_pooling` is given.
            num_groups: classes of the shared classifier; see [`IConEConfig`].
            projections: `"own"`, or `"new"` as in the paper. A kind given in `config` (`text_projection="mlp"`) makes
                that tower's projection new, and so does another `projection_dim`.
            defaults: fields of [`IConEConfig`] that give way to a dual encoder's, such as [`RECOMMENDED_CONFIG`].
            dtype: passed to the towers' `from_pretrained`, and used for the new parameters.
            attn_implementation: passed to the towers' `from_pretrained`.
            config: the other fields of [`IConEConfig`].

        Raises:
            TypeError: for a keyword that is no field of [`IConEConfig`].
            ValueError: if a tower states no hidden size, a pooling can't be guessed, or a field is out of range.
        """
        # Refuse misspelt fields before loading anything.
        known = [field.name for field in fields(IConEConfig)]
        for name in (*config, *(defaults or {})):
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise TypeError(f"from_encoders got {name!r}, which is no field of IConEConfig.{hint}")

        # Load the towers, and how the text tower's checkpoint pools.
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        options = {name: value for name, value in options.items() if value is not None}
        halves = load_halves(vision, text, options)
        given = {name: value for name, value in config.items() if value is not None}
        if "text_pooling" not in given and halves[1].pair is None and not isinstance(text, PreTrainedModel):
            given["text_pooling"] = saved_pooling(text)

        # Keep what the dual encoders trained.
        kept = keep_own(halves, projections, given)
        values = give_up_hard_negatives({**(defaults or {}), **kept.fields, **given}, given)

        # Give the config copies: a config that becomes part of another one loses its attention implementation. The
        # model then puts the towers' own configs in their place.
        vision_model, text_model = (half.tower for half in halves)
        icone_config = IConEConfig(
            vision_config=copy.deepcopy(vision_model.config),
            text_config=copy.deepcopy(text_model.config),
            num_groups=num_groups,
            **values,
        )
        model = cls(icone_config, vision_model, text_model).to(vision_model.dtype)  # type: ignore[arg-type]
        kept.copy_into(model)
        return model

    def shard_classifier(self, classifier: ShardedClassifier | None = None) -> None:
        """Keep only this rank's rows of the class vectors.

        `self.classifier` becomes a [`ShardedClassifier`]. Call this on every rank of an initialised process group.
        Training, losses and [`save_pretrained`] do what they did before, but no rank holds more than its share, and
        every rank must call `save_pretrained`.

        Args:
            classifier: the rows, new ones or those of a checkpoint ([`ShardedClassifier.from_pretrained`]). A model
                built or loaded with `num_groups=0` then never holds all rows. `None` cuts the rows out of the model's
                own classifier.

        Raises:
            ValueError: if there are no class vectors to cut, or `classifier` has another `projection_dim`.
        """
        # Cut this rank's rows out of the whole classifier, unless they are given.
        if classifier is None:
            if self.classifier is None:
                raise ModelError("This model has no class vectors (num_groups=0): pass a ShardedClassifier.")
            weight = self.classifier.weight
            classifier = ShardedClassifier(self.config.num_groups, self.config.projection_dim, dtype=weight.dtype)
            classifier.weight.data.copy_(weight.data[classifier.rows])
        if classifier.weight.shape[1] != self.config.projection_dim:
            raise ModelError(
                f"The class vectors have {classifier.weight.shape[1]} dimensions, projection_dim is "
                f"{self.config.projection_dim}."
            )
        self.classifier = classifier.to(self.device)
        self.config.num_groups = classifier.num_groups

    def add_classifier(self, num_groups: int) -> None:
        """Give the model class vectors that are new."""
        classifier = nn.Linear(self.config.projection_dim, num_groups, bias=False, dtype=self.dtype)
        nn.init.normal_(classifier.weight, std=self.config.initializer_range)
        self.classifier = classifier.to(self.device)
        self.config.num_groups = num_groups

    def heads(self) -> IConEHeads:
        """Return projections, classifier and temperature, sharing the parameters."""
        return IConEHeads(self)

    # --- training modes ---

    def set_encoders_trainable(self, trainable: bool) -> None:
        """Freeze both towers, or make them trainable.

        Frozen towers go to eval mode at once and stay there. Of a tower with LoRA adapters only these become trainable.
        """
        for tower in (self.vision_model, self.text_model):
            set_trainable(tower, trainable)
        self.train(self.training)

    def train(self, mode: bool = True) -> "IConEModel":
        """Set the training or eval mode, with two exceptions."""
        super().train(mode)
        # Frozen towers and all batch norm stay in eval mode.
        for tower in (self.vision_model, self.text_model):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
            for module in tower.modules():
                # Only batch norm has these statistics, torch's own and that of transformers' convolutional towers.
                if hasattr(module, "running_mean"):
                    module.eval()
        return self

    # --- features ---

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Project images into the common space.

        Returns the vision tower's output, with the projected feature `(batch, projection_dim)` as its `pooler_output`.
        The feature is not normalised: the instance loss needs its length. `kwargs` go to the tower.
        """
        output = self.run_vision_tower(pixel_values, **kwargs)
        output.pooler_output = self.project_image(self.pool_image(output))
        return output

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Project captions into the common space.

        Returns the text tower's output, with the projected feature `(batch, projection_dim)` as its `pooler_output`,
        not normalised. `kwargs` go to the tower.

        Raises:
            ValueError: if the captions have more tokens than the tower has position embeddings.
        """
        output = self._run_text_tower(input_ids, attention_mask, token_type_ids, **kwargs)
        output.pooler_output = self.project_text(self.pool_text(output, attention_mask))
        return output

    def get_image_token_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Project every position of images: `(batch, positions, projection_dim)`.

        Positions are the tower's tokens (a class token first, where it has one; no register tokens) or its feature map,
        row by row. Each position goes through the layers that make the tower's pooled output (a layer norm, an
        attention head) as if it were the only one. The features are not normalised.
        """
        return self.project_positions(self.run_vision_tower(pixel_values))

    def project_positions(self, output: BaseModelOutputWithPooling) -> torch.Tensor:
        """Project the vision tower's positions, as [`get_image_token_features`] does."""
        return self.visual_projection(pooled_positions(self.vision_model, output, self.config.vision_pooling))

    def get_text_token_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Project every token: `(batch, tokens, projection_dim)`, not normalised."""
        output = self._run_text_tower(input_ids, attention_mask)
        return self.text_projection(pooled_positions(self.text_model, output, self.config.text_pooling))

    def run_vision_tower(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Run the vision tower: images are `(batch, channels, height, width)`."""
        return run_vision_tower(self.vision_model, pixel_values, **kwargs)

    def pool_image(self, output: BaseModelOutputWithPooling) -> torch.Tensor:
        """Pool the vision tower's output by `config.vision_pooling`: `(batch, width)`."""
        return pool(self.config, "vision", output)

    def pool_text(self, output: BaseModelOutputWithPooling, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pool the text tower's output by `config.text_pooling`: `(batch, width)`."""
        return pool(self.config, "text", output, attention_mask)

    def _run_text_tower(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        longest = max_text_tokens(self.config.text_config)
        if longest and input_ids.shape[1] > longest:
            raise ModelError(
                f"input_ids has {input_ids.shape[1]} tokens, the text tower's positions end at {longest}. Tokenise "
                "with IConEProcessor, which truncates, or with truncation=True and a max_length."
            )
        if token_type_ids is not None:  # pass it on only if given: not every text tower takes it
            kwargs["token_type_ids"] = token_type_ids
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)

    # --- forward ---

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        group_ids: torch.Tensor | None = None,
        instance_weight: float = 1.0,
        contrastive_weight: float = 1.0,
        return_loss: bool | None = None,
        token_type_ids: torch.Tensor | None = None,
        pooled_image: torch.Tensor | None = None,
        pooled_text: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        teacher_image: torch.Tensor | None = None,
        teacher_text: torch.Tensor | None = None,
        teacher_image_embeds: torch.Tensor | None = None,
        teacher_text_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> IConEOutput:
        """Embed images and captions, and compute losses of pairs.

        Either modality can be left out. For the losses, row i of the images and row i of the captions are a pair.

        In distributed training (`train` mode, an initialised process group) the losses are those of the batch over all
        ranks: InfoNCE sees every rank's rows, gathered with their gradient. The ranks' losses then differ. Their mean,
        like the mean of their gradients that DDP takes, is exactly that of one process with the whole batch.

        Args:
            input_ids, attention_mask, token_type_ids: `(batch, tokens)`, as the tokenizer returns them.
            pixel_values: `(batch, channels, height, width)`.
            group_ids: `(batch,)`, each pair's group, `0..num_groups-1`; [`IGNORED_GROUP`] marks a filler row, which no
                loss sees.
            instance_weight: lambda_1 of equation (9). At 0 the instance loss is not computed.
            contrastive_weight: lambda_2 of equation (9). At 0 the contrastive loss is not computed.
            return_loss: `None` computes the losses if `group_ids` are given. The contrastive loss alone
                (`instance_weight=0`) needs no `group_ids`: all pairs then count as different groups.
            pooled_image, pooled_text: `(batch, width)`, the towers' pooled outputs (`pool_image`, `pool_text`). The
                towers are then not run.
            num_items_in_batch: pairs that the instance loss is averaged over, if these are a chunk of a larger batch.
            teacher_image, teacher_text: `(batch, width)`, for soft targets; default: `pooled_image`, `pooled_text`.
            teacher_image_embeds, teacher_text_embeds: `(batch, dim)`, another dual encoder's, for distillation.
            kwargs: arguments for both towers (`output_hidden_states`, `output_attentions`).

        Raises:
            ValueError: if nothing to embed is given, if a loss lacks what it needs, or if group ids are out of range.
        """
        # Embed what is given. Pooled outputs only need the projection; anything else runs a tower first.
        vision_output = text_output = image_features = text_features = None
        if pooled_image is not None:
            image_features = self.project_image(pooled_image)
        elif pixel_values is not None:
            vision_output = self.get_image_features(pixel_values, return_dict=True, **kwargs)
            image_features = vision_output.pooler_output
        if pooled_text is not None:
            text_features = self.project_text(pooled_text)
        elif input_ids is not None:
            text_output = self.get_text_features(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
            text_features = text_output.pooler_output
        if image_features is None and text_features is None:
            raise ValueError("Nothing to embed: pass pixel_values, input_ids or both.")

        # Compare images with captions, and compute the losses of pairs.
        named = teacher_image, teacher_text, teacher_image_embeds, teacher_text_embeds
        teachers = teachers_of(named, pooled_image, pooled_text)
        of_losses = group_ids, instance_weight, contrastive_weight, return_loss, num_items_in_batch, teachers
        output = self.score(image_features, text_features, *of_losses)
        output.vision_model_output, output.text_model_output = vision_output, text_output
        return output


AutoModel.register(IConEConfig, IConEModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(IConEConfig, IConEModel, exist_ok=True)
IConEModel.register_for_auto_class("AutoModel")  # copies this module into a checkpoint
