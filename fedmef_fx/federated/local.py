"""A client's part of a round: local epochs with extrusion where it is due, then the growth candidates.

Knows nothing about transports: `train_locally` takes a model and a data set and returns an `Update`.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset

from fedmef_fx.errors import ConfigError, DataError, DivergedError
from fedmef_fx.federated.batches import Batch, Collate, samples_in
from fedmef_fx.federated.client_data import OpenData, opened
from fedmef_fx.federated.drawing import drawing_from
from fedmef_fx.federated.hooks import ClientHooks
from fedmef_fx.federated.local_round import LocalRound
from fedmef_fx.federated.local_training import LocalTraining, cosine
from fedmef_fx.federated.messages import RoundTask, Update
from fedmef_fx.federated.objective import LossFunction, Objective, objective_of
from fedmef_fx.federated.reports import Findings, findings_of, readjusted_midway
from fedmef_fx.federated.seeds import derive_seed
from fedmef_fx.federated.state import ModelState, read_state
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.ops.noise_site import NoiseSite
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.training.clipping import clip_gradients
from fedmef_fx.training.extrusion import Extrusion
from fedmef_fx.training.micro_batches import batch_statistics_in, micro_batches

__all__ = ["LocalTraining", "LossFunction", "train_locally"]


def train_locally(
    model: nn.Module,
    dataset: Any,
    options: LocalTraining,
    *,
    task: RoundTask,
    client: int = 0,
    loss_fn: LossFunction | Objective = F.cross_entropy,
    collate: Collate | None = None,
    hooks: ClientHooks | None = None,
    received: ModelState | None = None,
    kept: MutableMapping[str, Tensor] | None = None,
) -> Update:
    """Train a transformed model on one client's data, in place, as a round asks for it.

    In an adjustment round the weights that the server is about to prune are extruded (`fedmef_fx.Extrusion`, with the
    counts of the task, fixed for the round), and the gradients at inactive coordinates are collected afterwards, with
    the trained weights. The result depends on the model's parameters and buffers, the data and the arguments only: not
    on what the model did before, nor on the random state of torch, numpy, Python and generators that the data hold,
    which is left as it was.

    Args:
        model: A transformed model, which holds what the server sent.
        dataset: What `opened` takes, with at least one sample, in batches that the objective takes. One sample is
            enough, unless the model keeps a BatchNorm that needs more than one value per channel.
        options: How to train.
        task: The round.
        client: The client's number, for its random choices and error messages.
        loss_fn: Mean loss of a batch of outputs and targets, or an objective.
        collate: Makes a batch of items; None for what torch's loaders do.
        hooks: What takes part in the training; None for nothing.
        received: What the server sent, for the hooks; None for what the model holds.
        kept: What the client keeps from round to round, for the hooks; changed in place.

    Returns:
        The trained values, the growth candidates if asked for, and measurements; never a dense gradient.

    Raises:
        ConfigError: No samples, a single one where BatchNorm needs more, or a loss that is no longer finite.
    """
    objective = objective_of(loss_fn)
    seed = derive_seed(transformation_of(model).config.seed, "client", task.round_index, client)
    device = next(model.parameters()).device
    with drawing_from(seed, device, dataset):
        data = opened(dataset, collate=collate)
    if data.samples == 0:
        raise ConfigError(
            f"client {client}: got a data set without samples; expected at least one: leave the client out"
        )
    if hooks is not None:
        options = _own_options(hooks, options, task, client=client, samples=data.samples)
    for module in model.modules():
        if isinstance(module, NoiseSite):
            module.reset(draws=seed % 2**32)
    model.train()
    with drawing_from(seed, device, data.data):
        loss, peak_saved_bytes, local = 0.0, 0, None
        if not task.is_opening:
            optimizer = options.make_optimizer(model, options.learning_rate_in(task))
            if hooks is not None:
                local = LocalRound(
                    model=model,
                    task=task,
                    client=client,
                    samples=data.samples,
                    received=received or read_state(model, version=task.round_index),
                    optimizer=optimizer,
                    steps=options.epochs * data.batch_count(options.batch_size),
                    state={} if kept is None else kept,
                )
            with _hooked(hooks, local) as before_step:
                loss, peak_saved_bytes = _epochs(
                    model,
                    data,
                    options,
                    optimizer,
                    task=task,
                    client=client,
                    objective=objective,
                    before_step=before_step,
                )
            # What the last step left takes room that the candidates need.
            optimizer.zero_grad()
            optimizer.state.clear()
        found = _findings(model, data, options, task=task, objective=objective)
    state = read_state(model, version=task.round_index)
    return Update(
        round_index=task.round_index,
        samples=data.samples,
        loss=loss,
        peak_saved_bytes=peak_saved_bytes,
        values={} if task.is_opening else state.values,
        dense=state.dense,
        gradients=found.gradients,
        votes=found.votes,
        scores=found.scores,
        masks=found.masks,
        client=client,
        extras={} if local is None else local.reply,
        metrics={} if local is None else local.checked_metrics(),
    )


@contextlib.contextmanager
def _hooked(hooks: ClientHooks | None, local: LocalRound | None) -> Iterator[Callable[[], None]]:
    """A block of local training with hooks before and after it; gives what is to be called before each step."""
    if hooks is None or local is None:
        yield lambda: None
        return

    def before_step() -> None:
        hooks.before_step(local)
        local.step += 1

    hooks.before_training(local)
    yield before_step
    hooks.after_training(local)


def _own_options(
    hooks: ClientHooks, options: LocalTraining, task: RoundTask, *, client: int, samples: int
) -> LocalTraining:
    """How this client trains in this round."""
    own = hooks.local_training(options, task, client=client, samples=samples)
    if not isinstance(own, LocalTraining) or own.weight_storage != options.weight_storage:
        raise ConfigError(
            f"local_training: client {client}, round {task.round_index}: expected a LocalTraining with "
            f"weight_storage={options.weight_storage!r}, as all clients have it; got {own!r:.100}"
        )
    return own


def _epochs(
    model: nn.Module,
    data: OpenData,
    options: LocalTraining,
    optimizer: Optimizer,
    *,
    task: RoundTask,
    client: int,
    objective: Objective,
    before_step: Callable[[], None],
) -> tuple[float, int]:
    """All local epochs: mean loss of the last one, and the bytes that the first step kept for its backward."""
    clipping = transformation_of(model).config.gradient_clipping
    rates = [group["lr"] for group in optimizer.param_groups]
    device = next(model.parameters()).device
    step_count = options.epochs * data.batch_count(options.batch_size)
    step, peak, total, seen = 0, 0, 0.0, 0
    midway = readjusted_midway(
        model,
        optimizer,
        task,
        steps=step_count,
        batch=lambda: next(data.batches(batch_size=options.batch_size, shuffle=True, device=device)),
        batch_loss=objective.loss,
    )
    with _extrusion(model, optimizer, task, step_count), midway:
        for _ in range(options.epochs):
            total, seen = 0.0, 0
            for batch in data.batches(batch_size=options.batch_size, shuffle=True, device=device):
                if options.schedule == "cosine":
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * cosine(min(step / step_count, 1.0))
                optimizer.zero_grad()
                value, kept = _gradients(model, batch, objective, client=client, is_measured=step == 0)
                peak = max(peak, kept)
                before_step()
                if clipping is not None:
                    clip_gradients(model, clipping)
                optimizer.step()
                size = samples_in(batch)
                total += _finite(value, client, task) * size
                step, seen = step + 1, seen + size
            _check_epoch(data, seen, client)
    return total / seen, peak


def _check_epoch(data: OpenData, seen: int, client: int) -> None:
    """Refuse a stream that ended before the client's declared number of samples, and a loader that gave none."""
    is_short = isinstance(data.data, IterableDataset) and data.limit is not None and seen != data.limit
    if is_short or seen == 0:
        raise DataError(
            f"client {client}: {type(data.data).__name__}: got {seen} samples in an epoch; expected {data.samples}, as "
            "the client declared"
        )


