"""Which weights change places in an adjustment round: prune low magnitudes, grow large gradients, keep the budget."""

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity.selection import largest_positions, magnitudes, smallest_positions
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = ["adjust_mask", "lowest_magnitude"]


def lowest_magnitude(weight: Tensor, mask: Tensor, k: int) -> Tensor:
    """theta_low: positions of the k active weights of lowest magnitude.

    Masked weights are 0 and would always come first; they are no candidates.

    Args:
        weight: A parameter, any shape.
        mask: Boolean, of its shape; True = active.
        k: How many, at most the number of active weights.

    Returns:
        `k` flat (row-major) positions, int64, ascending; of equal magnitudes those at lower positions are taken.

    Raises:
        ConfigError: A mask of another shape or type, more weights than are active, or weights that are no numbers.

    Example:
        >>> lowest_magnitude(torch.tensor([0.0, -1.0, 3.0, 2.0]), torch.tensor([False, True, True, True]), 2)
        tensor([1, 3])
    """
    _check_mask(weight, mask)
    active = mask.flatten().nonzero().squeeze(1)
    return active[smallest_positions(magnitudes(torch.take(weight.detach(), active)), k)]


def adjust_mask(
    weight: Tensor, mask: Tensor, gradient: SparseGradient, k: int, *, may_go: Tensor | None = None
) -> Tensor:
    """The mask after one adjustment: k active weights pruned, k inactive coordinates grown.

    1. Candidates for growth are the coordinates that are inactive in `mask` and have a gradient other than 0 (one that
       nobody sent counts as 0). A weight that this adjustment prunes is therefore never grown back by it.
    2. Where there are fewer than k candidates, or fewer than k active weights that may go, k shrinks to that number:
       the number of active weights never changes.
    3. The k of these active weights of lowest magnitude are pruned, the k candidates of largest |gradient| are grown.

    Args:
        weight: A parameter, any shape, or its weights as they take effect. Grown weights have to start without effect,
            which is for the caller to do (`fedmef_fx.set_masks` sets them to 0).
        mask: Boolean, of its shape; True = active. It is not changed.
        gradient: Averaged gradient of the parameter.
        k: How many weights change places, >= 0.
        may_go: Boolean, of its shape: the weights that may be pruned; None for all.

    Returns:
        A new mask of the same shape, on the same device, with as many active weights.

    Raises:
        ConfigError: A mask or gradient of another size, or a negative k.
    """
    _check_mask(weight, mask)
    if gradient.numel != mask.numel():
        raise ConfigError(
            f"adjust_mask: got a gradient of a parameter of {gradient.numel} weights; expected {mask.numel()}"
        )
    if k < 0:
        raise ConfigError(f"adjust_mask: k: got {k}; expected an integer >= 0")
    positions, values = gradient.positions.to(mask.device), gradient.values.to(mask.device)
    is_candidate = ~torch.take(mask, positions) & (values != 0)
    positions, values = positions[is_candidate], values[is_candidate]
    prunable = mask if may_go is None else mask & may_go
    k = min(k, positions.numel(), int(prunable.count_nonzero()))
    adjusted = mask.flatten().clone()
    adjusted[lowest_magnitude(weight, prunable, k)] = False
    adjusted[positions[largest_positions(magnitudes(values), k)]] = True
    return adjusted.reshape(mask.shape)


def _check_mask(tensor: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != tensor.shape:
        raise ConfigError(
            f"adjust: got a mask of {mask.dtype}{list(mask.shape)}; expected torch.bool{list(tensor.shape)}, "
            "the shape of its parameter"
        )
