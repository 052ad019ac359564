"""`memory` measures one training step and changes nothing."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.memory_report import memory
from fedmef_fx.models import digits_cnn

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
