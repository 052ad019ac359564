"""Masks that are drawn once and stay: at random, or by magnitude at the start (as in FL-PQSU, Xu et al., 2021)."""

from typing import Final

from fedmef_fx.federated.methods.baseline import baseline

__all__ = ["STATIC_MAGNITUDE", "STATIC_RANDOM"]

STATIC_RANDOM: Final = baseline("static-random", "random", "never", exchange="2 O_s")
"""The mask that FedTiny and FedMef start from, never adjusted."""
STATIC_MAGNITUDE: Final = baseline("static-magnitude", "magnitude", "never", exchange="2 O_s")
"""Of each layer the weights of largest magnitude at the start."""
