"""What is recorded of a round."""

import dataclasses
import math
from typing import Any, Final, Self, get_args, get_type_hints

from fedmef_fx.errors import CheckpointError

__all__ = ["RoundRecord", "json_number"]


_NOT_FINITE: Final = ("nan", "inf", "-inf")
# Fields that records of former versions lack.
_LATER: Final = frozenset({"metrics", "by_client"})


def json_number(value: Any) -> Any:
    """A value as strict JSON can hold it: a number that is not finite as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """One finished round.

    Attributes:
        round_index: t, counted from 0.
        adjusted: Whether it was an adjustment round.
        clients: The clients whose updates were averaged; none in a round without enough answers.
        train_loss: Mean loss of the last local epoch, weighted by samples; NaN where nobody took part.
        test_loss: Mean loss of the new global model on the test set; None without one.
        test_accuracy: Its share of correct predictions, 0 to 1; None without a test set or classes.
        density: Active share of the prunable weights, 0 to 1.
        bytes_down: Bytes from the server to all clients of the round.
        bytes_up: Bytes from them to the server.
        seconds: Wall-clock time, evaluation included.
        peak_saved_bytes: Largest number of bytes that a client kept between forward and backward.
        churn: Parameter name -> weights that changed places; empty outside adjustment rounds.
        metrics: Numbers of the strategy and of the server by name; those that clients sent are means, weighted by
            samples.
        by_client: Client -> its numbers by name: `samples`, `loss`, `bytes_down`, `bytes_up`, `peak_saved_bytes` and
            its own where it took part, `test_loss` and `test_accuracy` of the new model where it has a test set.
    """

    round_index: int
    adjusted: bool
    clients: tuple[int, ...]
    train_loss: float
    test_loss: float | None
    test_accuracy: float | None
    density: float
    bytes_down: int
    bytes_up: int
    seconds: float
    peak_saved_bytes: int
    churn: dict[str, int] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    by_client: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them: numbers that are not finite as text."""
        result = {name: json_number(value) for name, value in dataclasses.asdict(self).items()}
        result["metrics"] = {name: json_number(value) for name, value in self.metrics.items()}
        result["by_client"] = {
            str(client): {name: json_number(value) for name, value in numbers.items()}
            for client, numbers in self.by_client.items()
        }
        return result

    @classmethod
    def from_dict(cls, fields: object) -> Self:
        """Read what `to_dict` gave and JSON stored.

        Raises:
            CheckpointError: Missing or unknown fields, or values of another type.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        required = set(names) - _LATER
        if not isinstance(fields, dict) or not required <= fields.keys() <= set(names):
            raise CheckpointError(f"round record: got {fields!r:.80}; expected the fields {', '.join(names)}")
        fields = {name: _restored(value, hint) for name, (value, hint) in _with_hints(cls, fields).items()}
        for name, (value, hint) in _with_hints(cls, fields).items():
            if not _fits(value, hint):
                raise CheckpointError(f"round record: {name}: got {value!r:.80}; expected {hint}")
        return cls(**{**fields, "clients": tuple(fields["clients"])})


def _with_hints(cls: type, fields: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    hints = get_type_hints(cls)
    return {name: (value, hints[name]) for name, value in fields.items()}


def _restored(value: Any, hint: Any) -> Any:
    """A value as it was before JSON stored it."""
    if float in (hint, *get_args(hint)) and value in _NOT_FINITE:
        return float(value)
    if not isinstance(value, dict):
        return value
    if hint == dict[str, float]:
        return {name: _restored(number, float) for name, number in value.items()}
    if hint == dict[int, dict[str, float]]:
        return {
            int(client) if str(client).isdecimal() else client: _restored(numbers, dict[str, float])
            for client, numbers in value.items()
        }
    return value


def _fits(value: object, hint: Any) -> bool:
    if hint == tuple[int, ...]:
        return isinstance(value, list) and all(type(item) is int for item in value)
    if hint == dict[str, int]:
        return isinstance(value, dict) and all(type(item) is int for item in value.values())
    if hint == dict[str, float]:
        return isinstance(value, dict) and all(type(item) in (int, float) for item in value.values())
    if hint == dict[int, dict[str, float]]:
        return isinstance(value, dict) and all(
            type(client) is int and _fits(numbers, dict[str, float]) for client, numbers in value.items()
        )
    return type(value) in (get_args(hint) or (hint,))
