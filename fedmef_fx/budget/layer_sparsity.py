"""What is kept of single layers' inputs: `Config.layer_sparsity` and `layer_bits`, put into the sites that keep it."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator

from torch import fx

from fedmef_fx.config import Config
from fedmef_fx.graph.origin import layer_of
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.packing import BlockCode, ThresholdEstimator
from fedmef_fx.packing.bit_planes import Bits

__all__ = ["apply_layer_levels", "packing_sites", "set_sparsity", "with_bits"]


def packing_sites(regions: Iterable[Region]) -> Iterator[tuple[str, PackActivation, Region, fx.Node]]:
    """Every packing site: the first layer that reads what it packs, the site, and where it is called."""
    for region in regions:
        for graph in region.graphs.values():
            for node in graph.nodes:
                site = region.module(node)
                if isinstance(site, PackActivation):
                    yield layer_of(region, node), site, region, node


def apply_layer_levels(regions: Iterable[Region], config: Config) -> dict[str, list[str]]:
    """Give sites the sparsity and the bits that are asked for the layer that reads them first.

    Args:
        regions: Graphs with their sites.
        config: Its `layer_sparsity`, where anything is dropped, and its `layer_bits`.

    Returns:
        By field, entries that fit no layer.
    """
    sparsity = config.layer_sparsity if config.activation_sparsity > 0 else ()
    unused = {
        "layer_sparsity": dict.fromkeys(name for name, _ in sparsity),
        "layer_bits": dict.fromkeys(name for name, _ in config.layer_bits),
    }
    for layer, site, _, _ in packing_sites(regions):
        gammas = [(name, gamma) for name, gamma in sparsity if fnmatch.fnmatchcase(layer, name)]
        bits = [(name, count) for name, count in config.layer_bits if fnmatch.fnmatchcase(layer, name)]
        for field, fitting in (("layer_sparsity", gammas), ("layer_bits", bits)):
            for name, _ in fitting:
                unused[field].pop(name, None)
        if gammas:
            set_sparsity(site, min(gammas[-1][1], site.activation_sparsity))
        if bits:
            site.code = with_bits(site.code, bits[-1][1])
    return {field: list(names) for field, names in unused.items()}


def set_sparsity(site: PackActivation, activation_sparsity: float) -> None:
    """Let a site drop another share from now on; its threshold is estimated again."""
    old = site.estimator
    site.activation_sparsity = activation_sparsity
    site.estimator = ThresholdEstimator(kept_target=1.0 - activation_sparsity, sample=old.sample, interval=old.interval)


def with_bits(code: BlockCode | None, bits: Bits | None) -> BlockCode | None:
    """A code with another number of bits; None for values, and for what has no code."""
    if code is None or bits is None:
        return None
    return dataclasses.replace(code, bits=bits, levels="range" if bits == 8 else code.levels)
