"""`Program`: a model on its way through the passes, as regions of torch.fx graphs over one module tree.

A region is a module whose forward was traced. It has one graph where train and eval mode run the same operations and
one graph per mode where they differ (`F.dropout(training=self.training)`, auxiliary heads, stochastic depth). All
graphs resolve their targets against the same module, so parameters are never copied.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeAlias

from torch import Tensor, fx, nn

from fedmef_fx.model import Transformation

__all__ = ["GraphMode", "Program", "Region", "join", "provenance", "set_provenance"]

GraphMode: TypeAlias = Literal["both", "train", "eval"]

_META = "fedmef_fx"


@dataclasses.dataclass
class Region:
    """A traced module.

    Attributes:
        path: Name of the module in the model; "" is the whole model.
        owner: The module against which the graphs resolve their targets.
        graphs: Either {"both": graph} or {"train": graph, "eval": graph}.
    """

    path: str
    owner: nn.Module
    graphs: dict[GraphMode, fx.Graph]

    def graph_for(self, *, training: bool) -> fx.Graph:
        """The graph that runs in a mode."""
        return self.graphs.get("both") or self.graphs["train" if training else "eval"]

    def full_name(self, target: str) -> str:
        """The name in the whole model of something a graph of this region refers to."""
        return join(self.path, target)

    def attribute(self, target: str) -> object:
        """What a `get_attr` or `call_module` target refers to.

        Raises:
            AttributeError: Nothing has that name.
        """
        found: object = self.owner
        for part in target.split("."):
            found = getattr(found, part)
        return found

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, None for other nodes."""
        if node.op != "call_module":
            return None
        found = self.attribute(str(node.target))
        return found if isinstance(found, nn.Module) else None

    def tensor(self, node: object) -> Tensor | None:
        """The parameter or buffer that a `get_attr` node reads, None for anything else."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        found = self.attribute(str(node.target))
        return found if isinstance(found, Tensor) else None


@dataclasses.dataclass
class Program:
    """A model, its traced regions and the facts that passes collect.

    Attributes:
        model: The copy that is being transformed.
        regions: Its traced regions, none inside another.
        facts: Becomes the model's child module `fedmef`.
    """

    model: nn.Module
    regions: list[Region]
    facts: Transformation

    def graphs(self) -> Iterator[tuple[Region, GraphMode, fx.Graph]]:
        """Every graph with its region and mode."""
        for region in self.regions:
            for mode, graph in region.graphs.items():
                yield region, mode, graph


def join(path: str, name: str) -> str:
    """Join two module paths, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name


def set_provenance(node: fx.Node, *, by: str, origin: str) -> None:
    """Record which pass made a node and from which node, module or parameter."""
    node.meta[_META] = {"pass": by, "origin": origin}


def provenance(node: fx.Node) -> tuple[str, str] | None:
    """The pass that made a node and what it was made from; None for nodes of the original graph."""
    entry = node.meta.get(_META)
    return (entry["pass"], entry["origin"]) if entry else None
