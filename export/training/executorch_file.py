"""`export_executorch`: a file with which a phone or board trains the sparse model, checked against torch.

The file holds one method, `forward(target, *inputs)`: ExecuTorch's training module runs it, hands out the gradients by
the names of the parameters, and its optimizers step. Masks and NSConv are part of the graph. Nothing is left of the
code of activations: ExecuTorch plans the memory of a step ahead, and keeps dense what waits for the backward.
"""

import copy
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.export.examples import ExampleCall, Examples, read_examples
from fedmef_fx.export.training.joint_graph import ExportedStep, LossFunction, TrainingStep, export_step, step_notices
from fedmef_fx.export.training.report import DeviceCheck, TrainingExportReport
from fedmef_fx.files.atomic import check_target, replacing
from fedmef_fx.sparse_model.masks import masks
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["export_executorch"]

_PREFIX: Final = "model."  # of the names of parameters in a training step
_LOSS: Final = 1e-3
"""Of a loss, relative: sums in another order."""
_GRADIENTS: Final = 3e-2
"""Of the gradients of the median step, relative: what a ReLU gets may be 0 up to rounding, and fall on either side."""


def export_executorch(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Sequence[Any],
    example_target: Tensor,
    example_kwargs: Mapping[str, Any] | None = None,
    loss_fn: LossFunction = F.cross_entropy,
    check_steps: int = 20,
    learning_rate: float = 1e-3,
) -> TrainingExportReport:
    """Write the training step of a transformed model for ExecuTorch, and check that it trains as torch does.

    Parameters have the names that the model gives them, after `model.`; those with packed weights stay packed, so that
    file, gradients and optimizer hold active weights only. The sizes of all tensors are those of the examples.

    Args:
        model: A transformed model in float32; it does not change. The step is that of eval mode: nothing is dropped,
            and a BatchNorm that was left uses its running statistics; the report names such layers.
        path: The file to write, whole or not at all; the usual ending is `.pte`.
        example_inputs: Positional arguments of one call, as a tuple, of the batch size that the device trains with.
        example_target: What the loss compares with, of the same batch size.
        example_kwargs: Keyword arguments of the call; they become constants of the file.
        loss_fn: Of the model's result and the target: the mean loss of the batch, a scalar.
        check_steps: Steps of gradient descent in ExecuTorch's runtime beside the same steps in torch, on random batches
            like the examples; 0 for none.
        learning_rate: Of these steps.

    Returns:
        Sizes, planned memory and the comparison.

    Raises:
        ConfigError: The model is not transformed, not in float32, or the examples do not fit.
        ExportError: ExecuTorch is not installed, an operator is missing in it, the path cannot be written, or the
            file trains differently.
    """
    where = "export_executorch"
    if not is_transformed(model):
        raise ConfigError(
            f"{where}: {type(model).__name__} is not transformed; expected the result of fedmef_fx.transform(model)"
        )
    _check_numbers(model, check_steps, learning_rate)
    destination = check_target(path, error=lambda message: ExportError(f"{where}: {message}"))
    examples = read_examples(model, example_inputs, example_kwargs, where=where)
    if not isinstance(example_target, Tensor) or not examples.is_batched(example_target):
        got = list(example_target.shape) if isinstance(example_target, Tensor) else type(example_target).__name__
        raise ConfigError(f"{where}: got example_target {got}; expected a tensor of {examples.batch_size} samples")
    runtime = _runtime()
    step = TrainingStep(copy.deepcopy(model).eval(), loss_fn, examples.call.kwargs)
    exported = export_step(step, example_target, examples.call.args)
    program = _lowered(exported.joint, runtime)
    check = None
    with replacing(destination, error=lambda message: ExportError(f"{where}: {message}")) as temporary:
        temporary.write_bytes(program.buffer)
        if check_steps:
            batches = _batches(examples, example_target, check_steps)
            check = _check(runtime, temporary.read_bytes(), step, exported, batches, learning_rate)
    return TrainingExportReport(
        path=destination,
        bytes=destination.stat().st_size,
        planned_bytes=sum(program.executorch_program.execution_plan[0].non_const_buffer_sizes),
        parameters=sum(parameter.requires_grad for parameter in step.parameters()),
        batch_size=int(example_target.shape[0]),
        check=check,
        notices=step_notices(step.model),
    )


