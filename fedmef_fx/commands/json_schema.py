"""The JSON Schema of what commands print with `--json`: one name per thing, in all of them."""

import json
from importlib import resources
from typing import Any

from fedmef_fx.inspection.document import json_schema

__all__ = ["output_schema"]


def output_schema(command: str) -> dict[str, Any]:
    """The schema of a command's output.

    Args:
        command: Its name, such as `export`.

    Raises:
        KeyError: There is no such command.
    """
    document: dict[str, Any] = json.loads(
        resources.files("fedmef_fx").joinpath("commands/schema.json").read_text(encoding="utf-8")
    )
    document["$defs"]["commands"][command]
    document["$defs"]["inspection"] = {**json_schema(), "$id": "urn:fedmef-fx:inspection"}
    return {**document, "$ref": f"#/$defs/commands/{command}"}
