"""The methods that the engine runs, by name."""

from collections.abc import Mapping
from typing import Final

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.methods.fedavg import FEDAVG
from fedmef_fx.federated.methods.feddst import FEDDST
from fedmef_fx.federated.methods.fedfit import FEDFIT
from fedmef_fx.federated.methods.fedmef import FEDMEF
from fedmef_fx.federated.methods.fedrts import FEDRTS
from fedmef_fx.federated.methods.fedtiny import FEDTINY
from fedmef_fx.federated.methods.method import Method
from fedmef_fx.federated.methods.prunefl import PRUNEFL
from fedmef_fx.federated.methods.snip import SNIP
from fedmef_fx.federated.methods.ssfl import SSFL
from fedmef_fx.federated.methods.static import STATIC_MAGNITUDE, STATIC_RANDOM
from fedmef_fx.federated.methods.synflow import SYNFLOW

__all__ = ["METHODS", "method_of"]

METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        FEDMEF,
        FEDTINY,
        FEDDST,
        PRUNEFL,
        FEDRTS,
        FEDFIT,
        SNIP,
        SYNFLOW,
        SSFL,
        STATIC_MAGNITUDE,
        STATIC_RANDOM,
        FEDAVG,
    )
}
"""FedMef first, FedAvg on the dense model last; each module says where its method was published."""


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
