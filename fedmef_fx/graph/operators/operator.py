"""Operators: what is known of torch's functions, methods and modules, one row each.

Passes, exporters, inspection, capture and training name no operators of their own: they read rows. A rule that needs
code stands on the row, or above this room by the kind that the row names, once for all operators of that kind.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Literal, Self, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedmef_fx.errors import FedmefError
from fedmef_fx.ops.named import NAMED, NamedFunction

__all__ = ["Operator", "PlainCall", "named", "operator_of", "overrides", "register", "rows", "writes"]

PlainCall: TypeAlias = tuple[Callable[..., Any] | str, tuple[Any, ...], dict[str, Any]]
"""A function, or the target of a module, with its arguments."""

Keeps = Literal["nothing", "inputs", "output", "both"]
Plumbing = Literal["", "fact", "part"]
Compression = Literal["", "input", "result", "norm", "batch_norm", "product", "attention"]

# In the order in which the first one is an operator's plain form.
_TORCH: Final = (F, torch, Tensor)
_PYTHON: Final = frozenset(dir(operator))
_WRITING: Final = frozenset(name for name in _PYTHON if name[0] == "i" and _PYTHON & {name[1:], f"{name[1:]}_"})
"""Names of Python's operators that write into their first argument."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operator:
    """One operator, under all its names.

    Attributes:
        name: What torch calls it, and nodes that keep 8 bits for it.
        functions: Its functions, first the one that stands for it in plain graphs.
        methods: Its methods of tensors.
        modules: Its modules; subclasses that do not override their forward count as well.
        options: Attributes of the modules that are arguments of the function, and tensors that they hold.
        signature: Names of the function's arguments, where Python cannot read them.
        kind: What it does to channels: the name of a rule of `compact`. "unknown" assumes nothing.
        keeps: What autograd keeps of its tensors. "both" where that is not known, which costs memory and never
            correctness.
        is_view: Whether its result shares the storage of its first argument, or may.
        carries_gradient: Whether gradients pass through it.
        is_sized_by_data: Whether the size of its result follows from what its tensors contain.
        weights: Which arguments, or parameters of the modules, it multiplies with something; "*" stands for any.
        has_rows: Whether the weights of its modules have a row for each output, `[out, in, ...]`.
        has_other_parameters: Whether its modules hold parameters that are no weights, whatever their shape.
        is_composite: Whether its modules compute with tensor functions only, so that tracers may look inside.
        is_homogeneous: Whether a positive factor may stand before it as well as behind it: f(c x) = c f(x).
        is_nonlinearity: Whether the gain of its function scales the kernel before it.
        in_8_bits: What `compress-saved` keeps of it in 8 bits, the name of a rule; "" for nothing.
        derivative: From the gradient of the result and the kept input or result, and the options, to the gradient of
            the input. Torch works it out where this is None and the input is kept.
        small: From its options by name to the op that takes its place in `shrink-saved` and keeps less; None where
            none does.
        plain: For an op of this package: the call that stands for its node in plain graphs.
        sizes: Attributes of the modules that say a size: name, tensor, dimension.
        plumbing: What pictures leave out of it: a "fact" says something about a tensor and is none, a "part" is its
            tensor for whoever reads the graph; "" where it is drawn.
    """

    name: str
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    options: tuple[str, ...] = ()
    signature: tuple[str, ...] = ("input",)
    kind: str = "unknown"
    keeps: Keeps = "both"
    is_view: bool = False
    carries_gradient: bool = True
    is_sized_by_data: bool = False
    weights: tuple[str, ...] = ()
    has_rows: bool = False
    has_other_parameters: bool = False
    is_composite: bool = False
    is_homogeneous: bool = False
    is_nonlinearity: bool = False
    in_8_bits: Compression = ""
    derivative: Callable[..., Tensor] | None = None
    small: Callable[[Mapping[str, Any]], partial[Any] | None] | None = None
    plain: Callable[[fx.Node], PlainCall] | None = None
    sizes: tuple[tuple[str, str, int], ...] = ()
    plumbing: Plumbing = ""

    @classmethod
    def of_torch(
        cls,
        name: str,
        *aliases: str,
        spaces: tuple[Any, ...] = _TORCH,
        functions: tuple[Callable[..., Any], ...] = (),
        **facts: Any,
    ) -> Self:
        """A row with all functions and methods that torch has under a name, those in place as well.

        Args:
            name: The name.
            *aliases: Its other names.
            spaces: Where to look: modules, and `torch.Tensor` for methods.
            functions: Further functions; the first is the plain form.
            **facts: The rest of the row.
        """
        calls: dict[Callable[..., Any], None] = dict.fromkeys(functions)
        methods: dict[str, None] = {}
        for space in spaces:
            for alias in (name, *aliases):
                for variant in (alias, f"i{alias}" if space is operator else f"{alias}_"):
                    call = getattr(space, variant, None)
                    if callable(call) and not isinstance(call, type):
                        calls[call] = None
                        methods |= {variant: None} if space is Tensor else {}
        return cls(name=name, functions=tuple(calls), methods=tuple(methods), **facts)

    @property
    def function(self) -> Callable[..., Any]:
        """The function that stands for it in plain graphs."""
        return self.functions[0]


_ROWS: Final[dict[Any, Operator]] = {}
_NAMES: Final[dict[str, Operator]] = {}


def register(*operators: Operator) -> None:
    """Make operators known under all their names.

    Raises:
        FedmefError: A name that has a row already.
    """
    for row in operators:
        targets = (*row.functions, *row.methods, *row.modules)
        taken = [target for target in targets if target in _ROWS]
        if taken or row.name in _NAMES:
            raise FedmefError(
                f"operators: {row.name!r} is to be registered, but {taken or [row.name]} has a row already; expected "
                "one row for each function, method and module"
            )
        _NAMES[row.name] = row
        _ROWS.update(dict.fromkeys(targets, row))
        if row.in_8_bits:
            NAMED[row.name] = NamedFunction(row.function, row.derivative)


def rows() -> Iterator[Operator]:
    """Every row."""
    return iter(_NAMES.values())


def named(name: str) -> Operator:
    """The row with a name."""
    return _NAMES[name]


def operator_of(target: Any) -> Operator | None:
    """The row of a function, of a method by its name, or of a class of modules; None for what has none."""
    try:
        row = _ROWS.get(target)
    except TypeError:  # a target that cannot be hashed
        return None
    if row is None and isinstance(target, type):
        base = next((base for base in target.__mro__ if base in _ROWS), None)
        return None if base is None else _ROWS[base]
    return row


def writes(target: Any) -> bool:
    """Whether a function or method writes into its first argument by its name."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name in _WRITING:
        return target is getattr(operator, name)
    return name.endswith("_") and not name.endswith("__")


def overrides(cls: type) -> bool:
    """Whether a class of modules computes something else than the class whose row it has."""
    bases = cls.__mro__
    above = bases[: next(place for place, base in enumerate(bases) if base in _ROWS)]
    return any(name in vars(base) for base in above for name in ("forward", "_conv_forward"))
