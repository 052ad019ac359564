"""Transformed models in files: `save` and `load`, and folders as the Hugging Face Hub has them (`hub`)."""

from fedmef_fx.checkpoint.model_file import load, save

__all__ = ["load", "save"]
