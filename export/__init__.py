"""From a trained sparse model to a file for inference."""

if __name__ != "fedmef_fx.export":
    raise ImportError(f"import fedmef_fx.export, not {__name__}: two copies of one class would not be equal")
