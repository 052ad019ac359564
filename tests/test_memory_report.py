"""`memory` measures one training step and changes nothing."""

import copy
import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.memory.backends import BackendName, using_backend
from fedmef_fx.memory.registry import held_buffers
from fedmef_fx.memory.resident import why_not
from fedmef_fx.memory.timeline import CATEGORIES
from fedmef_fx.memory_report import memory
from fedmef_fx.models import REFERENCE_MODELS, digits_cnn
from fedmef_fx.ops.packing import PackActivation
from fedmef_fx.training_step import OptimizerChoice

IMAGES = torch.ones(8, 1, 8, 8)


def test_bytes_of_a_model_that_is_small_enough_to_count() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    report = memory(model, (torch.ones(3, 4),))
    weights = 4 * (4 * 6 + 6 * 2)
    assert (report.weights, report.gradients, report.buffers) == (weights, weights, 0)
    assert report.inputs == 4 * 3 * 4
    # The result of the ReLU, which the second layer keeps as well; the input belongs to the caller.
    assert report.saved == {"dense": 4 * 3 * 6, "packed values": 0, "bitmap": 0, "8-bit": 0}
    assert report.peak >= weights * 2 + report.inputs


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert memory(model, (torch.ones(1, 4),)).weights == 64


def test_a_transformed_model_keeps_less() -> None:
    model, images = digits_cnn(), torch.ones(64, 1, 8, 8)
    dense = memory(model, (images,))
    sparse = memory(fedmef_fx.transform(model, Config(activation_sparsity=0.9)), (images,))
    assert sparse.saved["packed values"] > 0
    assert sparse.saved["bitmap"] > 0
    assert sparse.saved_total < 0.25 * dense.saved_total
    assert sparse.peak < dense.peak
    assert sparse.buffers > dense.buffers, "the masks"


def test_nothing_changes() -> None:
    model = fedmef_fx.transform(digits_cnn()).eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    memory(model, (IMAGES,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_it_is_repeatable() -> None:
    model = fedmef_fx.transform(digits_cnn())
    assert memory(model, (IMAGES,)) == memory(model, (IMAGES,))


def test_a_loss_of_ones_own() -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    report = memory(digits_cnn(), (IMAGES,), loss=lambda logits: F.cross_entropy(logits, labels))
    assert report.saved_total > memory(digits_cnn(), (IMAGES,)).saved_total, "log-softmax keeps its result"


def test_keyword_arguments_and_outputs_that_are_not_tensors() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, *, scale: float) -> dict[str, Tensor | int]:  # type: ignore[override]  # on purpose
            return {"out": super().forward(x) * scale, "rank": 2}

    assert memory(Scaled(4, 2), (torch.ones(3, 4),), example_kwargs={"scale": 2.0}).gradients == 40


def test_text_and_dictionary_agree() -> None:
    report = memory(digits_cnn(), (IMAGES,))
    content = json.loads(json.dumps(report.as_dict()))
    assert content["saved_total"] == report.saved_total == sum(content["saved"].values())
    for value in (report.weights, report.gradients, report.saved_total, report.peak):
        assert f"{value:,d} bytes" in str(report)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("resnet18", (IMAGES,), "expected a torch"),
        (digits_cnn(), IMAGES, "expected a tuple"),
        (digits_cnn(), (torch.ones(2, 3, 8, 8),), "fails on the example inputs"),
        (digits_cnn().requires_grad_(False), (IMAGES,), "differentiable scalar"),
    ],
)
def test_what_cannot_be_measured(model: nn.Module, inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        memory(model, inputs)


def test_a_loss_that_is_no_scalar() -> None:
    with pytest.raises(ConfigError, match=r"a tensor \[8, 10\]"):
        memory(digits_cnn(), (IMAGES,), loss=lambda logits: logits)


def test_the_package_is_the_function_of_the_public_api():
    import fedmef_fx  # noqa: PLC0415

    model, x = nn.Linear(4, 2), torch.ones(3, 4)
    assert fedmef_fx.memory(model, (x,)).saved_total == memory(model, (x,)).saved_total
    assert fedmef_fx.memory.PackedTensor.__name__ == "PackedTensor"


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


@pytest.mark.parametrize(
    ("optimizer", "copies"), [(None, 0), ("sgd", 0), ("sgd-momentum", 1), ("adam", 2), ("adamw", 2), (momentum, 1)]
)
def test_the_state_of_the_optimizer(optimizer: OptimizerChoice, copies: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    report = memory(model, (torch.ones(3, 4),), optimizer=optimizer)
    scalars = 4 * 4 if copies == 2 else 0  # Adam's step counts
    assert report.optimizer == copies * report.weights + scalars
    assert report.peak >= report.weights + report.gradients + report.optimizer
    phases = {event.site.phase for event in report.timeline}
    assert phases == ({"forward", "backward", "optimizer"} if optimizer else {"forward", "backward"})


@pytest.mark.parametrize("optimizer", ["lion", 3])
def test_an_optimizer_that_does_not_exist(optimizer: Any) -> None:
    with pytest.raises(ConfigError, match="'sgd-momentum'"):
        memory(digits_cnn(), (IMAGES,), optimizer=optimizer)


def test_the_timeline_adds_up() -> None:
    report = memory(fedmef_fx.transform(digits_cnn()), (IMAGES,), optimizer="sgd-momentum")
    assert sum(report.at_peak.values()) == report.peak == max(sum(event.live) for event in report.timeline)
    first, last = report.timeline[0], report.timeline[-1]
    held = dict(zip(CATEGORIES, last.live, strict=True))
    assert held["saved"] == 0, "backward let go of everything"
    assert (held["weights"], held["gradients"], held["optimizer"]) == (
        report.weights,
        report.gradients,
        report.optimizer,
    )
    assert dict(zip(CATEGORIES, first.live, strict=True))["gradients"] == 0


@pytest.mark.parametrize("transformed", [False, True], ids=["plain", "transformed"])
@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
@pytest.mark.parametrize("density", [0.1, 0.9])
@pytest.mark.parametrize(
    "config",
    [
        Config(weight_storage="packed"),
        Config(weight_storage="packed", packed_dtype="bfloat16"),
        Config(normalization="keep", saved_precision="int8"),
        Config(normalization="keep", saved_precision="int8", weight_storage="packed", packed_dtype="bfloat16"),
    ],
    ids=["packed", "bfloat16", "int8", "all"],
)
def test_predictions_of_packed_weights_and_formats(config: Config, density: float, kernels: BackendName) -> None:
    if kernels == "numba":
        pytest.importorskip("numba", reason="numba is an optional dependency")
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


def test_models_that_no_graph_serves_as_a_whole() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.lstm(x)[0]
            return self.head(out[:, -1] if out.shape[0] > 1 else out[:, 0])

    x = torch.randn(4, 5, 6)
    model = fedmef_fx.transform(Recurrent())
    report = memory(model, (x,), optimizer="sgd-momentum")
    assert {"lstm", "head"} <= {layer.path for layer in report.layers}
    predicted = memory(model, (x,), optimizer="sgd-momentum", predict=True)
    assert predicted.gradients == report.gradients
    # torch does not know the size of oneDNN's workspace before it runs.
    assert predicted.peak == pytest.approx(report.peak, rel=0.1) or "oneDNN" in predicted.notes[-1]


def test_the_allocator_sees_at_least_the_state() -> None:
    report = memory(digits_cnn(), (IMAGES,), optimizer="sgd-momentum", allocator=True)
    assert report.allocator_peak is not None
    # The same tensors, seen by the allocator: the timeline notes at the end of an operation what lives in it.
    assert report.allocator_peak == pytest.approx(report.peak, rel=0.25)


@pytest.mark.skipif(bool(why_not()), reason="needs /proc")
def test_resident_memory_of_a_fresh_process() -> None:
    model = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 3))
    images = torch.zeros(64, 1, 64, 64)
    report = memory(model, (images,), optimizer="sgd", rss=True)
    assert report.rss is not None
    # One activation of 64 MB is held, another one is its gradient.
    assert report.rss.step > 64 * 64 * 64 * 64 * 4
    assert report.rss.growth == report.rss.model + report.rss.step
    assert report.as_dict()["rss"]["growth"] == report.rss.growth


