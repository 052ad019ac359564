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
from fedmef_fx.measure.memory import memory
from fedmef_fx.measure.resident import why_not
from fedmef_fx.measure.timeline import CATEGORIES
from fedmef_fx.measure.training_step import OptimizerChoice
from fedmef_fx.models import digits_cnn
from fedmef_fx.packing.registry import held_buffers

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
    assert fedmef_fx.packing.PackedTensor.__name__ == "PackedTensor"


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