def _extrusion(
    model: nn.Module, optimizer: Optimizer, task: RoundTask, step_count: int
) -> contextlib.AbstractContextManager[object]:
    """Extrusion in adjustment rounds, and in those only."""
    if not task.counts or transformation_of(model).config.extrusion_strength == 0:
        return contextlib.nullcontext()
    return Extrusion(model, optimizer, budget_steps=step_count, counts=task.counts)


def _gradients(
    model: nn.Module, batch: Batch, objective: Objective, *, client: int, is_measured: bool
) -> tuple[float, int]:
    """Forward and backward of a batch, in parts if the configuration says so: its loss, and bytes kept if measured."""
    size = transformation_of(model).config.micro_batch
    parts = [(batch, 1.0)] if size is None else micro_batches(batch, size, model=model)
    value, peak = 0.0, 0
    for part, scale in parts:
        # Only the first step is measured: the meter looks at every tensor that autograd saves.
        meter = SavedTensors(model, *_tensors(batch)) if is_measured else None
        with meter or contextlib.nullcontext():
            loss = _loss(model, part, objective, client) * scale
        peak = max(peak, meter.nbytes) if meter else peak
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        value += loss.item()
    return value, peak


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def _loss(model: nn.Module, batch: Batch, objective: Objective, client: int) -> Tensor:
    try:
        return objective.loss(model, batch)
    except ValueError as error:
        if samples_in(batch) == 1 and "more than 1 value per channel" in str(error):
            raise ConfigError(
                f"client {client}: got a batch of a single sample, from which BatchNorm cannot compute statistics; "
                'expected normalization="nsconv", which needs none, or at least two samples'
            ) from error
        raise


