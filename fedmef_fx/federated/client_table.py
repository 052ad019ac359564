"""The clients of a run, one row each: how often they took part, what they sent, how the model does on their data."""

import statistics
from collections.abc import Sequence
from typing import Final

from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.federated.failures import Failure
from fedmef_fx.federated.rounds import RoundRecord

__all__ = ["client_cells"]

_SUMS: Final = ("bytes_down", "bytes_up")
_LARGEST: Final = ("peak_saved_bytes",)
_KNOWN: Final = ("samples", "loss", *_SUMS, *_LARGEST)


def client_cells(
    rounds: Sequence[RoundRecord], failures: Sequence[Failure]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows, by client.

    Numbers are those of the last round that has them, but for the mean loss, bytes (sums) and the peak (the largest).

    Args:
        rounds: The rounds of a run.
        failures: Who was left out of them.
    """
    found: dict[int, dict[str, list[float]]] = {}
    for record in rounds:
        for client, numbers in record.by_client.items():
            for name, value in numbers.items():
                found.setdefault(client, {}).setdefault(name, []).append(value)
    for failure in failures:
        found.setdefault(failure.client, {})
    others = dict.fromkeys(name for numbers in found.values() for name in numbers if name not in _KNOWN)
    headings = ("client", "rounds", "failed", "samples", "mean loss", "last loss", "down", "up", "saved peak", *others)
    return headings, [_row(client, found[client], others, failures) for client in sorted(found)]


def _row(
    client: int, numbers: dict[str, list[float]], others: dict[str, None], failures: Sequence[Failure]
) -> tuple[str, ...]:
    losses = numbers.get("loss", [])
    return (
        str(client),
        str(len(losses)),
        str(sum(failure.client == client for failure in failures)),
        f"{numbers['samples'][-1]:.0f}" if "samples" in numbers else "-",
        f"{statistics.fmean(losses):.4f}" if losses else "-",
        f"{losses[-1]:.4f}" if losses else "-",
        *(shown_bytes(int(sum(numbers.get(name, [])))) for name in _SUMS),
        *(shown_bytes(int(max(numbers.get(name, [0])))) for name in _LARGEST),
        *(f"{numbers[name][-1]:.6g}" if name in numbers else "-" for name in others),
    )
