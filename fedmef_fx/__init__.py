"""fedmef_fx: FedMef for any PyTorch model.

Graph passes turn a model into one that trains sparse and in little memory, in federations of phones and boards, and
leaves as ONNX. Huang et al., "FedMef: Towards Memory-efficient Federated Dynamic Pruning", CVPR 2024.
"""

from fedmef_fx.api import ExportReport, export_onnx, freeze, transform
from fedmef_fx.checkpoint import load, save
from fedmef_fx.config import Config
from fedmef_fx.errors import FedmefError
from fedmef_fx.inspection import inspect
from fedmef_fx.model import coverage, density, masks, report, set_masks

__all__ = [
    "Config",
    "ExportReport",
    "FedmefError",
    "coverage",
    "density",
    "export_onnx",
    "freeze",
    "inspect",
    "load",
    "masks",
    "report",
    "save",
    "set_masks",
    "transform",
]
