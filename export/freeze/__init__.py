"""From a sparse model to a plain module for inference."""

from fedmef_fx.export.freeze.freeze import freeze, frozen_graph

__all__ = ["freeze", "frozen_graph"]
