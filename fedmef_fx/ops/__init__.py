"""Runtime operations that transformed graphs call."""
