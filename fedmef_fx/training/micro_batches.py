"""`micro_batches`: one batch in parts, whose gradients add up to the gradient of the batch."""

import operator
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.emit import program_of
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["batch_size_of", "batch_statistics_in", "micro_batches"]

BatchTree = TypeVar("BatchTree")


def micro_batches(
    batch: BatchTree,
    size: int,
    *,
    model: nn.Module | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Iterator[tuple[BatchTree, float]]:
    """Go through a batch in parts that take the memory of a small batch.

        for (x, y), scale in micro_batches((inputs, targets), 16, model=model):
            (loss_fn(model(x), y) * scale).backward()
        optimizer.step()

    The sum of the parts' gradients is the gradient of the whole batch, up to the rounding of the sum, for a model in
    which samples do not meet: no batch statistics, as after `normalization="nsconv"`. Activation pruning estimates its
    thresholds from parts then, and counts parts as steps (`Config.threshold_interval`), so that with gamma > 0 the
    gradients differ slightly from those of a whole batch, within what pruning itself changes. Dropout draws for each
    part. A thing that a loss averages over something other than samples needs a scale of one's own.

    Args:
        batch: Tensors in tuples, lists and dictionaries, all with the samples in their first dimension. What is no
            tensor goes into every part unchanged.
        size: Samples per part; the last one may have fewer.
        model: If given, a model in which batch statistics are left is refused.
        reduction: Of the loss: for a "mean", scale is the part's share of the samples, for a "sum" it is 1.

    Returns:
        Parts in the structure of the batch, as views of its tensors, with their scale.

    Raises:
        ConfigError: A size below 1, tensors of different or no batch size, or batch statistics in the model.

    Example:
        >>> [(part.tolist(), scale) for part, scale in micro_batches(torch.arange(3), 2)]
        [([0, 1], 0.6666666666666666), ([2], 0.3333333333333333)]
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"micro_batches: size: got {size!r}; expected an integer >= 1")
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"micro_batches: reduction: got {reduction!r}; expected 'mean' | 'sum'")
    left = batch_statistics_in(model) if model is not None else []
    if left:
        shown = ", ".join(map(repr, left[:5])) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise ConfigError(
            f"micro_batches: {shown} in train mode compute statistics of the batch, which a part of it does not have; "
            'expected a model without: fedmef_fx.transform(model, Config(normalization="nsconv")), or put these '
            "modules into eval mode"
        )
    return _parts(batch, size, batch_size_of(batch), reduction)


def _parts(batch: Any, size: int, samples: int, reduction: str) -> Iterator[tuple[Any, float]]:
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        part = pytree.tree_map_only(Tensor, operator.itemgetter(slice(start, stop)), batch)
        yield part, (stop - start) / samples if reduction == "mean" else 1.0


def batch_size_of(batch: Any) -> int:
    """Number of samples of a batch.

    Raises:
        ConfigError: No tensor, tensors that disagree, or one without a first dimension or samples.
    """
    tensors = [(path, leaf) for path, leaf in pytree.tree_leaves_with_path(batch) if isinstance(leaf, Tensor)]
    sizes = {f"batch{pytree.keystr(path)}": leaf.shape[0] if leaf.dim() else None for path, leaf in tensors}
    if len(set(sizes.values())) == 1 and None not in sizes.values() and 0 not in sizes.values():
        return next(size for size in sizes.values() if size)
    if not sizes:
        raise ConfigError("micro_batches: the batch holds no tensor; expected e.g. (inputs, targets)")
    listed = ", ".join(f"{name}: {'no dimension' if size is None else size}" for name, size in sizes.items())
    raise ConfigError(
        f"micro_batches: batch sizes are {listed}; expected one size >= 1: the samples in every tensor's first "
        "dimension"
    )


def batch_statistics_in(model: nn.Module) -> list[str]:
    """Names of the modules that compute statistics over a batch in the mode they are in.

    A transformed model may hold subclasses of BatchNorm that became part of normalised kernels; no graph calls them.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats)
    }
    if not found or not is_transformed(model):
        return list(found)
    regions = program_of(model).regions
    used = {
        name
        for region in regions
        for graph in region.graphs.values()
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
        for name in (region.full_name(str(node.target).removesuffix(".running_mean")),)
    }
    traced = [region.path for region in regions if region.role == "region"]
    return [name for name in found if name in used or not any(_is_inside(name, path) for path in traced)]


def _is_inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")
