"""int8 + packed files against float32: how often both choose the same class of real images, and what stays float32.

    FEDMEF_FX_DATA=... python benchmarks/int8_agreement.py [--steps 300] [--models shuffled ...] [--docs docs/onnx.md]

Five small networks (residual, inverted residual, shuffled channels, squeeze and excitation with hard swish, a vision
transformer) train on CIFAR-10 at density 0.3 (untrained networks choose by chance: agreement says nothing). Their
files are calibrated with 256 training images and compared on 1,000 test images with the float32 file, in onnxruntime:
once with int8 everywhere, once as `export_onnx` does by default.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime
import torch
from _docs import fill
from _machine import machine
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx.data import load_cifar10
from fedmef_fx.models import vit_tiny

TARGET: Final = 0.97
_TEST_IMAGES: Final = 1000


def _conv(before: int, after: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(after)]


class Residual(nn.Module):
    """Two convolutions, or an inverted residual with a depthwise one, next to a shortcut."""

    def __init__(self, before: int, after: int, stride: int, *, inverted: bool = False) -> None:
        super().__init__()
        wide = 4 * before
        self.body = nn.Sequential(
            *_conv(before, wide, 1) if inverted else _conv(before, after, stride=stride),
            nn.ReLU6() if inverted else nn.ReLU(),
            *(
                [*_conv(wide, wide, 3, stride, wide), nn.ReLU6(), *_conv(wide, after, 1)]
                if inverted
                else _conv(after, after)
            ),
        )
        self.shortcut = (
            nn.Sequential(*_conv(before, after, 1, stride)) if stride > 1 or before != after else nn.Identity()
        )
        self.last = nn.Identity() if inverted else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add both ways."""
        return self.last(self.body(x) + self.shortcut(x))  # type: ignore[no-any-return]


class Shuffled(nn.Module):
    """A unit of ShuffleNetV2: half of the channels pass, both halves are joined and shuffled."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        half, self.stride = after // 2, stride
        first = before if stride > 1 else before // 2
        self.body = nn.Sequential(
            *_conv(first, half, 1), nn.ReLU(), *_conv(half, half, 3, stride, half), *_conv(half, half, 1), nn.ReLU()
        )
        self.side = nn.Sequential(*_conv(before, before, 3, stride, before), *_conv(before, half, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Join and shuffle."""
        left, right = (self.side(x), x) if self.stride > 1 else x.chunk(2, 1)
        joined = torch.cat([left, self.body(right)], 1)
        number, channels, height, width = joined.shape
        return joined.view(number, 2, channels // 2, height, width).transpose(1, 2).reshape(joined.shape)


class Excited(nn.Module):
    """A unit of MobileNetV3: depthwise, squeeze and excitation, hard swish."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        wide = 3 * before
        self.first = nn.Sequential(*_conv(before, wide, 1), nn.Hardswish(), *_conv(wide, wide, 5, stride, wide))
        self.squeeze, self.excite = nn.Conv2d(wide, wide // 4, 1), nn.Conv2d(wide // 4, wide, 1)
        self.last = nn.Sequential(*_conv(wide, after, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel by what all of the image says."""
        x = F.hardswish(self.first(x))
        scale = self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu())
        return self.last(x * F.hardsigmoid(scale))  # type: ignore[no-any-return]


def _network(unit: Callable[[int, int, int], nn.Module]) -> nn.Module:
    stages = [unit(16, 16, 1), unit(16, 32, 2), unit(32, 32, 1), unit(32, 64, 2), unit(64, 64, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*_conv(3, 16), nn.ReLU(), *stages, *head)


MODELS: Final[dict[str, Callable[[], nn.Module]]] = {
    "residual": lambda: _network(Residual),
    "inverted": lambda: _network(lambda a, b, stride: Residual(a, b, stride, inverted=True)),
    "shuffled": lambda: _network(Shuffled),
    "excited": lambda: _network(Excited),
    "vit": lambda: vit_tiny(dim=64, depth=4, heads=2),
}


def trained(name: str, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """A sparse model after some steps of AdamW."""
    torch.manual_seed(0)
    config = fedmef_fx.Config(density=0.3, normalization="keep")
    model = fedmef_fx.transform(MODELS[name](), config, example_inputs=(images[:2],)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def choices(path: Path, images: Tensor) -> Tensor:
    """The class that a file chooses for each image."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat(
        [torch.from_numpy(session.run(None, {name: part.numpy()})[0]) for part in images.split(100)]
    ).argmax(1)


def measure(name: str, methods: Sequence[str], images: Tensor, labels: Tensor, steps: int) -> Iterator[list[str]]:
    """The cells of a model's rows, one row for each way to take ranges."""
    test = load_cifar10()[1]
    real, classes = test.batch(torch.arange(_TEST_IMAGES))
    model = trained(name, images, labels, steps)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"example_inputs": (images[:2],), "weights": "packed", "verify": False}
        plain = Path(folder) / "float32.onnx"
        size = fedmef_fx.export_onnx(model, plain, **options).bytes
        expected = choices(plain, real)
        options |= {"quantize": "int8", "calibration_data": list(images[:256].split(64))}
        for method in methods:
            alone, chosen = Path(folder) / "int8.onnx", Path(folder) / "chosen.onnx"
            fedmef_fx.export_onnx(model, alone, **options, calibration_method=method, float32_layers=())
            report = fedmef_fx.export_onnx(model, chosen, **options, calibration_method=method)
            shares = [float((choices(path, real) == expected).float().mean()) for path in (alone, chosen)]
            told = "" if shares[1] >= TARGET else f" (missed {TARGET})"
            kept = ", ".join(layer.name for layer in report.layers if layer.kind == "float32") or "none"
            accuracy = float((expected == classes).float().mean())
            shown = [f"{accuracy:.3f}", f"{shares[0]:.3f}", f"{shares[1]:.3f}{told}"]
            yield [name, method, *shown, f"{size:,}", f"{report.bytes:,}", kept]


_HEAD: Final = ("model", "ranges", "accuracy", "int8 alone", "by default", "bytes, float32", "bytes", "float32 layers")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Top-1 agreement of int8 + packed files with float32 on CIFAR-10.")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=("minmax", "percentile", "entropy"), default=["minmax"])
    parser.add_argument("--docs", type=Path, help="page whose place `int8 agreement` gets the table")
    arguments = parser.parse_args()
    train = load_cifar10()[0]
    images, labels = train.batch(torch.arange(len(train)))
    lines = [f"| {' | '.join(_HEAD)} |", "|---|---|---:|---:|---:|---:|---:|---|"]
    print("\n".join(lines), flush=True)
    for name in arguments.models:
        for cells in measure(name, arguments.methods, images, labels, arguments.steps):
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    about = f"{machine()}; onnxruntime {onnxruntime.__version__}"
    print(f"\n{about}")
    if arguments.docs is not None:
        fill(arguments.docs, "int8 agreement", "\n".join(lines) + f"\n\n{about}")


if __name__ == "__main__":
    main()
