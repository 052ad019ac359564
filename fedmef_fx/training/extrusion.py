"""Budget-aware extrusion (FedMef, Eq. 2-5) for any training loop that ends in `optimizer.step()`.

Before low-magnitude weights are pruned, training moves what they know into the others. theta_low, the k_l active
weights of lowest magnitude of each layer, is fixed at the start; then

    L_s  = L + lambda * ||theta_low||_2^2        (Eq. 2): adds 2 * lambda * theta to the gradient of a marked weight
    mu_s = max(eta_s, beta_s)                    (Eq. 3-5): the rate of step s; see `sparsity.extrusion_schedule`

With `Config.adjustment_space="effective"` weights of an NSConv count as they take effect: w_hat takes the place of
theta in both, and the gradient of the term reaches all active weights of a row and its gain (`ops/effective_space.py`).

Both act through hooks that are gone when the context ends; the loop, its loss and its scheduler stay unchanged.
"""

import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.bitmap import pack_bits, unpack_bits
from fedmef_fx.packing.tracers import uncompiled
from fedmef_fx.sparse_model.effective import EffectiveParameter, effective_parameters
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity.extrusion_schedule import floored_rate
from fedmef_fx.sparsity.schedule import adjustment_count
from fedmef_fx.training.adjustment import lowest_units, unit_sizes
from fedmef_fx.training.wrapped_optimizer import innermost_optimizer

__all__ = ["Extrusion"]


_Hook = Callable[["_Places", Tensor], Tensor]


class _Marks:
    """Ascending positions among so many, as a bitmap."""

    def __init__(self, positions: Tensor, numel: int) -> None:
        is_marked = torch.zeros(numel, dtype=torch.bool, device=positions.device)
        is_marked[positions] = True
        self._bits, self._numel = pack_bits(is_marked), numel

    def booleans(self) -> Tensor:
        return unpack_bits(self._bits, self._numel)

    def positions(self) -> Tensor:
        return self.booleans().nonzero().squeeze(1)


class _Gaps:
    """Ascending positions, few among many: a byte for each, its distance to the one before.

    A distance below 255 stands as it is, less one; each byte of 255 before it adds 255.
    """

    def __init__(self, positions: Tensor) -> None:
        gaps = positions.diff(prepend=positions.new_full((1,), -1)) - 1
        long = gaps // 255
        ends = (long + 1).cumsum(0) - 1
        self._bytes = torch.full((positions.numel() + int(long.sum()),), 255, dtype=torch.uint8, device=gaps.device)
        self._bytes[ends] = (gaps - 255 * long).to(torch.uint8)

    def positions(self) -> Tensor:
        is_end = self._bytes != 255
        reached = (self._bytes.to(torch.int32) + is_end).cumsum(0)
        return reached[is_end] - 1


class _Places:
    """Where the marked weights of a parameter are in its stored form, and the term that extrudes them.

    They are there for a whole round, and therefore kept at a bit per stored weight; of a packed parameter also, at
    about a byte each, where they are in the dense weight.

    Attributes:
        parameter: The masked parameter, in the space of adjustments.
    """

    def __init__(self, parameter: EffectiveParameter, positions: Tensor) -> None:
        self.parameter = parameter
        self._found: _Marks | None = None
        self._marks: _Marks | _Gaps
        if parameter.masked.is_packed:
            self._marks = _Gaps(positions)
        else:
            self._marks = self._found = _Marks(positions, parameter.masked.shape.numel())
        self._version: int | None = None
        # Gradient of the term by gain, its strength, and the versions of weight and gain that it belongs to.
        self._by_gain: tuple[Tensor, float, tuple[int, int]] | None = None

    def positions(self) -> Tensor:
        """Flat positions in the dense weight."""
        return self._marks.positions()

    def now(self) -> _Marks:
        """Those in the parameter; of a packed one, of the weights that are still active."""
        masked = self.parameter.masked
        version = masked.buffer._version if masked.is_packed else None
        if self._found is None or version != self._version:  # the topology changed: values may have other places
            places = masked.places(self.positions())
            self._found, self._version = _Marks(places[places >= 0], masked.parameter.numel()), version
        return self._found

    def by_weight(self, strength: float) -> Tensor:
        """Gradient of strength * ||theta_low||^2 by the weight; that by gain, which comes with it, is kept."""
        term, by_gain = self.parameter.penalty_gradients(self.now().booleans(), strength)
        if by_gain is not None:
            self._by_gain = by_gain, strength, self._state()
        return term

    def by_gain(self, strength: float) -> Tensor:
        """Gradient of strength * ||theta_low||^2 by gain, for a parameter that has one."""
        kept = self._kept()
        if kept is None or kept[1] != strength:
            self.by_weight(strength)
            kept = self._kept()
        assert kept is not None  # noqa: S101  # the line before has set it
        return kept[0]

    def square(self) -> Tensor:
        """||theta_low||^2 at present."""
        kept, gain = self._kept(), self.parameter.gain
        if kept is None or gain is None:
            return self.parameter.at(self.now().positions()).float().square().sum()
        # dP/dgain = 2 lambda / gain * sum of w_hat_low^2 in each row
        return torch.dot(kept[0].flatten().float(), gain.detach().flatten().float()) / (2 * kept[1])

    def forget(self) -> None:
        """Drop what was kept: the weights are about to change."""
        self._by_gain = None

    def _kept(self) -> tuple[Tensor, float] | None:
        if self._by_gain is None or self._by_gain[2] != self._state():
            return None
        return self._by_gain[:2]

    def _state(self) -> tuple[int, int]:
        gain = self.parameter.gain
        return self.parameter.masked.parameter._version, 0 if gain is None else gain._version


