"""Models and data of the other tests of federations, whose conftest has the same name as any other."""

import importlib.util
from pathlib import Path

__all__ = ["blobs", "small_network"]

_PATH = Path(__file__).resolve().parent.parent / "federated" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("federated_conftest", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
blobs, small_network = _MODULE.blobs, _MODULE.small_network
