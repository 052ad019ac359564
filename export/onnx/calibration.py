"""Calibration data: calls of the model as a user hands them over, checked before anything is exported."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedmef_fx.errors import ConfigError
from fedmef_fx.export.examples import ExampleCall, Examples

__all__ = ["calibration_calls", "check_batch_sizes"]

_REMEDY: Final = "e.g. a DataLoader, or calibration_data=[x for x, label in loader][:50]"


def calibration_calls(
    model: nn.Module, quantize: str | None, data: Iterable[Any] | None, examples: Examples
) -> list[ExampleCall] | None:
    """Read calibration data.

    Args:
        model: For messages.
        quantize: None or "int8".
        data: Anything that yields a tensor, or a tuple or list of the positional arguments, per call; or a
            `DataLoader`, whose batches may have more than the model takes, such as labels behind the inputs, and may
            be dictionaries with the names of its arguments.
        examples: Every call has to be like these, up to the batch size.

    Returns:
        The calls, with the keyword arguments of the examples; None where nothing is quantized.

    Raises:
        ConfigError: Data without quantization or the other way round, none at all, or of another type or shape.
    """
    if quantize is None:
        if data is not None:
            raise ConfigError("export_onnx: got calibration_data without quantize; expected quantize='int8' with it")
        return None
    name = type(model).__name__
    if data is None:
        raise ConfigError(
            f"export_onnx: quantize={quantize!r} needs inputs like those that {name} will see; expected {_REMEDY}"
        )
    if isinstance(data, Mapping | str | bytes) or not isinstance(data, Iterable):
        raise ConfigError(f"export_onnx: calibration_data is a {type(data).__name__}; expected calls, {_REMEDY}")
    # One tensor is one call, not a row of calls with one sample each.
    rows = [data] if isinstance(data, Tensor) else list(data)
    if not rows:
        raise ConfigError(f"export_onnx: calibration_data is empty; expected at least one call, {_REMEDY}")
    if isinstance(data, tuple) and len(rows) == len(examples.call.args) > 1 and _fits(rows, examples):
        rows = [data]  # the arguments of one call, as example_inputs has them
    if isinstance(data, DataLoader):
        rows = [_inputs_of(row, examples) for row in rows]
    return [_call(index, row, examples) for index, row in enumerate(rows)]


def _inputs_of(batch: Any, examples: Examples) -> Any:
    """What the model takes of a batch of a `DataLoader`; the batch itself where that is not clear."""
    count = len(examples.call.args)
    if isinstance(batch, Mapping):
        names = list(examples.signature.parameters)[:count]
        keywords = {name: batch.get(name, value) for name, value in examples.call.kwargs.items()}
        return ExampleCall(tuple(batch[name] for name in names), keywords) if batch.keys() >= set(names) else batch
    return tuple(batch[:count]) if isinstance(batch, tuple | list) and len(batch) > count else batch


def check_batch_sizes(calls: Sequence[ExampleCall], examples: Examples, *, is_dynamic: bool) -> None:
    """Find out whether calls have the batch size of a file that fixes it.

    Raises:
        ConfigError: They have not.
    """
    if is_dynamic and examples.batch_size is not None:
        return
    expected = [tuple(tensor.shape) for tensor in examples.call.tensors()]
    for index, call in enumerate(calls):
        got = [tuple(tensor.shape) for tensor in call.tensors()]
        if got != expected:
            raise ConfigError(
                f"export_onnx: calibration_data[{index}] has sizes {got}; the file has fixed sizes {expected}, so "
                "expected these: split the data into such batches, or export with dynamic_batch=True"
            )


def _fits(arguments: Sequence[Any], examples: Examples) -> bool:
    expected = examples.call.args
    return all(
        isinstance(one, Tensor) and isinstance(example, Tensor) and one.shape[1:] == example.shape[1:]
        for one, example in zip(arguments, expected, strict=True)
    )


def _call(index: int, row: Any, examples: Examples) -> ExampleCall:
    where = f"export_onnx: calibration_data[{index}]"
    if isinstance(row, ExampleCall):
        arguments, kwargs = row.args, row.kwargs
    elif isinstance(row, Tensor | tuple | list):
        arguments, kwargs = (row,) if isinstance(row, Tensor) else tuple(row), examples.call.kwargs
    else:
        raise ConfigError(
            f"{where} is a {type(row).__name__}; expected a tensor, or a tuple of the arguments of a call"
        )
    call = ExampleCall(arguments, kwargs)
    got, expected = call.tensors(), examples.call.tensors()
    if len(arguments) != len(examples.call.args) or len(got) != len(expected):
        raise ConfigError(
            f"{where} has {len(arguments)} arguments with {len(got)} tensors; expected {len(examples.call.args)} with "
            f"{len(expected)}, as example_inputs and example_kwargs have. Leave labels out: {_REMEDY}"
        )
    for position, (one, example) in enumerate(zip(got, expected, strict=True)):
        if one.dtype != example.dtype or one.dim() != example.dim() or _sizes(one, example, examples):
            batched = ["batch" if examples.is_batched(example) else "", *map(str, example.shape)]
            shape = ", ".join(([batched[0]] if batched[0] else batched[1:2]) + batched[2:])
            raise ConfigError(
                f"{where}: input {position} is {one.dtype}{list(one.shape)}; expected {example.dtype}[{shape}], like "
                "the example input"
            )
        if one.numel() == 0 or (one.is_floating_point() and not bool(one.isfinite().all())):
            raise ConfigError(f"{where}: input {position} is empty, or has values that are NaN or infinite")
    return call


def _sizes(one: Tensor, example: Tensor, examples: Examples) -> bool:
    """Whether sizes differ, the batch size aside."""
    first = 1 if examples.is_batched(example) else 0
    return one.shape[first:] != example.shape[first:]
