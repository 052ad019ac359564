"""Insert masks: every prunable weight is read through its mask.

Prunable is a floating point, trainable parameter of two or more dimensions that a convolution, a linear layer or a
matrix product reads, directly or through views.

Rules
1. The density budget is shared among the prunable parameters (`sparsity.allocation`), and each gets one boolean buffer
   `<parameter>_mask`; tied weights are one parameter and get one mask.
2. `get_attr weight` -> `masked_weight(get_attr weight, get_attr weight_mask)`, for every use of the parameter.

Left dense, with the reason in the coverage: ignored modules, frozen parameters, weights tied to an embedding, and
weights inside opaque modules. At density 1 there are no masks.
"""

import dataclasses
import operator
from collections.abc import Iterator
from typing import ClassVar, Final, Literal

import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx.errors import ConfigError
from fedmef_fx.model import PrunableParameter, is_ignored, mask_name, register_mask
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.passes._nodes import layers, source_of_weight
from fedmef_fx.pipeline import PassResult, Refusal
from fedmef_fx.program import Program, Region, set_provenance
from fedmef_fx.sparsity import allocate, magnitude_masks, random_masks

__all__ = ["InsertMasks"]

_PRODUCTS: Final = frozenset(
    {
        operator.matmul,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
        "matmul",
        "mm",
        "bmm",
    }
)
_NOT_PRUNABLE: Final = (nn.Embedding, nn.EmbeddingBag, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclasses.dataclass(frozen=True)
class InsertMasks:
    """The pass of this module; see the module docstring for its rules.

    Attributes:
        density: Active share of the prunable weights, (0, 1].
        allocation: How layers share the budget.
        mask_init: Random masks or those of the largest magnitudes.
        seed: Of random masks.
        ignore: Modules whose parameters stay dense, as in `Config.ignore`.
    """

    name: ClassVar[str] = "insert-masks"
    density: float = 0.1
    allocation: Literal["erk", "uniform"] = "erk"
    mask_init: Literal["random", "magnitude"] = "random"
    seed: int = 0
    ignore: tuple[str | type, ...] = ()

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph; registers the masks and the coverage on the model."""
        facts = self._find(program)
        chosen = {name: fact for name, fact in facts.items() if fact.tier is not None and not fact.reason}
        if self.density < 1:
            if not chosen:
                raise ConfigError(
                    f"{type(program.model).__name__} has no prunable weights: expected at least one trainable weight "
                    f"of a convolution or linear layer that is not ignored; Config.ignore is {self.ignore!r}"
                )
            self._register(program, list(chosen))
            self._rewrite(program, set(chosen))
        masked = set(chosen) if self.density < 1 else set()
        program.facts.prunable = {
            name: dataclasses.replace(fact, masked=name in masked) for name, fact in facts.items()
        }
        refusals = tuple(Refusal(name, fact.reason) for name, fact in facts.items() if fact.reason)
        return PassResult(self.name, tuple(sorted(masked)), refusals)

    def _find(self, program: Program) -> dict[str, PrunableParameter]:
        """Every prunable parameter, in the model's order, and why some stay dense."""
        inside = {id(parameter): region for parameter, region in _weights_in_graphs(program)}
        read = {id(r.tensor(node)) for r, _, graph in program.graphs() for node in graph.find_nodes(op="get_attr")}
        embedded = _embedded(program)
        facts = {}
        for name, parameter in program.model.named_parameters():
            owner = program.model.get_submodule(name.rpartition(".")[0])
            if parameter.dim() < 2 or not parameter.is_floating_point():
                continue
            region = inside.get(id(parameter))
            if region is None and (id(parameter) in read or isinstance(owner, _NOT_PRUNABLE)):
                continue  # read, but by no product: a positional embedding, a learnable scale, ...
            reason = ""
            if id(parameter) in embedded:
                reason = "tied to an embedding, which stays dense"
            elif is_ignored(self.ignore, name.rpartition(".")[0], owner):
                reason = "ignored by Config.ignore"
            elif not parameter.requires_grad:
                reason = "frozen (requires_grad is False)"
            elif region is None:
                reason = f"no traced layer reads it ({type(owner).__name__} is opaque or unused)"
            facts[name] = PrunableParameter(
                name,
                parameter.numel(),
                tier=None if region is None else "graph",
                reason=reason,
                region=None if region is None else region.path,
                region_modules=0 if region is None else _modules_with_weights(region),
            )
        return facts

    def _register(self, program: Program, names: list[str]) -> None:
        weights = {name: program.model.get_parameter(name).detach() for name in names}
        counts = allocate({n: tuple(w.shape) for n, w in weights.items()}, self.density, method=self.allocation)
        if self.mask_init == "magnitude":
            masks = magnitude_masks(weights, counts)
        else:
            masks = random_masks({n: tuple(w.shape) for n, w in weights.items()}, counts, seed=self.seed)
        for name, mask in masks.items():
            register_mask(program.model, name, mask)

    def _rewrite(self, program: Program, chosen: set[str]) -> None:
        names = {id(program.model.get_parameter(name)): name for name in chosen}
        for region, _, graph in program.graphs():
            for node in graph.find_nodes(op="get_attr"):
                name = names.get(id(region.tensor(node)))
                if name is None or not node.users:
                    continue
                local = name.removeprefix(f"{region.path}.") if region.path else name
                with graph.inserting_after(node):
                    mask = graph.get_attr(mask_name(local))
                with graph.inserting_after(mask):
                    masked = graph.call_function(masked_weight, (node, mask))
                node.replace_all_uses_with(masked, delete_user_cb=lambda user, masked=masked: user is not masked)
                for new in (mask, masked):
                    set_provenance(new, by=self.name, origin=name)


def _weights_in_graphs(program: Program) -> Iterator[tuple[nn.Parameter, Region]]:
    for region, _, graph in program.graphs():
        for node in layers(graph):
            yield from _parameters_of(region, [node.args[1]])
        for node in graph.nodes:
            if node.op in ("call_function", "call_method") and node.target in _PRODUCTS:
                yield from _parameters_of(region, list(node.all_input_nodes))


def _parameters_of(region: Region, arguments: list[object]) -> Iterator[tuple[nn.Parameter, Region]]:
    for argument in arguments:
        target = source_of_weight(region, argument)
        if target is not None:
            yield region.owner.get_parameter(target), region


def _embedded(program: Program) -> set[int]:
    """Identities of the parameters that embeddings look up."""
    modules = program.model.modules()
    found = {id(m.weight) for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for region, _, graph in program.graphs():
        for node in graph.find_nodes(op="call_function", target=F.embedding):
            weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            found |= {id(parameter) for parameter, _ in _parameters_of(region, [weight])}
    return found


def _modules_with_weights(region: Region) -> int:
    return sum(any(p.dim() > 1 for p in module.parameters(recurse=False)) for module in region.owner.modules())
