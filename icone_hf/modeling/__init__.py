"""The model and everything that travels with a checkpoint.

Here are config, model and processor, and their parts: losses, projections and classifier, towers, LoRA, the sharded
classifier. These files import torch, transformers, huggingface_hub, safetensors, the standard library and each other by
a single dot, nothing else: transformers copies them into a checkpoint, and loads them from there where icone_hf is not
installed. Importing this folder registers the model with the Auto classes.
"""

from .configuration_icone import IConEConfig
from .extra_towers import EfficientNetLiteConfig, EfficientNetLiteModel, RecurrentTextConfig, RecurrentTextModel
from .heads import IConEHeads, IConEOutput
from .losses import contrastive_loss, hinge_loss, instance_loss, sigmoid_loss
from .modeling_icone import IConEModel
from .processing_icone import IConEProcessor
from .sharded_classifier import ShardedClassifier
from .taught_losses import distillation_loss, soft_target_loss, uni_modal_loss

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "IConEConfig",
    "IConEHeads",
    "IConEModel",
    "IConEOutput",
    "IConEProcessor",
    "RecurrentTextConfig",
    "RecurrentTextModel",
    "ShardedClassifier",
    "contrastive_loss",
    "distillation_loss",
    "hinge_loss",
    "instance_loss",
    "sigmoid_loss",
    "soft_target_loss",
    "uni_modal_loss",
]
