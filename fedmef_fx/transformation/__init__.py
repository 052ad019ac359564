"""`transform`: from a model to its sparse version."""
