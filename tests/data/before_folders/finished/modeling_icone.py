"""IConE: two encoders, one common space, one classifier over image/text groups that both modalities share."""

# No `from __future__ import annotations` here: transformers reads the real types of `config: IConEConfig`.
import copy
import difflib
import math
import os
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForZeroShotImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_icone import IConEConfig, tower_width
from .lora import LoraTowersMixin, merged_state_dict, set_trainable
from .objective import check_pairs, contrastive_objective, count_ranks, instance_objective, rank_index
from .sentence_transformers_files import write_sentence_transformers_files
from .sharded_classifier import ShardedClassifier
from .towers import load_tower, max_text_tokens, pool, pooled_positions, run_vision_tower, saved_pooling

logger = logging.get_logger(__name__)

LOWEST_TEMPERATURE = 0.01  # CLIP's bound for a learned temperature
SIGMOID_BIAS = -10.0  # SigLIP's start


@dataclass
class IConEOutput(ModelOutput):
    """Output of [`IConEModel`]. What was not asked for, or cannot be had from the inputs, is `None`.

    Args:
        loss: scalar, `instance_weight * instance_loss + contrastive_weight * contrastive_loss`, equation (9).
        instance_loss: scalar, equation (5). `None` if its weight is 0.
        contrastive_loss: scalar, equation (8). `None` if its weight is 0.
        logits_per_image: `(num_images, num_sentences)`, cosine similarities divided by `model.temperature`.
        logits_per_text: its transpose.
        image_embeds: `(num_images, projection_dim)`, L2-normalised.
        text_embeds: `(num_sentences, projection_dim)`, L2-normalised.
        vision_model_output: what the vision tower returned, its `pooler_output` replaced by the projected feature.
        text_model_output: the same for the text tower.
    """

    loss: torch.Tensor | None = None
    instance_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in super().to_tuple())


