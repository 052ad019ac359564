"""Passes from text: what a report writes is read back, and nothing else is."""

import contextlib
import dataclasses
import string
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fedmef_fx.passes
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.pipeline import describe
from fedmef_fx.passes.catalogue import PASSES, parse_pass, parse_passes
from fedmef_fx.passes.compress_saved import CompressSaved
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.replay_rewrites import ReplayRewrites
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.passes.shrink_saved import ShrinkSaved

IGNORE = st.lists(st.text(), max_size=3).map(tuple)
SHARES = st.floats(0, 1)
STATISTICS = st.sampled_from(["active", "all"])
STEPS = st.one_of(
    st.builds(FunctionalizeWeights, IGNORE),
    st.builds(
        InsertMasks,
        SHARES,
        st.sampled_from(["erk", "uniform"]),
        st.sampled_from(["random", "magnitude"]),
        st.integers(),
        IGNORE,
        st.text(),
        st.integers(),
    ),
    st.builds(NormalizeKernels, STATISTICS, IGNORE),
    st.builds(RescaleResiduals),
    st.builds(CompressSaved, IGNORE),
    st.builds(ShrinkSaved),
    st.builds(
        PruneActivations,
        SHARES,
        st.integers(),
        st.integers(),
        IGNORE,
        st.sampled_from(["same", "bfloat16", "float16"]),
    ),
    st.builds(PackWeights),
    st.builds(ReplayRewrites, STATISTICS, IGNORE),
)


@given(STEPS)
def test_what_describes_a_pass_is_read_back(step):
    assert parse_pass(describe(step)) == step


@given(st.lists(STEPS, max_size=4).map(tuple))
def test_several_in_one_text_are_read_back(steps):
    text = "; ".join(map(describe, steps))
    assert parse_passes(text) == steps
    assert parse_passes((text, *steps)) == (*steps, *steps)


def test_the_catalogue_has_every_pass():
    folder = Path(fedmef_fx.passes.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {"catalogue"}
    assert {step.__module__.rpartition(".")[2] for step in PASSES} == modules
    assert len({step.name for step in PASSES}) == len(PASSES)


def test_a_type_is_written_as_in_config():
    step = CompressSaved(ignore=(nn.Linear, "head"))
    assert describe(step) == (
        "compress-saved{ignore=('type:torch.nn.modules.linear.Linear', 'head'), saved_precision='int8'}"
    )
    assert describe(parse_pass(describe(step))) == describe(step)


def test_options_that_are_left_out_take_their_defaults():
    assert parse_pass(" insert-masks{ seed = 3 } ") == InsertMasks(seed=3)
    assert parse_pass("shrink-saved{}") == parse_pass("shrink-saved") == ShrinkSaved()
    assert parse_passes("") == parse_passes(()) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("insert-mask", r"'insert-mask'; expected functionalize-weights, .*did you mean insert-masks"),
        ("insert-masks{densty=0.1}", r"pass insert-masks: .*'densty'; expected density, .*did you mean density"),
        ("pack-weights{a=1}", r"pass pack-weights: .*'a'; expected none"),
        ("insert-masks{density='a'}", r"pass insert-masks: density: got 'a'; expected a finite number"),
        ("insert-masks{density=1e999}", r"density: got inf; expected a finite number"),
        ("insert-masks{seed=True}", r"seed: got True; expected an integer"),
        ("insert-masks{allocation='er'}", r"allocation: got 'er'; expected 'erk' or 'uniform'"),
        ("insert-masks{ignore=('a')}", r"ignore: got 'a'; expected a tuple such as \('a', 'b'\)"),
        ("insert-masks{ignore=(1,)}", r"ignore: got \(1,\); expected a tuple"),
        ("insert-masks{seed=1, seed=2}", r"option seed is given twice"),
        ("insert-masks{0.1}", r"expected insert-masks\{option=value, ...\}"),
        ("insert-masks{density=0.1", r"expected name or name\{option=value, ...\}"),
        ("{density=0.1}", r"expected name or name"),
        ("insert-masks{density=__import__('os')}", r"density: expected a Python literal"),
        ("insert-masks{density=0.1)(seed=1}", r"expected insert-masks\{option=value, ...\}"),
        ("insert-masks{**{'seed': 1}}", r"expected insert-masks\{option=value, ...\}"),
        ("insert-masks{ignore=('\\d',)}", r"expected insert-masks\{option=value, ...\}"),
        ("pack-weights;;shrink-saved", r"expected a pass before and after each ';'"),
        ("pack-weights;", r"expected a pass before and after each ';'"),
    ],
)
def test_what_cannot_be_read_says_what_was_expected(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_passes(text)


@pytest.mark.parametrize(
    "value",
    ["-" * 9000 + "1", "[" * 9000, "+".join("1" * 4000), "1" * 9000, "\x00", "\ud800", "f()" * 3000, "()" * 3000],
    ids=["signs", "brackets", "sums", "digits", "null", "surrogate", "calls", "pairs"],
)
def test_hostile_values_are_refused(value):
    with pytest.raises(ConfigError) as caught:
        parse_pass(f"insert-masks{{density={value}}}")
    assert len(str(caught.value)) < 500


@given(st.text(max_size=40) | st.text(string.punctuation + "insert-masks{density=1}; ", max_size=40))
def test_no_text_does_anything_but_parse_or_fail(text):
    with contextlib.suppress(ConfigError):
        assert all(step.name in text for step in parse_passes(text))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (3, "got int; expected a sequence of passes"),
        ((PackWeights,), r"got the class PackWeights; expected a pass, e.g. PackWeights\(\)"),
        ((3,), r"got int; expected a pass, with a name and run\(program\)"),
    ],
)
def test_what_is_no_pass_is_refused(passes, message):
    with pytest.raises(ConfigError, match=message):
        parse_passes(passes)


def test_classes_of_the_caller_can_be_named_too():
    @dataclasses.dataclass(frozen=True)
    class Count:
        name: ClassVar[str] = "count"
        at_most: int
        label: str | None = None

        def run(self, program):
            raise NotImplementedError

    known = (*PASSES, Count)
    assert parse_passes("count{at_most=3, label=None}; shrink-saved", known=known) == (Count(3), ShrinkSaved())
    with pytest.raises(ConfigError, match=r"got no at_most; expected count\{at_most=...\}"):
        parse_pass("count", known=known)
