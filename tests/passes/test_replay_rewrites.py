"""A graph that is captured later reads the masks and kernels that the model has; no stored value changes."""

import torch
from torch import nn

from fedmef_fx.graph.origin import provenance
from fedmef_fx.passes.catalogue import PASSES
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.replay_rewrites import ReplayRewrites
from tests.passes.programs import program_for, run, text_of


def masked(model):
    """A model with masks, as a program has made them, and nothing of its graphs."""
    run(program_for(model), FunctionalizeWeights(), InsertMasks(0.5))
    return model


def test_masks_that_exist_are_read_in_a_new_graph():
    model = masked(nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = program_for(model)
    result = run(program, FunctionalizeWeights(), ReplayRewrites())
    assert result.rewrites == ("0.weight",)
    assert text_of(program).splitlines() == [
        "_0_weight = 0.weight",
        "_0_weight_mask = 0.weight_mask",
        "masked_weight = masked_weight(_0_weight, _0_weight_mask)",
        "linear = linear(input_1, masked_weight)",
        "_1 = 1(linear)",
        "return _1",
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    text = text_of(program)
    assert not run(program, ReplayRewrites()).modified
    assert text_of(program) == text


def test_new_nodes_name_the_pass_that_is_replayed():
    program = program_for(masked(nn.Sequential(nn.Linear(8, 6))))
    run(program, FunctionalizeWeights(), ReplayRewrites())
    ((_, _, graph),) = program.graphs()
    by = {provenance(node)[0] for node in graph.nodes if provenance(node) is not None}
    assert by == {"functionalize-weights", "insert-masks"}
    assert by <= {step.name for step in PASSES}


def test_a_model_without_masks_stays():
    program = program_for(nn.Sequential(nn.Linear(8, 6)))
    run(program, FunctionalizeWeights())
    before = text_of(program)
    assert not run(program, ReplayRewrites()).modified
    assert text_of(program) == before