def _check_numbers(model: nn.Module, steps: int, rate: float) -> None:
    others = sorted({str(p.dtype) for p in model.parameters() if p.dtype != torch.float32})
    if others:
        raise ConfigError(f"export_executorch: got parameters of {', '.join(others)}; expected float32: model.float()")
    if steps < 0 or not rate > 0:
        raise ConfigError(
            f"export_executorch: got check_steps={steps}, learning_rate={rate}; expected steps of 0 or more and a rate "
            "above 0"
        )


class _Runtime:
    """The parts of ExecuTorch that are used."""

    def __init__(self) -> None:
        from executorch import exir  # noqa: PLC0415 -- an extra
        from executorch.extension import training  # noqa: PLC0415

        self.exir: Any = exir
        self.training: Any = training


def _runtime() -> _Runtime:
    try:
        return _Runtime()
    except ImportError as error:
        raise ExportError(
            f"export_executorch: ExecuTorch cannot be imported: {error}; install it: pip install "
            "'fedmef-fx[executorch]'"
        ) from error


def _lowered(joint: ExportedProgram, runtime: _Runtime) -> Any:
    """The joint graph as a program of ExecuTorch."""
    try:
        # What torch's differentiation writes is not among the operators that inference is held to.
        edge = runtime.exir.to_edge(joint, compile_config=runtime.exir.EdgeCompileConfig(_check_ir_validity=False))
        return edge.to_executorch()
    except Exception as error:
        raise ExportError(f"export_executorch: ExecuTorch cannot take the training step: {error}") from error


def _batches(examples: Examples, target: Tensor, count: int) -> list[tuple[Tensor, tuple[Any, ...]]]:
    """Random targets and arguments like the examples."""
    generator = torch.Generator().manual_seed(0)
    targets = Examples(ExampleCall((target,), {}), examples.signature, examples.batch_size)
    return [
        (targets.random(None, generator=generator).args[0], examples.random(None, generator=generator).args)
        for _ in range(count)
    ]


def _check(
    runtime: _Runtime,
    buffer: bytes,
    step: TrainingStep,
    exported: ExportedStep,
    batches: Sequence[tuple[Tensor, tuple[Any, ...]]],
    rate: float,
) -> DeviceCheck:
    """Train in the runtime and in torch, and compare.

    Raises:
        ExportError: The runtime fails, or comes to other weights.
    """
    module = runtime.training._load_for_executorch_for_training_from_buffer(buffer)
    weights = {name: parameter.detach().clone() for name, parameter in step.named_parameters()}
    losses, gradients, optimizer = [], [], None
    for target, inputs in batches:
        # Torch computes at the weights that the runtime has come to: otherwise the rounding of one step would grow in
        # the next ones, and a ReLU whose input is about 0 makes it large at once.
        loss, expected = exported.differentiated(weights, target, inputs)
        try:
            found = module.forward_backward("forward", (target, *inputs))[0]
            if optimizer is None:  # the module knows its parameters from the first step on
                optimizer = runtime.training.get_sgd_optimizer(module.named_parameters(), rate, 0, 0, 0, False)
            gradient = module.named_gradients()
            gradients.append(_distance(gradient, expected))
            optimizer.step(gradient)
        except RuntimeError as error:
            raise ExportError(f"export_executorch: ExecuTorch's runtime cannot run the step: {error}") from error
        losses.append(abs(float(found) - loss) / max(abs(loss), 1e-12))
        weights.update((name, parameter.detach().clone()) for name, parameter in module.named_parameters().items())
    check = DeviceCheck(
        steps=len(batches),
        loss=max(losses),
        gradients=statistics.median(gradients),
        worst_gradients=max(gradients),
        masked=_largest_masked(step, weights),
    )
    if not (check.loss <= _LOSS and check.gradients <= _GRADIENTS) or check.masked:
        raise ExportError(
            f"export_executorch: the file trains differently from torch: {check}; expected losses within {_LOSS}, "
            f"gradients within {_GRADIENTS}, and masked weights of 0. An operator of this version of ExecuTorch may "
            "compute something else: install another one, or change the layer"
        )
    return check


def _distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    difference = math.fsum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return math.sqrt(difference / max(math.fsum(float(g.square().sum()) for g in expected.values()), 1e-30))


def _largest_masked(step: TrainingStep, weights: Mapping[str, Tensor]) -> float:
    """Largest magnitude of a masked weight; packed ones are not there."""
    outside = [
        float(weights[_PREFIX + name][~mask].abs().max())
        for name, mask in masks(step.model).items()
        if weights[_PREFIX + name].shape == mask.shape and not mask.all()
    ]
    return max(outside, default=0.0)
