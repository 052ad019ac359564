"""`Objective`: how a model is called with a batch, and what its loss and its figures are. Everything goes through it.

A batch is one of

    (input, target)             model(input); the loss gets outputs and target
    (input, ..., target)        model(input, ...)
    {name: tensor, ...}         model(name=tensor, ...), with the names that the model takes; the target is what is
                                called `labels`, `label`, `targets`, `target` or `y`
    input, or (input,)          no labels: the target is the input, as for autoencoders and models of one's own loss

Outputs may be a tensor, a tuple, a dictionary or an object with attributes. Without a loss function of one's own the
loss is the one that the model computes itself (`outputs.loss`, where it took the labels), else cross-entropy of its
logits; for sequences per position, where targets are -100 they do not count.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmef_fx.errors import ConfigError, DataError
from fedmef_fx.federated.batches import Batch, samples_in

__all__ = ["LossFunction", "Metric", "Objective", "objective_of"]

LossFunction = Callable[[Any, Any], Tensor]
"""Maps a batch of outputs and targets to their mean loss, a scalar."""

Metric = Callable[[Any, Any], "Tensor | float"]
"""Maps a batch of outputs and targets to a mean over its samples."""

_LABELS: Final = ("labels", "label", "targets", "target", "y")
_IGNORED: Final = -100  # of F.cross_entropy


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised and measured; subclass it for batches that it does not know.

    Attributes:
        loss_fn: Mean loss of a batch of outputs and targets; `F.cross_entropy` stands for the module's rules.
        metrics: Name -> mean of a batch of outputs and targets, for evaluation.

    Example:
        >>> objective = Objective(metrics={"mean": lambda outputs, targets: outputs.mean()})
        >>> objective.evaluate(nn.Linear(2, 2), (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))).samples
        3
    """

    loss_fn: LossFunction = F.cross_entropy
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)

    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """What the model makes of a batch."""
        args, kwargs = self.call(model, batch)
        return model(*args, **kwargs)

    def call(self, model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with: arguments by position and by name."""
        if isinstance(batch, Tensor):
            return (batch,), {}
        if isinstance(batch, tuple | list):
            return tuple(batch[: max(len(batch) - 1, 1)]), {}
        if not isinstance(batch, Mapping):
            raise DataError(
                f"batch: got a {type(batch).__name__}; expected a tensor, a tuple, a list or a dictionary of tensors, "
                "or an Objective of one's own whose outputs and target know it"
            )
        return (), self.arguments(model, batch)

    def target(self, batch: Batch) -> Any:
        """What the loss compares outputs with."""
        if isinstance(batch, Tensor):
            return batch
        if isinstance(batch, Mapping):
            name = _label_of(batch)
            return next(iter(batch.values())) if name is None else batch[name]
        return batch[-1]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar.

        Raises:
            ConfigError: Outputs that the rules make no loss of.
        """
        return self._loss_of(self.outputs(model, batch), batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> "Evaluated":
        """Loss, accuracy and metrics of a batch."""
        outputs, target = self.outputs(model, batch), self.target(batch)
        loss, logits = float(self._loss_of(outputs, batch)), _logits(outputs)
        right, places = _right(logits, target)
        if logits is not None and right is not None and logits.dim() > 2 and not self._fits(loss, outputs, target):
            right, places = None, 0
        return Evaluated(
            samples=samples_in(batch),
            loss=loss,
            right=right,
            places=places,
            metrics={name: _number(name, metric(outputs, target)) for name, metric in self.metrics.items()},
        )

    def arguments(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a dictionary the model takes: labels only where it is to compute the loss itself."""
        taken = _parameters_of(model)
        wanted = dict(batch) if taken is None else {name: batch[name] for name in batch if name in taken}
        label = _label_of(batch)
        if label is not None and (self.loss_fn is not F.cross_entropy or taken is None):
            wanted.pop(label, None)
        if not wanted:
            raise DataError(
                f"batch: got {', '.join(map(str, batch))}; expected names that the model takes: "
                f"{', '.join(taken or ())}"
            )
        return wanted

    def _fits(self, loss: float, outputs: Any, target: Tensor) -> bool:
        """Whether positions of outputs predict those of the target: a model that shifts them computes another loss."""
        if self.loss_fn is not F.cross_entropy or not isinstance(_part(outputs, "loss"), Tensor):
            return True
        logits = _logits(outputs)
        same = logits is not None and float(F.cross_entropy(logits.flatten(0, -2).float(), target.flatten()))
        return math.isclose(loss, same, rel_tol=1e-4)

    def _loss_of(self, outputs: Any, batch: Batch) -> Tensor:
        target = self.target(batch)
        if self.loss_fn is not F.cross_entropy:
            return self.loss_fn(outputs, target)
        own = None if isinstance(outputs, Tensor) else _part(outputs, "loss")
        if isinstance(own, Tensor):
            return own if own.dim() == 0 else own.mean()
        logits = _logits(outputs)
        if logits is None or not isinstance(target, Tensor):
            raise ConfigError(
                f"loss: got outputs {type(outputs).__name__} and a target {type(target).__name__}; expected logits and "
                "labels, or loss_fn=, which gets both"
            )
        if _is_per_position(logits, target):
            return F.cross_entropy(logits.flatten(0, -2), target.flatten())
        return F.cross_entropy(logits, target)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What was found of a batch.

    Attributes:
        samples: How many it has.
        loss: Their mean loss.
        right: Number of right predictions; None where targets are no classes, or outputs no logits of them.
        places: Number of predictions.
        metrics: Means by name.
    """

    samples: int
    loss: float
    right: int | None
    places: int
    metrics: Mapping[str, float]


def objective_of(loss: "LossFunction | Objective") -> Objective:
    """An objective of a loss function, or the one that is given."""
    return loss if isinstance(loss, Objective) else Objective(loss)


def _label_of(batch: Mapping[str, Any]) -> str | None:
    return next((name for name in _LABELS if name in batch), None)


def _parameters_of(model: nn.Module) -> frozenset[str] | None:
    """Names of what the model's forward takes; None where that is anything."""
    for owner in (model, *type(model).__mro__):
        forward = vars(owner).get("forward") if isinstance(owner, type) else vars(model).get("forward")
        if forward is None:
            continue
        parameters = inspect.signature(forward).parameters.values()
        if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name == "self" for p in parameters):
            continue  # a wrapper: what it wraps knows
        return frozenset(p.name for p in parameters if p.name != "self")
    return None


def _part(outputs: Any, name: str) -> Any:
    """A named part of outputs; None without it."""
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return getattr(outputs, name, None)


def _logits(outputs: Any) -> Tensor | None:
    """The tensor of scores in outputs: named logits, or the first one."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(named := _part(outputs, "logits"), Tensor):
        return named
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple | list) else ()
    return next((part for part in parts if isinstance(part, Tensor) and part.dim()), None)


def _is_per_position(logits: Tensor, target: Tensor) -> bool:
    """Whether outputs are `[batch, ..., classes]` for classes `[batch, ...]`, and not what torch reads them as."""
    if target.is_floating_point() or logits.dim() < 3 or target.shape != logits.shape[:-1]:
        return False
    return target.shape != (logits.shape[0], *logits.shape[2:])


def _right(logits: Tensor | None, target: Any) -> tuple[int | None, int]:
    """Right predictions and their number, of classes for each sample or each position."""
    if logits is None or not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool:
        return None, 0
    is_plain = logits.dim() == 2 and target.dim() == 1
    if not is_plain and not _is_per_position(logits, target):
        return None, 0
    counts = target != _IGNORED
    return int(((logits.argmax(-1) == target) & counts).sum()), int(counts.sum())


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ConfigError(f"metrics: {name!r}: got {value!r:.80}; expected one number, the mean over the batch")
