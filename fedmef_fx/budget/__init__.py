"""Planning a transformation that keeps a memory budget."""
