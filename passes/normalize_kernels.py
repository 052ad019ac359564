"""BatchNorm becomes NSConv: a layer and the BatchNorm after it turn into one layer with a normalised sparse kernel.

The kernel's equation and guards stand in `ops/nsconv.py`. It needs no batch statistics, so training works with any
batch size.

Rules
1. `bn(layer(x, weight, bias))` -> `layer(x, nsconv_weight(weight, gain, mask), shift)`, where gain and shift are the
   BatchNorm's weight and bias under their old names. A bias of the layer had no effect before the BatchNorm and is no
   longer read. A BatchNorm without affine parameters gets them (1 and 0).
2. g is the gain of the nonlinearity that follows (views in between are looked through), 1 where none does.
3. Where Python code may run instead of the graph, the two modules compute the same when called one after the other:
   `layer(x)` -> `layer(x, nsconv_weight(weight, 1, mask))` and `bn(x)` -> `channel_affine(x, gain, shift)`.
4. The stored weights of each output channel are centred over its active ones, which the kernel does anyway, so that a
   weight of 0 is one that contributes nothing: pruning small weights and growing zeros then change little. Gradient
   steps keep the sum of a channel, because the gradient of a centred kernel sums to 0.
5. A BatchNorm of torch.nn becomes a `ScaleAndShift` in place, with the same parameters and buffers, so that
   dictionaries of the original load; its running statistics are no longer read. Subclasses keep their class.
6. The transformation notes how each weight is normalised, for what adjusts masks by w_hat (`ops/effective_space.py`).

Refused: what `_batch_norm_pairs` lists, which finds the pairs.
"""

import dataclasses
import inspect
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from fedmef_fx.graph.nodes import layers, source_of_weight
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.signature import AnyTensors
from fedmef_fx.ops.nsconv import DEGENERATE, KernelForm, Statistics
from fedmef_fx.ops.scale_and_shift import ScaleAndShift
from fedmef_fx.passes._batch_norm_pairs import Pair, affine_graphs, find_pairs, is_plain_batch_norm
from fedmef_fx.passes._nsconv_layers import normalize_layer, normalize_pair
from fedmef_fx.records.passes import PassResult, Refusal
from fedmef_fx.sparse_model.transformation import NormalizedKernel

__all__ = ["NormalizeKernels"]


@dataclasses.dataclass(frozen=True)
class NormalizeKernels:
    """The pass of this module; see the module docstring for its rules.

    Attributes:
        statistics: Mean and deviation over "active" weights or over "all".
        ignore: Modules that are left alone, as in `Config.ignore`.
    """

    name: ClassVar[str] = "normalize-kernels"
    statistics: Statistics = "active"
    ignore: tuple[str | type, ...] = ()

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph."""
        pairs, refusals = self._match(program)
        gains: dict[str, float] = {}
        kernels: dict[int, list[NormalizedKernel]] = {}
        for pair in pairs:
            kernels.setdefault(pair.parts[0], []).append(self._rewrite(pair, gains))
        _note(program, kernels)
        if any(region.role == "fallback" for region in program.regions):
            self._rewrite_fallbacks(program, pairs)
        for pair in pairs:
            norm = pair.region.owner.get_submodule(pair.path)
            if is_plain_batch_norm(norm):
                ScaleAndShift.replace(norm)
        rewrites = dict.fromkeys(pair.name for pair in pairs)
        return PassResult(self.name, tuple(rewrites), tuple(refusals))

    def _match(self, program: Program) -> tuple[list[Pair], list[Refusal]]:
        """The pairs to rewrite, and the BatchNorms that stay; what all graphs say of a pair has to agree."""
        pairs, refused = find_pairs(program, ignore=self.ignore)
        return pairs, [Refusal(*entry) for entry in refused.items()]

    def _rewrite(self, pair: Pair, gains: dict[str, float]) -> NormalizedKernel:
        kernel = normalize_pair(pair, statistics=self.statistics, gains=gains, by=self.name)
        form = KernelForm(**kernel.kwargs)  # type: ignore[arg-type]  # its options
        if self.statistics == "active":
            mask = kernel.args[2]
            _centre(pair, pair.region.owner.get_buffer(str(mask.target)) if isinstance(mask, fx.Node) else None, form)
        return NormalizedKernel(f"{pair.name}.weight", form)

    def _rewrite_fallbacks(self, program: Program, pairs: list[Pair]) -> None:
        """Rule 3, for the layers and BatchNorms of all pairs."""
        kernels = {pair.parts[0]: pair.layer.args[1] for pair in pairs}
        for region in program.regions:
            for graph in region.graphs.values() if region.role == "fallback" else ():
                for layer in layers(graph):
                    target = source_of_weight(region, layer.args[1])
                    kernel = None if target is None else kernels.get(id(region.attribute(target)))
                    if isinstance(kernel, fx.Node):
                        normalize_layer(region, layer, str(target), dict(kernel.kwargs), by=self.name)
        norms = {pair.parts[1]: pair for pair in pairs}
        for pair in norms.values():
            norm = pair.region.owner.get_submodule(pair.path)
            if is_plain_batch_norm(norm):
                continue  # rule 5
            graphs = affine_graphs(norm)
            if graphs is None:
                continue  # only where one graph serves all calls: find_pairs refuses others
            program.regions.append(Region(pair.name, norm, graphs, _required(norm), role="fallback"))
            for graph in graphs.values():
                for node in graph.nodes:
                    set_provenance(node, by=self.name, origin=pair.name)


def _note(program: Program, kernels: dict[int, list[NormalizedKernel]]) -> None:
    """Rule 5; the graphs of both modes say the same of a weight, unless several NSConvs share it."""
    for name, parameter in program.model.named_parameters():
        found = set(kernels.get(id(parameter), ()))
        if len(found) == 1:
            program.transformation.kernels[name] = found.pop()


def _required(module: nn.Module) -> AnyTensors:
    parameters = inspect.signature(module.forward).parameters.values()
    return AnyTensors(frozenset(p.name for p in parameters if p.default is inspect.Parameter.empty))


@torch.no_grad()
def _centre(pair: Pair, mask: Tensor | None, form: KernelForm) -> None:
    """Subtract from each row of a kernel the mean that its NSConv subtracts anyway (rule 4)."""
    weight = pair.region.owner.get_parameter(pair.weight)
    rows = form.rows(weight)
    mask = torch.ones_like(rows, dtype=torch.bool) if mask is None else form.rows(mask)
    number = mask.sum(1, keepdim=True)
    mean = rows.sum(1, keepdim=True) / number.clamp_min(1)
    # Where nothing but the mean is left, NSConv does not subtract it either.
    spread = torch.where(mask, rows - mean, 0.0).norm(dim=1, keepdim=True)
    centred = (number > 1) & (spread > DEGENERATE * rows.norm(dim=1, keepdim=True))
    weight.copy_(form.kernel(torch.where(mask & centred, rows - mean, rows), weight.shape))
