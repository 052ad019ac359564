"""Tracers: whoever records the operations of a model besides running them, and what they can record of this package.

torch.export, make_fx, AOTAutograd, torch.jit.trace and the transforms of torch.func see operations of torch. What runs
in numpy or in compiled kernels passes them by: they would record memory that nobody filled. So

- in eval mode transformed models run in operations of torch alone while they are traced, and keep nothing;
- in train mode, and under the derivatives of torch.func, they refuse (`refuse_tracers`);
- kernels are operators of torch while they are traced (`fedmef_fx.packing.operators`);
- torch.compile compiles what lies between transformed graphs. These, their backward and hooks run as without it
  (`uncompiled`).

Tensors that merely have no values (`FakeTensorMode`) are no trace: with them is measured what training takes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.nn.parameter import Buffer, Parameter

from fedmef_fx.errors import FedmefError

__all__ = [
    "is_exported",
    "is_traced",
    "refuse_batched",
    "refuse_tracers",
    "uncompiled",
    "weights_as_constants",
]

_NOT_COMPILED: Final = (
    "fedmef_fx: transformed graphs run as they are, between what is compiled, because they keep packed tensors for "
    "their backward; to compile a whole model for inference, freeze first: fedmef_fx.freeze(model)"
)

P = ParamSpec("P")
R = TypeVar("R")

_MODES: Final = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)
_PRE_DISPATCH: Final = torch._C.DispatchKey.PreDispatch
_is_scripted: Final[Callable[[], bool]] = torch._C._is_tracing
_innermost_transform: Final[Callable[[], object]] = torch._C._functorch.peek_interpreter_stack
_count_modes: Final[Callable[[], int]] = torch._C._len_torch_dispatch_stack
_DERIVATIVES: Final = ("Grad", "Jvp")
_PLAIN: Final = (Tensor, Parameter, Buffer)
_REMEDY: Final = "freeze first: fedmef_fx.freeze(model) is a plain module that can be traced and differentiated at will"


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile run a function, and all that it calls, instead of looking into it.

    Autograd calls backward functions and hooks from Python that torch.compile may be compiling: it would look into
    them, too. torch's own decorator, which does not import the compiler before it is needed.
    """
    wrapper: Any = _disable_dynamo(function)
    wrapper._torchdynamo_disable, wrapper._torchdynamo_disable_msg = True, _NOT_COMPILED
    return cast("Callable[P, R]", wrapper)


def is_traced() -> bool:
    """Whether somebody records the operations that run, or gives them another meaning."""
    # First: torch.compile takes it for True, and does not look at the rest.
    if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return True
    # Kernels ask hundreds of times in a step: cheap questions before dear ones.
    if _is_scripted() or _innermost_transform() is not None:
        return True
    if _count_modes() > 0 and any(torch._C._get_dispatch_mode(mode) for mode in _MODES):
        return True
    return torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


def is_exported() -> bool:
    """Whether the record is for where this package may not be installed."""
    if torch.compiler.is_dynamo_compiling():  # of which torch 2.11 says that it exports, always
        return False
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


@contextlib.contextmanager
def weights_as_constants() -> Iterator[None]:
    """A block that torch's older ONNX exporter does not see, so that it takes the weights made there for constants.

    It folds them itself otherwise, and loses one of two that come out equal.
    """
    state = torch._C._get_tracing_state()
    if state is None or not torch.onnx.is_in_onnx_export():
        yield
        return
    core: Any = torch._C  # its stub leaves the setter out
    core._set_tracing_state(None)
    try:
        with torch.no_grad():
            yield
    finally:
        core._set_tracing_state(state)


def refuse_tracers(module: nn.Module, *arguments: object) -> None:
    """Refuse a call of a transformed module that cannot be traced faithfully.

    Args:
        module: The module.
        *arguments: What it is called with.

    Raises:
        FedmefError: It is traced in train mode, or differentiated by torch.func or in forward mode, or got tensors of a
            class with kernels of its own.
    """
    for argument in arguments:
        if isinstance(argument, Tensor) and type(argument) not in _PLAIN:
            _refuse_foreign(module, argument)
    if forward_ad._current_level >= 0:
        raise FedmefError(
            f"{type(module).__name__}: got a derivative in forward mode; expected loss.backward() or "
            f"torch.autograd.grad, as layers keep their inputs in few bits for those alone, or {_REMEDY}"
        )
    if not is_traced():
        return
    derivatives = [str(level.key()) for level in torch._C._functorch.get_interpreter_stack() or ()]
    if any(key.rpartition(".")[2] in _DERIVATIVES for key in derivatives):
        raise FedmefError(
            f"{type(module).__name__}: got a transform of torch.func that takes derivatives; expected loss.backward() "
            f"or torch.autograd.grad, as layers keep their inputs in few bits for those alone, or {_REMEDY}"
        )
    if module.training:
        raise FedmefError(
            f"{type(module).__name__}: got traced in train mode (torch.export, torch.jit.trace, make_fx, torch.func); "
            "expected to train it with loss.backward(), also under torch.compile, as a trace cannot record what layers "
            f"keep in few bits. For inference trace model.eval(), or {_REMEDY}"
        )


def refuse_batched(gradients: tuple[Tensor | None, ...]) -> None:
    """Refuse gradients of many results at once, whose memory is not that of one.

    Raises:
        FedmefError: Autograd was asked for such gradients.
    """
    is_batched = _innermost_transform() is not None
    for gradient in gradients:
        is_batched = is_batched or (gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient))
    if not is_batched:
        return
    raise FedmefError(
        "backward: got a batch of gradients (is_grads_batched=True, vectorize=True or torch.func.vmap around "
        "torch.autograd.grad); expected one at a time, e.g. torch.autograd.functional.jacobian(model, x), or "
        f"{_REMEDY}"
    )


def _refuse_foreign(module: nn.Module, tensor: Any) -> None:
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ or is_traced():
        return
    if isinstance(tensor, torch._subclasses.FakeTensor):
        return
    raise FedmefError(
        f"{type(module).__name__}: got a {type(tensor).__name__}, which has operations of its own; expected a plain "
        f"torch.Tensor, as layers pack the memory of their inputs, or {_REMEDY}"
    )
