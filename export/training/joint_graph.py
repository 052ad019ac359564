"""The training step of a transformed model as one exported graph: forward, loss, and the gradient of each parameter.

    (parameters, masks, inputs, target)  ->  (loss, output, gradients)

What a transformed model computes in eval mode consists of torch's own operators: a masked weight is a `where`, NSConv
its equations. torch differentiates that graph. Activations are kept as they are, by the runtime's plan of memory.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fedmef_fx.errors import ExportError
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.sparse_model.masked_parameter import mask_name
from fedmef_fx.sparse_model.masks import masks
from fedmef_fx.sparse_model.transformation import transformation_of

__all__ = ["ExportedStep", "LossFunction", "TrainingStep", "export_step", "step_notices"]

LossFunction = Callable[[Any, Tensor], Tensor]
"""Of the model's result and the target: the mean loss of the batch, a scalar."""


class TrainingStep(nn.Module):
    """Forward and loss, as one call.

    Args:
        model: In eval mode.
        loss_fn: Of the model's result and the target.
        kwargs: Keyword arguments of every call, by name.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self._loss_fn, self._kwargs = model, loss_fn, dict(kwargs)
        rows = transformation_of(model).prunable
        self._hooked = [name for name in masks(model) if rows[name].tier == "hook"]

    def forward(self, target: Tensor, *inputs: Any) -> Any:
        """The loss, and the result if it is a tensor."""
        # Weights that the model's own Python reads are masked by hooks on their gradients, which no graph has.
        masked = {
            name: masked_weight(self.model.get_parameter(name), self.model.get_buffer(mask_name(name)))
            for name in self._hooked
        }
        output = torch.func.functional_call(self.model, masked, inputs, self._kwargs)
        loss = self._loss_fn(output, target)
        return (loss, output.detach()) if isinstance(output, Tensor) else (loss,)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ExportedStep:
    """A training step twice: as torch runs it, and with its gradients as part of the graph.

    Attributes:
        forward: (parameters, buffers, target, inputs) -> (loss, output).
        joint: The same, with the gradient of each parameter that needs one.
    """

    forward: ExportedProgram
    joint: ExportedProgram

    def differentiated(
        self, parameters: Mapping[str, Tensor], target: Tensor, inputs: Sequence[Any]
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients by autograd, which knows nothing of the joint graph.

        Args:
            parameters: By name.
            target: What the loss compares with.
            inputs: Positional arguments of the model.

        Returns:
            The loss, and the gradient of each parameter that needs one, by name.
        """
        module = self.forward.module()
        needed = {str(s.target) for s in self.joint.graph_signature.output_specs if s.kind is _GRADIENT}
        own = {name: value.detach().requires_grad_(name in needed) for name, value in parameters.items()}
        loss = torch.func.functional_call(module, own, (target, *inputs))[0]
        gradients = torch.autograd.grad(loss, [own[name] for name in sorted(needed)])
        return float(loss.detach()), dict(zip(sorted(needed), gradients, strict=True))


def export_step(step: TrainingStep, target: Tensor, inputs: Sequence[Any]) -> ExportedStep:
    """Export a training step; the sizes of all tensors are fixed.

    Args:
        step: Forward and loss. Parameters that nothing reads, such as the bias of a convolution that a normalisation
            cancels, need no gradient from then on: torch differentiates only what is read.
        target: What the loss compares with.
        inputs: Positional arguments of the model.

    Raises:
        ExportError: torch.export cannot express the step, or the loss depends on no parameter.
    """
    from torch.export.experimental import _export_forward_backward  # noqa: PLC0415 -- slow to import

    try:
        # Fused attention would be taken apart in the forward and not in the backward, which then gets something else
        # than it expects of the forward: torch 2.13 exports wrong gradients without a word. Its results also lie in
        # memory in another order than those of the plain form, which torch 2.10 minds.
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own use of what it deprecates
            forward = torch.export.export(step, (target, *inputs), strict=False)
            if unread := _unread(forward):
                for name in unread:
                    step.get_parameter(name).requires_grad_(False)
                forward = torch.export.export(step, (target, *inputs), strict=False)
            joint = _export_forward_backward(forward)
            return ExportedStep(forward, joint.run_decompositions({_POOL_BACKWARD: _scattered}))
    except Exception as error:
        raise ExportError(
            f"{type(step.model).__name__}: torch.export cannot write its training step: {error}; expected a model and "
            "a loss of fixed sizes, without Python that depends on values"
        ) from error


def _unread(forward: ExportedProgram) -> list[str]:
    """Parameters that need a gradient and that no node reads."""
    users = {node.name: len(node.users) for node in forward.graph.nodes}
    return [
        str(spec.target)
        for spec in forward.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER and not users[spec.arg.name]
    ]


def step_notices(model: nn.Module) -> tuple[str, ...]:
    """What a model does in training that its exported step does not."""
    norms = [
        name for name, child in model.named_modules() if isinstance(child, _BatchNorm) and child.track_running_stats
    ]
    dropouts = [name for name, child in model.named_modules() if isinstance(child, _DropoutNd) and child.p > 0]
    notices = []
    if norms:
        notices.append(f"normalises by running statistics, which stay as they are: {', '.join(norms)}")
    if dropouts:
        notices.append(f"drops nothing: {', '.join(dropouts)}")
    return tuple(notices)


_GRADIENT: Final = OutputKind.GRADIENT_TO_PARAMETER
_POOL_BACKWARD: Final = torch.ops.aten.max_pool2d_with_indices_backward.default


def _scattered(grad: Tensor, x: Tensor, *options: Any) -> Tensor:
    """The gradient of a max-pooling's input, added up by positions.

    ExecuTorch 1.5 has a kernel for the whole, whose sums begin with whatever lies in memory: gradients came out as
    large as 30 where 0.09 is right.
    """
    *outer, height, width = x.shape
    planes, positions = [-1, height * width], options[-1]
    zeros = grad.new_zeros(x.shape).reshape(planes)
    added = zeros.scatter_add(1, positions.reshape([zeros.shape[0], -1]), grad.reshape([zeros.shape[0], -1]))
    return added.reshape([*outer, height, width])
