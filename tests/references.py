"""Plain computations that faster ones are held against."""

from torch import Tensor

from fedmef_fx.sparsity import SparseGradient


def largest_inactive(gradient: Tensor, mask: Tensor, k: int) -> SparseGradient:
    """The k values of a dense gradient that are largest in magnitude where the mask is off, lower positions first."""
    positions = (~mask).flatten().nonzero().squeeze(1)
    values = gradient.detach().flatten()[positions]
    chosen = values.abs().argsort(descending=True, stable=True)[:k].sort().values
    return SparseGradient(positions[chosen], values[chosen], mask.numel())
