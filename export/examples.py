"""Example inputs of a model: which dimension is the batch, and random inputs of other batch sizes like them."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedmef_fx.errors import ConfigError
from fedmef_fx.export.results import EVERYTHING, Wanted
from fedmef_fx.export.sizes import Sizes, VaryingSize, read_sizes

__all__ = ["ExampleCall", "Examples", "evaluating", "read_examples", "result_of", "run"]


@dataclasses.dataclass(frozen=True, slots=True)
class ExampleCall:
    """Arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, in the order in which they become inputs of a graph."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


@dataclasses.dataclass(frozen=True, slots=True)
class Examples:
    """Example arguments, keyword arguments in the order of the signature.

    Attributes:
        call: The arguments as given.
        signature: Of the model's forward.
        batch_size: Size of dimension 0 of the first tensor; None where it has no dimensions.
        sizes: Further sizes that vary, by argument and dimension.
        wanted: Which of the model's results count.
    """

    call: ExampleCall
    signature: inspect.Signature
    batch_size: int | None
    sizes: Sizes = dataclasses.field(default_factory=dict)
    wanted: Wanted = EVERYTHING

    def is_batched(self, tensor: Tensor) -> bool:
        """Whether dimension 0 of an example is the batch: it has the size of the first tensor's."""
        return tensor.dim() > 0 and tensor.shape[0] == self.batch_size

    def random(
        self, batch_size: int | None, *, generator: torch.Generator, longer: int = 0, traced: bool = False
    ) -> ExampleCall:
        """Random arguments like the examples: same mean and deviation, integers within the same range.

        Args:
            batch_size: Size of the batch; None for the examples' own.
            generator: On the CPU.
            longer: Added to every other size that varies, in what it is a multiple of.
            traced: Whether the call is for tracing, which takes a size that is small for a constant.

        Returns:
            Arguments that share no tensor with each other or with the examples.
        """
        varying = {id(self.arguments()[name]): dims for name, dims in self.sizes.items()}

        def one(example: Tensor) -> Tensor:
            shape = list(example.shape)
            if batch_size is not None and self.is_batched(example):
                shape[0] = batch_size
            for dim, size in varying.get(id(example), {}).items():
                shape[dim] = size.grown(shape[dim], longer, size.traced if traced else 0)
            return _random_like(example, tuple(shape), generator)

        return ExampleCall(*pytree.tree_map_only(Tensor, one, (self.call.args, self.call.kwargs)))

    def dynamic_shapes(self) -> dict[str, Any]:
        """What `torch.export` is told about sizes: dimension 0 of batched inputs varies, the rest does not."""
        batch = torch.export.Dim("batch")
        roots = {size.name: size for dims in self.sizes.values() for size in dims.values()}
        named = {name: torch.export.Dim(name, min=size.least, max=size.most) for name, size in roots.items()}
        shapes: dict[str, Any] = pytree.tree_map(
            lambda leaf: {0: batch} if isinstance(leaf, Tensor) and self.is_batched(leaf) else None, self.arguments()
        )
        for argument, dims in self.sizes.items():
            shapes[argument] = {
                **(shapes[argument] or {}),
                **{dim: _multiple(named[size.name], size) for dim, size in dims.items()},
            }
        return shapes

    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(self.signature.bind(*self.call.args, **self.call.kwargs).arguments)


def _multiple(root: Any, size: VaryingSize) -> Any:
    return root if size.multiple == 1 else size.multiple * root


def _random_like(example: Tensor, shape: tuple[Any, ...], generator: torch.Generator) -> Tensor:
    values = example.detach().cpu()
    if values.numel() == 0:
        result = torch.empty(shape)
    elif values.dtype == torch.bool:
        result = torch.rand(shape, generator=generator) < float(values.double().mean())
    elif values.dtype.is_floating_point:
        deviation = float(values.double().std(correction=0))
        # An example that is constant, such as torch.zeros, tells nothing about the scale.
        result = torch.randn(shape, generator=generator) * (deviation or 1.0) + float(values.double().mean())
    elif values.dtype.is_complex:
        result = torch.randn(shape, generator=generator, dtype=torch.complex64)
    else:
        result = torch.randint(int(values.min()), int(values.max()) + 1, shape, generator=generator)
    return result.to(example.device, example.dtype)


