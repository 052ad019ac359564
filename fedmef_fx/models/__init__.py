"""Reference architectures: the networks that FedMef is evaluated on, and two small transformers."""

from collections.abc import Callable
from typing import Final

from torch import nn

from fedmef_fx.models.convolutional import (
    MobileNetV2,
    ResNet,
    digits_cnn,
    mobilenet_v2,
    resnet18,
    resnet50,
)
from fedmef_fx.models.transformers import gpt2_bytes, vit_tiny

__all__ = [
    "REFERENCE_MODELS",
    "MobileNetV2",
    "ResNet",
    "digits_cnn",
    "gpt2_bytes",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "vit_tiny",
]

REFERENCE_MODELS: Final[dict[str, Callable[..., nn.Module]]] = {
    "digits_cnn": digits_cnn,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "vit_tiny": vit_tiny,
    "gpt2_bytes": gpt2_bytes,
}
"""The models that the command line knows, by name."""
