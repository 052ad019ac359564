"""What adjustments look at: each masked weight as it takes effect, or as it is stored (`Config.adjustment_space`)."""

import dataclasses

import torch
from torch import Tensor, nn

from fedmef_fx.module_tree import owner_of
from fedmef_fx.ops.effective_space import effective_values, penalty_gradients, resting_weights
from fedmef_fx.ops.effective_weight import StoredWeight
from fedmef_fx.ops.nsconv import KernelForm
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of

__all__ = ["EffectiveParameter", "effective_parameters", "start_grown"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class EffectiveParameter:
    """A masked parameter in the space of adjustments; see `ops/effective_space.py`.

    Attributes:
        masked: The parameter.
        gain: The live gain of its NSConv; None where the space is that of parameters or there is no NSConv.
        form: How the NSConv standardises.
    """

    masked: MaskedParameter
    gain: Tensor | None
    form: KernelForm

    @property
    def mask(self) -> Tensor:
        """See `MaskedParameter.mask`."""
        return self.masked.mask

    @property
    def _stored(self) -> StoredWeight:
        packed_shape = self.masked.shape if self.masked.is_packed else None
        return StoredWeight(self.masked.parameter, self.gain, self.masked.buffer, self.form, packed_shape)

    def values(self) -> Tensor:
        """w_hat of the active weights `[active]`, in row-major order; a copy."""
        return self.masked.values() if self.gain is None else self.masked.collect(effective_values(self._stored))

    def dense(self) -> Tensor:
        """w_hat in the weight's dense shape, 0 where masked; a copy."""
        return self.masked.dense() if self.gain is None else self.masked.expand(effective_values(self._stored))

    def at(self, places: Tensor) -> Tensor:
        """w_hat at some places of the parameter as it is stored, such as `MaskedParameter.places` gives."""
        parameter = self.masked.parameter.detach()
        return torch.take(parameter if self.gain is None else effective_values(self._stored), places)

    def penalty_gradients(self, places: Tensor, strength: float) -> tuple[Tensor, Tensor | None]:
        """Gradients, of the parameter in its form and of gain, of strength * sum of w_hat^2 at places or booleans."""
        return penalty_gradients(self._stored, places, strength)


def effective_parameters(model: nn.Module) -> dict[str, EffectiveParameter]:
    """Every masked parameter of a transformed model as adjustments look at it: live, by original name."""
    transformation = transformation_of(model)
    kernels = transformation.kernels if transformation.config.adjustment_space == "effective" else {}
    found = {}
    for name, masked in masked_parameters(model).items():
        kernel = kernels.get(name)
        gain = None if kernel is None else _tensor(model, kernel.gain)
        found[name] = EffectiveParameter(masked, gain, KernelForm() if kernel is None else kernel.form)
    return found


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, leaf = owner_of(model, name)
    tensor: Tensor = getattr(owner, leaf)
    return tensor


@torch.no_grad()
def start_grown(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Let weights that were grown start without effect: at w_hat = 0; the others keep their value.

    A row that comes back from nothing gets gain 1: extrusion may have emptied it through its gain, with which it would
    come back too weak to stay.

    Args:
        model: A transformed model whose masks have just changed.
        before: Parameter name -> the mask it had before.
    """
    for name, parameter in effective_parameters(model).items():
        mask, old = parameter.mask, before[name].to(parameter.masked.buffer.device)
        grown = mask & ~old
        if parameter.gain is None or not grown.any():
            continue
        weight = parameter.masked.dense()
        start = resting_weights(weight, parameter.form, survivors=mask & old, grown=grown)
        parameter.masked.write(torch.where(grown, start, weight)[mask])
        returns = parameter.form.rows(mask).any(1) & ~parameter.form.rows(mask & old).any(1)
        parameter.gain.masked_fill_(returns, 1.0)
