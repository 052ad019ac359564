"""The methods that `memory.py` compares, each as a model with what its training step does besides."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from _peers import TwoBitCodes, with_budget
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedmef_fx import Config, masks, micro_batches, transform
from fedmef_fx.models import REFERENCE_MODELS
from fedmef_fx.sparse_model.parameters import register_mask

__all__ = ["METHODS", "Method", "Trainer", "applies"]

DENSITY, GAMMA, MICRO_BATCH = 0.1, 0.9, 16


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: What is shown.
        build: From the original model and the masks that all sparse methods share to the model that trains.
        is_masked: Whether weights are multiplied by masks after each step.
        micro_batch: Samples per part; None for whole batches.
        is_compiled: Whether torch compiles the model, inside of which the meter of live tensors sees nothing.
    """

    label: str
    build: Callable[[nn.Module], nn.Module]
    is_masked: bool = False
    micro_batch: int | None = None
    is_compiled: bool = False


def masked(model: nn.Module) -> nn.Module:
    """The model with the masks that `ours` draws, as buffers: training multiplies by them after each step."""
    result = copy.deepcopy(model)
    for name, mask in masks(transform(model, Config(density=DENSITY))).items():
        register_mask(result, name, mask)
    return result


def ours(**options: Any) -> Callable[[nn.Module], nn.Module]:
    """A transformation of the model."""
    return lambda model: transform(model, Config(**{"density": DENSITY, **options}))


class _ReLU6(Function):
    """ReLU6 that saves its result, which the next layer saves as well, instead of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clamp(0.0, 6.0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grad * ((out > 0) & (out < 6))


class ReLU6SavedOnce(nn.Module):
    """`_ReLU6` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Clamp to [0, 6]."""
        return _ReLU6.apply(x)


def with_relu6_saved_once(model: nn.Module) -> nn.Module:
    """A masked model whose ReLU6 keeps no tensor of its own."""
    return _replaced(masked(model), nn.ReLU6, lambda _: ReLU6SavedOnce())


class _TopK(Function):
    """A layer that keeps the largest 1 - gamma of its input as values with int32 indices (after DropIT)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...] | None) -> Tensor:
        flat = x.detach().reshape(-1)
        kept = max(1, round((1 - GAMMA) * flat.numel()))
        index = flat.abs().topk(kept, sorted=False).indices
        ctx.save_for_backward(flat[index], index.to(torch.int32), weight)
        ctx.shape, ctx.options, ctx.has_bias = x.shape, options, bias is not None
        return F.linear(x, weight, bias) if options is None else F.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, index, weight = ctx.saved_tensors
        x = values.new_zeros(ctx.shape.numel()).index_copy_(0, index.long(), values).view(ctx.shape)
        if ctx.options is None:
            return grad @ weight, grad.t() @ x, grad.sum(0) if ctx.has_bias else None, None
        stride, padding, dilation, groups = ctx.options
        which = (ctx.needs_input_grad[0], True, ctx.has_bias)
        sizes = [weight.shape[0]] if ctx.has_bias else None
        arguments = (stride, padding, dilation, False, [0, 0], groups, which)
        return (*torch.ops.aten.convolution_backward(grad, x, weight, sizes, *arguments), None)


class TopKLayer(nn.Module):
    """A convolution or linear layer that trains with `_TopK`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)
        is_linear = isinstance(layer, nn.Linear)
        self.options = None if is_linear else (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result, exact."""
        return _TopK.apply(x, self.weight, self.bias, self.options)


def drop_it(model: nn.Module) -> nn.Module:
    """A masked model whose layers keep their inputs by top-k."""
    return _replaced(masked(model), (nn.Conv2d, nn.Linear), TopKLayer)


class _Checkpointed(nn.Module):
    """A block whose activations are computed again for its backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        """The block's result."""
        return checkpoint(self.block, x, use_reentrant=False)


