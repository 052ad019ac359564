"""What is said about the operators of an int8 file."""

import dataclasses

__all__ = ["LayerPrecision"]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerPrecision:
    """How one operator of a quantized file computes.

    Attributes:
        name: Of the layer, from its weight; of what it computes, for operators without one.
        operator: `Conv`, `Gemm`, ...
        error: Of the model's outputs on calibration data with this operator alone in int8, relative to their spread;
            None where it was not measured, since all operators together cost little.
        kind: "int8" or "float32".
    """

    name: str
    operator: str
    error: float | None
    kind: str
