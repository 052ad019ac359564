"""`Method`: the policies in which federated methods differ. The loop is the same for all of them."""

import dataclasses
from typing import Any, Literal

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.methods.fixed import Never
from fedmef_fx.federated.methods.policies import Adjustment, Opening
from fedmef_fx.federated.methods.top_gradients import TopGradients

__all__ = ["Method"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Policies of a federated training; what a policy leaves open is taken from the configuration.

    Attributes:
        name: What histories and checkpoints call it.
        initial_mask: `"dense"` for none at all, `"random"`, `"magnitude"`, an `Opening` that scores weights before the
            first round, or None for what the configuration says.
        adjustment: Who moves weights in adjustment rounds, by what, and what clients send for it: an `Adjustment`, by
            default the `"server"`, which prunes the lowest magnitudes and grows where the averaged top-k gradients of
            the clients are largest; or `"never"` anyone.
        extrudes: Whether clients extrude what is about to be pruned, as strongly as the configuration says.
        activations: `"pruned"` and packed as the configuration says, or kept `"dense"`.
        normalization: `"nsconv"`, `"keep"`, or None for what the configuration says.
        exchange: What a client and the server exchange in an adjustment round, in the terms of the FedRTS paper: O_d a
            dense model, O_s a sparse one, O_xi the top-k gradients with their positions.

    Raises:
        ConfigError: Policies that contradict each other.

    Example:
        >>> METHODS["fedtiny"].configure(Config(density=0.2)).activation_sparsity
        0.0
    """

    name: str
    initial_mask: Literal["dense", "random", "magnitude"] | Opening | None = None
    adjustment: Literal["never", "server"] | Adjustment = "server"
    extrudes: bool = True
    activations: Literal["dense", "pruned"] = "pruned"
    normalization: Literal["nsconv", "keep"] | None = None
    exchange: str = "2 O_s + O_xi"

    def __post_init__(self) -> None:
        if self.initial_mask == "dense" and self.adjusts:
            raise ConfigError(f"Method {self.name!r}: got adjustments of a dense model; expected adjustment='never'")
        if self.extrudes and not self.adjusts:
            raise ConfigError(f"Method {self.name!r}: got extrusion without adjustments; expected extrudes=False")

    @property
    def adjusts(self) -> bool:
        """Whether masks ever change."""
        return not isinstance(self.policy, Never)

    @property
    def policy(self) -> Adjustment:
        """The adjustment, as a policy."""
        if isinstance(self.adjustment, Adjustment):
            return self.adjustment
        return Never() if self.adjustment == "never" else TopGradients()

    @property
    def opening(self) -> Opening | None:
        """How the first masks are found from scores; None where the transformation draws them."""
        return self.initial_mask if isinstance(self.initial_mask, Opening) else None

    def configure(self, config: Config) -> Config:
        """The configuration with this method's policies in it.

        Raises:
            ConfigError: A granularity of masks that the method does not know.
        """
        self._check_granularity(config)
        changes: dict[str, object] = {}
        if self.initial_mask == "dense":
            changes["density"] = 1.0
        elif isinstance(self.initial_mask, str):
            changes["mask_init"] = self.initial_mask
        if self.normalization is not None:
            changes["normalization"] = self.normalization
        if not self.extrudes:
            changes["extrusion_strength"] = 0.0
        if self.activations == "dense":
            changes |= {"activation_sparsity": 0.0, "activation_bits": None, "layer_bits": ()}
        return config.replace(**changes)

    def _check_granularity(self, config: Config) -> None:
        known = {"weight"} if self.opening else self.policy.granularities
        if known and config.granularity not in known:
            raise ConfigError(
                f"Method {self.name!r}: got granularity={config.granularity!r}; expected "
                f"{' | '.join(map(repr, sorted(known)))}, as it chooses single weights"
            )

    def settings(self) -> dict[str, Any]:
        """What a run depends on, as JSON can hold it."""
        adjustment, mask = self.adjustment, self.initial_mask
        return {
            "name": self.name,
            "initial_mask": mask.settings() if isinstance(mask, Opening) else mask,
            "adjustment": adjustment.settings() if isinstance(adjustment, Adjustment) else adjustment,
            "extrudes": self.extrudes,
            "activations": self.activations,
            "normalization": self.normalization,
        }