def test_resident_memory_that_cannot_be_had_is_explained() -> None:
    report = memory(nn.Linear(4, 2), (torch.ones(3, 4),), loss=lambda y: y.sum(), rss=True)
    assert report.rss is None
    assert any("no resident memory" in note for note in report.notes)


def test_output_for_machines_and_people(tmp_path: Path) -> None:
    report = memory(fedmef_fx.transform(digits_cnn()), (IMAGES,))
    content = json.loads(report.to_json(timeline=True))
    assert content["peak_site"]["phase"] == report.peak_site.phase
    assert len(content["timeline"]["events"]) == len(report.timeline)
    assert "timeline" not in json.loads(report.to_json())
    assert f"{report.peak:,d}" in report._repr_html_()
    largest = report.largest_layers(2)
    assert len(largest) == 2
    assert largest[0].held >= largest[1].held > 0
    for name in ("step.png", "step.svg"):
        report.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ConfigError, match="ends in"):
        report.plot(tmp_path / "step.txt")
    with pytest.raises(ConfigError, match="cannot be written"):
        report.plot(tmp_path / "nowhere" / "step.png")


def test_an_exception_in_forward_leaves_nothing_behind() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3)
            self.second = nn.Conv2d(4, 4, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            hidden = self.first(x)
            if self.calls == 2:
                raise RuntimeError("no second call")
            return self.second(hidden)

    gc.collect()
    before = len(held_buffers())
    with pytest.raises(ConfigError, match="no second call"):
        memory(fedmef_fx.transform(Failing(), Config(density=0.5)), (IMAGES,))
    gc.collect()
    assert len(held_buffers()) == before
    assert torch.randn(2).sum().isfinite(), "no mode is left on"


@pytest.mark.gpu
def test_cuda_allocator_statistics() -> None:
    model = fedmef_fx.transform(digits_cnn()).cuda()
    report = memory(model, (IMAGES.cuda(),), optimizer="sgd-momentum")
    assert report.cuda is not None
    assert report.cuda.reserved >= report.cuda.allocated >= report.weights + report.gradients + report.optimizer
