"""Copies of a transformed model on several ranks: whether they have the same masks.

`DistributedDataParallel` averages gradients by the place of a parameter, and copies buffers of rank 0, masks among
them, to the others. With other masks on other ranks it would average gradients of different weights.

`watch_wrappers` lets a DistributedDataParallel around a transformed model check, before each training step, that all
ranks have the same masks and that packed weights have the sizes that it was made for; one small `all_reduce` a step.
FullyShardedDataParallel (FSDP1), which cuts up weights and leaves their masks whole, is refused when it wraps; after
`fully_shard` (FSDP2) any request for the masks of the cut weights is refused (`masked_parameters`).
"""

import functools
import hashlib
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.bitmap import pack_bits
from fedmef_fx.sparse_model.averages import transformed_parts
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter, resizes
from fedmef_fx.sparse_model.parameters import masked_parameters

__all__ = ["check_process_group", "check_same_masks", "watch_wrappers"]

_FSDP1: Final = "torch.distributed.fsdp.fully_sharded_data_parallel"


def check_same_masks(model: nn.Module, *, group: "dist.ProcessGroup | None" = None) -> None:
    """Raise, on every rank, unless a transformed model has the same masks on all ranks; every rank calls it.

    Raises:
        ConfigError: Masks differ, or there is no process group.
    """
    check_process_group("check_same_masks")
    parameters = list(masked_parameters(model).values())
    _check(parameters, _digest_of(parameters), group)


def check_process_group(call: str) -> None:
    """Raise where a call of this name has no other processes to talk to.

    Raises:
        ConfigError: There is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            f"{call}: there is no process group; expected a call on every rank after "
            "torch.distributed.init_process_group(...)"
        )


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


def _resizes_of(entries: list[MaskedParameter]) -> dict[int, int]:
    return {id(entry.parameter): resizes(entry.parameter) for entry in entries}


class _Watch:
    """What one wrapper was made for; a forward pre-hook of it."""

    def __init__(self, model: nn.Module) -> None:
        self._resizes = _resizes_of(_entries(model))
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
        present = _resizes_of(entries)
        if present.keys() != self._resizes.keys():  # of a copy, whose buckets were made for what it has now
            self._resizes = present
        if present != self._resizes:
            raise ConfigError(
                "DistributedDataParallel: packed weights got another number of active values since the model was "
                "wrapped; expected the parameters that its buckets were made for. Wrap it again after set_masks: "
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
            "made again, as this one's weights are joined by now"
        )


def _is_fsdp1(kind: type) -> bool:
    return any(base.__module__ == _FSDP1 for base in kind.__mro__)
