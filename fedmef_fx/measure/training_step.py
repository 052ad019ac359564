"""One training step of a copy of a model, real or with shapes only, for measuring."""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils import _pytree as pytree

from fedmef_fx.errors import ConfigError
from fedmef_fx.measure.live import tensors_in
from fedmef_fx.module_tree import duplicate_of, tensors_of
from fedmef_fx.training.micro_batches import micro_batches

__all__ = ["LossOfOutput", "OptimizerChoice", "OptimizerName", "TrainingStep", "optimizer_factory"]

OptimizerName = Literal["sgd", "sgd-momentum", "adam", "adamw"]
OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
OptimizerChoice: TypeAlias = OptimizerName | OptimizerFactory | None
LossOfOutput: TypeAlias = Callable[[Any], Tensor]

# Small, so that the step that is measured follows one that has changed next to nothing.
_RATE: Final = 1e-4
_FACTORIES: Final[dict[str, OptimizerFactory]] = {
    "sgd": lambda parameters: SGD(parameters, lr=_RATE),
    "sgd-momentum": lambda parameters: SGD(parameters, lr=_RATE, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=_RATE),
    "adamw": lambda parameters: AdamW(parameters, lr=_RATE),
}


def optimizer_factory(choice: OptimizerChoice) -> OptimizerFactory | None:
    """What makes an optimizer from parameters.

    Args:
        choice: A name, a function such as `lambda parameters: torch.optim.SGD(parameters, lr=0.1)`, or None.

    Raises:
        ConfigError: An unknown name, or something that cannot be called.
    """
    if choice is None or (callable(choice) and not isinstance(choice, str)):
        return choice
    if isinstance(choice, str) and choice in _FACTORIES:
        return _FACTORIES[choice]
    names = " | ".join(map(repr, get_args(OptimizerName)))
    raise ConfigError(
        f"memory: optimizer: got {choice!r}; expected {names}, or a function from parameters to an optimizer, e.g. "
        "optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
    )


@dataclasses.dataclass(kw_only=True)
class TrainingStep:
    """A model in train mode with what its training step needs; made by `of` and `without_values`.

    Attributes:
        model: A copy of the caller's.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of it.
        loss: From the output to a scalar; None for the sum of all floating point results.
        optimizer: The optimizer, if there is one.
        mode: Makes tensors without values; None for a real step.
        micro_batch: Samples per part, see `fedmef_fx.training.micro_batches`; None for the whole batch at once.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: LossOfOutput | None
    optimizer: Optimizer | None
    mode: FakeTensorMode | None = None
    micro_batch: int | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Sequence[Any],
        *,
        example_kwargs: Mapping[str, Any] | None = None,
        loss: LossOfOutput | None = None,
        optimizer: OptimizerChoice = None,
        micro_batch: int | None = None,
        has_values: bool = True,
    ) -> "TrainingStep":
        """A step of a copy of a model.

        Args:
            model: Any model; it does not change.
            example_inputs: Positional arguments of one call, as a tuple.
            example_kwargs: Keyword arguments of that call.
            loss: From the model's output to a scalar.
            optimizer: See `optimizer_factory`.
            micro_batch: Samples per part; None for the whole batch at once.
            has_values: False for tensors that have shapes only: the step then takes next to no memory or time.

        Raises:
            ConfigError: Not a model, inputs that are no tuple, an unknown optimizer, or a batch that cannot be cut.
        """
        if not isinstance(model, nn.Module):
            raise ConfigError(f"memory: got {type(model).__name__}; expected a torch.nn.Module")
        if isinstance(example_inputs, Tensor):
            raise ConfigError("memory: example_inputs is a tensor; expected a tuple of arguments: memory(model, (x,))")
        factory = optimizer_factory(optimizer)
        mode = None if has_values else FakeTensorMode(allow_non_fake_inputs=True)
        duplicate = (duplicate_of(model) if mode is None else _without_values(model, mode)).train()
        duplicate.zero_grad(set_to_none=True)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: _input(t, mode), (tuple(example_inputs), dict(example_kwargs or {}))
        )
        with mode or contextlib.nullcontext():
            own_optimizer = None if factory is None else factory(p for p in duplicate.parameters() if p.requires_grad)
        if micro_batch is not None:
            micro_batches((args, kwargs), micro_batch, model=duplicate)  # refuses what cannot be cut
        return cls(
            model=duplicate,
            args=args,
            kwargs=kwargs,
            loss=loss,
            optimizer=own_optimizer,
            mode=mode,
            micro_batch=micro_batch,
        )

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return list(tensors_in((self.args, self.kwargs)))

    @property
    def optimizer_state(self) -> list[Tensor]:
        """The tensors that the optimizer keeps."""
        state = {} if self.optimizer is None else dict(self.optimizer.state)
        return list(tensors_in(list(state.values())))

    @contextlib.contextmanager
    def isolated(self) -> Iterator[None]:
        """A block for everything the step does; torch's random state is afterwards what it was."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices), self.mode or contextlib.nullcontext():
            yield

    def parts(self) -> Iterator[tuple[tuple[tuple[Any, ...], dict[str, Any]], float]]:
        """Arguments of each call, with the scale of its loss.

        Without values only the first two parts: in all later ones as much is alive as in the second, or less.
        """
        whole = (self.args, self.kwargs)
        if self.micro_batch is None:
            return iter([(whole, 1.0)])
        parts = micro_batches(whole, self.micro_batch)
        return parts if self.mode is None else itertools.islice(parts, 2)

    def output(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """What the model returns for a part.

        Raises:
            ConfigError: The model refuses the inputs.
        """
        try:
            return self.model(*call[0], **call[1])
        except Exception as error:
            outcome = "cannot be predicted, as it needs values" if _needs_values(error) else "fails"
            raise ConfigError(
                f"memory: {type(self.model).__name__} {outcome} on the example inputs in train mode: "
                f"{type(error).__name__}: {error}"
            ) from error

    def loss_of(self, output: Any) -> Tensor:
        """The loss.

        Raises:
            ConfigError: It is no differentiable scalar.
        """
        value = _sum(output) if self.loss is None else self.loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"memory: the loss is {got}; expected a differentiable scalar, e.g. "
                "loss=lambda output: torch.nn.functional.cross_entropy(output, labels)"
            )
        return value

    def zero_grad(self) -> None:
        """Free the gradients, as `optimizer.zero_grad()` does."""
        self.model.zero_grad(set_to_none=True)

    def warm_up(self) -> None:
        """The first part of a step, and the optimizer's part: afterwards all state exists."""
        self.zero_grad()
        call, _ = next(self.parts())
        self.loss_of(self.output(call)).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        if self.optimizer is not None:
            self.optimizer.step()

    def run(self) -> None:
        """One whole step."""
        self.zero_grad()
        for call, scale in self.parts():
            loss = self.loss_of(self.output(call))
            loss = loss if scale == 1 else loss * scale
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        if self.optimizer is not None:
            self.optimizer.step()


def _sum(output: Any) -> Any:
    results = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    return sum((result.sum() for result in results[1:]), results[0].sum()) if results else None


def _needs_values(error: Exception) -> bool:
    return type(error).__module__.startswith("torch._subclasses") or "DataDependent" in type(error).__name__


def _input(tensor: Tensor, mode: FakeTensorMode | None) -> Tensor:
    if mode is not None:
        return mode.from_tensor(tensor)
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _without_values(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model whose tensors have shapes only."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model):
        if id(tensor) not in memo and not isinstance(tensor, FakeTensor):
            memo[id(tensor)] = mode.from_tensor(tensor)
    with torch.no_grad():
        return copy.deepcopy(model, memo)
