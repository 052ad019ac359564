"""From a sparse model to a plain module for inference."""
