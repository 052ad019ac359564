"""All passes read one way: numbered rules, `_match` decides, `_rewrite` changes, and none imports another."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from fedmef_fx.passes.catalogue import PASSES

MODULES = [step.__module__ for step in PASSES]


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_a_pass_decides_in_one_place_and_rewrites_in_another(step):
    assert callable(vars(step)["_match"])
    assert callable(vars(step)["_rewrite"])


@pytest.mark.parametrize("module", MODULES)
def test_rules_are_numbered(module):
    text = importlib.import_module(module).__doc__
    numbers = re.findall(r"^(\d)\. ", text.partition("\nRules\n")[2], re.MULTILINE)
    assert numbers == [str(number + 1) for number in range(len(numbers))]
    assert numbers


@pytest.mark.parametrize("module", MODULES)
def test_no_pass_imports_another(module):
    tree = ast.parse(Path(importlib.import_module(module).__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & set(MODULES)
