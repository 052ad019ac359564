"""The verifier names the broken invariant, the pass and the node."""

import dataclasses
import operator
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

from fedmef_fx.capture import capture_graphs
from fedmef_fx.config import Config
from fedmef_fx.errors import PassError, VerificationError
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.pipeline import Pipeline
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.records.passes import PassResult
from fedmef_fx.sparse_model.transformation import Transformation


def program() -> Program:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model.register_buffer("counter", torch.zeros(()))
    return Program(model, [Region("", model, capture_graphs(model))], Transformation(Config(density=0.5)))


@dataclasses.dataclass(frozen=True)
class Broken:
    """A pass that does one wrong thing."""

    name: ClassVar[str] = "broken"
    what: str = ""

    def run(self, program: Program) -> PassResult:
        region, graph = program.regions[0], program.regions[0].graphs["both"]
        return getattr(self, self.what)(program, region, graph)

    def crash(self, program, region, graph):
        return next(iter([]))

    def lose_key(self, program, region, graph):
        del region.owner.counter
        return PassResult(self.name, ("counter",))

    def new_input(self, program, region, graph):
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder("extra")
        set_provenance(node, by=self.name, origin="nothing")
        return PassResult(self.name, ("extra",))

    def no_provenance(self, program, region, graph):
        relu = next(node for node in graph.nodes if node.target == "1")
        with graph.inserting_after(relu):
            graph.call_function(operator.neg, (relu,))
        return PassResult(self.name, ("neg",))

    def silent(self, program, region, graph):
        relu = next(node for node in graph.nodes if node.target == "1")
        relu.replace_all_uses_with(relu.args[0])
        graph.erase_node(relu)
        return PassResult(self.name)

    def dangling(self, program, region, graph):
        next(node for node in graph.nodes if node.target == "1").target = "no.such.module"
        return PassResult(self.name, ("no.such.module",))

    def unmasked(self, program, region, graph):
        node = next(node for node in graph.nodes if node.target is masked_weight)
        node.replace_all_uses_with(node.args[0])
        return PassResult(self.name, (node.name,))

    def wrong_mask(self, program, region, graph):
        region.owner.get_submodule("0").weight_mask = torch.ones(3, dtype=torch.bool)
        return PassResult(self.name)

    def training_flag(self, program, region, graph):
        region.owner.get_submodule("1").eval()
        return PassResult(self.name)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lose_key", r"pass broken: names are kept: the state dict lost 'counter'"),
        ("new_input", r"interface is kept: .*placeholder extra"),
        ("no_provenance", r"inserted nodes have provenance: node neg"),
        ("silent", r"report is truthful: the graph changed"),
        ("dangling", r"pass broken: graphs are well formed|targets exist: node _1 refers to 'no\.such\.module'"),
        ("unmasked", r"masked parameters are read through masks: node \w+ reads \d\.weight without its mask"),
        ("wrong_mask", r"masks match: the mask of 0\.weight is torch\.bool \(3,\)"),
        ("training_flag", r"training flags are kept: module '1' had training=True"),
    ],
)
def test_a_broken_pass_is_named(what, message):
    subject = program()
    verifier = Verifier.of(subject)
    steps = (FunctionalizeWeights(), InsertMasks(density=0.5), Broken(what))
    with pytest.raises(VerificationError, match=message):
        Pipeline(steps, after_pass=verifier).run(subject)


def test_a_crash_names_the_pass_and_chains_its_cause():
    with pytest.raises(PassError, match=r"pass broken: StopIteration") as error:
        Pipeline((Broken("crash"),)).run(program())
    assert isinstance(error.value.__cause__, StopIteration)


def test_sound_passes_pass():
    subject = program()
    report = Pipeline((FunctionalizeWeights(), InsertMasks(density=0.5)), after_pass=Verifier.of(subject)).run(subject)
    assert [len(result.rewrites) for result in report] == [2, 2]
    assert report["insert-masks"].name == (
        "insert-masks{density=0.5, allocation='erk', mask_init='random', seed=0, ignore=(), "
        "granularity='weight', channel_multiple=8, output_layer='pruned', mask_frozen=False}"
    )
    with pytest.raises(KeyError, match="no pass 'x'; passes: functionalize"):
        report["x"]


def test_graphs_are_fx_graphs():
    assert isinstance(program().regions[0].graphs["both"], fx.Graph)
