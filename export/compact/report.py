"""What `compact` says about itself."""

import dataclasses
from typing import Any

__all__ = ["CompactLayer", "CompactReport"]


@dataclasses.dataclass(frozen=True, slots=True)
class CompactLayer:
    """A weight of two or more dimensions.

    Attributes:
        name: Its name.
        before: Its shape before.
        after: Its shape now.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class CompactReport:
    """What `compact` removed, what it did not and why.

    Attributes:
        layers: Every weight of two or more dimensions, in order.
        parameters_before: Number of parameters before.
        parameters_after: Number of parameters now.
        flops_before: Operations of convolutions and products in one call on the examples; a multiply-add is two.
        flops_after: The same now.
        max_abs: Largest difference of an output on the examples and on random inputs like them.
        refusals: Pairs (where, why) of dead channels that stay, with their number.
    """

    layers: tuple[CompactLayer, ...] = ()
    parameters_before: int = 0
    parameters_after: int = 0
    flops_before: int = 0
    flops_after: int = 0
    max_abs: float = 0.0
    refusals: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def of_dict(cls, values: dict[str, Any]) -> "CompactReport":
        """The inverse of `as_dict`."""
        layers = tuple(
            CompactLayer(layer["name"], tuple(layer["before"]), tuple(layer["after"])) for layer in values["layers"]
        )
        refusals = tuple((where, why) for where, why in values["refusals"])
        return cls(**{**values, "layers": layers, "refusals": refusals})

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [
            f"{layer.name:{width}s}  {_shape(layer.before):>18s} -> {_shape(layer.after)}"
            for layer in self.layers
            if layer.before != layer.after
        ]
        lines.append(_change("parameters", self.parameters_before, self.parameters_after))
        lines.append(_change("FLOPs", self.flops_before, self.flops_after))
        lines.append(f"largest difference {self.max_abs:.1e}")
        lines += [f"refused {where}: {why}" for where, why in self.refusals]
        return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _change(what: str, before: int, after: int) -> str:
    ratio = f", {before / after:.2f} times fewer" if after else ""
    return f"{what} {before:,} -> {after:,}{ratio}"
