"""A model on trial for a memory budget: what each packed input may drop, what that saves, and what it costs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedmef_fx.budget.layer_sparsity import packing_sites, set_sparsity, with_bits
from fedmef_fx.budget.plan import LayerLevels
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.emit import program_of
from fedmef_fx.measure.live import tensors_in
from fedmef_fx.module_tree import duplicate_of
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.ops.random_numbers import seeded
from fedmef_fx.packing.bit_planes import BITS
from fedmef_fx.packing.bitmap import bitmap_nbytes
from fedmef_fx.records.memory_plan import Level

__all__ = ["PlannedModel", "square_distance"]

_GAMMAS: Final = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


class PlannedModel:
    """A transformed model whose packing sites are set in place, and measured on a few samples.

    Attributes:
        model: The model; its own, not the user's.
        settings: Fields of the configuration that it differs in.
        sites: The layer that reads a packed input first, the site, and the parameters whose gradients it serves.
        limits: The least that each site may keep: its largest gamma, and the bits of its code.
        nothing: All values for each site.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: dict[str, Any],
        limit: Callable[[str], float],
        sample: tuple[tuple[Any, ...], dict[str, Any]],
        *,
        measured: "PlannedModel | None" = None,
    ) -> None:
        self.model, self.settings, self._sample = model, settings, sample
        sites: dict[int, tuple[str, PackActivation, set[str]]] = {}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for layer, site, region, node in packing_sites(program_of(model).regions):
            read = (region.tensor(source) for user in node.users for source in user.all_input_nodes)
            readers = {names[id(tensor)] for tensor in read if isinstance(tensor, nn.Parameter)}
            sites.setdefault(id(site), (layer, site, set()))[2].update(readers)
        self.sites = list(sites.values())
        self._codes = [site.code for _, site, _ in self.sites]
        self.limits = [
            Level(min(site.activation_sparsity, limit(layer)), None if site.code is None else site.code.bits)
            for layer, site, _ in self.sites
        ]
        self.nothing = [Level()] * len(self.sites)
        self._kept: dict[Level, list[float]] = {}
        self._errors: dict[Level, list[float]] = {}
        self._sizes: list[tuple[int, torch.dtype]] = []  # elements and type of what each site packs
        self._exact: dict[str, Tensor] | None = None
        if measured is not None and [site[0] for site in measured.sites] == [site[0] for site in self.sites]:
            # Formats change neither what is packed nor which part of it: only how it is stored.
            self._kept, self._errors, self._sizes = measured._kept, measured._errors, measured._sizes

    def set(self, levels: Sequence[Level]) -> None:
        """Give every site its level, and the share that it kept when that was measured."""
        shares = [self.kept(level)[i] for i, level in enumerate(levels)]
        self._put(levels)
        for (_, site, _), share in zip(self.sites, shares, strict=True):
            site.estimator.kept = share

    def _put(self, levels: Sequence[Level]) -> None:
        for (_, site, _), code, level in zip(self.sites, self._codes, levels, strict=True):
            set_sparsity(site, level.gamma)
            site.code = with_bits(code, level.bits)

    def kept(self, level: Level) -> list[float]:
        """Share that each site keeps at a level."""
        if level not in self._kept:
            self._measure(level)
        return self._kept[level]

    @property
    def exact(self) -> dict[str, Tensor]:
        """Weight gradients with nothing dropped but zeros."""
        if self._exact is None:
            self._exact = self.gradients(self.nothing)
        return self._exact

    def _measure(self, level: Level) -> None:
        """Note what each site keeps at a level, and the error of the gradients that are computed from it."""
        gradients = self.exact if level == Level() else self.gradients([level] * len(self.sites))
        self._errors[level] = [square_distance(gradients, self.exact, readers) for _, _, readers in self.sites]

    def gradients(self, levels: Sequence[Level]) -> dict[str, Tensor]:
        """Weight gradients on the sample, of a surrogate loss: mean square distance of the results to fixed noise."""
        self._put(levels)
        copied = duplicate_of(self.model).train()
        names = {id(module): name for name, module in self.model.named_modules()}
        copies = [copied.get_submodule(names[id(site)]) for _, site, _ in self.sites]
        sizes = [(0, torch.float32)] * len(copies)
        for i, module in enumerate(copies):
            module.register_forward_pre_hook(_note_size(sizes, i))
        args, kwargs = self._sample
        with seeded(0):
            _surrogate(copied(*args, **kwargs)).backward()  # type: ignore[no-untyped-call]  # torch's own
        if len(set(levels)) == 1:
            estimators = [module.estimator for module in copies if isinstance(module, PackActivation)]
            self._kept[levels[0]] = [estimator.expected_kept for estimator in estimators]
            self._sizes = sizes
        return {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}

    def nbytes(self, index: int, level: Level, share: float) -> int:
        """Bytes that a site keeps at a level of so many times the sample."""
        numel, dtype = self._sizes[index]
        numel = round(numel * share)
        kept, code = round(self.kept(level)[index] * numel), with_bits(self._codes[index], level.bits)
        if code is None:
            narrow = self.sites[index][1].value_dtype != "same"
            values = kept * (min(2, dtype.itemsize) if narrow else dtype.itemsize)
        else:
            values = code.nbytes(kept, dtype)
        bitmap = 0 if code is not None and level.gamma == 0 else bitmap_nbytes(numel)
        return min(bitmap + values, numel * dtype.itemsize)  # where packing would lose, a site leaves it

    def levels(self, share: float) -> list[LayerLevels]:
        """What each layer may drop, and what that costs: one run per level, as errors of layers are independent.

        Args:
            share: Size of a part of the batch over that of the sample.
        """
        for level in self.tried:
            if level not in self._errors:
                self._measure(level)
        return [self._levels_of(i, share) for i in range(len(self.sites))]

    def even_levels(self) -> list[list[Level]]:
        """Each level that was tried for all sites, as far as each may take it, in the order of errors."""
        every = {tuple(_clipped(level, limit) for limit in self.limits): None for level in self.tried}
        return sorted(map(list, every), key=lambda chosen: sum(self._errors[k][i] for i, k in enumerate(chosen)))

    @property
    def tried(self) -> list[Level]:
        """The levels that are measured: each gamma with values and in the fewest bits, and all bits of the whole."""
        gammas = sorted({g for g in _GAMMAS if g < self._largest_gamma} | {limit.gamma for limit in self.limits})
        fewest = min((limit.bits for limit in self.limits if limit.bits is not None), default=None)
        coded = () if fewest is None else (b for b in reversed(BITS) if b >= fewest)
        levels = [Level(gamma) for gamma in gammas] + [Level(0.0, bits) for bits in coded]
        return levels + ([] if fewest is None else [Level(gamma, fewest) for gamma in gammas if gamma > 0])

    @property
    def _largest_gamma(self) -> float:
        return max((limit.gamma for limit in self.limits), default=0.0)

    def _levels_of(self, index: int, share: float) -> LayerLevels:
        """The levels that one site may take: no other one takes as little and has as small an error."""
        limit = self.limits[index]
        allowed = [level for level in self.tried if _is_within(level, limit)]
        choices = [(self._errors[level][index], self.nbytes(index, level, share), level) for level in allowed]
        choices.sort(key=lambda each: (each[2] != Level(), *each[:2]))
        chosen = choices[:1]  # everything comes first
        for each in choices[1:]:
            if each[1] < chosen[-1][1] or (self._codes[index] is None and each[1] == chosen[-1][1]):
                chosen.append(each)
        errors, nbytes, levels = zip(*chosen, strict=True)
        return LayerLevels(self.sites[index][0], levels, nbytes, errors)


def _is_within(level: Level, limit: Level) -> bool:
    """Whether a level keeps no less than a limit allows."""
    in_bits = level.bits is None or (limit.bits is not None and level.bits >= limit.bits)
    return level.gamma <= limit.gamma and in_bits


def _clipped(level: Level, limit: Level) -> Level:
    """A level, or what a limit allows of it."""
    bits = None if level.bits is None or limit.bits is None else max(level.bits, limit.bits)
    return Level(min(level.gamma, limit.gamma), bits)


def _note_size(sizes: list[tuple[int, torch.dtype]], index: int) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        sizes[index] = (args[0].numel(), args[0].dtype)

    return note


def _surrogate(output: Any) -> Tensor:
    results = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if not results:
        raise ConfigError("Config.memory_budget: no result of the model has a gradient; expected a model to train")
    return torch.stack([(result - torch.randn_like(result)).square().mean() for result in results]).sum()


def square_distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], names: set[str]) -> float:
    """Square of the distance of some gradients to exact ones."""
    both = names & found.keys() & exact.keys()
    return sum(float((found[name].double() - exact[name].double()).square().sum()) for name in both)
