"""The methods that the engine can run: FedMef and its baselines, as the few policies in which they differ."""

import dataclasses
from collections.abc import Mapping
from typing import Final, Literal

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError

__all__ = ["METHODS", "Method", "method_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Policies of a federated training; what a policy leaves open is taken from the configuration.

    Attributes:
        name: What histories and checkpoints call it.
        initial_mask: `"dense"` for none at all, `"random"`, `"magnitude"`, or None for what the configuration says.
        adjustment: Who moves weights in adjustment rounds: `"never"` anyone, or the `"server"`, which prunes the lowest
            magnitudes and grows where the averaged top-k gradients of the clients are largest.
        extrudes: Whether clients extrude what is about to be pruned, as strongly as the configuration says.
        activations: `"pruned"` and packed as the configuration says, or kept `"dense"`.
        normalization: `"nsconv"`, `"keep"`, or None for what the configuration says.

    Raises:
        ConfigError: Policies that contradict each other.

    Example:
        >>> METHODS["fedtiny"].configure(Config(density=0.2)).activation_sparsity
        0.0
    """

    name: str
    initial_mask: Literal["dense", "random", "magnitude"] | None = None
    adjustment: Literal["never", "server"] = "server"
    extrudes: bool = True
    activations: Literal["dense", "pruned"] = "pruned"
    normalization: Literal["nsconv", "keep"] | None = None

    def __post_init__(self) -> None:
        if self.initial_mask == "dense" and self.adjustment != "never":
            raise ConfigError(f"Method {self.name!r}: got adjustments of a dense model; expected adjustment='never'")
        if self.extrudes and self.adjustment == "never":
            raise ConfigError(f"Method {self.name!r}: got extrusion without adjustments; expected extrudes=False")

    def configure(self, config: Config) -> Config:
        """The configuration with this method's policies in it."""
        changes: dict[str, object] = {}
        if self.initial_mask == "dense":
            changes["density"] = 1.0
        elif self.initial_mask is not None:
            changes["mask_init"] = self.initial_mask
        if self.normalization is not None:
            changes["normalization"] = self.normalization
        if not self.extrudes:
            changes["extrusion_strength"] = 0.0
        if self.activations == "dense":
            changes |= {"activation_sparsity": 0.0, "activation_bits": None, "layer_bits": ()}
        return config.replace(**changes)


def _baseline(name: str, mask: Literal["dense", "random", "magnitude"] | None, *, adjusts: bool = False) -> Method:
    """A method without FedMef's two ideas."""
    adjustment: Literal["never", "server"] = "server" if adjusts else "never"
    return Method(
        name=name,
        initial_mask=mask,
        adjustment=adjustment,
        extrudes=False,
        activations="dense",
        normalization="keep",
    )


METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        Method(name="fedmef"),
        _baseline("fedtiny", "random", adjusts=True),
        _baseline("static-magnitude", "magnitude"),
        _baseline("static-random", "random"),
        _baseline("fedavg", "dense"),
    )
}
"""By name: FedMef (Huang et al., 2024), FedTiny (Huang et al., 2023), a static mask by magnitude at the start (as in
FL-PQSU) or at random, and FedAvg on the dense model (McMahan et al., 2017)."""


def method_of(method: str | Method) -> Method:
    """A method by its name; a method itself is returned unchanged.

    Raises:
        ConfigError: An unknown name.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ConfigError(f"method: got {method!r}; expected {' | '.join(map(repr, METHODS))}, or a Method(...)")
    return METHODS[method]
