"""The errors that fedmef_fx raises on purpose.

Every one derives from `FedmefError`, says where it happened, what was got, what was expected and what to do.
"""

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "ExportError",
    "FedmefError",
    "MissingStateError",
    "PassError",
    "RoundError",
    "VerificationError",
    "WireError",
]


class FedmefError(Exception):
    """Base class of every error that fedmef_fx raises on purpose."""


class ConfigError(FedmefError, ValueError):
    """An option or argument that cannot be used: out of range, unknown, or contradicting another one."""


class CaptureError(FedmefError):
    """A model that cannot be turned into a graph faithfully; the message names the reason."""


class PassError(FedmefError):
    """A pass met a user mistake or a bug of its own; the message names the pass and the node."""


class VerificationError(PassError):
    """A graph broke one of the named invariants after a pass."""


class ExportError(FedmefError):
    """A model could not be written for inference, or the written file disagrees with the model."""


class CheckpointError(FedmefError):
    """A checkpoint that is damaged, truncated, or belongs to another architecture."""


class WireError(FedmefError):
    """Bytes from a peer that do not decode to what the protocol allows."""


class MissingStateError(WireError):
    """A broadcast that builds on what its receiver does not have: it needs a complete one."""


class DataError(FedmefError, ValueError):
    """A data file that is missing, truncated or not in the format it should be in."""


class DivergedError(ConfigError):
    """Training whose loss is no longer finite."""


class RoundError(FedmefError, RuntimeError):
    """Rounds of a federation in a row with too few usable answers."""
