"""Whether the number of parts that a tensor falls into is the same for calls of every shape.

`x.unbind(1)`, `x.split(16)` and `[0] * x.shape[0]` give Python as many parts as the sizes of the example say, and the
graph holds that many. Of `qkv.unbind(2)`, whose three parts a layer makes, that is right for every call; of the steps
of a sequence it is not, and the graph then serves calls of the example's shapes only. Which of the two it is, a run of
the graph with unknown sizes tells.
"""

import operator
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

__all__ = ["counts_depend_on_shapes", "has_counted_parts"]

# The place of the dimension among the arguments, tensor included.
_DIMENSION: Final = {"unbind": 1, "split": 2, "chunk": 2, "tensor_split": 2, "unsafe_split": 2, "unsafe_chunk": 2}
_OF_ONE_DIMENSION: Final = {"vsplit": 0, "hsplit": 1, "dsplit": 2}
_REPEATS: Final = (operator.mul, operator.imul)


def has_counted_parts(kind: str, target: Any, result: object) -> bool:
    """Whether an operation makes a number of parts that sizes may decide."""
    if not isinstance(result, tuple | list | str):
        return False
    name = target if kind == "call_method" else getattr(target, "__name__", "")
    return target in _REPEATS or name in _DIMENSION or name in _OF_ONE_DIMENSION


def counts_depend_on_shapes(module: nn.Module, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a call of other shapes may take a tensor apart into another number of parts.

    Args:
        module: The module of the graph.
        graph: Traced with an example.
        tensors: Of the example, by the names of placeholders.

    Returns:
        True also where the graph cannot be run with unknown sizes.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False, duck_shape=False), allow_non_fake_inputs=True)
    try:
        unknown = {
            name: mode.from_tensor(tensor, symbolic_context=_unknown(tensor)) for name, tensor in tensors.items()
        }
        with mode, torch.no_grad():
            watcher = _Watcher(module, graph)
            watcher.run(*(unknown[str(node.target)] for node in graph.find_nodes(op="placeholder")))
    except Exception:
        return True
    return watcher.found


def _unknown(tensor: Tensor) -> StatelessSymbolicContext[Any, Any]:
    return StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim())


class _Watcher(fx.Interpreter):
    """Runs a graph and looks at what is taken apart.

    Attributes:
        found: Whether an unknown size decided on a number of parts.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)  # of a module it takes the state alone
        self.found = False

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function."""
        self._look("call_function", target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method."""
        self._look("call_method", target, args, kwargs)
        return super().call_method(target, args, kwargs)

    def _look(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if target in _REPEATS:
            self.found |= any(isinstance(x, list | tuple | str) for x in args) and any(map(_is_unknown, args))
            return
        name = target if kind == "call_method" else getattr(target, "__name__", "")
        if not (name in _DIMENSION or name in _OF_ONE_DIMENSION) or not args or not isinstance(args[0], Tensor):
            return
        place = _DIMENSION.get(name, len(args))
        dim = args[place] if place < len(args) else kwargs.get("dim", _OF_ONE_DIMENSION.get(name, 0))
        pieces = args[1] if name != "unbind" and len(args) > 1 else None
        # A list of sizes says itself how many there are.
        self.found |= not isinstance(pieces, list | tuple) and _is_unknown(args[0].shape[min(dim, args[0].dim() - 1)])


def _is_unknown(size: object) -> bool:
    # Where an example has a single sample, operations that broadcast take its size for the number 1.
    return not size.node.expr.is_number if isinstance(size, torch.SymInt) else type(size) is int and size == 1
