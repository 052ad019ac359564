"""Reference architectures: the networks that FedMef is evaluated on, and two small transformers."""

from fedmef_fx.models.convolutional import (
    REFERENCE_MODELS,
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
