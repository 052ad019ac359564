"""Looking at graphs: what was rewritten, by which pass, why something was not, and what each layer costs.

`inspect` takes a model apart into plain records once; text, tables, diffs, pictures and JSON are made from those.
Importing this package imports neither networkx nor rich.
"""

from fedmef_fx.inspection.comparison import Comparison, ParameterChange, compare
from fedmef_fx.inspection.document import json_schema
from fedmef_fx.inspection.inspection import Inspection, inspect
from fedmef_fx.inspection.table import LayerRow, Table
from fedmef_fx.records.graphs import GraphRecord, NodeRecord, SavedRecord, TensorRecord

__all__ = [
    "Comparison",
    "GraphRecord",
    "Inspection",
    "LayerRow",
    "NodeRecord",
    "ParameterChange",
    "SavedRecord",
    "Table",
    "TensorRecord",
    "compare",
    "inspect",
    "json_schema",
]
