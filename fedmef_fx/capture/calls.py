"""How a model really calls its modules: recorded while the original runs on example inputs, in both modes."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fedmef_fx.capture.state import fixed_seed, restored
from fedmef_fx.graph.operators import Layer, operator_of
from fedmef_fx.graph.signature import Call, Signature

__all__ = ["Recording", "record_calls"]

_CALLS_PER_MODULE: Final = 6


@dataclasses.dataclass
class Recording:
    """What happened in the recorded calls.

    Attributes:
        calls: Mode (True is train) -> module -> its calls of different shape, in order.
        products: Identities of the parameters that some product read.
    """

    calls: dict[bool, dict[nn.Module, list[Call]]] = dataclasses.field(default_factory=lambda: {True: {}, False: {}})
    products: set[int] = dataclasses.field(default_factory=set)


def record_calls(model: nn.Module, call: Call, *, modes: tuple[bool, ...]) -> Recording:
    """Run a model and record the calls of its modules. Nothing changes.

    Args:
        model: The model.
        call: The call of the model itself; it succeeds in the modes.
        modes: Which modes: True is train.
    """
    recording = Recording()
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    for training in modes:
        model.train(training)
        hooks = _recording(model, recording.calls[training])
        products = _Products(parameters, recording.products)
        with restored(model), fixed_seed(), torch.no_grad(), hooks, products, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # checkpointing misses the gradients that a recording does without
            _copy(call).on(model.forward, model)
    return recording


@contextlib.contextmanager
def _recording(model: nn.Module, calls: dict[nn.Module, list[Call]]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(_recorder(calls), with_kwargs=True)
        for module in model.modules()
        if any(parameter.dim() > 1 for parameter in module.parameters())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(calls: dict[nn.Module, list[Call]]) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call.of(module, args, kwargs)
        earlier = calls.setdefault(module, [])
        if call is None or len(earlier) >= _CALLS_PER_MODULE:
            return
        if not any(Signature.of(other, exact=True).accepts(call) for other in earlier):
            earlier.append(_copy(call))

    return record


def _copy(call: Call) -> Call:
    return call.replace_tensors(lambda tensor: tensor.detach().clone())


class _Products(TorchFunctionMode):
    """Notes which parameters products read, directly or through views."""

    def __init__(self, parameters: dict[int, nn.Parameter], found: set[int]) -> None:
        super().__init__()
        self._parameters = parameters
        self._found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        row = operator_of(func)
        if row is not None and row.weights:
            weights = args[1:2] if isinstance(row, Layer) and len(args) > 1 else (args, kwargs)
            for leaf in pytree.tree_leaves(weights):
                if isinstance(leaf, Tensor):
                    self._found |= {id(t) for t in (leaf, leaf._base) if t is not None and id(t) in self._parameters}
        return func(*args, **(kwargs or {}))
