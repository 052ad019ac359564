"""`memory`: what one training step of a model takes, measured or predicted."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedmef_fx.measure.allocator import allocator_peak, cuda_peak
from fedmef_fx.measure.fresh_process import NotMeasurableError, resident_growth
from fedmef_fx.measure.layer_marks import mark_layers
from fedmef_fx.measure.meter import SavedKind
from fedmef_fx.measure.report import MemoryReport
from fedmef_fx.measure.timeline import AttributedSaves, StepTimeline
from fedmef_fx.measure.training_step import LossOfOutput, OptimizerChoice, TrainingStep

__all__ = ["MemoryReport", "memory"]

_UNSEEN: Final = "not in the peak: workspaces inside operations, such as those of convolutions"
_RECURRENT: Final = "not in the prediction: what recurrent layers keep in oneDNN, which alone knows its size; measure"


def memory(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    loss: LossOfOutput | None = None,
    optimizer: OptimizerChoice = None,
    micro_batch: int | None = None,
    predict: bool = False,
    allocator: bool = False,
    rss: bool = False,
) -> MemoryReport:
    """Measure one training step: forward, loss, backward and, if there is an optimizer, its step.

    It runs in train mode on a copy, which exists next to the model meanwhile. The second step is measured, when the
    optimizer has its state and thresholds are estimated. The model, its gradients and torch's random state stay as
    they are.

    Args:
        model: Any model.
        example_inputs: Positional arguments of one call, as a tuple, with the batch size that is to be measured.
        example_kwargs: Keyword arguments of that call.
        loss: From the model's output to a scalar. Default: the sum of all floating point results, which itself keeps
            nothing for backward.
        optimizer: `"sgd"`, `"sgd-momentum"`, `"adam"`, `"adamw"`, or a function from parameters to an optimizer; None
            for a step without.
        micro_batch: Samples per part, as of `fedmef_fx.training.micro_batches`; the loss has to fit parts then. Held
            bytes are those of the first part.
        predict: Run on tensors that have shapes only: no memory, hardly any time, for models of any size. What
            depends on values is assumed: a pruned activation keeps the share it kept when the model last ran, before
            that its target.
        allocator: Also measure the peak of torch's own allocator, which includes temporaries inside operations.
        rss: Also measure the resident memory of a fresh process that does only this.

    Returns:
        The report.

    Raises:
        ConfigError: The model refuses the inputs, the loss is no differentiable scalar, an unknown optimizer, or a
            prediction for a model whose forward needs values.

    Example:
        >>> report = memory(nn.Linear(4, 2), (torch.ones(3, 4),), optimizer="sgd-momentum")
        >>> report.weights, report.gradients, report.optimizer, report.saved_total
        (40, 40, 40, 0)
    """
    arguments: dict[str, Any] = {
        "model": model,
        "example_inputs": example_inputs,
        "example_kwargs": example_kwargs,
        "loss": loss,
        "optimizer": optimizer,
        "micro_batch": micro_batch,
    }
    report = _follow(TrainingStep.of(**arguments, has_values=not predict), predict=predict)
    if predict:
        return report
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        cuda = _untracked(arguments, lambda step: cuda_peak(step.run, device))
        report = dataclasses.replace(report, cuda=cuda)
    if allocator:
        report = dataclasses.replace(report, allocator_peak=_untracked(arguments, _allocated))
    if rss:
        try:
            report = dataclasses.replace(report, rss=resident_growth(**arguments))
        except NotMeasurableError as error:
            report = dataclasses.replace(report, notes=(*report.notes, f"no resident memory: {error}"))
    return report


def _follow(step: TrainingStep, *, predict: bool) -> MemoryReport:
    """Run two steps and watch the second."""
    with step.isolated():
        step.warm_up()  # also lets a model capture what it captures on its first call, before its layers are marked
        timeline = StepTimeline()
        mark_layers(step.model, timeline)
        step.zero_grad()
        timeline.hold(step.model.parameters(), "weights")
        timeline.hold(step.model.buffers(), "buffers")
        timeline.hold(step.inputs, "inputs")
        timeline.hold(step.optimizer_state, "optimizer")
        timeline.name_parameters(step.model.named_parameters())
        hooks = [_when_accumulated(p, timeline) for p in step.model.parameters() if p.requires_grad]
        kinds: Mapping[SavedKind, int] = {}
        for call, scale in step.parts():
            held = _forward_and_backward(step, timeline, call, scale)
            kinds = kinds or held  # a later part is of the same size, or smaller
        if step.optimizer is not None:
            with timeline.during("optimizer"):
                step.optimizer.step()
                timeline.hold(step.optimizer_state, "optimizer")
        for hook in hooks:
            hook.remove()
        return MemoryReport(
            weights=_nbytes(step.model.parameters()),
            buffers=_nbytes(step.model.buffers()),
            inputs=_nbytes(step.inputs),
            gradients=_nbytes(p.grad for p in step.model.parameters() if p.grad is not None),
            optimizer=_nbytes(step.optimizer_state),
            saved={str(kind): count for kind, count in kinds.items()},
            transients=timeline.transients,
            peak=timeline.peak,
            peak_site=timeline.peak_site,
            at_peak=dict(timeline.at_peak),
            layers=timeline.layers,
            timeline=tuple(timeline.events),
            is_predicted=predict,
            notes=_notes(timeline, predict=predict),
        )


def _forward_and_backward(step: TrainingStep, timeline: StepTimeline, call: Any, scale: float) -> dict[SavedKind, int]:
    """One part of the batch; returns what was held between forward and backward."""
    with AttributedSaves(timeline, step.model, *step.inputs) as saves, timeline.during("forward"):
        output = step.output(call)
        timeline.enter("loss", output)
        value = step.loss_of(output)
        value = value if scale == 1 else value * scale
        del output
        timeline.leave(value)
        timeline.end_forward()
    kinds = saves.by_kind()
    with timeline.during("backward"):
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return kinds


def _notes(timeline: StepTimeline, *, predict: bool) -> tuple[str, ...]:
    recurrent = any("mkldnn_rnn" in event.site.op for event in timeline.events)
    return (_UNSEEN, *((_RECURRENT,) if predict and recurrent else ()))


def _when_accumulated(parameter: nn.Parameter, timeline: StepTimeline) -> Any:
    def tell(accumulated: Tensor) -> None:
        if accumulated.grad is not None:
            timeline.hold([accumulated.grad], "gradients")

    return parameter.register_post_accumulate_grad_hook(tell)  # type: ignore[no-untyped-call]  # torch's own


def _untracked(arguments: dict[str, Any], measure: Any) -> Any:
    """Measure a second step that nothing else watches."""
    step = TrainingStep.of(**arguments)
    with step.isolated():
        step.run()
        step.zero_grad()
        return measure(step)


def _allocated(step: TrainingStep) -> int:
    state = [*step.model.parameters(), *step.model.buffers(), *step.inputs, *step.optimizer_state]
    return _nbytes(state) + allocator_peak(step.run)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.layout is torch.strided
    }
    return sum(storages.values())
