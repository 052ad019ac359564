"""Two processes that train one model: the same masks, and an error that says where they are not."""

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fedmef_fx import Config, density, growth_candidates, masks, set_masks, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparsity.schedule import adjustment_count
from fedmef_fx.training.adjustment import adjusted_masks
from fedmef_fx.training.distributed import check_same_masks, synchronize_masks, synchronized_candidates
from tests import forked
from tests.packed_models import build


def _in_a_group(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for check in (_adjusts, _differs, _keeps_sizes, _resizes, _wraps_flat, _shards):
        torch.manual_seed(0)
        check(rank)
    # See tests/capture/test_circumstances.py: gloo's threads may abort a process that ends while its peer still talks.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def make(storage: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model, x, y = build("conv")
    return transform(model, Config(density=0.4, activation_sparsity=0.0, weight_storage=storage)), x, y


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def _adjusts(rank: int) -> None:
    for storage in ("dense", "packed"):
        model, x, y = make(storage)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(2):
            parallel = DistributedDataParallel(model)
            for _ in range(2):
                step(parallel, optimizer, x + rank, y)
            del parallel
            own = growth_candidates(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x + rank, y)], k=6)
            shared = synchronized_candidates(own)
            counts = {
                name: adjustment_count(masked.active, masked.numel - masked.active, round_index=0, stop=1, rate=0.1)
                for name, masked in masked_parameters(model).items()
            }
            set_masks(model, adjusted_masks(model, shared, counts))
            check_same_masks(model)
            optimizer.zero_grad()
        for parameter in model.parameters():
            other = parameter.detach().clone()
            torch.distributed.broadcast(other, 0)
            assert torch.equal(other, parameter)


def _differs(rank: int) -> None:
    for storage in ("dense", "packed"):
        model, x, y = make(storage)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        step(parallel, optimizer, x, y)
        own = {name: mask.roll(rank) for name, mask in masks(model).items()}
        set_masks(model, own)
        with pytest.raises(ConfigError, match="synchronize_masks"):
            parallel(x)
        with pytest.raises(ConfigError, match="masks differ"):
            check_same_masks(model)
        assert all(torch.equal(mask, own[name]) for name, mask in masks(model).items())
        synchronize_masks(model, source=1)
        step(parallel, optimizer, x, y)
        check_same_masks(model)


def _resizes(rank: int) -> None:
    model, x, y = make("packed")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    parallel = DistributedDataParallel(model)
    step(parallel, optimizer, x + rank, y)
    optimizer.zero_grad()
    own = masks(model)
    set_masks(model, {name: torch.ones_like(mask) for name, mask in own.items()})
    with pytest.raises(ConfigError, match="Wrap it again"):
        parallel(x)
    set_masks(model, own)  # the former sizes, but nothing hears of their gradients any more
    with pytest.raises(ConfigError, match="Wrap it again"):
        parallel(x)
    parallel = DistributedDataParallel(parallel.module)
    step(parallel, optimizer, x + rank, y)
    step(copy.deepcopy(parallel), optimizer, x + rank, y)


def _keeps_sizes(rank: int) -> None:
    model, x, y = make("packed")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        step(parallel, optimizer, x + rank, y)
        set_masks(model, {name: mask.flip(0) for name, mask in masks(model).items()})
    step(parallel, optimizer, x + rank, y)
    for parameter in model.parameters():
        other = parameter.detach().clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(other, parameter)


def _wraps_flat(_: int) -> None:
    for storage in ("dense", "packed"):
        with pytest.raises(ConfigError, match="FSDP1"):
            FullyShardedDataParallel(make(storage)[0], device_id=torch.device("cpu"))


def _shards(_: int) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for storage in ("dense", "packed"):
        model, x, _ = make(storage)
        fully_shard(model.get_submodule(next(iter(masks(model))).rpartition(".")[0]), mesh=mesh)
        with pytest.raises(ConfigError, match="fully_shard"):
            model(x)
        model, x, _ = make(storage)
        fully_shard(model, mesh=mesh)
        with pytest.raises(ConfigError, match="fully_shard"):
            model(x)
        model, _, _ = make(storage)
        fully_shard(model, mesh=mesh)
        for call in (masks, density, lambda m: set_masks(m, {}), lambda m: m.state_dict()):
            with pytest.raises(ConfigError, match="fully_shard"):
                call(model)


@pytest.mark.slow
def test_on_two_processes(tmp_path: Path) -> None:
    # One after the other in the same two: starting them takes longer than all that they check.
    forked.run_in_two(_in_a_group, tmp_path / "store", folder=tmp_path)


def test_without_processes_it_says_so() -> None:
    model, _, _ = make("dense")
    for call in (check_same_masks, synchronize_masks):
        with pytest.raises(ConfigError, match="init_process_group"):
            call(model)
    with pytest.raises(ConfigError, match="init_process_group"):
        synchronized_candidates({})
