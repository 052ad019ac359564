"""Extrusion, growth, adjustment, clipping and micro-batches, for any training loop."""