class IConEModel(LoraTowersMixin, PreTrainedModel):
    """Instance Contrastive Embedding for image-text retrieval.

    `visual_projection` and `text_projection` map the towers' pooled outputs into the common space;
    `classifier.weight`, of shape `(num_groups, projection_dim)` and without bias, is the paper's `W_share`.
    `num_groups=0` has no classifier.

    In training mode a frozen tower (none of whose parameters requires a gradient) stays in eval mode, and batch norm
    always does: its statistics are those of the pretrained tower, so that k processes train as one.

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
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    # The losses are means over the batch; the Trainer must divide them by the accumulation steps itself.
    accepts_loss_kwargs = False
    _modes_are_set = False

    def __init__(
        self,
        config: IConEConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_model = vision_model if vision_model is not None else AutoModel.from_config(config.vision_config)
        self.text_model = text_model if text_model is not None else AutoModel.from_config(config.text_config)
        # One config object for tower and parent: what is changed in one is changed in both.
        for name, tower in (("vision_config", self.vision_model), ("text_config", self.text_model)):
            setattr(config, name, tower.config)
        self.visual_projection = nn.Linear(tower_width(config.vision_config), config.projection_dim, bias=False)
        self.text_projection = nn.Linear(tower_width(config.text_config), config.projection_dim, bias=False)
        self.classifier: nn.Linear | ShardedClassifier | None = None
        if config.num_groups:
            self.classifier = nn.Linear(config.projection_dim, config.num_groups, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(())) if config.learn_temperature else None
        self.logit_bias = nn.Parameter(torch.empty(())) if config.contrastive_loss == "sigmoid" else None
        self.post_init()
        self.add_configured_adapters()  # after post_init, which would start their zeros at random

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.visual_projection or module is self.text_projection:
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif module is self:
            if self.logit_scale is not None:
                init.constant_(self.logit_scale, -math.log(self.config.temperature))
            if self.logit_bias is not None:
                init.constant_(self.logit_bias, SIGMOID_BIAS)
        else:
            super()._init_weights(module)

    # --- building, saving, loading ---

    @classmethod
    def from_encoders(
        cls,
        vision: str | os.PathLike | PreTrainedModel,
        text: str | os.PathLike | PreTrainedModel,
        num_groups: int = 0,
        *,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        **config: Any,
    ) -> "IConEModel":
        """Joins two pretrained towers under new projections and a new classifier.

        Args:
            vision: Hub id, local folder or module. Of a checkpoint with both towers (CLIP, SigLIP) the vision tower is
                taken.
            text: likewise for the text tower. The pooling that a sentence-transformers checkpoint states in its
                `1_Pooling/config.json` is taken over, unless `text_pooling` is given.
            num_groups: classes of the shared classifier; see [`IConEConfig`].
            dtype: passed to the towers' `from_pretrained`, and used for the new parameters.
            attn_implementation: passed to the towers' `from_pretrained`.
            config: the other fields of [`IConEConfig`].

        Raises:
            TypeError: for a keyword that is no field of [`IConEConfig`].
            ValueError: if a tower states no hidden size, a pooling cannot be guessed, or a field is out of range.
        """
        known = [field.name for field in fields(IConEConfig)]
        for name in config:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise TypeError(f"from_encoders got {name!r}, which is no field of IConEConfig.{hint}")
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        options = {name: value for name, value in options.items() if value is not None}
        vision_model = load_tower(vision, "vision", options)
        text_model = load_tower(text, "text", options)
        if config.get("text_pooling") is None and not isinstance(text, PreTrainedModel):
            config["text_pooling"] = saved_pooling(text)
        # Copies, since a config that becomes part of another one loses its attention implementation; the model itself
        # then puts the towers' own configs in their place.
        icone_config = IConEConfig(
            vision_config=copy.deepcopy(vision_model.config),
            text_config=copy.deepcopy(text_model.config),
            num_groups=num_groups,
            **config,
        )
        return cls(icone_config, vision_model, text_model).to(vision_model.dtype)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. With another `num_groups` than the checkpoint's, the classifier starts fresh: a log line.

        Raises:
            RuntimeError: if any other weight differs in shape, unless `ignore_mismatched_sizes=True` is passed.
            ValueError: if adapters are asked for that the checkpoint has not.
            ImportError: if the checkpoint has adapters (`config.vision_lora`, `text_lora`) and peft is missing.
        """
        if kwargs.get("ignore_mismatched_sizes"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, **kwargs, ignore_mismatched_sizes=True, output_loading_info=True
        )
        model, info = loaded
        if any(".base_layer." in name for name in info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} has no adapters, but vision_lora or text_lora was asked for: load it "
                "without, then call model.add_adapter(LoraConfig(...))."
            )
        for name, saved, wanted in sorted(info["mismatched_keys"]):
            if name != "classifier.weight":
                raise RuntimeError(
                    f"{name} is {tuple(saved)} in {pretrained_model_name_or_path} but {tuple(wanted)} in the config. "
                    "Load it with the config it was saved with, or pass ignore_mismatched_sizes=True to start it fresh."
                )
            logger.warning(
                f"The checkpoint has class vectors for {saved[0]} groups, {wanted[0]} are wanted: the classifier "
                "starts fresh, everything else is the checkpoint's."
            )
        return (model, info) if return_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        with_classifier: bool = True,
        merge_lora: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers, and always all weights, those of adapters too; and what sentence-transformers reads.

        Args:
            save_directory: of the checkpoint.
            with_classifier: `False` leaves the class vectors out: searching needs none.
            merge_lora: adds the adapters to the weights that they adapt: a plain checkpoint, which loads without peft.
            kwargs: transformers' own.
        """
        self.record_adapters()
        changed: dict[str, Any] = {} if with_classifier else {"num_groups": 0}
        if merge_lora:
            changed |= {"vision_lora": None, "text_lora": None}
        state_dict = kwargs.pop("state_dict", None)
        if merge_lora:
            state_dict = merged_state_dict(self)
        sharded = self.classifier if isinstance(self.classifier, ShardedClassifier) else None
        if sharded is not None or not with_classifier:
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith("classifier.")}
        if sharded is not None:
            kwargs["max_shard_size"] = "1000TB"  # the rest as one file, to which the class vectors are added
        # transformers notes one Auto class of a model; a pipeline asks for this one.
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {"AutoModelForZeroShotImageClassification": "modeling_icone.IConEModel", **auto_map}
        before = {name: getattr(self.config, name) for name in changed}
        try:
            for name, value in changed.items():
                setattr(self.config, name, value)
            if sharded is None or rank_index() == 0:
                super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
                write_sentence_transformers_files(save_directory)
        finally:
            for name, value in before.items():
                setattr(self.config, name, value)
        if sharded is not None and with_classifier:
            sharded.add_to_checkpoint(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """With `push_to_hub=True` transformers uploads before [`save_pretrained`] here has gone on."""
        write_sentence_transformers_files(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def shard_classifier(self, classifier: ShardedClassifier | None = None) -> None:
        """Puts this rank's rows of the class vectors in the place of all: `classifier` becomes a [`ShardedClassifier`].

        In an initialised process group; training, losses and [`save_pretrained`], which every rank then calls, do what
        they did, but no rank holds more than its share.

        Args:
            classifier: the rows: new ones, or those of a checkpoint ([`ShardedClassifier.from_pretrained`]), of which
                the model, built or loaded with `num_groups=0`, need never hold all. `None`: cut out of the model's own.

        Raises:
            ValueError: if there are no class vectors to cut, or `classifier` has another `projection_dim`.
        """
        if classifier is None:
            if self.classifier is None:
                raise ValueError("This model has no class vectors (num_groups=0): pass a ShardedClassifier.")
            weight = self.classifier.weight
            classifier = ShardedClassifier(self.config.num_groups, self.config.projection_dim, dtype=weight.dtype)
            classifier.weight.data.copy_(weight.data[classifier.rows])
        if classifier.weight.shape[1] != self.config.projection_dim:
            raise ValueError(
                f"The class vectors have {classifier.weight.shape[1]} dimensions, projection_dim is "
                f"{self.config.projection_dim}."
            )
        self.classifier = classifier.to(self.visual_projection.weight.device)
        self.config.num_groups = classifier.num_groups

    @property
    def temperature(self) -> float | torch.Tensor:
        """What cosines are divided by: `config.temperature`, or the learned one, a scalar tensor."""
        if self.logit_scale is None:
            return self.config.temperature
        return torch.exp(-self.logit_scale).clamp(min=LOWEST_TEMPERATURE)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """DDP asks for this. `forward`'s graph averages samples' sparse gradient; that of shards needs no mean."""
        is_sharded = isinstance(self.classifier, ShardedClassifier)
        return ["classifier.weight"] if self.config.instance_samples or is_sharded else []

    def heads(self) -> "IConEModel":
        """This model without its towers, which embeds pooled outputs alone. Weights and config are this model's own.

        Its `state_dict` is that of projections, classifier and temperature.
        """
        heads = copy.copy(self)
        heads._modules = {**self._modules, "vision_model": nn.Identity(), "text_model": nn.Identity()}
        return heads

    # --- training modes ---

    def set_encoders_trainable(self, trainable: bool) -> None:
        """Freezes or thaws both towers; frozen towers go to eval mode at once and stay there.

        Of a tower with LoRA adapters these alone are thawed.
        """
        for tower in (self.vision_model, self.text_model):
            set_trainable(tower, trainable)
        self.set_modes(self.training)

    def train(self, mode: bool = True) -> "IConEModel":
        """As in torch, but for what stays in eval mode. Which towers are frozen is looked at when the mode changes.

        A Trainer calls this at every step, and a walk over all modules and parameters takes as long as a step of the
        heads. Freeze by [`set_encoders_trainable`], which sets the modes anew.
        """
        return self if self._modes_are_set and mode == self.training else self.set_modes(mode)

    def set_modes(self, mode: bool) -> "IConEModel":
        """Puts every module into the mode that it should be in, whichever the model was in."""
        super().train(mode)
        for tower in (self.vision_model, self.text_model):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
            for module in tower.modules():
                # Every batch norm of torch and of transformers' convolutional towers has these statistics.
                if hasattr(module, "running_mean"):
                    module.eval()
        self._modes_are_set = True
        return self

    # --- features ---

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The vision tower's output, its `pooler_output` replaced by the projected feature `(batch, projection_dim)`.

        The feature is not normalised: the instance loss uses it as it is. `kwargs` go to the tower.
        """
        output = self.run_vision_tower(pixel_values, **kwargs)
        output.pooler_output = self.visual_projection(self.pool_image(output))
        return output

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The text tower's output, its `pooler_output` replaced by the projected feature `(batch, projection_dim)`.

        Raises:
            ValueError: if the sequences are longer than the tower's position embeddings.
        """
        output = self._run_text_tower(input_ids, attention_mask, token_type_ids, **kwargs)
        output.pooler_output = self.text_projection(self.pool_text(output, attention_mask))
        return output

    def get_image_token_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Every position of the picture in the common space, `(batch, positions, projection_dim)`, not normalised.

        Positions are the tower's tokens (a class token first, where it has one; no register tokens) or its feature map,
        row by row. Each goes through what makes the tower's pooled output of the whole, as if it were alone: a layer
        norm, an attention head.
        """
        return self.project_positions(self.run_vision_tower(pixel_values))

    def project_positions(self, output: BaseModelOutputWithPooling) -> torch.Tensor:
        """The positions of the vision tower's output in the common space, as [`get_image_token_features`] does it."""
        return self.visual_projection(pooled_positions(self.vision_model, output, self.config.vision_pooling))

    def get_text_token_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Every token of the sentence in the common space, `(batch, tokens, projection_dim)`, not normalised."""
        output = self._run_text_tower(input_ids, attention_mask)
        return self.text_projection(pooled_positions(self.text_model, output, self.config.text_pooling))

    def run_vision_tower(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """What the vision tower returns for pictures `(batch, channels, height, width)`, whichever form it wants."""
        return run_vision_tower(self.vision_model, pixel_values, **kwargs)

    def pool_image(self, output: BaseModelOutputWithPooling) -> torch.Tensor:
        """The vision tower's "global token" by `config.vision_pooling`, `(batch, width)`, before the projection."""
        return pool(self.config, "vision", output)

    def pool_text(self, output: BaseModelOutputWithPooling, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The text tower's "global token" by `config.text_pooling`, `(batch, width)`, before the projection."""
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
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, the text tower's positions end at {longest}. Tokenise "
                "with IConEProcessor, which truncates, or with truncation=True and a max_length."
            )
        if token_type_ids is not None:  # not every text tower knows this argument
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
        **kwargs: Any,
    ) -> IConEOutput:
        """Embeds images, sentences or both, and computes the losses of pairs (row i of both belong together).

        In distributed training (`train` mode, an initialised process group) the losses are those of the batch over all
        ranks: InfoNCE sees every rank's rows, gathered with their gradient. The ranks' losses then differ, and their
        mean, like the mean of their gradients that DDP takes, is exactly that of one process with the whole batch.

        Args:
            input_ids, attention_mask, token_type_ids: `(batch, tokens)`, as the tokenizer returns them.
            pixel_values: `(batch, channels, height, width)`.
            group_ids: `(batch,)`, each pair's image/text group, `0..num_groups-1`; [`IGNORED_GROUP`] marks a filler
                row, which no loss sees.
            instance_weight: lambda_1 of equation (9). At 0 the instance loss is not computed.
            contrastive_weight: lambda_2 of equation (9). At 0 InfoNCE is not computed.
            return_loss: `None` computes the losses if `group_ids` are given. InfoNCE alone (`instance_weight=0`) needs
                no `group_ids`: all pairs then count as different groups.
            pooled_image, pooled_text: `(batch, width)`, the towers' pooled outputs (`pool_image`, `pool_text`) if they
                are known already; the towers are then not run.
            num_items_in_batch: pairs that the instance loss is averaged over, if these are a chunk of a larger batch.
            kwargs: to both towers (`output_hidden_states`, `output_attentions`).

        Raises:
            ValueError: if nothing to embed is given, if a loss lacks what it needs, or if group ids are out of range.
        """
        vision_output: Any = None
        text_output: Any = None
        image_features: Any = None
        text_features: Any = None
        if pooled_image is not None:
            image_features = self.visual_projection(pooled_image)
        elif pixel_values is not None:
            vision_output = self.get_image_features(pixel_values, return_dict=True, **kwargs)
            image_features = vision_output.pooler_output
        if pooled_text is not None:
            text_features = self.text_projection(pooled_text)
        elif input_ids is not None:
            text_output = self.get_text_features(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
            text_features = text_output.pooler_output
        if image_features is None and text_features is None:
            raise ValueError("Nothing to embed: pass pixel_values, input_ids or both.")

        image_embeds: Any = None if image_features is None else F.normalize(image_features, dim=-1)
        text_embeds: Any = None if text_features is None else F.normalize(text_features, dim=-1)
        logits_per_text = logits_per_image = None
        if image_embeds is not None and text_embeds is not None:
            logits_per_text = text_embeds @ image_embeds.T / self.temperature
            logits_per_image = logits_per_text.T
        loss: Any = None
        instance: Any = None
        contrastive: Any = None
        if return_loss or (return_loss is None and group_ids is not None):
            check_pairs(self.config, image_features, text_features, group_ids, instance_weight, contrastive_weight)
            num_ranks = count_ranks() if self.training else 1
            if instance_weight:
                known_groups = cast(torch.Tensor, group_ids)
                pairs = self.config, image_features, text_features, known_groups
                if isinstance(self.classifier, ShardedClassifier):
                    instance = self.classifier.objective(*pairs, num_items_in_batch)
                else:
                    instance = instance_objective(
                        *pairs,
                        cast(nn.Linear, self.classifier).weight,
                        num_ranks,
                        self.config.instance_samples if self.training else 0,
                        num_items_in_batch,
                    )
            if contrastive_weight:
                contrastive = contrastive_objective(
                    self.config, self.temperature, self.logit_bias, image_embeds, text_embeds, group_ids, num_ranks
                )
            weighted = ((instance_weight, instance), (contrastive_weight, contrastive))
            loss = sum(weight * part for weight, part in weighted if part is not None)
        return IConEOutput(
            loss=loss,
            instance_loss=instance,
            contrastive_loss=contrastive,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=vision_output,
            text_model_output=text_output,
        )


AutoModel.register(IConEConfig, IConEModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(IConEConfig, IConEModel, exist_ok=True)
IConEModel.register_for_auto_class("AutoModel")  # a checkpoint takes this module along
