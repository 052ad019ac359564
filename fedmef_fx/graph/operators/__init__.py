"""The table of operators: a row for each, in one file per family; see `operator.py` for what a row says."""

from fedmef_fx.graph.operators import (
    activations,
    arithmetic,
    dropouts,
    norms,
    poolings,
    products,
    reductions,
    runtime,
    values,
    views,
)
from fedmef_fx.graph.operators.activations import Activation
from fedmef_fx.graph.operators.calls import arguments, bound
from fedmef_fx.graph.operators.norms import Norm
from fedmef_fx.graph.operators.operator import Operator, named, operator_of, overrides, register, rows, writes
from fedmef_fx.graph.operators.poolings import Pooling
from fedmef_fx.graph.operators.products import Layer

__all__ = [
    "Activation",
    "Layer",
    "Norm",
    "Operator",
    "Pooling",
    "arguments",
    "bound",
    "named",
    "operator_of",
    "overrides",
    "register",
    "rows",
    "writes",
]

for _family in (
    activations,
    arithmetic,
    dropouts,
    norms,
    poolings,
    products,
    reductions,
    runtime,
    values,
    views,
):
    register(*_family.ROWS)
