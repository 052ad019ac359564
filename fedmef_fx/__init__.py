"""fedmef_fx: FedMef for any PyTorch model.

Graph passes turn a model into one that trains sparse and in little memory, in federations of phones and boards, and
leaves as ONNX. Huang et al., "FedMef: Towards Memory-efficient Federated Dynamic Pruning", CVPR 2024.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

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
from fedmef_fx.inspection import inspect
from fedmef_fx.measure.memory import memory
from fedmef_fx.moved import MovedModules, keep_old_attributes
from fedmef_fx.sparse_model.averages import averaged, watch_averages
from fedmef_fx.sparse_model.masks import density, masks, set_masks
from fedmef_fx.sparse_model.state_dicts import dense_state_dict
from fedmef_fx.sparse_model.transformation import coverage, memory_plan, report
from fedmef_fx.training.distributed import watch_wrappers
from fedmef_fx.training.extrusion import Extrusion
from fedmef_fx.training.growth import growth_candidates
from fedmef_fx.training.micro_batches import micro_batches
from fedmef_fx.transformation.mask_layers import mask_layers
from fedmef_fx.transformation.transform import transform

if TYPE_CHECKING:
    from fedmef_fx import federated

__all__ = [
    "CompactReport",
    "Config",
    "ExportReport",
    "Extrusion",
    "FedmefError",
    "averaged",
    "compact",
    "compact_report",
    "coverage",
    "dense_state_dict",
    "density",
    "export_onnx",
    "federated",
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

sys.meta_path.append(MovedModules())
watch_averages()  # also for models that are unpickled, before anything else is called
watch_wrappers()
keep_old_attributes(memory)
keep_old_attributes(micro_batches)


def __getattr__(name: str) -> Any:
    # The federation takes as long to import as all the rest: only its users should wait for it.
    if name == "federated":
        return importlib.import_module("fedmef_fx.federated")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
