"""The JSON document of an inspection."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any, Final

from fedmef_fx.inspection.table import Table
from fedmef_fx.records.graphs import GraphRecord, NodeRecord
from fedmef_fx.records.passes import PassReport

__all__ = ["SCHEMA", "SCHEMA_VERSION", "document", "json_schema", "to_json"]

SCHEMA: Final = "fedmef-fx/inspection"
SCHEMA_VERSION: Final = 1
"""Raised when a field changes its meaning or goes away; new fields alone do not raise it."""


def document(graphs: Iterable[GraphRecord], table: Table, passes: PassReport, notices: Sequence[str]) -> dict[str, Any]:
    """What `Inspection.to_json` writes, as Python values; the fields are described there."""
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "graphs": [
            {"region": graph.region, "mode": graph.mode, "nodes": [_node(node) for node in graph.nodes]}
            for graph in graphs
        ],
        "parameters": table.as_dicts(),
        "rest_saved": table.rest_saved,
        "rest_saved_before": table.rest_saved_before,
        "passes": [
            {
                "name": result.name,
                "rewrites": list(result.rewrites),
                "refusals": [{"where": refusal.where, "reason": refusal.reason} for refusal in result.refusals],
            }
            for result in passes
        ],
        "notices": list(notices),
    }


def _node(node: NodeRecord) -> dict[str, Any]:
    return {
        **dataclasses.asdict(node),
        "inputs": list(node.inputs),
        "tensors": [{"shape": list(tensor.shape), "dtype": tensor.dtype} for tensor in node.tensors],
        "saved": None if node.saved is None else [dataclasses.asdict(saved) for saved in node.saved],
    }


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `Inspection.to_json` writes; it may gain fields within a version."""
    text = resources.files("fedmef_fx.inspection").joinpath("schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def to_json(content: dict[str, Any]) -> str:
    """A document as JSON text in ASCII; `<` is written as an escape, so that the text can stand inside HTML."""
    return json.dumps(content, indent=2, allow_nan=False).replace("<", "\\u003c")