def _finite(value: float, client: int, task: RoundTask) -> float:
    if not math.isfinite(value):
        raise DivergedError(
            f"client {client}, round {task.round_index}: the loss became {value}: training has diverged; expected a "
            "smaller LocalTraining.learning_rate, or gradient clipping, e.g. Config(gradient_clipping=0.05)"
        )
    return value


def _findings(
    model: nn.Module, data: OpenData, options: LocalTraining, *, task: RoundTask, objective: Objective
) -> Findings:
    """What the task asks for beside weights, from as many batches as the options say; an opening looks at one."""
    device = next(model.parameters()).device
    parts = data.batches(batch_size=options.batch_size, shuffle=True, device=device)
    limit = 1 if task.is_opening else options.growth_batches
    if limit is not None:
        parts = itertools.islice(parts, limit)
    if (size := _part_size(model, options, task=task, objective=objective)) is not None:
        is_given = transformation_of(model).config.micro_batch is not None
        parts = itertools.chain.from_iterable(
            (part for part, _ in micro_batches(batch, size, model=model))
            if is_given or _has_a_label_per_sample(batch)
            else (batch,)
            for batch in parts
        )
    return findings_of(model, objective.loss, parts, task)


def _part_size(model: nn.Module, options: LocalTraining, *, task: RoundTask, objective: Objective) -> int | None:
    """How many samples of a batch to look at together, where the parts of a batch say the same as the whole.

    Sums for growth take memory that a step of local training does not need; half a batch makes room for them.
    """
    if (size := transformation_of(model).config.micro_batch) is not None:
        return size
    # A single batch needs no sums.
    is_sum = task.report in ("gradients", "positions") and not task.is_opening and options.growth_batches != 1
    is_mean_of_samples = type(objective) is Objective and objective.loss_fn is F.cross_entropy
    if is_sum and is_mean_of_samples and not batch_statistics_in(model):
        return max(options.batch_size // 2, 1)
    return None


def _has_a_label_per_sample(batch: Batch) -> bool:
    """Whether a batch is tensors of as many samples each, of which the last has one number per sample.

    The mean loss of its parts, weighted by samples, is that of the batch then.
    """
    tensors = list(batch) if isinstance(batch, tuple | list) else []
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.dim() for tensor in tensors):
        return False
    return tensors[-1].dim() == 1 and len({tensor.shape[0] for tensor in tensors}) == 1
