"""What is left of a BatchNorm whose layer has a normalised kernel: a gain and a shift per channel."""

from typing import Any

import torch
from torch import Tensor, nn

from fedmef_fx.ops.nsconv import channel_affine

__all__ = ["ScaleAndShift"]


class ScaleAndShift(nn.Module):
    """Takes the place of a BatchNorm, with its parameters, buffers and attributes, so that its state still loads.

    Its running statistics are never read or changed. It normalises nothing, so that tools that look for BatchNorms
    (differential privacy, SyncBatchNorm, `update_bn`) find none.

    Attributes:
        replaced: The class of the BatchNorm.
    """

    _version = 2  # of BatchNorm's state
    replaced: type[nn.Module]
    weight: Tensor
    bias: Tensor

    @classmethod
    def replace(cls, norm: nn.Module) -> None:
        """Let a BatchNorm only scale and shift, in place."""
        vars(norm)["replaced"] = type(norm)
        norm.__class__ = cls

    def restore(self) -> None:
        """Make it the BatchNorm again, with running statistics that normalise nothing, in place."""
        with torch.no_grad():
            mean = torch.zeros_like(self.weight)
            variance = torch.full_like(self.weight, 1.0 - vars(self)["eps"])
        self.running_mean, self.running_var = mean.detach(), variance.detach()
        self.__class__ = vars(self).pop("replaced")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- BatchNorm's name for it
        """Scale and shift, [N, channels, *size]."""
        return channel_affine(input, self.weight, self.bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start over."""
        self.weight.fill_(1.0)
        self.bias.zero_()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # As BatchNorm does: dictionaries from before torch 0.4.1 have no such counter.
        counter, own = f"{prefix}num_batches_tracked", self._buffers.get("num_batches_tracked")
        if (local_metadata.get("version") or 0) < self._version and own is not None:
            state_dict.setdefault(counter, own)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return f"{self.weight.numel()}"
