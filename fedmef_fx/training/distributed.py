"""Several processes that train one model: the same masks everywhere, and a check that says where they are not.

`DistributedDataParallel` averages gradients by the place of a parameter, and copies buffers of rank 0, masks among
them, to the others. With other masks on other ranks it would average gradients of different weights. So ranks have to
change masks together, and to the same ones:

    candidates = synchronized_candidates(growth_candidates(model, loss_fn, batches))   # the same on all ranks
    set_masks(model, ...)                                                             # from what all ranks share
    parallel = DistributedDataParallel(model)                                         # again, where weights are packed

`watch_wrappers` lets a DistributedDataParallel around a transformed model check, before each training step, that all
ranks have the same masks and that packed weights have the sizes that it was made for; one small `all_reduce` a step.
FullyShardedDataParallel (FSDP1), which cuts up weights and leaves their masks whole, is refused when it wraps; after
`fully_shard` (FSDP2) any request for the masks of the cut weights is refused (`masked_parameters`).
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.bitmap import pack_bits
from fedmef_fx.sparse_model.averages import transformed_parts
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter
from fedmef_fx.sparse_model.masks import masks, set_masks
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparsity.sparse_gradient import SparseGradient, average_sparse_gradients

__all__ = ["check_same_masks", "synchronize_masks", "synchronized_candidates", "watch_wrappers"]

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"


def synchronized_candidates(
    candidates: Mapping[str, SparseGradient], *, group: "dist.ProcessGroup | None" = None
) -> dict[str, SparseGradient]:
    """Growth candidates of all ranks, averaged: the same on every rank, to the last bit.

    Every rank calls it with what `fedmef_fx.growth_candidates` found on its own batches. A coordinate that a rank did
    not send counts as 0 there, as in a federation. All ranks weigh the same.

    Args:
        candidates: Parameter name -> candidates, of the same parameters in the same order on all ranks.
        group: The process group; None for the default one.

    Raises:
        ConfigError: There is no process group.
    """
    _initialized("synchronized_candidates")
    return {name: average_sparse_gradients(_gathered(own, group)) for name, own in candidates.items()}


def synchronize_masks(model: nn.Module, *, source: int = 0, group: "dist.ProcessGroup | None" = None) -> None:
    """Give a transformed model the masks of one rank on all ranks, as `set_masks` does it.

    Every rank calls it, before the model is wrapped or between two steps.

    Args:
        model: A transformed model.
        source: Global rank whose masks are taken.
        group: The process group; None for the default one.

    Raises:
        ConfigError: There is no process group.
    """
    _initialized("synchronize_masks")
    new = {name: mask.to(torch.uint8).contiguous() for name, mask in masks(model).items()}
    for mask in new.values():
        dist.broadcast(mask, source, group=group)
    set_masks(model, {name: mask.bool() for name, mask in new.items()})


def check_same_masks(model: nn.Module, *, group: "dist.ProcessGroup | None" = None) -> None:
    """Raise, on every rank, unless a transformed model has the same masks on all ranks; every rank calls it.

    Raises:
        ConfigError: Masks differ, or there is no process group.
    """
    _initialized("check_same_masks")
    parameters = list(masked_parameters(model).values())
    _check(parameters, _digest_of(parameters), group)


def _initialized(call: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            f"{call}: there is no process group; expected a call on every rank after "
            "torch.distributed.init_process_group(...)"
        )


def _gathered(own: SparseGradient, group: "dist.ProcessGroup | None") -> list[tuple[SparseGradient, float]]:
    """The candidates of one parameter from all ranks, in the order of ranks."""
    ranks, device = dist.get_world_size(group), own.positions.device
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([own.positions.numel()], device=device), group=group)
    longest = max(int(size) for size in sizes)
    if not longest:
        return [(own, 1.0)]
    parts = []
    for tensor in (own.positions, own.values.double()):
        padded = tensor.new_zeros(longest)
        padded[: tensor.numel()] = tensor
        received = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(received, padded, group=group)
        parts.append([part[: int(size)] for part, size in zip(received, sizes, strict=True)])
    return [
        (SparseGradient(positions, values.to(own.values.dtype), own.numel), 1.0)
        for positions, values in zip(*parts, strict=True)
    ]


def _entries(model: nn.Module) -> list[MaskedParameter]:
    return [parameter for part in transformed_parts(model) for parameter in masked_parameters(part).values()]


def _digest_of(parameters: list[MaskedParameter]) -> int:
    """A number of 62 bits that follows from all masks."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in parameters:
        bits = parameter.buffer if parameter.is_packed else pack_bits(parameter.buffer)
        digest.update(bits.detach().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 2


def _check(parameters: list[MaskedParameter], digest: int, group: "dist.ProcessGroup | None") -> None:
    if not parameters:
        return
    extremes = torch.tensor([digest, -digest], device=parameters[0].buffer.device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    if int(extremes[0]) != -int(extremes[1]):
        raise ConfigError(
            "masks differ between the ranks that train one model, so gradients of different weights would be averaged; "
            "expected the same masks everywhere. Choose them from what all ranks share, e.g. "
            "fedmef_fx.training.distributed.synchronized_candidates(candidates), or take those of one rank: "
            "fedmef_fx.training.distributed.synchronize_masks(model)"
        )


class _Watch:
    """What one wrapper was made for; a forward pre-hook of it."""

    def __init__(self, model: nn.Module) -> None:
        self._sizes = [entry.parameter.numel() for entry in _entries(model)]
        self._versions: list[tuple[int, int]] = []
        self._digest = 0

    def __call__(self, wrapper: Any, _: object) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not wrapper.require_backward_grad_sync or wrapper._join_config.enable:
            return
        entries = _entries(wrapper.module)
        versions = [(id(entry.buffer), entry.buffer._version) for entry in entries]
        if versions != self._versions:
            self._digest = _digest_of(entries)
            self._versions = versions
        _check(entries, self._digest, wrapper.process_group)
        if [entry.parameter.numel() for entry in entries] != self._sizes:
            raise ConfigError(
                "DistributedDataParallel: packed weights have another number of active values than when the model was "
                "wrapped; expected the sizes that its buckets were made for. Wrap the model again after set_masks: "
                "parallel = torch.nn.parallel.DistributedDataParallel(parallel.module)"
            )


@functools.cache
def watch_wrappers() -> None:
    """From now on, check what wraps transformed models for distributed training; see the module docstring."""
    register_module_module_registration_hook(_watch)


def _watch(parent: nn.Module, name: str, module: Any) -> None:
    """Called by torch when a module becomes a child of another one."""
    if name == "module" and isinstance(parent, nn.parallel.DistributedDataParallel) and transformed_parts(module):
        parent.register_forward_pre_hook(_Watch(module))
    elif name == "_fsdp_wrapped_module" and _is_fsdp1(type(parent)) and transformed_parts(module):
        raise ConfigError(
            "FullyShardedDataParallel (FSDP1) joins weights to one flat parameter and cuts it up, so that masks fit "
            "nothing any more; expected torch.nn.parallel.DistributedDataParallel(model) around a transformed model, "
            "made anew, as this one's weights are joined by now"
        )


def _is_fsdp1(kind: type) -> bool:
    return any(base.__module__ == _FSDP1 for base in kind.__mro__)