def read_examples(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    sizes: Mapping[str, Mapping[int, str]] | None = None,
    *,
    wanted: Wanted = EVERYTHING,
    where: str = "export_onnx",
) -> Examples:
    """Check example arguments against a model's signature; errors name the call `where`.

    Args:
        model: The model.
        inputs: Positional arguments of a call.
        kwargs: Its keyword arguments.
        sizes: Sizes that vary besides the batch, by argument and dimension: "length", or "32*height" for multiples.
        wanted: Which of the model's results count.
        where: Name of the call, for errors.

    Raises:
        ConfigError: Not a tuple or list, no tensor in it, arguments that do not fit the signature, or sizes that do not
            fit the arguments.
    """
    if not isinstance(inputs, tuple | list):
        raise ConfigError(
            f"{where}: example_inputs is a {type(inputs).__name__}; expected a tuple of arguments, e.g. "
            "example_inputs=(x,)"
        )
    signature, named = inspect.signature(model.forward), dict(kwargs or {})
    try:
        signature.bind(*inputs, **named)
    except TypeError as error:
        raise ConfigError(
            f"{where}: the example inputs do not fit {type(model).__name__}.forward{signature}: got {len(inputs)} "
            f"positional and {sorted(named)} keyword arguments: {error}"
        ) from error
    order = {name: index for index, name in enumerate(signature.parameters)}
    call = ExampleCall(tuple(inputs), dict(sorted(named.items(), key=lambda item: order.get(item[0], len(order)))))
    tensors = call.tensors()
    if not tensors:
        raise ConfigError(f"{where}: got no tensor among the example inputs; expected e.g. example_inputs=(x,)")
    examples = Examples(call, signature, tensors[0].shape[0] if tensors[0].dim() else None, wanted=wanted)
    return dataclasses.replace(examples, sizes=_checked_sizes(examples, sizes or {}))


def _checked_sizes(examples: Examples, texts: Mapping[str, Mapping[int, str]]) -> Sizes:
    arguments, sizes = examples.arguments(), {}
    for argument, dims in read_sizes(texts).items():
        value = arguments.get(argument)
        if not isinstance(value, Tensor):
            tensors = [name for name, one in arguments.items() if isinstance(one, Tensor)]
            raise ConfigError(
                f"export_onnx: dynamic_sizes names {argument!r}, which is no tensor argument; expected one of "
                f"{', '.join(map(repr, tensors))}"
            )
        first = 1 if examples.is_batched(value) else 0
        sizes[argument] = {
            dim: _checked_size(argument, dim, size, value, allowed=range(first, value.dim()), text=texts[argument][dim])
            for dim, size in dims.items()
        }
    return sizes


def _checked_size(
    argument: str, dim: int, size: VaryingSize | None, value: Tensor, *, allowed: range, text: object
) -> VaryingSize:
    if type(dim) is not int or dim not in allowed or size is None:
        raise ConfigError(
            f"export_onnx: dynamic_sizes[{argument!r}] holds {dim!r}: {text!r}; expected a dimension in "
            f"{list(allowed)} and a name other than 'batch', e.g. {{{argument!r}: {{1: 'length'}}}}, or '32*height' "
            "for a size that is a multiple of 32"
        )
    if value.shape[dim] % size.multiple or not value.shape[dim]:
        raise ConfigError(
            f"export_onnx: dynamic_sizes[{argument!r}] holds {dim!r}: {text!r}, and the example has size "
            f"{value.shape[dim]} there; expected a multiple of {size.multiple}"
        )
    if value.shape[dim] < 2:
        raise ConfigError(
            f"export_onnx: dimension {dim} of {argument!r} has size {value.shape[dim]} in the example; "
            "expected at least 2 of a size that varies, as 0 and 1 are taken for constants"
        )
    return size


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model is in eval mode; afterwards each module has the mode that it had before."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def run(model: nn.Module, call: ExampleCall, wanted: Wanted = EVERYTHING) -> list[Tensor]:
    """The tensors that a model returns in eval mode, in order; it may write into its inputs, not into the call's."""
    return wanted.tensors(result_of(model, call))


def result_of(model: nn.Module, call: ExampleCall) -> Any:
    """What a model returns in eval mode; see `run`."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (call.args, call.kwargs))
    with evaluating(model), torch.no_grad():
        return model(*args, **kwargs)
