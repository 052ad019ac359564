"""What a federation exchanges of a model: masks, the active values under them, and all other tensors."""

import dataclasses
import functools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fedmef_fx.errors import ConfigError
from fedmef_fx.files.container import DTYPES, digest
from fedmef_fx.packing.bitmap import pack_bits
from fedmef_fx.sparse_model.copies import forget_copy
from fedmef_fx.sparse_model.masks import masks, set_masks
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of

__all__ = ["ModelState", "Schema", "TensorSpec", "load_state", "read_state", "trained_names"]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """The spec of a tensor."""
        return cls(tensor.shape, tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor like this."""
        return self.shape.numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Schema:
    """Names, shapes and dtypes of what is exchanged; all parties of a federation have the same.

    Attributes:
        masked: Parameters with masks.
        dense: Other parameters and persistent buffers (biases, normalisation, running statistics).
    """

    masked: Mapping[str, TensorSpec]
    dense: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, model: nn.Module) -> "Schema":
        """The schema of a transformed model.

        Raises:
            ConfigError: A tensor of a dtype that cannot be exchanged.
        """
        parameters = masked_parameters(model)
        masked = {
            name: TensorSpec(parameter.shape, parameter.parameter.dtype) for name, parameter in parameters.items()
        }
        schema = cls(masked, {name: TensorSpec.of(tensor) for name, tensor in _dense_tensors(model).items()})
        for name, spec in (schema.masked | schema.dense).items():  # type: ignore[operator]  # both are dicts
            if spec.dtype not in DTYPES.values():
                expected = ", ".join(map(str, DTYPES.values()))
                raise ConfigError(f"federated: {name!r}: got {spec.dtype}; expected one of {expected}")
        return schema

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, masked weights included."""
        return sum(spec.nbytes for specs in (self.masked, self.dense) for spec in specs.values())


@dataclasses.dataclass(frozen=True, eq=False)
class ModelState:
    """A model's exchanged tensors, on the CPU. They are shared between states and never changed in place.

    Attributes:
        version: Number of rounds that are finished in it.
        masks: Parameter name -> boolean mask, True = active.
        values: Parameter name -> its active values `[active]`, in row-major order.
        dense: Name -> tensor, of all other parameters and persistent buffers.
        run: Name of the run that it belongs to; empty outside runs.
    """

    version: int
    masks: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    run: str = ""

    @functools.cached_property
    def mask_digest(self) -> str:
        """What tells these masks from all others, 32 hexadecimal digits."""
        return digest({name: pack_bits(mask) for name, mask in self.masks.items()}, {})[:32]


def _dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors without a mask, by name; a tied one once."""
    # By identity: `features.1.weight` must never be taken for a part of `features.10.weight`.
    excluded = {
        id(tensor)
        for parameter in masked_parameters(model).values()
        for tensor in (parameter.parameter, parameter.buffer)
    }
    persistent = model.state_dict(keep_vars=True).keys()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in persistent and id(tensor) not in excluded}


def trained_names(model: nn.Module, dense: Collection[str]) -> tuple[str, ...]:
    """Names of those dense tensors that are parameters and are trained."""
    return tuple(name for name, tensor in model.named_parameters() if name in dense and tensor.requires_grad)


@torch.no_grad()
def read_state(model: nn.Module, *, version: int, run: str = "") -> ModelState:
    """Copy the exchanged tensors of a transformed model.

    Args:
        model: A transformed model.
        version: Number of finished rounds.
        run: Name of the run.
    """
    parameters = masked_parameters(model)
    return ModelState(
        version,
        masks={name: mask.cpu() for name, mask in masks(model).items()},
        values={name: parameter.values().cpu() for name, parameter in parameters.items()},
        dense={name: tensor.detach().cpu().clone() for name, tensor in _dense_tensors(model).items()},
        run=run,
    )


@torch.no_grad()
def load_state(model: nn.Module, state: ModelState) -> None:
    """Write a state of the same schema into a model; masked weights become exactly 0.

    Args:
        model: A transformed model of the state's schema.
        state: The state.
    """
    forget_copy(transformation_of(model))  # a client's copy of the server's model goes its own way
    parameters = masked_parameters(model)
    set_masks(model, {n: m for n, m in state.masks.items() if not torch.equal(m, parameters[n].mask.cpu())})
    for name, parameter in parameters.items():
        parameter.write(state.values[name])
    for name, tensor in _dense_tensors(model).items():
        tensor.copy_(state.dense[name])
