"""The optimizer that steps, under what libraries put around one."""

from typing import Any

from torch.optim import Optimizer

from fedmef_fx.errors import ConfigError

__all__ = ["innermost_optimizer"]

_REMEDY = "pass the one that moves the parameters, e.g. torch.optim.SGD(sparse.parameters(), lr=0.1)"


def innermost_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer whose `step` moves the parameters: what stands under `.optimizer` of each wrapper around it.

    Only that one is sure to run step hooks: a wrapper may never have called the constructor of torch's optimizers, and
    may leave steps out, which must not count.

    Raises:
        ConfigError: None, a list, or a wrapper that holds no optimizer of torch.
    """
    found, seen = optimizer, {id(optimizer)}
    while (inner := _inner(found)) is not None and id(inner) not in seen:
        seen.add(id(inner))
        found = inner
    if not isinstance(found, Optimizer) or not hasattr(found, "_optimizer_step_pre_hooks"):
        several = isinstance(optimizer, list | tuple)
        raise ConfigError(
            f"Extrusion: optimizer: got {type(optimizer).__name__}; expected one optimizer of torch, or a wrapper that "
            f"holds one as .optimizer: {'enter one Extrusion for each optimizer, or ' if several else ''}{_REMEDY}"
        )
    return found


def _inner(optimizer: Any) -> Any:
    held = (getattr(optimizer, name, None) for name in ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer"))
    return next((inner for inner in held if isinstance(getattr(inner, "param_groups", None), list)), None)