def checkpointed(model: nn.Module) -> nn.Module:
    """A masked model that checkpoints each residual block."""
    model = masked(model)
    blocks = {type(m) for m in model.modules() if type(m).__name__ in ("_BasicBlock", "_InvertedResidual")}
    return _replaced(model, tuple(blocks), _Checkpointed)


class _Autocast(nn.Module):
    """A model that computes in bfloat16 where torch's autocast does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Scores in float32."""
        with torch.autocast("cpu", torch.bfloat16):
            scores: Tensor = self.model(x)
        return scores.float()


def autocast(model: nn.Module) -> nn.Module:
    """A masked model under autocast."""
    return _Autocast(masked(model))


def _replaced(model: nn.Module, kinds: Any, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kinds):
                setattr(module, name, make(child))
    return model


BUDGET = "activation_memory_budget"
DENSE = {"weight_storage": "dense"}
VALUES = {"activation_sparsity": 0.9}
ONE_BIT = {"activation_bits": 1, "activation_rounding": "nearest", "activation_levels": "centroids"}
METHODS = {
    "dense": Method("dense (BatchNorm)", copy.deepcopy),
    "masked": Method("masked-dense (BatchNorm)", masked, is_masked=True),
    "relu6": Method("masked-dense, ReLU6 saved once", with_relu6_saved_once, is_masked=True),
    "dropit": Method("masked-dense, top-k and int32 indices", drop_it, is_masked=True),
    "checkpointing": Method("masked-dense, each block checkpointed", checkpointed, is_masked=True),
    "autocast": Method("masked-dense, bfloat16 autocast", autocast, is_masked=True),
    "coded": Method(
        "masked-dense, 2 bits for all that is saved", lambda model: TwoBitCodes(masked(model)), is_masked=True
    ),
    "budget-0.5": Method(f"masked-dense, {BUDGET} 0.5", with_budget(masked, 0.5), is_masked=True, is_compiled=True),
    "budget-0.2": Method(f"masked-dense, {BUDGET} 0.2", with_budget(masked, 0.2), is_masked=True, is_compiled=True),
    "values": Method("ours: gamma 0.9, weights dense", ours(**VALUES, **DENSE)),
    "packed": Method("ours: gamma 0.9, weights packed", ours(**VALUES)),
    "default": Method("ours: 2 bits, weights packed (default)", ours()),
    "one-bit": Method("ours: 1 bit", ours(**ONE_BIT)),
    "micro": Method(f"ours: default, micro-batches of {MICRO_BATCH}", ours(), micro_batch=MICRO_BATCH),
}


def applies(method: str, model: str) -> bool:
    """Whether a method differs on a model from the row above."""
    return method != "relu6" or any(isinstance(m, nn.ReLU6) for m in REFERENCE_MODELS[model]().modules())


class Trainer:
    """A method at work on a batch of random images."""

    def __init__(self, method: str, model: str, batch: int) -> None:
        torch.manual_seed(0)
        self.method = METHODS[method]
        self.model = self.method.build(REFERENCE_MODELS[model]()).train()
        self.x, self.y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        buffers = dict(self.model.named_buffers())
        found = ((p, buffers.get(f"{name}_mask")) for name, p in self.model.named_parameters())
        self.masks = [(p, mask) for p, mask in found if mask is not None] if self.method.is_masked else []

    def tensors(self) -> list[Tensor]:
        """What exists before a step."""
        return [*self.model.parameters(), *self.model.buffers(), self.x, self.y]

    def loss(self, logits: Tensor) -> Tensor:
        """Cross entropy, of parts as well."""
        return F.cross_entropy(logits, self.y[: len(logits)])

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        parts = [(self.x, 1.0)]
        if self.method.micro_batch is not None:
            parts = micro_batches(self.x, self.method.micro_batch, model=self.model)
        for part, scale in parts:
            (self.loss(self.model(part)) * scale).backward()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, mask in self.masks:
                parameter.mul_(mask)
