"""The activation sparsity of single layers: `Config.layer_sparsity` put into the sites where inputs are packed."""

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from fedmef_fx.graph.origin import layer_of
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.packing import ThresholdEstimator

__all__ = ["apply_layer_sparsity", "packing_sites", "set_sparsity"]


def packing_sites(regions: Iterable[Region]) -> Iterator[tuple[str, PackActivation, Region, fx.Node]]:
    """Every packing site: the first layer that reads what it packs, the site, and where it is called."""
    for region in regions:
        for graph in region.graphs.values():
            for node in graph.nodes:
                site = region.module(node)
                if isinstance(site, PackActivation):
                    yield layer_of(region, node), site, region, node


def apply_layer_sparsity(regions: Iterable[Region], layer_sparsity: Sequence[tuple[str, float]]) -> list[str]:
    """Give sites the sparsity that is asked for the layer that reads them first.

    Args:
        regions: Graphs with their sites.
        layer_sparsity: As in `Config.layer_sparsity`.

    Returns:
        Entries that fit no layer.
    """
    unused = dict.fromkeys(name for name, _ in layer_sparsity)
    for layer, site, _, _ in packing_sites(regions):
        fitting = [(name, gamma) for name, gamma in layer_sparsity if fnmatch.fnmatchcase(layer, name)]
        for name, _ in fitting:
            unused.pop(name, None)
        if fitting:
            set_sparsity(site, min(fitting[-1][1], site.activation_sparsity))
    return list(unused)


def set_sparsity(site: PackActivation, activation_sparsity: float) -> None:
    """Let a site drop another share from now on; its threshold is estimated again."""
    old = site.estimator
    site.activation_sparsity = activation_sparsity
    site.estimator = ThresholdEstimator(kept_target=1.0 - activation_sparsity, sample=old.sample, interval=old.interval)
