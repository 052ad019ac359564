"""The exported training step has the loss and the gradients that the model has, with masks and without BatchNorm."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn import functional as F

from fedmef_fx import Config, masks, transform
from fedmef_fx.errors import ExportError
from fedmef_fx.export.training.joint_graph import ExportedStep, TrainingStep, export_step, step_notices
from fedmef_fx.models import digits_cnn


class Attention(nn.Module):
    """A LayerNorm, attention, dropout, and a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.layer(self.embed(x) * scale).mean(1))


class Pooled(nn.Module):
    """Overlapping and grouped: windows of a pooling share elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(self.norm(self.first(x))), 3, 2, 1)
        return self.head(F.hardswish(self.second(x)).mean((2, 3)))


CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "attention": (Attention, (4, 5, 8), {"scale": 0.5}),
    "pooled": (Pooled, (4, 2, 9, 9), {}),
}


def exact(kind: Any, storage: Any, **example: Any) -> nn.Module:
    config = Config(density=0.3, weight_storage=storage, activation_sparsity=0.0, activation_bits=None)
    return transform(kind(), config, **example).eval()


def run_joint(step: TrainingStep, exported: ExportedStep, *arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients as the joint graph computes them."""
    joint, given = exported.joint, iter(arguments)
    state = {**joint.constants, **joint.state_dict, **dict(step.named_parameters())}
    values = [
        next(given) if spec.kind is InputKind.USER_INPUT else state[str(spec.target)]
        for spec in joint.graph_signature.input_specs
    ]
    with torch.no_grad():
        results = joint.graph_module(*values)
    specs = list(zip(joint.graph_signature.output_specs, results, strict=True))
    loss = next(result for spec, result in specs if spec.kind is OutputKind.LOSS_OUTPUT)
    return loss, {str(s.target): r for s, r in specs if s.kind is OutputKind.GRADIENT_TO_PARAMETER}


@pytest.mark.parametrize(("case", "storage"), [("attention", "packed"), ("pooled", "dense")])
def test_loss_and_gradients(case: str, storage: str) -> None:
    kind, shape, kwargs = CASES[case]
    x, target = torch.randn(shape), torch.tensor([0, 2, 1, 2])
    model = exact(kind, storage, example_inputs=(x,), example_kwargs=kwargs)
    step = TrainingStep(model, F.cross_entropy, kwargs)
    exported = export_step(step, target, (x,))
    loss, gradients = run_joint(step, exported, target, x)
    again, by_autograd = exported.differentiated(dict(step.named_parameters()), target, (x,))
    expected = F.cross_entropy(model(x, **kwargs), target)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert again == pytest.approx(expected.item(), rel=1e-5)
    assert (
        by_autograd.keys()
        == gradients.keys()
        == {name for name, parameter in step.named_parameters() if parameter.requires_grad}
    )
    for name, gradient in gradients.items():
        wanted = step.get_parameter(name).grad
        assert wanted is not None
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(by_autograd[name], wanted, rtol=1e-4, atol=1e-6)


class ByHand(nn.Module):
    """Python control flow, and a weight that it reads by itself, whose mask is held by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.by_hand = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(2)[:, 0, :8])
        if x.shape[0] > 3:
            x = x.relu()
        return F.linear(x, self.by_hand)


@pytest.mark.parametrize("kind", [Pooled, ByHand])
def test_masked_weights_have_no_gradient(kind: Any) -> None:
    model, x, target = exact(kind, "dense"), torch.randn(4, 2, 8, 8), torch.arange(4) % 3
    step = TrainingStep(model, F.cross_entropy, {})
    gradients = run_joint(step, export_step(step, target, (x,)), target, x)[1]
    for name, mask in masks(model).items():
        assert not gradients[f"model.{name}"][~mask].any()
        assert gradients[f"model.{name}"][mask].any()


def test_what_a_device_does_not_do_is_named() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Dropout(0.0), nn.Linear(4, 2))
    notices = step_notices(transform(network, Config(normalization="keep")))
    assert notices == ("normalises by running statistics, which stay as they are: 1", "drops nothing: 2")
    assert step_notices(transform(digits_cnn())) == ()


def test_python_that_depends_on_values_is_refused() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.mean() if float(output.detach().sum()) > 0 else output.sum()

    with pytest.raises(ExportError, match="cannot write its training step"):
        export_step(TrainingStep(exact(digits_cnn, "dense"), loss, {}), torch.arange(2), (torch.randn(2, 1, 8, 8),))
