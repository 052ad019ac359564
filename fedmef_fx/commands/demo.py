"""`fedmef-fx demo`: the whole story on handwritten digits, from a dense model to a verified ONNX file."""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset

import fedmef_fx
from fedmef_fx.commands.command import AsJson, Result, command, progress_bar
from fedmef_fx.commands.tables import bytes_text, show_table
from fedmef_fx.commands.train import round_note
from fedmef_fx.commands.twin import masked_dense_twin
from fedmef_fx.data import stacked
from fedmef_fx.demo import DemoResult, run_demo
from fedmef_fx.memory_report import memory
from fedmef_fx.models import digits_cnn

__all__ = ["demo"]
