"""Several processes with DistributedDataParallel: `torchrun --nproc-per-node 2 ddp_training.py`."""

import os
import tempfile

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fedmef_fx
from fedmef_fx.models import digits_cnn
from fedmef_fx.training.distributed import check_same_masks, synchronize_masks, synchronized_candidates

if "RANK" in os.environ:  # torchrun says where the other processes are
    dist.init_process_group("gloo")
else:  # alone
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
rank = dist.get_rank()
torch.manual_seed(rank)  # each process has its own part of the data
x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))

model = fedmef_fx.transform(digits_cnn(), fedmef_fx.Config(density=0.2, weight_storage="dense", seed=0))
synchronize_masks(model)
parallel = DistributedDataParallel(model, find_unused_parameters=True)  # NSConv does not read its convolution's bias
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(parallel(x), y).backward()
    optimizer.step()

own = fedmef_fx.growth_candidates(model, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), [(x, y)], k=8)
masks, weights = fedmef_fx.masks(model), fedmef_fx.dense_state_dict(model)
for name, found in synchronized_candidates(own).items():  # the same on all ranks
    flat = masks[name].flatten().clone()
    active = flat.nonzero().flatten()
    grown = found.positions[found.values.abs().argsort(descending=True)[:8]]
    flat[active[weights[name].flatten()[active].abs().argsort()[: grown.numel()]]] = False
    flat[grown] = True
    masks[name] = flat.view(masks[name].shape)
fedmef_fx.set_masks(model, masks)
check_same_masks(model)
if rank == 0:
    print(f"{dist.get_world_size()} processes, density {fedmef_fx.density(model):.2f}")
dist.destroy_process_group()
