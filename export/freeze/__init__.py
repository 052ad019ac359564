"""From a sparse model to a plain module for inference."""

from fedmef_fx.export.freeze.freeze import freeze

__all__ = ["freeze"]
