"""Programs of small models, for tests that run single passes."""

from torch import nn

from fedmef_fx import Config
from fedmef_fx.capture import capture_graphs
from fedmef_fx.graph.pipeline import Pass, Pipeline
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.records.passes import PassResult
from fedmef_fx.sparse_model.transformation import Transformation


def program_for(model: nn.Module, config: Config | None = None) -> Program:
    """A model as one region, before any pass."""
    return Program(model, [Region("", model, capture_graphs(model))], Transformation(config or Config()))


def run(program: Program, *steps: Pass) -> PassResult:
    """Run passes, each verified; the result of the last one."""
    *_, last = Pipeline(steps, after_pass=Verifier.of(program)).run(program)
    return last


def text_of(program: Program) -> str:
    """What the nodes of a program with one graph call, and on what: options left out, one line a node."""
    ((_, _, graph),) = program.graphs()
    lines = []
    for node in graph.nodes:
        called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        read = ", ".join(x.name for x in node.all_input_nodes)
        if node.op == "get_attr":
            lines.append(f"{node.name} = {called}")
        elif node.op != "placeholder":
            lines.append(f"return {read}" if node.op == "output" else f"{node.name} = {called}({read})")
    return "\n".join(lines)


def refusals_of(result: PassResult) -> dict[str, str]:
    """What was refused, with the reasons."""
    return {refusal.where: refusal.reason for refusal in result.refusals}
