"""JSON and DOT: complete, versioned, and closed against hostile names."""

import json
import re
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.inspection import inspect, json_schema
from tests.inspection.models import HOSTILE_NAMES, PerMode, hostile, linear, two_convolutions


def _closed(schema: Any) -> Any:
    """A schema that allows no other fields, so that the tests notice fields that it does not describe."""
    match schema:
        case dict():
            closed = {key: _closed(value) for key, value in schema.items()}
            return {**closed, "additionalProperties": False} if schema.get("type") == "object" else closed
        case list():
            return [_closed(item) for item in schema]
        case _:
            return schema


SCHEMA = json_schema()
CLOSED = _closed(SCHEMA)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    document = json.loads(inspect(linear()).to_json())
    for path, value in ((("version",), 2), (("graphs", 0, "mode"), "test"), (("parameters", 0, "active"), -1)):
        broken = json.loads(json.dumps(document))
        *parents, last = path
        owner = broken
        for key in parents:
            owner = owner[key]
        owner[last] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


@pytest.mark.parametrize("build", [linear, two_convolutions, PerMode])
@pytest.mark.parametrize("transformed", [False, True])
def test_json_follows_its_schema(build: type[nn.Module], transformed: bool) -> None:
    model = build()
    inputs = (torch.ones(2, 1, 8, 8),) if build is two_convolutions else (torch.ones(3, 4),)
    original = model if transformed else None
    if transformed:
        model = fedmef_fx.transform(model, Config(density=0.5, weight_storage="dense"))
    document = json.loads(inspect(model, inputs).to_json(original))
    assert all((row["saved_before"] is not None) == transformed for row in document["parameters"])
    jsonschema.validate(document, CLOSED)
    assert (document["schema"], document["version"]) == ("fedmef-fx/inspection", 1)
    assert bool(document["passes"]) == transformed
    saved = [entry for graph in document["graphs"] for node in graph["nodes"] for entry in node["saved"] or ()]
    assert sum(entry["nbytes"] for entry in saved if not entry["counted_at"]) > 0


def test_json_names_the_refusals() -> None:
    document = json.loads(inspect(fedmef_fx.transform(linear(), Config(density=0.5, weight_storage="dense"))).to_json())
    (entry,) = [entry for entry in document["passes"] if entry["name"].startswith("prune-activations")]
    assert entry["refusals"][0]["where"] == "input_1"


def test_json_gives_hostile_names_back_and_closes_no_script() -> None:
    text = inspect(hostile()).to_json()
    assert "<" not in text
    assert text.isascii()
    document = json.loads(text)
    targets = [node["target"] for node in document["graphs"][0]["nodes"]]
    assert set(HOSTILE_NAMES) <= set(targets)


def _strings_and_rest(dot: str) -> tuple[list[str], str]:
    """The quoted strings of a DOT document, and what is left without them."""
    pattern = re.compile(r'"((?:[^"\\]|\\.)*)"')
    return pattern.findall(dot), pattern.sub("S", dot)


def test_dot_keeps_hostile_names_inside_strings() -> None:
    dot = inspect(hostile(), (torch.ones(1, 2),)).to_dot()
    strings, rest = _strings_and_rest(dot)
    # What is left is our own: identifiers, edges and attributes.
    assert re.fullmatch(r"[A-Za-z0-9_ \n{};,=\[\]>S-]*", rest)
    assert any("<script>" in string for string in strings)
    assert any(r"back\\\\slash" in repr(string) for string in strings)
    assert max(map(len, strings)) < 300, "a name of 10,000 characters makes no box"


def test_dot_colours_what_a_pass_made() -> None:
    dot = inspect(fedmef_fx.transform(linear(), Config(density=0.5, weight_storage="dense"))).to_dot()
    assert 'tooltip="insert-masks"' in dot
    assert dot.count("->") == sum(len(n.inputs) for n in inspect(fedmef_fx.transform(linear())).graphs[0].nodes)


def test_dot_has_a_cluster_per_graph() -> None:
    strings, rest = _strings_and_rest(inspect(PerMode()).to_dot())
    assert {"train", "eval"} <= set(strings)
    assert rest.count("subgraph cluster_") == 2
    identifiers = re.findall(r"^ +(\w+) \[", rest, flags=re.MULTILINE)
    assert len(identifiers) == len(set(identifiers)) == 1 + 2 * 4  # the defaults of `node`, and each node of each graph
