"""Relative error of gradients in float64 against eager autograd, with density 1 and nothing dropped.

    python benchmarks/gradient_error.py

"kept": BatchNorm stays, so that eager is the original model. "nsconv": eager runs the same graph, its kernels written
out in ordinary autograd operations. Each with saved tensors left alone (gamma 0) and with all of them packed (gamma
1e-9: everything that is not zero is kept).
"""

import copy

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from fedmef_fx import Config, transform
from fedmef_fx.models import REFERENCE_MODELS
from fedmef_fx.ops.nsconv import nsconv_weight


def eager_kernel(weight: Tensor, gain: Tensor, mask: Tensor | None = None, *, g: float, **_: object) -> Tensor:
    """The NSConv kernel in ordinary operations: w_hat = g gain (w - mean) / (std sqrt(N))."""
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    kernel = centred / (centred.square().mean(1, keepdim=True).sqrt() * rows.shape[1] ** 0.5)
    return (g * gain[:, None] * kernel).view_as(weight)


def eager(model: nn.Module, normalization: str) -> nn.Module:
    """The model whose gradients are the truth."""
    if normalization == "keep":
        return copy.deepcopy(model)
    plain = transform(model, Config(density=1.0, activation_sparsity=0.0))
    if not isinstance(plain, fx.GraphModule):
        raise TypeError("expected a model with one graph")
    for node in plain.graph.find_nodes(op="call_function", target=nsconv_weight):
        node.target = eager_kernel
    plain.recompile()
    return plain


def main() -> None:
    """Print the table."""
    table = Table("model", "normalization", "gamma", "largest relative error", title=machine())
    for name in ("resnet18", "mobilenet_v2"):
        torch.manual_seed(0)
        model = REFERENCE_MODELS[name]().double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the two sides would drop different elements
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        for normalization in ("keep", "nsconv"):
            truth = eager(model, normalization)
            truth.train()(x).square().mean().backward()
            for gamma in (0.0, 1e-9):
                config = Config(density=1.0, activation_sparsity=gamma, normalization=normalization)  # type: ignore[arg-type]
                ours = transform(model, config)
                ours.train()(x).square().mean().backward()
                errors = [
                    ((p.grad - ours.get_parameter(n).grad).norm() / p.grad.norm()).item()  # type: ignore[operator,union-attr]
                    for n, p in truth.named_parameters()
                    if p.grad is not None
                ]
                table.add_row(name, normalization, f"{gamma:g}", f"{max(errors):.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
