"""Masks that never change."""

import dataclasses
from typing import ClassVar

from fedmef_fx.federated.methods.policies import Adjustment, AfterRound

__all__ = ["Never"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Never(Adjustment):
    """Nobody prunes, nothing grows; clients send their weights alone."""

    name: ClassVar[str] = "never"
    granularities: ClassVar[frozenset[str]] = frozenset()  # any

    def finish(self, after: AfterRound) -> dict[str, int]:
        """Leave masks as they are."""
        return {}
