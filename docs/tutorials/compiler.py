# %% [markdown]
# # For compilers: read the graphs, write a pass
#
# `transform` is a pipeline of passes over torch.fx graphs. Each can be looked at, and yours can join them.

# %%
import dataclasses
from typing import ClassVar

import torch
from torch import nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.passes import PassResult, Program, operator_at, set_provenance

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2))
x = torch.randn(1, 3, 4, 4)

# %% [markdown]
# ## The graph
# Shapes, densities, what is kept for backward, and in brackets which pass made a node from what.

# %%
sparse = fedmef_fx.transform(net, Config(density=0.25))
print(fedmef_fx.inspect(sparse, (x,)))

# %% [markdown]
# ## After each pass
# `print_after` prints on stderr, or calls what you give it.

# %%
texts: list[str] = []
fedmef_fx.transform(net, Config(density=0.25), print_after=["insert-masks"], printer=texts.append)
print(texts[0])


# %% [markdown]
# ## A pass
# It decides by what an operator is, not by how it is spelt: `operator_at` knows functions, methods and modules alike.


# %%
@dataclasses.dataclass(frozen=True)
class ReplaceSilu:
    """`silu(x)` -> `hardswish(x)`."""

    name: ClassVar[str] = "replace-silu"

    def run(self, program: Program) -> PassResult:
        names = []
        for region, _, graph in program.graphs():
            for node in list(graph.nodes):
                row = operator_at(region, node)
                if row is None or row.name != "silu":
                    continue
                with graph.inserting_before(node):
                    new = graph.call_function(nn.functional.hardswish, (node.args[0],))
                set_provenance(new, by=self.name, origin=region.full_name(node.name))
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                names.append(region.full_name(node.name))
        return PassResult(self.name, tuple(names))


model = fedmef_fx.transform(net, Config(density=0.25), passes=[ReplaceSilu()])
result = fedmef_fx.report(model)["replace-silu"]
print(result.name, "rewrote", result.rewrites)

# %% [markdown]
# ## It survives files
# A file names the pass. Who loads it has the pass installed, or hands it over.

# %%
fedmef_fx.save(model, "model.safetensors")
try:
    fedmef_fx.load("model.safetensors", net)
except fedmef_fx.FedmefError as error:
    print(error)
again = fedmef_fx.load("model.safetensors", net, passes=[ReplaceSilu])
print(torch.equal(again.eval()(x), model.eval()(x)))

# %% [markdown]
# ## Next
# [Passes of your own](../passes.md): helpers, what is checked, packages that offer passes.
