"""fedmef_fx: FedMef for any PyTorch model.

Graph passes turn a model into one that trains sparse and in little memory, in federations of phones and boards, and
leaves as ONNX. Huang et al., "FedMef: Towards Memory-efficient Federated Dynamic Pruning", CVPR 2024.
"""

import importlib
import logging
import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any, Final

from fedmef_fx.moved import MOVED, MovedModules, keep_old_attributes

if TYPE_CHECKING:
    from fedmef_fx import federated
    from fedmef_fx.checkpoint import load, save
    from fedmef_fx.config import Config
    from fedmef_fx.errors import FedmefError
    from fedmef_fx.export.compact.compact import compact, compact_report
    from fedmef_fx.export.compact.report import CompactReport
    from fedmef_fx.export.freeze.freeze import freeze
    from fedmef_fx.export.onnx.digest import verify_onnx
    from fedmef_fx.export.onnx.inspect_file import inspect_onnx
    from fedmef_fx.export.onnx.onnx_file import export_onnx
    from fedmef_fx.export.onnx.report import ExportReport
    from fedmef_fx.export.onnx.unpack import unpack_onnx
    from fedmef_fx.export.training.executorch_file import export_executorch
    from fedmef_fx.export.training.report import TrainingExportReport
    from fedmef_fx.fitting.fit import fit
    from fedmef_fx.fitting.report import FitReport
    from fedmef_fx.inspection import inspect
    from fedmef_fx.measure.memory import memory
    from fedmef_fx.sparse_model.averages import averaged
    from fedmef_fx.sparse_model.masks import density, masks, set_masks
    from fedmef_fx.sparse_model.state_dicts import dense_state_dict
    from fedmef_fx.sparse_model.transformation import coverage, memory_plan, report
    from fedmef_fx.training.extrusion import Extrusion
    from fedmef_fx.training.growth import growth_candidates
    from fedmef_fx.training.micro_batches import micro_batches
    from fedmef_fx.transformation.mask_layers import mask_layers
    from fedmef_fx.transformation.transform import transform

__all__ = [
    "CompactReport",
    "Config",
    "ExportReport",
    "Extrusion",
    "FedmefError",
    "FitReport",
    "TrainingExportReport",
    "averaged",
    "compact",
    "compact_report",
    "coverage",
    "dense_state_dict",
    "density",
    "export_executorch",
    "export_onnx",
    "federated",
    "fit",
    "freeze",
    "growth_candidates",
    "inspect",
    "inspect_onnx",
    "load",
    "mask_layers",
    "masks",
    "memory",
    "memory_plan",
    "micro_batches",
    "report",
    "save",
    "set_masks",
    "transform",
    "unpack_onnx",
    "verify_onnx",
]

__version__ = "0.1.0"

_HOMES: Final = {
    "CompactReport": "export.compact.report",
    "Config": "config",
    "ExportReport": "export.onnx.report",
    "Extrusion": "training.extrusion",
    "FedmefError": "errors",
    "FitReport": "fitting.report",
    "TrainingExportReport": "export.training.report",
    "averaged": "sparse_model.averages",
    "compact": "export.compact.compact",
    "compact_report": "export.compact.compact",
    "coverage": "sparse_model.transformation",
    "dense_state_dict": "sparse_model.state_dicts",
    "density": "sparse_model.masks",
    "export_executorch": "export.training.executorch_file",
    "export_onnx": "export.onnx.onnx_file",
    "fit": "fitting.fit",
    "freeze": "export.freeze.freeze",
    "growth_candidates": "training.growth",
    "inspect": "inspection",
    "inspect_onnx": "export.onnx.inspect_file",
    "load": "checkpoint",
    "mask_layers": "transformation.mask_layers",
    "masks": "sparse_model.masks",
    "memory": "measure.memory",
    "memory_plan": "sparse_model.transformation",
    "micro_batches": "training.micro_batches",
    "report": "sparse_model.transformation",
    "save": "checkpoint",
    "set_masks": "sparse_model.masks",
    "transform": "transformation.transform",
    "unpack_onnx": "export.onnx.unpack",
    "verify_onnx": "export.onnx.digest",
}
"""Public name -> the module that defines it; importing torch takes seconds, and only its users should wait for it."""

# An application that wants to know sets a level and a handler; without, warnings would be printed by default.
logging.getLogger(__name__).addHandler(logging.NullHandler())

sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        if name in MOVED:
            keep_old_attributes(value)
        globals()[name] = value
        return value
    is_public = name.isidentifier() and not name.startswith("_")
    if is_public and PathFinder.find_spec(f"{__name__}.{name}", __path__) is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
