"""The same sparse model in dense and in packed storage, and how their training is compared."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from fedmef_fx import Config, set_masks, transform
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparsity.adjust import adjust_mask
from tests.packed_models import build
from tests.references import largest_inactive

# Sums over a row run in another order, which costs a few units in the last place of double precision per step, and more
# where little is left of large terms. The order depends on the processor, so there are digits to spare; what is wrong
# differs from the first digit on.
TIGHT = 1e-10


# Adam divides a gradient by its own size: where one is almost 0, as of weights just grown, it magnifies such noise.
OVER_STEPS = {"sgd": TIGHT, "adamw": 1e-8}


OPTIMIZERS = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda model: AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2, amsgrad=True),
}


CONFIG = Config(density=0.3, activation_sparsity=0.0, weight_storage="dense")


def dense_and_packed(name: str, config: Config = CONFIG) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The same sparse model in dense and in packed storage, and a batch."""
    model, x, y = build(name)
    dense = transform(model, config)
    packed = transform(model, config.replace(weight_storage="packed"))
    assert {parameter.is_packed for parameter in masked_parameters(packed).values()} == {True}
    return dense, packed, x, y


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_same_weights(dense: nn.Module, packed: nn.Module, *, tolerance: float = TIGHT) -> None:
    ours, theirs = masked_parameters(packed), masked_parameters(dense)
    for name, parameter in ours.items():
        assert torch.equal(parameter.mask, theirs[name].mask)
        assert relative(parameter.dense(), theirs[name].parameter.detach()) < tolerance, name


def relative(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    if not right.numel():
        return 0.0
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-30))


def change_topology(dense: nn.Module, packed: nn.Module, x: Tensor, y: Tensor, *, uneven: bool) -> None:
    """Prune and grow k weights per layer by the same rule; uneven changes the number of active weights, too."""
    changed = {}
    for name, parameter in masked_parameters(dense).items():
        generator = torch.Generator().manual_seed(parameter.numel)
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        k = min(parameter.active, parameter.numel - parameter.active) // 3
        mask = adjust_mask(parameter.dense(), parameter.mask, largest_inactive(gradient, parameter.mask, k), k)
        if uneven:
            mask &= torch.rand(mask.shape, generator=generator) < 0.8
            mask |= torch.rand(mask.shape, generator=generator) < 0.05
        changed[name] = mask
    set_masks(dense, changed)
    set_masks(packed, changed)
