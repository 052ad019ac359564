"""The architectures that FedMef is evaluated on, for demos, tests and benchmarks; `transformers.py` has two more.

Modules carry the names that torchvision gives them, so that its checkpoints for the same layout load. Convolutions
start with the fan-out scaling of He et al. (ICCV 2015), BatchNorm at the identity.
"""

from collections import OrderedDict
from typing import Final

from torch import Tensor, nn

from fedmef_fx.errors import ConfigError

__all__ = [
    "MobileNetV2",
    "ResNet",
    "digits_cnn",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
]


def digits_cnn(num_classes: int = 10) -> nn.Sequential:
    """A small Conv-BatchNorm-ReLU network for the 8x8 digits that come with scikit-learn.

    Input `[batch, 1, 8, 8]`, 67,754 parameters with 10 classes. It has no source paper: it is the smallest network with
    every kind of layer that FedMef treats specially, and trains within seconds.

    Args:
        num_classes: Number of logits.

    Returns:
        A model from `[batch, 1, 8, 8]` to `[batch, num_classes]`.

    Example:
        >>> sum(parameter.numel() for parameter in digits_cnn().parameters())
        67754
    """
    _check_positive("digits_cnn", num_classes=num_classes)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 1
    for index, (width, pools) in enumerate([(32, False), (32, True), (64, False), (64, True)], start=1):
        layers[f"conv{index}"] = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm2d(width)
        layers[f"relu{index}"] = nn.ReLU()
        if pools:
            layers[f"pool{index}"] = nn.MaxPool2d(kernel_size=2)
        channels = width
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels * 2 * 2, num_classes)
    model = nn.Sequential(layers)
    _initialize(model)
    return model


def _projection(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential | None:
    """What a shortcut needs to match a block that changes the shape; None where it stays."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions next to the shortcut (ResNet-18 and -34)."""

    expansion: Final = 1  # output channels divided by width

    def __init__(self, in_channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(in_channels, width, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(x)))
        hidden = self.bn2(self.conv2(hidden))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(hidden + shortcut)
        return out


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions next to the shortcut (ResNet-50 and deeper); the 3x3 one carries the stride."""

    expansion: Final = 4  # output channels divided by width

    def __init__(self, in_channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, out_channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(x)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        hidden = self.bn3(self.conv3(hidden))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(hidden + shortcut)
        return out


class ResNet(nn.Module):
    """A residual network (He et al., CVPR 2016); `resnet18` and `resnet50` build the two in use.

    Args:
        block: Kind of residual block.
        depths: Number of blocks in each of the four stages.
        num_classes: Number of logits.
        in_channels: Channels of the input image.
        small_images: Take the 3x3 stem of stride 1 without max-pool (CIFAR), not the 7x7 one of stride 2 (ImageNet).
        width: Channels of the stem and of the first stage; each later stage has twice as many.
    """

    def __init__(
        self,
        block: type[_BasicBlock] | type[_Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        num_classes: int,
        in_channels: int,
        small_images: bool,
        width: int = 64,
    ) -> None:
        super().__init__()
        stem_kernel, stem_stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(
            in_channels, width, kernel_size=stem_kernel, stride=stem_stride, padding=stem_kernel // 2, bias=False
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        last = width * block.expansion
        self.layer1 = _residual_stage(block, width, width, depth=depths[0], stride=1)
        self.layer2 = _residual_stage(block, last, 2 * width, depth=depths[1], stride=2)
        self.layer3 = _residual_stage(block, 2 * last, 4 * width, depth=depths[2], stride=2)
        self.layer4 = _residual_stage(block, 4 * last, 8 * width, depth=depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * last, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, channels, height, width]` to logits `[batch, num_classes]`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _residual_stage(
    block: type[_BasicBlock] | type[_Bottleneck], in_channels: int, width: int, *, depth: int, stride: int
) -> nn.Sequential:
    """Build `depth` blocks, of which the first changes resolution and channels."""
    first = block(in_channels, width, stride=stride)
    rest = [block(width * block.expansion, width, stride=1) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


def resnet18(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18 for small images: 3x3 stem of stride 1, no max-pool.

    Input `[batch, 3, 32, 32]`, 11,173,962 parameters with 10 classes. He et al., Deep Residual Learning for Image
    Recognition, CVPR 2016; the stem is that of the paper's CIFAR-10 networks.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the input image.

    Returns:
        A model from `[batch, in_channels, height, width]` to `[batch, num_classes]`.

    Example:
        >>> resnet18(num_classes=100).fc.out_features
        100
    """
    _check_positive("resnet18", num_classes=num_classes, in_channels=in_channels)
    return ResNet(_BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, small_images=True)


def resnet50(num_classes: int = 1000) -> ResNet:
    """ResNet-50 in its ImageNet layout, with the stride in the 3x3 convolutions.

    Input `[batch, 3, 224, 224]`, 25,557,032 parameters with 1000 classes. He et al., Deep Residual Learning for Image
    Recognition, CVPR 2016.

    Args:
        num_classes: Number of logits.

    Returns:
        A model from `[batch, 3, height, width]` to `[batch, num_classes]`.

    Example:
        >>> sum(parameter.numel() for parameter in resnet50().parameters())
        25557032
    """
    _check_positive("resnet50", num_classes=num_classes)
    return ResNet(_Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=3, small_images=False)


# (expansion, output channels, blocks, stride of the first block): Table 2 of Sandler et al., with two changes for 32x32
# images: stride 1 in the 24-channel stage and in the stem, so that 4x4 positions are left at the end.
_INVERTED_STAGES: Final = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_bn_relu6(
    in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class _InvertedResidual(nn.Module):
    """Expand 1x1, filter depthwise 3x3, project 1x1 without nonlinearity; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv_bn_relu6(in_channels, width, kernel_size=1))
        layers += [
            _conv_bn_relu6(width, width, kernel_size=3, stride=stride, groups=width),
            nn.Conv2d(width, out_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.has_shortcut else out


class MobileNetV2(nn.Module):
    """MobileNetV2 for small images; `mobilenet_v2` builds it.

    Args:
        num_classes: Number of logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(3, 32, kernel_size=3)]
        channels = 32
        for expansion, out_channels, depth, first_stride in _INVERTED_STAGES:
            for index in range(depth):
                stride = first_stride if index == 0 else 1
                layers.append(_InvertedResidual(channels, out_channels, stride=stride, expansion=expansion))
                channels = out_channels
        layers.append(_conv_bn_relu6(channels, 1280, kernel_size=1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 3, height, width]` to logits `[batch, num_classes]`."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def mobilenet_v2(num_classes: int = 10) -> MobileNetV2:
    """MobileNetV2 for small images: stem and first stride-2 stage at stride 1.

    Input `[batch, 3, 32, 32]`, 2,236,682 parameters with 10 classes. Sandler et al., MobileNetV2: Inverted Residuals
    and Linear Bottlenecks, CVPR 2018.

    Args:
        num_classes: Number of logits.

    Returns:
        A model from `[batch, 3, height, width]` to `[batch, num_classes]`.

    Example:
        >>> sum(parameter.numel() for parameter in mobilenet_v2().parameters())
        2236682
    """
    _check_positive("mobilenet_v2", num_classes=num_classes)
    return MobileNetV2(num_classes)


def _check_positive(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{where}: got {name}={size!r}; expected an integer >= 1")


def _initialize(model: nn.Module) -> None:
    """Scale convolutions by fan-out; a classifier starts small, as its inputs are not normalised."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
