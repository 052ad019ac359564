"""What commands print for machines: a schema for each, which `json_of` holds every output of the tests against."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from fedmef_fx.cli import COMMANDS
from fedmef_fx.commands.json_schema import output_schema
from tests.cli.program import json_of


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_schema(name: str) -> None:
    schema = output_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"something": 1}, schema)


def test_no_such_command_has_none() -> None:
    with pytest.raises(KeyError):
        output_schema("nonsense")


def _definitions(schema: Any) -> Iterator[tuple[str, str]]:
    """Key and meaning of each described property of the commands' outputs."""
    if isinstance(schema, dict):
        for key, value in schema.get("properties", {}).items():
            if isinstance(value, dict) and ("$ref" in value or "description" in value):
                yield key, json.dumps(value.get("$ref") or value["description"])
        for value in schema.values():
            yield from _definitions(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _definitions(value)


def test_files_have_one_name_and_one_key_for_their_size() -> None:
    found = dict[str, set[str]]()
    for key, meaning in _definitions(output_schema("demo")["$defs"]["commands"]):
        found.setdefault(key, set()).add(meaning)
    for key in (
        "path",
        "bytes",
        "rounds",
        "density",
        "bytes_up",
        "bytes_down",
        "model",
        "input",
        "threads",
        "quantize",
    ):
        assert len(found[key]) == 1, key
    assert not {"file", "filename", "html", "output", "size"} & found.keys()


def test_quick_commands_follow_their_schema(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert json_of("doctor")["checks"]
    assert json_of("inspect", "digits_cnn")["version"] == 1
    assert json_of("inspect", "digits_cnn", "--html", "page.html")["path"] == "page.html"
