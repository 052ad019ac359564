"""Tracers see a transformed model compute what it computes, or say what to do; they never see memory nobody filled."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_module, nop
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from fedmef_fx import Config, freeze, set_masks, transform
from fedmef_fx.errors import FedmefError
from fedmef_fx.sparse_model.masks import masks

# What the tracers of torch warn of is no concern of this package.
pytestmark = pytest.mark.filterwarnings("ignore")

# Packed kernels are standardised in another order while they are traced: rounding of float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    """Normalised kernels, 1 bit and 8 bit activations, pooling, a residual sum; two equal initial gains."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mid = nn.Conv2d(8, 8, 1)
        self.mid_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.attention = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.gelu(self.depthwise(F.relu6(self.mid_norm(self.mid(x)))))
        x = F.avg_pool2d(F.max_pool2d(x, 2), 2).mean((-2, -1))
        return self.head(self.drop(x * torch.sigmoid(self.attention(x))))


class Branching(nn.Module):
    """Several regions, and an LSTM whose weights are masked by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.first = nn.Linear(8, 16)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.first(x).relu()
        if x.shape[1] > 1:
            x = self.lstm(x)[0]
        return self.head(x.mean(1))


def sparse_model(kind: type[nn.Module] = Net, storage: Any = "dense") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = transform(kind(), Config(density=0.3, activation_sparsity=0.5, weight_storage=storage), example_inputs=(x,))
    model(x)  # running statistics other than the initial ones
    return model.eval(), x


def _saved_and_loaded(model: nn.Module, x: Tensor) -> Any:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    return torch.export.load(file).module()


def _scripted_and_loaded(model: nn.Module, x: Tensor) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), file)
    file.seek(0)
    return torch.jit.load(file)


def _with_any_batch(model: nn.Module, x: Tensor) -> Any:
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    return lambda given: exported(torch.cat([given, given]))[: len(given)]


def _of_parameters(model: nn.Module, x: Tensor) -> Any:
    parameters = dict(model.named_parameters())
    traced = make_fx(lambda given, x: functional_call(model, given, (x,)))(parameters, x)
    return lambda x: traced(parameters, x)


TRACERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "export with any batch": _with_any_batch,
    "export, saved": _saved_and_loaded,
    "export, decomposed": lambda model, x: torch.export.export(model, (x,)).run_decompositions().module(),
    "draft_export": lambda model, x: torch.export.draft_export(model, (x,)).module(),
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,)),
    "jit.trace, saved": _scripted_and_loaded,
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, symbolic": lambda model, x: make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x),
    "make_fx, pre-dispatch": lambda model, x: make_fx(model, pre_dispatch=True)(x),
    "make_fx of parameters": _of_parameters,
    "AOTAutograd": lambda model, x: aot_module(model, nop),
    "torch.func.functionalize": lambda model, x: torch.func.functionalize(model),
    "torch.func.vmap": lambda model, x: lambda x: torch.func.vmap(model)(x[:, None])[:, 0],
    "functional_call": lambda model, x: lambda x: functional_call(model, dict(model.named_parameters()), (x,)),
    "a counter of operations": lambda model, x: _counted(model),
    "saved tensor hooks": lambda model, x: _hooked(model),
}
CASES = [
    *((tracer, "packed") for tracer in TRACERS),
    *((tracer, "dense") for tracer in ("export", "jit.trace", "make_fx")),
]
IN_EVERY_MODE = ("functional_call", "a counter of operations", "saved tensor hooks")


def _counted(model: nn.Module) -> Any:
    def call(x: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            result: Tensor = model(x)
        assert counter.get_total_flops() > 0
        return result

    return call


def _hooked(model: nn.Module) -> Any:
    def call(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            result: Tensor = model(x)
        result.sum().backward(retain_graph=True)
        return result

    return call


@pytest.mark.parametrize(("tracer", "storage"), CASES)
def test_in_eval_mode_a_trace_computes_what_the_model_computes(tracer: str, storage: str):
    model, x = sparse_model(storage=storage)
    traced = TRACERS[tracer](copy.deepcopy(model), x)
    unseen = torch.randn_like(x)
    torch.testing.assert_close(traced(unseen), model(unseen), **CLOSE)


@pytest.mark.parametrize("tracer", [name for name in TRACERS if name not in IN_EVERY_MODE])
def test_in_train_mode_a_trace_is_refused_with_the_remedy(tracer: str):
    model, x = sparse_model()
    with pytest.raises(FedmefError, match=r"freeze first: fedmef_fx\.freeze\(model\)"):
        TRACERS[tracer](model.train(), x)(x)


@pytest.mark.parametrize("tracer", ["export", "jit.trace", "AOTAutograd"])
def test_models_of_several_regions_are_traced_likewise(tracer: str):
    model, x = sparse_model(Branching)
    traced = TRACERS[tracer](copy.deepcopy(model), x)
    torch.testing.assert_close(traced(x), model(x), **CLOSE)
    with pytest.raises(FedmefError, match="freeze first"):
        TRACERS[tracer](model.train(), x)(x)


def test_a_trace_of_changed_masks_has_them():
    model, x = sparse_model()
    set_masks(model, {name: mask.roll(1, 0) for name, mask in masks(model).items()})
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), **CLOSE)


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_files_of_torch_compute_what_the_model_computes(dynamo: bool, storage: str):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = sparse_model(storage=storage)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x), **CLOSE)


def _forward_mode(model: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return model(forward_ad.make_dual(x, x))


def _batched_gradients(model: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    out = model(x)
    return torch.func.vmap(lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True))(torch.randn(3, 4, 4))


DERIVATIVES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
    "grad of parameters": lambda model, x: torch.func.grad(lambda p: functional_call(model, p, (x,)).sum())(
        dict(model.named_parameters())
    ),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x),
    "grad for each sample": lambda model, x: torch.func.vmap(torch.func.grad(lambda x: model(x[None]).sum()))(x),
    "forward mode": _forward_mode,
    "a vectorised jacobian": lambda model, x: torch.autograd.functional.jacobian(model, x, vectorize=True),
    "batched gradients": _batched_gradients,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_derivatives_that_are_no_backward_are_refused(kind: str, training: bool):
    model, x = sparse_model()
    with pytest.raises(FedmefError, match="freeze first"):
        DERIVATIVES[kind](model.train(training), x)
    frozen = freeze(model)
    DERIVATIVES[kind](frozen, x)  # the remedy works


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_torch_fx_shows_layers_that_have_the_masks(storage: str):
    model, x = sparse_model(storage=storage)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), **CLOSE)


def test_tensors_with_operations_of_their_own_are_refused():
    model, x = sparse_model()
    with pytest.raises(FedmefError, match=r"TwoTensor.*freeze first"):
        model(TwoTensor(x, x))

    class Tagged(Tensor):
        """No operations of its own: plain memory."""

    assert torch.equal(model(x.as_subclass(Tagged)).as_subclass(Tensor), model(x))


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("training", [False, True])
def test_fake_tensors_show_the_shapes_that_a_real_step_has(training: bool, storage: str):
    model, x = sparse_model(storage=storage)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model.train(training)(mode.from_tensor(x)).shape == (4, 4)
    assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == (4, 4)
    assert torch.isfinite(model(x)).all()
