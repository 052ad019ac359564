"""What `transform` checks about a model and its example call before it starts."""

import dataclasses
import difflib
import fnmatch
import inspect as python_inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from fedmef_fx.capture import fixed_seed
from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.pipeline import Pass
from fedmef_fx.graph.signature import Call
from fedmef_fx.module_tree import uncompiled_model
from fedmef_fx.passes.catalogue import PASSES
from fedmef_fx.records.passes import Refusal
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["check_model", "check_passes", "example_call", "materialize", "unwrapped"]


_CONFIG_FIELDS: Final = {"statistics": "nsconv_statistics"}
"""Options of passes that `Config` has under another name."""


def check_model(model: nn.Module, config: Config) -> None:
    """Refuse what cannot be transformed.

    Raises:
        ConfigError: Not a module, transformed already, a name that no generated code can hold, or an entry of `ignore`
            that names nothing.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"transform: got {type(model).__name__}; expected a torch.nn.Module")
    if is_transformed(model):
        raise ConfigError(
            "transform: the model is transformed already; transform the original again with another Config, or change "
            "its masks with fedmef_fx.set_masks"
        )
    names = [name for name, _ in model.named_modules()]
    for name in names:
        if set(name) & set("\"'\\\n\r"):
            raise ConfigError(
                f"transform: module name {name!r} has quotes, backslashes or line breaks, which cannot stand in "
                "the code that torch.fx generates; rename the module"
            )
    _check_ignored(model, config.ignore, where="Config.ignore")


def check_passes(model: nn.Module, passes: Sequence[Pass]) -> None:
    """Refuse options of the caller's passes that `Config` would refuse.

    Raises:
        ConfigError: A value out of range, or an entry of `ignore` that names nothing.
    """
    for step in passes:
        if type(step) not in PASSES:
            continue  # a class of the caller's, whose options only it knows
        fields_of_step = dataclasses.fields(step)  # type: ignore[arg-type]  # all of PASSES are dataclasses
        options = {field.name: getattr(step, field.name) for field in fields_of_step}
        fields = {_CONFIG_FIELDS.get(name, name): value for name, value in options.items()}
        try:
            config = Config(**fields)
        except ConfigError as error:
            raise ConfigError(f"pass {step.name}: {str(error).removeprefix('Config.')}") from error
        _check_ignored(model, config.ignore, where=f"pass {step.name}: ignore")


def _check_ignored(model: nn.Module, entries: Collection[str | type], *, where: str) -> None:
    names = [name for name, _ in model.named_modules()]
    for entry in entries:
        pattern = str(entry)
        matches = pattern.startswith("type:") or any(fnmatch.fnmatchcase(name, pattern) for name in names)
        if not matches:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ConfigError(f"{where}: no module of {type(model).__name__} is named {pattern!r}{hint}")


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[Refusal, ...]]:
    """The model itself, out of what torch wraps around it, and what was done."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        kind = type(model).__name__
        raise ConfigError(
            f"transform: got a model wrapped in {kind}; expected the model itself, wrapped afterwards: "
            f"model = {kind}(fedmef_fx.transform(model.module))"
        )
    inner = uncompiled_model(model) if isinstance(model, nn.Module) else model
    if inner is model:
        return model, ()
    notice = Refusal(type(model).__name__, "unwrapped from torch.compile; compile the result: torch.compile(result)")
    return inner, (notice,)


def example_call(
    model: nn.Module, example_inputs: Sequence[Any] | None, example_kwargs: Mapping[str, Any] | None
) -> Call | None:
    """The example call, its arguments bound to the model's forward; None without example inputs.

    Raises:
        ConfigError: Inputs that are no tuple, or that do not fit the signature.
    """
    if example_inputs is None and example_kwargs is None:
        return None
    if isinstance(example_inputs, torch.Tensor):
        raise ConfigError("transform: example_inputs is a tensor; expected a tuple of arguments: example_inputs=(x,)")
    args, kwargs = tuple(example_inputs or ()), dict(example_kwargs or {})
    call = Call.of(model, args, kwargs)
    if call is None:
        raise ConfigError(
            f"transform: the example inputs do not fit {type(model).__name__}.forward"
            f"{python_inspect.signature(model.forward)}: got {len(args)} positional and {sorted(kwargs)} keyword "
            "arguments"
        )
    return call


def materialize(model: nn.Module, call: Call | None) -> None:
    """Give lazy layers their shapes, by the example call."""
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if not lazy:
        return
    if call is None:
        raise ConfigError(
            f"transform: parameter {lazy[0]!r} has no shape yet; expected example inputs, or a model that was called "
            "once: fedmef_fx.transform(model, example_inputs=(x,))"
        )
    with fixed_seed(), torch.no_grad():
        call.on(model.eval(), model)