class Extrusion:
    """A context in which training extrudes the weights that the next adjustment is going to prune.

    On entry the lowest active weights of each masked parameter that the optimizer trains are marked, and stay marked
    until the exit. Inside, each backward pass adds 2 * lambda * theta to the gradients of marked weights, and each
    `optimizer.step()` runs at the floored learning rate mu_s; the rate that a scheduler set is back in the parameter
    groups when the step returns. A step that a gradient scaler skips does not count. From step `budget_steps` on there
    is no budget left and the scheduled rate is used. A strength of 0 turns gradient term and rate floor off; weights
    are then only marked. On exit, also after an exception, all hooks are removed. An instance can be entered again,
    which marks again and starts at step 0.

    Args:
        model: A transformed model with masks.
        optimizer: The optimizer that trains it, or a wrapper that holds it as `.optimizer`; only its parameters are
            marked.
        budget_steps: T, optimizer steps until the adjustment: local epochs x batches, >= 1.
        counts: Parameter name -> number of weights to mark; parameters left out get none. Default: k_l(t) with the
            `adjustment_rate` of the model's configuration.
        round_index: t of the default counts. 0, the default, marks the whole share alpha.
        stop: R_stop of the default counts; default: `adjustment_stop` of the model's configuration.
        strength: lambda, >= 0; default: `extrusion_strength` of the model's configuration.
        accumulation_steps: Backward passes per optimizer step, >= 1; each adds its part of the term.
        scaler: The gradient scaler of mixed-precision training, which the term is then scaled by like the loss.

    Attributes:
        marked: Parameter name -> flat (row-major) positions of the marked weights, int64, ascending; the last ones
            marked remain after the exit.
        step: s, the optimizer steps taken since the entry.
        learning_rate: mu of the first parameter group at the last step; None before the first step.

    Raises:
        ConfigError: A model that was not transformed or has no masks, no optimizer, one that holds none of its masked
            parameters, or an argument out of range.

    Example:
        >>> with Extrusion(sparse, optimizer, budget_steps=len(batches)) as extrusion:  # doctest: +SKIP
        ...     for images, labels in batches:
        ...         optimizer.zero_grad()
        ...         loss_fn(sparse(images), labels).backward()
        ...         optimizer.step()
        >>> extrusion.norm()  # what pruning would now take away  # doctest: +SKIP
        0.03
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        budget_steps: int,
        counts: Mapping[str, int] | None = None,
        round_index: int = 0,
        stop: int | None = None,
        strength: float | None = None,
        accumulation_steps: int = 1,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        config = transformation_of(model).config
        if budget_steps < 1:
            raise ConfigError(
                f"Extrusion: budget_steps: got {budget_steps}; expected an integer >= 1, e.g. epochs * len(batches)"
            )
        if accumulation_steps < 1:
            raise ConfigError(f"Extrusion: accumulation_steps: got {accumulation_steps}; expected an integer >= 1")
        self.strength = config.extrusion_strength if strength is None else strength
        if not self.strength >= 0:
            raise ConfigError(f"Extrusion: strength: got {self.strength}; expected a number >= 0")
        self.budget_steps = budget_steps
        self.accumulation_steps = accumulation_steps
        self.step = 0
        self.learning_rate: float | None = None
        self._model = model
        self._optimizer = innermost_optimizer(optimizer)
        self._scaler = scaler
        self._entries = _trained_parameters(model, self._optimizer)
        self._round_index = round_index
        self._rate = config.adjustment_rate
        self._stop = config.adjustment_stop if stop is None else stop
        if counts is None and self._stop is None and round_index > 0:
            raise ConfigError(
                f"Extrusion: got round_index={round_index} without the round at which adjustments stop; expected one, "
                f"e.g. Extrusion(..., round_index={round_index}, stop=100)"
            )
        names = masked_parameters(model)
        unknown = sorted(set(counts or ()) - set(names))
        if unknown:
            raise ConfigError(f"Extrusion: counts: {unknown[0]!r} has no mask; masked parameters: {', '.join(names)}")
        self._counts = None if counts is None else dict(counts)
        self._places: dict[str, _Places] = {}
        self._handles: list[RemovableHandle] = []
        self._initial_rates: list[float] = []
        self._replaced: list[tuple[dict[str, Any], Any, Any]] = []

    def __enter__(self) -> Self:
        if self._handles:
            raise ConfigError("Extrusion: got entered twice; expected one `with` block at a time for an instance")
        marked = lowest_units(self._model, self._entries, self._count)
        self._places = {name: _Places(self._entries[name], positions) for name, positions in marked.items()}
        self.step = 0
        self.learning_rate = None
        self._initial_rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        if self.strength > 0:
            for places in self._places.values():
                extruded: list[tuple[Tensor, _Hook]] = [(places.parameter.masked.parameter, self._extrude)]
                gain = places.parameter.gain
                if gain is not None and gain.requires_grad:
                    extruded.append((gain, self._extrude_gain))
                for tensor, hook in extruded:
                    handle = tensor.register_hook(functools.partial(hook, places))  # type: ignore[no-untyped-call]
                    self._handles.append(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._restore_rates()

    @property
    def marked(self) -> dict[str, Tensor]:
        """See the class."""
        return {name: places.positions() for name, places in self._places.items()}

    def norm(self) -> float:
        """||theta_low||_2 of the marked weights of all layers together, at present; 0 before the first entry."""
        squares = [places.square() for places in self._places.values()]
        if not squares:
            return 0.0
        return float(torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt())

    def _count(self, name: str) -> int:
        if self._counts is not None:
            return self._counts.get(name, 0)
        active, inactive = unit_sizes(self._model)[name]
        # In round 0 the schedule is at its start whenever it stops.
        stop = 1 if self._stop is None else self._stop
        return adjustment_count(active, inactive, round_index=self._round_index, stop=stop, rate=self._rate)

    @uncompiled
    def _extrude(self, places: "_Places", gradient: Tensor) -> Tensor:
        """Gradient hook of a weight: its gradient with that of the term added."""
        return self._added(gradient, places.by_weight(self.strength / self.accumulation_steps))

    @uncompiled
    def _extrude_gain(self, places: "_Places", gradient: Tensor) -> Tensor:
        """Gradient hook of a gain: the same."""
        return self._added(gradient, places.by_gain(self.strength / self.accumulation_steps))

    def _added(self, gradient: Tensor, term: Tensor) -> Tensor:
        if self._scaler is not None:
            term = self._scaler.scale(term)
        # Out of place: autograd may hand the same gradient tensor to other parts of the graph.
        return gradient + term.to(gradient.dtype)

    @uncompiled
    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        self._restore_rates()
        if self.strength > 0 and self.step < self.budget_steps:
            norm = self.norm()
            # Groups that were added after the entry have no initial rate and keep theirs.
            for group, initial in zip(optimizer.param_groups, self._initial_rates, strict=False):
                scheduled = group["lr"]
                rate = floored_rate(
                    float(scheduled), step=self.step, budget=self.budget_steps, norm=norm, initial_rate=initial
                )
                if rate > scheduled:
                    group["lr"] = torch.full_like(scheduled, rate) if isinstance(scheduled, Tensor) else rate
                    self._replaced.append((group, scheduled, group["lr"]))
        for places in self._places.values():
            places.forget()
        self.learning_rate = float(optimizer.param_groups[0]["lr"])

    @uncompiled
    def _after_step(self, *_: object) -> None:
        self.step += 1
        self._restore_rates()

    def _restore_rates(self) -> None:
        for group, scheduled, replacement in self._replaced:
            # After a step that raised, the loop may have set another rate meanwhile: that one wins.
            if group["lr"] is replacement:
                group["lr"] = scheduled
        self._replaced = []


def _trained_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, EffectiveParameter]:
    """The masked parameters that the optimizer moves."""
    parameters = effective_parameters(model)
    if not parameters:
        raise ConfigError(
            "Extrusion: the model has no masks, so nothing will be pruned; expected a density below 1, "
            "e.g. fedmef_fx.transform(model, fedmef_fx.Config(density=0.1))"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {
        name: parameter
        for name, parameter in parameters.items()
        if id(parameter.masked.parameter) in held and parameter.masked.parameter.requires_grad
    }
    if not trained:
        raise ConfigError(
            "Extrusion: the optimizer holds none of the model's masked parameters; expected one that was made from "
            "the transformed model, e.g. torch.optim.SGD(sparse.parameters(), lr=0.1)"
        )
    return trained
