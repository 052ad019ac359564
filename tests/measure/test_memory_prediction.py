"""`memory(predict=True)` says what a step takes without running it: near what is measured, with all kernels."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.measure.memory import memory
from fedmef_fx.models import REFERENCE_MODELS, digits_cnn
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.packing.backends import BackendName, available_backends, using_backend

IMAGES = torch.ones(8, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "transformed"),
    [("resnet18", False), pytest.param("mobilenet_v2", True, marks=pytest.mark.slow)],
    ids=["plain", "transformed"],
)
def test_layers_and_prediction(name: str, transformed: bool) -> None:
    model, images = REFERENCE_MODELS[name](), torch.randn(2, 3, 32, 32)
    paths = {"", "loss", *(path for path, _ in model.named_modules())}
    candidate = fedmef_fx.transform(model) if transformed else model
    report = memory(candidate, (images,), optimizer="sgd-momentum")
    assert sum(layer.held for layer in report.layers) == report.saved_total
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    with_work = {layer.path for layer in report.layers if layer.transients}
    assert with_work >= set(convolutions)
    if not transformed:
        assert {layer.path for layer in report.layers} <= paths
    # Every prunable layer's work in backward is found, through the nodes that autograd made for it.
    backward = {event.site.path for event in report.timeline if event.site.phase == "backward"}
    assert backward >= set(convolutions)
    assert report.peak_site.phase == "backward"
    predicted = memory(candidate, (images,), optimizer="sgd-momentum", predict=True)
    assert predicted.is_predicted
    # Thresholds from samples keep a little more or less than their target; everything else is the same.
    assert predicted.peak == pytest.approx(report.peak, rel=0.1)
    assert predicted.saved_total == pytest.approx(report.saved_total, rel=0.1)
    for field in ("weights", "buffers", "inputs", "gradients", "optimizer"):
        assert getattr(predicted, field) == getattr(report, field), field
    if not transformed:
        assert predicted.peak == report.peak
        assert predicted.layers == report.layers


FORMATS = {
    "packed": Config(weight_storage="packed"),
    "bfloat16": Config(weight_storage="packed", packed_dtype="bfloat16"),
    "int8": Config(normalization="keep", saved_precision="int8"),
    "all": Config(normalization="keep", saved_precision="int8", weight_storage="packed", packed_dtype="bfloat16"),
}


@pytest.mark.parametrize(  # every pair of two of them
    ("format_", "density", "kernels"),
    [
        *((name, *rest) for name in ("packed", "all") for rest in ((0.1, "numpy"), (0.9, "native"))),
        *((name, *rest) for name in ("bfloat16", "int8") for rest in ((0.9, "numpy"), (0.1, "native"))),
    ],
)
def test_predictions_of_packed_weights_and_formats(format_: str, density: float, kernels: BackendName) -> None:
    config = FORMATS[format_]
    if kernels not in available_backends():
        pytest.skip("the kernels could not be compiled")
    model = fedmef_fx.transform(digits_cnn(), config.replace(density=density))
    images = torch.randn(8, 1, 8, 8)
    with using_backend(kernels):
        for size in (None, 4):
            if size is not None and config.normalization == "keep":
                continue
            report = memory(model, (images,), optimizer="sgd-momentum", micro_batch=size)
            predicted = memory(model, (images,), optimizer="sgd-momentum", micro_batch=size, predict=True)
            assert predicted.peak == pytest.approx(report.peak, rel=0.02)
            assert predicted.saved_total == pytest.approx(report.saved_total, rel=0.1)


class Gated(nn.Module):
    """What it keeps at 8 bits is contiguous, or a part of a wider result."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, dim=-1)
        return self.second(F.gelu(left) * right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [64, 1000, 4096])  # below, about and above what is encoded at a time
def test_predictions_know_what_encoding_takes(samples: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = Config(saved_precision="int8", activation_sparsity=0.0, density=0.5)
    model, x = fedmef_fx.transform(Gated().to(dtype), config), torch.randn(samples, 64, dtype=dtype)
    report, predicted = memory(model, (x,)), memory(model, (x,), predict=True)
    assert report.saved["8-bit"] > 0
    assert predicted.peak == pytest.approx(report.peak, rel=0.02)
    for ours, theirs in zip(predicted.layers, report.layers, strict=True):
        assert ours.path == theirs.path
        assert ours.transients == pytest.approx(theirs.transients, rel=0.05, abs=1024)


def test_a_prediction_needs_no_memory_and_leaves_nothing() -> None:
    layer = nn.Linear(1 << 20, 1 << 20, device="meta")  # 4 TiB of float32
    report = memory(layer, (torch.ones(2, 1 << 20, device="meta"),), predict=True, optimizer="adam")
    assert report.weights == (1 << 42) + (1 << 22)
    assert report.optimizer == pytest.approx(2 * report.weights, rel=1e-6)
    model = fedmef_fx.transform(digits_cnn())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory(model, (IMAGES,), predict=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())
    assert all(site.estimator.kept is None for site in model.modules() if isinstance(site, PackActivation))
    model(IMAGES).sum().backward()


def test_a_prediction_uses_the_share_that_was_kept() -> None:
    model = fedmef_fx.transform(digits_cnn(), Config(activation_sparsity=0.2))
    images = torch.randn(8, 1, 8, 8)
    # Half of what a ReLU gives is 0 and never kept, so that less than the target of 0.8 is.
    before = memory(model, (images,), predict=True).saved["packed values"]
    model(images)
    after = memory(model, (images,), predict=True).saved["packed values"]
    measured = memory(model, (images,)).saved["packed values"]
    assert after == pytest.approx(measured, rel=0.02)
    assert before > 1.2 * measured


def test_a_model_whose_forward_needs_values_cannot_be_predicted() -> None:
    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum().item() > 0 else -x)

    model, x = Branching(4, 2), torch.ones(3, 4)
    assert memory(model, (x,)).gradients == 40
    with pytest.raises(ConfigError, match="cannot be predicted"):
        memory(model, (x,), predict=True)
