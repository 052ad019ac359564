"""`Program`: a model on its way through the passes, as regions of torch.fx graphs over one module tree.

A region is a module whose forward was traced for calls of one signature. It has one graph where train and eval mode
run the same operations and one graph per mode where they differ (`F.dropout(training=self.training)`, auxiliary heads,
stochastic depth). All graphs resolve their targets against the same module, so parameters are never copied.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeAlias

from torch import Tensor, fx, nn

from fedmef_fx.graph.signature import AnyTensors, Signature
from fedmef_fx.module_tree import join
from fedmef_fx.records.graphs import GraphMode
from fedmef_fx.records.passes import Refusal
from fedmef_fx.sparse_model.transformation import Transformation

__all__ = ["Program", "Region", "Role"]

Role: TypeAlias = Literal["region", "leaf", "fallback"]


@dataclasses.dataclass
class Region:
    """A traced module.

    Attributes:
        path: Name of the module in the model; "" is the whole model.
        owner: The module against which the graphs resolve their targets.
        graphs: Either {"both": graph}, {"train": graph, "eval": graph}, or one of the two where the owner was only
            called in that mode.
        signature: The calls that the graphs serve; None for all.
        by_name: Whether placeholders are the arguments of forward; otherwise they are the tensors of a call, in order.
        role: A "region" is as large as tracing allows; a "leaf" is a single layer that Python calls; a "fallback" is a
            layer inside a region, for the calls in which Python runs instead of the region's graph: those that no
            graph serves, and other methods than forward.
    """

    path: str
    owner: nn.Module
    graphs: dict[GraphMode, fx.Graph]
    signature: Signature | AnyTensors | None = None
    by_name: bool = True
    role: Role = "region"

    def has_mode(self, *, training: bool) -> bool:
        """Whether there is a graph for a mode."""
        return "both" in self.graphs or ("train" if training else "eval") in self.graphs

    def graph_for(self, *, training: bool) -> fx.Graph:
        """The graph that runs in a mode; see `has_mode`."""
        return self.graphs.get("both") or self.graphs["train" if training else "eval"]

    @property
    def serves_all(self) -> bool:
        """Whether one graph serves all calls of the whole model, so that its forward never runs in Python."""
        return not self.path and self.signature is None and "both" in self.graphs

    @property
    def may_run_python(self) -> bool:
        """Whether the owner's original forward runs for calls that the graphs do not serve."""
        return self.role == "region" and self.signature is not None

    def full_name(self, target: str) -> str:
        """The name in the whole model of something a graph of this region refers to."""
        return join(self.path, target)

    def attribute(self, target: str) -> object:
        """What a `get_attr` or `call_module` target refers to.

        Raises:
            AttributeError: Nothing has that name.
        """
        value: object = self.owner
        for part in target.split("."):
            value = getattr(value, part)
        return value

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, None for other nodes."""
        if node.op != "call_module":
            return None
        value = self.attribute(str(node.target))
        return value if isinstance(value, nn.Module) else None

    def tensor(self, node: object) -> Tensor | None:
        """The parameter or buffer that a `get_attr` node reads, None for anything else."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = self.attribute(str(node.target))
        return value if isinstance(value, Tensor) else None


@dataclasses.dataclass
class Program:
    """A model, its traced regions and what passes say about it.

    Attributes:
        model: The copy that is being transformed.
        regions: Its traced regions, none inside another but fallbacks. Several regions may have one owner and differ
            in their signatures.
        transformation: Becomes the model's child module `fedmef`.
        products: Names of the parameters that products read while the original ran on example inputs.
        failures: What was not captured as part of a region, and why.
        pending: Paths of modules that are captured when they are first called, because there was no example call.
    """

    model: nn.Module
    regions: list[Region]
    transformation: Transformation
    products: frozenset[str] = frozenset()
    failures: tuple[Refusal, ...] = ()
    pending: tuple[str, ...] = ()

    @property
    def is_one_graph(self) -> bool:
        """Whether a single graph runs the whole model, in both modes and for all calls."""
        regions = [region for region in self.regions if region.role != "fallback"]
        return len(regions) == 1 and regions[0].serves_all

    def graphs(self) -> Iterator[tuple[Region, GraphMode, fx.Graph]]:
        """Every graph with its region and mode."""
        for region in self.regions:
            for mode, graph in region.graphs.items():
                yield region, mode, graph
