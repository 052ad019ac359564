"""Measuring a training step: what is held, when, and by which layer."""
