"""Switches for activation checkpointing that are turned on after a module was captured: its graphs would not see them.

Models turn it on by an attribute that their forward, or the call of a layer, looks at: `gradient_checkpointing` in
transformers, `grad_checkpointing` in timm, `use_checkpoint`, `with_cp` or `memory_efficient` elsewhere. From then on
Python runs in train mode, over layers that have the same masks and kernels as the graphs. Where only the graph computes
what the transformation made of the model, as with rescaled residual sums, that is an error.
"""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from torch import fx, nn

from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.compiled import original_class
from fedmef_fx.graph.origin import provenance

__all__ = ["Switch", "is_turned_on", "pass_of_graphs_alone", "refuse_switch", "switches_in"]

_IN_LAYERS: Final = frozenset(
    {
        "compress-saved",
        "functionalize-weights",
        "insert-masks",
        "normalize-kernels",
        "pack-weights",
        "prune-activations",
        "replay-rewrites",
        "shrink-saved",
    }
)
"""Passes that change nothing of what a model computes, or do the same to layers that Python calls."""
_NAMES: Final = re.compile("checkpoint|^with_cp$|^memory_efficient$")


class Switch(NamedTuple):
    """A switch that is off: the path of its module inside the captured one, and its name."""

    path: str
    name: str


def switches_in(module: nn.Module) -> tuple[Switch, ...]:
    """The switches of a module that is captured, and of those inside it, that are off."""
    return tuple(
        Switch(path, name)
        for path, child in module.named_modules()
        # What a class's own `__call__` looks at comes before forward, and so before the graphs.
        if path or original_class(child).__call__ is nn.Module.__call__
        for name in sorted(set(_switches_of(child)))
    )


def _switches_of(module: nn.Module) -> Iterator[str]:
    for names in (vars(module), *map(vars, type(module).__mro__)):
        yield from (name for name, value in names.items() if value is False and _NAMES.search(name))


def is_turned_on(module: nn.Module, switch: Switch) -> bool:
    """Whether somebody has turned a switch on in the meantime."""
    return getattr(module.get_submodule(switch.path), switch.name, False) is True


def pass_of_graphs_alone(graph: fx.Graph) -> str:
    """A pass that made a graph compute what the layers of its module, called by Python, would not; else empty."""
    origins = (provenance(node) for node in graph.nodes)
    return next((origin[0] for origin in origins if origin is not None and origin[0] not in _IN_LAYERS), "")


def refuse_switch(module: nn.Module, switch: Switch, step: str) -> None:
    """Raise because a switch was turned on.

    Raises:
        ConfigError: Always.
    """
    where = f"{original_class(module).__name__}.{switch.path}".removesuffix(".")
    raise ConfigError(
        f"{where}: {switch.name} was turned on after transform, whose graph does no activation checkpointing, and the "
        f"pass {step} changed that graph alone, so that the Python code computes something else; expected it to be on "
        "before: model.gradient_checkpointing_enable(), model.set_grad_checkpointing() or the like, then "
        'fedmef_fx.transform(model, ...); or leave the pass out, as with Config(residual="none")'
    )
