"""Extrusion, growth, adjustment, clipping and micro-batches, for anybody's training loop."""
