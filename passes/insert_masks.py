"""Insert masks: every prunable weight is read through its mask.

Prunable is a real, trainable parameter of two or more dimensions that a convolution, a linear layer or a
matrix product reads, directly, through views, or through a computation on the model's own tensors.

Rules
1. The density budget is shared among the prunable parameters (`sparsity.allocation`), and each gets one boolean buffer
   `<parameter>_mask`; tied weights are one parameter and get one mask. A mask of `torch.nn.utils.prune` is adopted:
   what it prunes stays pruned.
2. `get_attr weight` -> `masked_weight(get_attr weight, get_attr weight_mask)`, for every use of the parameter.
3. Weights that Python code or opaque modules read are 0 where masked and have their gradients masked
   (`gradient_masks`).
4. With `granularity="channel"` a mask switches whole output channels, the same in all layers of a group
   (`_channel_groups`); with "N:M" it keeps N of M consecutive inputs.

Left dense, with the reason in the coverage: ignored modules, the output layer where that is asked for, frozen
parameters unless `mask_frozen`, complex weights, weights tied to an embedding, and parametrized weights that are not 0
where their parameter is; with channel masks also weights that make the model's outputs and depthwise convolutions; with
N:M weights whose inputs cannot be cut into groups of M. At density 1 there are no masks.

Refused: weights that nothing reads, that have a mask already, or whose layer another pass rewrote without one.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fedmef_fx.config import is_ignored
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.operators import operator_of
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.nsconv import nsconv_weight
from fedmef_fx.passes._coarse_masks import coarse_masks, what_compact_leaves, what_resulted, with_channels
from fedmef_fx.passes._masked_reads import bare_reads, read_through_mask
from fedmef_fx.passes._weights import (
    embedded,
    is_factor,
    keeps_zeros,
    layer_path,
    opaque_weights,
    output_weights,
    reading_regions,
)
from fedmef_fx.records.passes import PassResult, Refusal
from fedmef_fx.sparse_model.parameters import register_mask
from fedmef_fx.sparse_model.transformation import PrunableParameter, Tier
from fedmef_fx.sparsity import allocate, magnitude_masks, random_masks

__all__ = ["InsertMasks"]

_FINAL: Final = (nsconv_weight, pruned_convolution, pruned_linear)
"""What takes a weight together with its mask, and so only right after the masks are made."""


@dataclasses.dataclass(frozen=True)
class InsertMasks:
    """The pass of this module; see the module docstring for its rules.

    Attributes:
        density: Active share of the prunable weights, (0, 1].
        allocation: How layers share the budget.
        mask_init: Random masks or those of the largest magnitudes.
        seed: Of random masks.
        ignore: Modules whose parameters stay dense, as in `Config.ignore`.
        granularity: "weight", "channel" or "N:M".
        channel_multiple: Channels are kept in multiples of this.
        output_layer: Whether the weights that make the model's output are pruned, as in `Config.output_layer`.
        mask_frozen: Whether frozen parameters are masked, too.
    """

    name: ClassVar[str] = "insert-masks"
    density: float = 0.1
    allocation: Literal["erk", "uniform"] = "erk"
    mask_init: Literal["random", "magnitude"] = "random"
    seed: int = 0
    ignore: tuple[str | type, ...] = ()
    granularity: str = "weight"
    channel_multiple: int = 8
    output_layer: Literal["pruned", "dense"] = "pruned"
    mask_frozen: bool = False

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph; registers the masks and the coverage on the model.

        Raises:
            ConfigError: Nothing can be pruned.
        """
        already = [name for name, prunable in program.transformation.prunable.items() if prunable.masked]
        if already:
            reason = "it has a mask already, which fedmef_fx.set_masks changes"
            return PassResult(self.name, refusals=tuple(Refusal(name, reason) for name in already))
        reads = _Reads.of(program)
        found = [self._match(program, reads, name, p) for name, p in program.model.named_parameters()]
        prunables = {prunable.name: prunable for prunable in found if isinstance(prunable, PrunableParameter)}
        if self.output_layer == "dense":
            prunables = _with_dense_output(program, prunables)
        prunables = with_channels(program, prunables, self.granularity)
        chosen = {
            name: prunable
            for name, prunable in prunables.items()
            if not prunable.reason or prunable.tier in ("module", "hook")
        }
        chosen = {name: prunable for name, prunable in chosen.items() if prunable.masked}
        notices: tuple[str, ...] = ()
        if self.density < 1:
            if not chosen:
                raise ConfigError(
                    f"{type(program.model).__name__} has no prunable weights: expected at least one trainable weight "
                    f"of a convolution or linear layer that is not ignored; Config.ignore is {self.ignore!r}. Weights "
                    "that Python code multiplies by hand are found with example inputs: transform(..., "
                    "example_inputs=(x,))"
                )
            masks = self._masks(program, chosen)
            notices = what_resulted(masks, chosen, self.granularity, density=self.density)
            notices += what_compact_leaves(program, masks, chosen, self.granularity)
            self._rewrite(program, chosen, masks)
        masked = set(chosen) if self.density < 1 else set()
        program.transformation.prunable = {
            name: dataclasses.replace(prunable, masked=name in masked) for name, prunable in prunables.items()
        }
        refusals = [
            Refusal(name, prunable.reason)
            for name, prunable in prunables.items()
            if prunable.reason and name not in chosen
        ]
        refusals += [refusal for refusal in found if isinstance(refusal, Refusal)]
        return PassResult(self.name, tuple(sorted(masked)), tuple(refusals), notices=notices)

    def _match(
        self, program: Program, reads: "_Reads", name: str, parameter: nn.Parameter
    ) -> PrunableParameter | Refusal | None:
        """A prunable parameter, with its reason where it stays dense; a layer's weight that is none; else None."""
        if parameter.dim() < 2 or not (parameter.is_floating_point() or parameter.is_complex()):
            return None
        owner = program.model.get_submodule(name.rpartition(".")[0])
        if id(parameter) in reads.finished:
            return Refusal(name, "an earlier pass made its layer one for a weight without a mask")
        reader = reads.weights.get(id(parameter))
        if reader is None and name not in reads.opaque:
            row = operator_of(type(owner))
            if id(parameter) in reads.parameters or (row is not None and row.has_other_parameters):
                return None  # read, but by no product: a positional embedding, a learnable scale, ...
            return Refusal(name, "nothing that was traced or recorded reads it")
        if is_factor(program, name):
            return None
        dense = self._reason_for_dense(program, name, parameter, reads.lookups)
        tier, reason = _tier(program, name, reader)
        return PrunableParameter(
            name,
            parameter.numel(),
            tier=tier,
            reason=dense or reason,
            masked=not dense,
            region=reader.path if reader is not None and tier == "graph" else None,
            region_modules=reads.sizes[id(reader)] if reader is not None else 0,
        )

    def _reason_for_dense(self, program: Program, name: str, parameter: nn.Parameter, lookups: set[int]) -> str:
        path = layer_path(name.rpartition(".")[0])
        layer = program.model.get_submodule(path)
        if id(parameter) in lookups:
            return "tied to an embedding, which stays dense"
        if is_ignored(self.ignore, path, layer):
            return "ignored by Config.ignore"
        if not parameter.requires_grad and not self.mask_frozen:
            return "frozen (requires_grad is False)"
        if parameter.is_complex():
            return "its numbers are complex, which the order by magnitude of pruning and growth does not cover"
        if isinstance(program.model.get_submodule(name.rpartition(".")[0]), torch.jit.ScriptModule):
            return "its module is compiled by TorchScript, which takes no mask"
        if not keeps_zeros(program, name):
            return "its parametrization does not keep zeros, so that a mask would not hold"
        return ""

    def _rewrite(self, program: Program, chosen: dict[str, PrunableParameter], masks: dict[str, Tensor]) -> None:
        for name, mask in masks.items():
            register_mask(program.model, name, mask)
        _guard(program, chosen)
        names = {id(program.model.get_parameter(name)): name for name in chosen}
        for region, _, graph in program.graphs():
            for read in bare_reads(region, graph, names, program.model):
                read_through_mask(read, by=self.name)

    def _masks(self, program: Program, chosen: dict[str, PrunableParameter]) -> dict[str, Tensor]:
        weights = {name: program.model.get_parameter(name).detach() for name in chosen}
        adopted = {name: mask for name, mask in _masks_of_others(program.model) if name in weights}
        if self.granularity != "weight":
            layouts = {name: prunable.channels for name, prunable in chosen.items() if prunable.channels is not None}
            seed = None if self.mask_init == "magnitude" else self.seed
            masks = coarse_masks(
                weights,
                layouts,
                granularity=self.granularity,
                density=self.density,
                allocation=self.allocation,
                multiple=self.channel_multiple,
                seed=seed,
            )
            return {name: mask & adopted[name] if name in adopted else mask for name, mask in masks.items()}
        counts = allocate({n: tuple(w.shape) for n, w in weights.items()}, self.density, method=self.allocation)
        counts |= {name: min(counts[name], int(mask.count_nonzero())) for name, mask in adopted.items()}
        if self.mask_init == "magnitude":
            return magnitude_masks({n: w * adopted[n] if n in adopted else w for n, w in weights.items()}, counts)
        masks = random_masks({n: tuple(w.shape) for n, w in weights.items()}, counts, seed=self.seed)
        return masks | self._random_within(adopted, counts)

    def _random_within(self, adopted: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Tensor]:
        """Random masks that keep only what other masks keep."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = {n: (torch.rand(m.shape, generator=generator) + 0.5).to(m.device) * m for n, m in adopted.items()}
        return magnitude_masks(scores, counts)


@dataclasses.dataclass(frozen=True)
class _Reads:
    """Who reads the parameters of a program.

    Attributes:
        weights: Identity of each parameter that a graph reads as a weight -> its reader.
        opaque: Names of the weights that no graph shows.
        parameters: Identities of all tensors that graphs read.
        finished: Identities of the parameters that other passes made NSConv kernels or pruned layers of.
        lookups: Identities of the parameters that embeddings look up.
        sizes: Identity of each region -> its number of modules with parameters.
    """

    weights: dict[int, Region]
    opaque: set[str]
    parameters: set[int]
    finished: set[int]
    lookups: set[int]
    sizes: dict[int, int]

    @classmethod
    def of(cls, program: Program) -> "_Reads":
        nodes = [(r.tensor(node), node) for r, _, graph in program.graphs() for node in graph.find_nodes(op="get_attr")]
        parameters = {id(tensor) for tensor, _ in nodes}
        finished = {id(tensor) for tensor, node in nodes if any(user.target in _FINAL for user in node.users)}
        sizes = {id(region): _modules_with_parameters(region) for region in program.regions}
        return cls(reading_regions(program), opaque_weights(program), parameters, finished, embedded(program), sizes)


def _with_dense_output(program: Program, found: dict[str, PrunableParameter]) -> dict[str, PrunableParameter]:
    """The same with the weights that make the output dense; the last one, where no graph shows which these are."""
    outputs = output_weights(program)
    named = [name for name in found if id(program.model.get_parameter(name)) in outputs] or list(found)[-1:]
    reason = "it makes the model's output: Config.output_layer is 'dense'"
    return {n: dataclasses.replace(p, masked=False, reason=reason) if n in named else p for n, p in found.items()}


def _guard(program: Program, chosen: dict[str, PrunableParameter]) -> None:
    """Note which parameters need their gradients masked: all that code outside of graphs may read."""
    parameters = dict(program.model.named_parameters())
    fallbacks = [region for region in program.regions if region.role == "fallback"] if program.is_one_graph else []
    by_graphs = {id(parameter) for region in fallbacks for parameter in region.owner._parameters.values()}
    if program.is_one_graph and not fallbacks:  # then nothing but the graph is meant to run
        by_graphs = {id(parameter) for parameter in parameters.values()}
    guarded = [n for n, prunable in chosen.items() if prunable.tier == "hook" or id(parameters[n]) not in by_graphs]
    guarded += [
        n for prunable in chosen.values() if prunable.channels for n in prunable.channels.dependents if n in parameters
    ]
    program.transformation.guarded = tuple(guarded)


def _tier(program: Program, name: str, reader: Region | None) -> tuple[Tier, str]:
    if reader is not None and reader.role == "region":
        return "graph", ""
    path = layer_path(name.rpartition(".")[0])
    if reader is not None:
        return "module", _why_not_in_a_graph(program, path)
    kind = type(program.model.get_submodule(path)).__name__
    return "hook", f"{kind} is opaque: its weights are used inside it. {_why_not_in_a_graph(program, path)}".strip()


def _why_not_in_a_graph(program: Program, path: str) -> str:
    """The reason of the module closest above a path that could not be traced."""
    above = [failure for failure in program.failures if path == failure.where or path.startswith(f"{failure.where}.")]
    root = [failure for failure in program.failures if failure.where == type(program.model).__name__]
    closest = max(above, key=lambda failure: len(failure.where), default=root[0] if root else None)
    return closest.reason if closest is not None else ""


def _masks_of_others(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Masks of `torch.nn.utils.prune`, by the name of the parameter that they apply to."""
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                name = f"{hook._tensor_name}_orig"
                yield f"{path}.{name}" if path else name, getattr(module, f"{hook._tensor_name}_mask") != 0


def _modules_with_parameters(region: Region) -> int:
    return sum(bool(module._parameters) for module in region.owner.modules())
