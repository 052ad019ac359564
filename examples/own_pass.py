"""A pass of one's own: SiLU becomes Hardswish, which small processors compute without an exponential."""

import dataclasses
from typing import ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx.passes import PassResult, Program, Refusal, Region, operator_at, set_provenance


@dataclasses.dataclass(frozen=True)
class ReplaceSilu:
    """`silu(x)` -> `hardswish(x)`; refused where it writes into its input."""

    name: ClassVar[str] = "replace-silu"
    ignore: tuple[str, ...] = ()

    def run(self, program: Program) -> PassResult:
        rewrites, refusals = {}, {}
        for region, _, graph in program.graphs():
            for node in list(graph.nodes):
                row, name = operator_at(region, node), region.full_name(node.name)
                if row is None or row.name != "silu" or node.name in self.ignore:
                    continue
                if getattr(region.module(node), "inplace", False) or node.kwargs.get("inplace"):
                    refusals[name] = Refusal(name, "it writes into its input")
                    continue
                self.replace(region, node)
                rewrites[name] = None
        return PassResult(self.name, tuple(rewrites), tuple(refusals.values()))

    def replace(self, region: Region, node: fx.Node) -> None:
        with node.graph.inserting_before(node):
            new = node.graph.call_function(F.hardswish, (node.args[0],))
        set_provenance(new, by=self.name, origin=region.full_name(node.name))
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)


if __name__ == "__main__":
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 10))
    model = fedmef_fx.transform(net, fedmef_fx.Config(density=0.2), passes=[ReplaceSilu()])
    print(fedmef_fx.report(model)["replace-silu"])
    print(fedmef_fx.inspect(model, (torch.randn(1, 3, 8, 8),)).diff(net))
    fedmef_fx.save(model, "model.safetensors")  # holds the text "replace-silu{ignore=()}", no code
    fedmef_fx.load("model.safetensors", net, passes=[ReplaceSilu])
