"""Whether the modules that a region's graphs were made from are still there, and still run nothing but their forward.

A graph holds what a trace saw: a layer that is put in the place of another, or a hook that is registered later, would
have no effect in it. So each call of a region looks, at the cost of comparing the children of its modules.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Final

from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from fedmef_fx.graph.hooks import has_user_hooks

__all__ = ["Watch"]

_OURS: Final = "fedmef"


@dataclasses.dataclass(eq=False)
class Watch:
    """The modules of a region as its graphs know them.

    Attributes:
        children: Every module that the graphs look into, with its children by name.
        candidates: Those among them, the owner aside, and modules that graphs call because of their hooks.
        hooked: The candidates that have hooks of the user, or a forward of their own.
        handles: How many hooks there were anywhere; None for a copy, which does not know.
    """

    children: list[tuple[nn.Module, dict[str, nn.Module | None]]]
    candidates: list[nn.Module]
    hooked: list[nn.Module]
    handles: int | None

    @classmethod
    def of(cls, owner: nn.Module, graphs: Iterable[fx.Graph]) -> "Watch":
        """The state of a region's modules now."""
        called = {str(node.target) for graph in graphs for node in graph.find_nodes(op="call_module")}
        inside: dict[int, nn.Module] = {}
        _collect(owner, "", called, inside)
        children = [(module, dict(module._modules)) for module in inside.values()]
        boundaries = [module for path, module in owner.named_modules() if path in called and _is_hooked(module)]
        candidates = [*list(inside.values())[1:], *boundaries]
        return cls(children, candidates, list(filter(_is_hooked, candidates)), RemovableHandle.next_id)

    def has_changed(self) -> bool:
        """Whether layers were put in, replaced or removed, or hooks registered or removed."""
        for index, (module, before) in enumerate(self.children):
            if module._modules != before:
                if _layers(module._modules) != _layers(before):
                    return True
                self.children[index] = module, dict(module._modules)
        if not self.hooked and self.handles == RemovableHandle.next_id:
            return False
        hooked = list(filter(_is_hooked, self.candidates))
        self.handles = RemovableHandle.next_id
        return len(hooked) != len(self.hooked) or any(a is not b for a, b in zip(hooked, self.hooked, strict=True))

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "handles": None}


def _collect(module: nn.Module, path: str, called: set[str], found: dict[int, nn.Module]) -> None:
    """The modules below one that no graph calls: Python runs the others, with all that they contain."""
    if id(module) in found or (path and path in called):
        return
    found[id(module)] = module
    for name, child in _layers(module._modules).items():
        if child is not None:
            _collect(child, f"{path}.{name}" if path else name, called, found)


def _layers(children: Mapping[str, nn.Module | None]) -> dict[str, nn.Module | None]:
    """Children without those that a transformation adds."""
    return {name: child for name, child in children.items() if not name.startswith(_OURS)}


def _is_hooked(module: nn.Module) -> bool:
    return has_user_hooks(module) or "forward" in vars(module)
