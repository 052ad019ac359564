"""Modules with state of their own that passes put into a model: packing sites, dropouts."""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from torch import fx, nn

from fedmef_fx.graph.program import Region

__all__ = ["SITES", "Sites", "add_site", "is_in_site", "is_site", "kept_sites"]

SITES: Final = "fedmef_sites"


class Sites(nn.Module):
    """Holds the sites of a region; code that calls all children of a module in turn finds that it changes nothing."""

    def forward(self, x: Any) -> Any:
        """The input itself."""
        return x


def add_site(region: Region, name: str, site: nn.Module) -> str:
    """Put a module into the child `fedmef_sites` of a region's owner.

    Args:
        region: The region whose graph will call the site.
        name: Wanted name; a number is appended where it is taken.
        site: The module.

    Returns:
        The target for `call_module`.
    """
    if not isinstance(getattr(region.owner, SITES, None), nn.Module):
        region.owner.add_module(SITES, Sites())
    sites = region.owner.get_submodule(SITES)
    unique, number = name, 1
    while hasattr(sites, unique):
        unique, number = f"{name}_{number}", number + 1
    site.train(region.owner.training)
    sites.add_module(unique, site)
    return f"{SITES}.{unique}"


def is_site(node: fx.Node) -> bool:
    """Whether a node calls such a module."""
    return node.op == "call_module" and is_in_site(str(node.target))


def is_in_site(path: str) -> bool:
    """Whether a module's path leads into one."""
    return SITES in path.split(".")


@contextlib.contextmanager
def kept_sites(owner: nn.Module, *, is_new: bool) -> Iterator[None]:
    """A block that makes the sites of a region again: those that still have a place keep their state.

    Args:
        owner: The region's owner.
        is_new: Whether the graphs that called the sites are gone; otherwise all sites stay.
    """
    before = owner._modules.pop(SITES, None) if is_new else None
    yield
    after = owner._modules.get(SITES)
    if before is None or after is None:
        return
    for name, site in after._modules.items():
        old = before._modules.get(name)
        if site is not None and type(old) is type(site):
            after._modules[name] = old
