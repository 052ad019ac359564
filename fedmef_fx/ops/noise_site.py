"""Places of a model that round at random: each has noise of its own, and its position in it as state."""

from typing import Any, TypeAlias

import torch
from torch import nn

from fedmef_fx.packing import NoiseStream
from fedmef_fx.packing.tracers import is_traced

__all__ = ["NoiseSite", "SiteState"]

SiteState: TypeAlias = tuple[float, int, bool, float | None, int]
"""The state of an estimator, where there is one, and the draws of the noise."""


class NoiseSite(nn.Module):
    """Hands out keys of noise, one for each call.

    Attributes:
        noise: The noise.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.noise = NoiseStream(seed)

    def forward(self, *_: Any) -> Any:
        """The next key; None where no gradient is recorded, and while traced."""
        return self.noise.next_key() if torch.is_grad_enabled() and not is_traced() else None

    @property
    def is_stateful(self) -> bool:
        """Whether what comes next depends on what came before."""
        return True

    @property
    def state(self) -> SiteState:
        """All that the next call depends on."""
        return 0.0, 0, False, None, self.noise.draws

    @state.setter
    def state(self, state: SiteState) -> None:
        self.noise.draws = state[-1]

    def reset(self, *, draws: int = 0) -> None:
        """Forget everything: what follows depends on nothing that came before.

        Args:
            draws: Where the noise goes on from.
        """
        self.noise.draws = draws

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle; one from before there was noise has none."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.noise = state.get("noise", NoiseStream(0))
