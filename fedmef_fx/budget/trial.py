"""A model on trial for a memory budget: what each packed input may drop, what that saves, and what it costs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedmef_fx.budget.layer_sparsity import packing_sites, set_sparsity
from fedmef_fx.budget.plan import LayerLevels
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.emit import program_of
from fedmef_fx.measure.live import tensors_in
from fedmef_fx.module_tree import duplicate_of
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.packing.bitmap import bitmap_nbytes

__all__ = ["PlannedModel", "square_distance"]

_LEVELS: Final = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


class PlannedModel:
    """A transformed model whose packing sites are set in place, and measured on a few samples.

    Attributes:
        model: The model; its own, not the user's.
        settings: Fields of the configuration that it differs in.
        sites: The layer that reads a packed input first, the site, and the parameters whose gradients it serves.
        limits: The most that each site may drop.
        nothing: A gamma of 0 for each site.
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
        found: dict[int, tuple[str, PackActivation, set[str]]] = {}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for layer, site, region, node in packing_sites(program_of(model).regions):
            read = (region.tensor(source) for user in node.users for source in user.all_input_nodes)
            readers = {names[id(tensor)] for tensor in read if isinstance(tensor, nn.Parameter)}
            found.setdefault(id(site), (layer, site, set()))[2].update(readers)
        self.sites = list(found.values())
        self.limits = [min(site.activation_sparsity, limit(layer)) for layer, site, _ in self.sites]
        self.nothing = [0.0] * len(self.sites)
        self._kept: dict[float, list[float]] = {}
        self._errors: dict[float, list[float]] = {}
        self._sizes: list[tuple[int, int]] = []  # elements and bytes per element of what each site packs
        self._exact: dict[str, Tensor] | None = None
        if measured is not None and [site[0] for site in measured.sites] == [site[0] for site in self.sites]:
            # Formats change neither what is packed nor which part of it: only how it is stored.
            self._kept, self._errors, self._sizes = measured._kept, measured._errors, measured._sizes

    def set(self, gammas: Sequence[float]) -> None:
        """Give every site its gamma, and the share that it kept when that was measured."""
        shares = [self.kept(gamma)[i] for i, gamma in enumerate(gammas)]
        for (_, site, _), gamma, share in zip(self.sites, gammas, shares, strict=True):
            set_sparsity(site, gamma)
            site.estimator.kept = share

    def kept(self, gamma: float) -> list[float]:
        """Share that each site keeps at a level."""
        if gamma not in self._kept:
            self._measure(gamma)
        return self._kept[gamma]

    @property
    def exact(self) -> dict[str, Tensor]:
        """Weight gradients with nothing dropped but zeros."""
        if self._exact is None:
            self._exact = self.gradients(self.nothing)
        return self._exact

    def _measure(self, gamma: float) -> None:
        """Note what each site keeps at a level, and the error of the gradients that are computed from it."""
        found = self.exact if gamma == 0.0 else self.gradients([gamma] * len(self.sites))
        self._errors[gamma] = [square_distance(found, self.exact, readers) for _, _, readers in self.sites]

    def gradients(self, gammas: Sequence[float]) -> dict[str, Tensor]:
        """Weight gradients on the sample, of a surrogate loss: mean square distance of the results to fixed noise."""
        for (_, site, _), gamma in zip(self.sites, gammas, strict=True):
            set_sparsity(site, gamma)
        copied = duplicate_of(self.model).train()
        names = {id(module): name for name, module in self.model.named_modules()}
        copies = [copied.get_submodule(names[id(site)]) for _, site, _ in self.sites]
        sizes = [(0, 0)] * len(copies)
        for i, module in enumerate(copies):
            module.register_forward_pre_hook(_note_size(sizes, i))
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        args, kwargs = self._sample
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            _surrogate(copied(*args, **kwargs)).backward()  # type: ignore[no-untyped-call]  # torch's own
        if len(set(gammas)) == 1:
            estimators = [module.estimator for module in copies if isinstance(module, PackActivation)]
            self._kept[gammas[0]] = [estimator.expected_kept for estimator in estimators]
            self._sizes = sizes
        return {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}

    def nbytes(self, index: int, gamma: float, share: float) -> int:
        """Bytes that a site keeps at a level of so many times the sample."""
        numel, itemsize = self._sizes[index]
        site = self.sites[index][1]
        narrow = getattr(site, "value_dtype", "same") != "same"
        kept = self.kept(gamma)[index]
        packed = bitmap_nbytes(round(numel * share)) + round(kept * numel * share) * (2 if narrow else itemsize)
        return min(packed, round(numel * share) * itemsize)  # where packing would lose, a site leaves it

    def levels(self, share: float) -> list[LayerLevels]:
        """What each layer may drop, and what that costs: one run per level, as errors of layers are independent.

        Args:
            share: Size of a part of the batch over that of the sample.
        """
        gammas = sorted({g for g in _LEVELS if g < max(self.limits)} | set(self.limits))
        for gamma in gammas:
            if gamma not in self._errors:
                self._measure(gamma)
        errors = [self._errors[gamma] for gamma in gammas]  # [level][site]
        result = []
        for i, (layer, _, _) in enumerate(self.sites):
            levels = [k for k, gamma in enumerate(gammas) if gamma <= self.limits[i]]
            nbytes = tuple(self.nbytes(i, gammas[k], share) for k in levels)
            result.append(
                LayerLevels(layer, tuple(gammas[k] for k in levels), nbytes, tuple(errors[k][i] for k in levels))
            )
        return result


def _note_size(sizes: list[tuple[int, int]], index: int) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        sizes[index] = (args[0].numel(), args[0].element_size())

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
