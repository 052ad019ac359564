"""The graph passes, one per file."""

if __name__ != "fedmef_fx.passes":
    raise ImportError(f"import fedmef_fx.passes, not {__name__}: two copies of one class would not be equal")
