"""A transformed model's training step for runtimes on devices: loss and gradients in one graph."""
