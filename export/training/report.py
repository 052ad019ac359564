"""What `export_executorch` wrote, and how it compares with torch."""

import dataclasses
from pathlib import Path

from fedmef_fx.display.sizes import shown_bytes

__all__ = ["DeviceCheck", "TrainingExportReport"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCheck:
    """Steps of gradient descent in the runtime, each computed by torch at the same weights.

    Attributes:
        steps: How many, each on another batch.
        loss: Largest difference of a loss, relative to the loss.
        gradients: Norm of the difference of all gradients over their norm, the median of the steps.
        worst_gradients: Likewise, the largest of the steps.
        masked: Largest magnitude of a masked weight in the runtime after all steps; 0 where a mask holds.
    """

    steps: int
    loss: float
    gradients: float
    worst_gradients: float
    masked: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingExportReport:
    """A file that trains on a device.

    Attributes:
        path: The file.
        bytes: Its size.
        planned_bytes: Memory that the runtime plans for one step besides parameters and gradients of the file: inputs,
            activations that wait for the backward, temporaries.
        parameters: How many parameters are trained.
        batch_size: Samples per step, which is fixed.
        check: Against torch; None where it was not asked for.
        notices: What the model does in training and the file does not.
    """

    path: Path
    bytes: int
    planned_bytes: int
    parameters: int
    batch_size: int
    check: DeviceCheck | None
    notices: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.path}: {shown_bytes(self.bytes)}, plans {shown_bytes(self.planned_bytes)} for steps of "
            f"{self.batch_size} samples, {self.parameters} parameters"
        ]
        if self.check is not None:
            lines.append(
                f"{self.check.steps} steps in the runtime: losses differ by {self.check.loss:.1e}, gradients by "
                f"{self.check.gradients:.1e} (at most {self.check.worst_gradients:.1e}), masked weights by "
                f"{self.check.masked:g} from 0"
            )
        return "\n".join([*lines, *(f"notice: {notice}" for notice in self.notices)])
