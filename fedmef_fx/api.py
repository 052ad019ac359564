"""`transform`: the call that turns a model into its sparse, memory-lean twin."""

import copy
import difflib
import fnmatch
import inspect as python_inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedmef_fx.agreement import check_capture
from fedmef_fx.capture import capture_graphs
from fedmef_fx.config import Config
from fedmef_fx.emit import emit
from fedmef_fx.errors import ConfigError
from fedmef_fx.export.freeze import freeze
from fedmef_fx.export.onnx_file import export_onnx
from fedmef_fx.export.report import ExportReport
from fedmef_fx.model import Transformation, is_transformed, keep_masks_on_load
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.passes.shrink_saved import ShrinkSaved
from fedmef_fx.pipeline import Pass, Pipeline
from fedmef_fx.program import Program, Region
from fedmef_fx.verify import Verifier

__all__ = ["ExportReport", "export_onnx", "freeze", "passes_of", "transform"]


def transform(
    model: nn.Module,
    config: Config | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Rewrite a model for FedMef: masked weights, normalised sparse convolutions, pruned saved activations.

    The result trains with any loop and any optimizer; masked weights stay exactly 0. Original parameter names stay, so
    the original's `state_dict` loads. What could not be rewritten stands, with its reason, in `fedmef_fx.report`.

    Args:
        model: The model; it never changes.
        config: What to do; None for `Config()`.
        example_inputs: Positional arguments of one call, as a tuple. With them the model is specialised to the
            optional arguments they give, and the capture is checked against the original in both modes.
        example_kwargs: Keyword arguments of that call.

    Returns:
        A `torch.fx.GraphModule` where one graph serves both modes, otherwise a module that holds a graph per mode.

    Raises:
        ConfigError: No prunable weights, an unknown name in `ignore`, or example inputs that the model itself refuses.
        CaptureError: The model cannot be traced faithfully; the message names the reason.

    Example:
        >>> import torch, fedmef_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> sparse = fedmef_fx.transform(net, fedmef_fx.Config(density=0.5))
        >>> round(fedmef_fx.density(sparse), 2)
        0.5
    """
    config = config or Config()
    _check_model(model, config)
    given = _given_arguments(model, example_inputs, example_kwargs)
    original_mode = {name: module.training for name, module in model.named_modules()}
    duplicate = copy.deepcopy(model)
    graphs = capture_graphs(duplicate, given=given)
    program = Program(duplicate, [Region("", duplicate, graphs)], Transformation(config))
    if given is not None:
        check_capture(model, program, example_inputs or (), example_kwargs or {})
    program.facts.reports = Pipeline(passes_of(config), after_pass=Verifier.of(program)).run(program)
    result = emit(program)
    for name, module in result.named_modules():
        module.training = original_mode.get(name, model.training)
    keep_masks_on_load(result)
    return result


def passes_of(config: Config) -> tuple[Pass, ...]:
    """The passes that a configuration asks for, in order."""
    steps: list[Pass] = [
        FunctionalizeWeights(config.ignore),
        InsertMasks(config.density, config.allocation, config.mask_init, config.seed, config.ignore),
    ]
    if config.normalization == "nsconv":
        steps.append(NormalizeKernels(config.nsconv_statistics, config.ignore))
        if config.residual == "rescale":
            steps.append(RescaleResiduals())
    if config.activation_sparsity > 0:
        steps.append(ShrinkSaved())
        steps.append(
            PruneActivations(
                config.activation_sparsity, config.threshold_sample, config.threshold_interval, config.ignore
            )
        )
    return tuple(steps)


def _check_model(model: nn.Module, config: Config) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"transform: got {type(model).__name__}; expected a torch.nn.Module")
    if is_transformed(model):
        raise ConfigError(
            "transform: the model is transformed already; transform the original again with another Config, or change "
            "its masks with fedmef_fx.set_masks"
        )
    names = [name for name, _ in model.named_modules()]
    for entry in config.ignore:
        pattern = str(entry)
        matches = pattern.startswith("type:") or any(fnmatch.fnmatchcase(name, pattern) for name in names)
        if not matches:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ConfigError(f"Config.ignore: no module of {type(model).__name__} is named {pattern!r}{hint}")


def _given_arguments(
    model: nn.Module, example_inputs: Sequence[Any] | None, example_kwargs: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Example arguments by name, after the original model accepted them in a real call."""
    if example_inputs is None and example_kwargs is None:
        return None
    if isinstance(example_inputs, torch.Tensor):
        raise ConfigError("transform: example_inputs is a tensor; expected a tuple of arguments: example_inputs=(x,)")
    args, kwargs = tuple(example_inputs or ()), dict(example_kwargs or {})
    signature = python_inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"transform: the example inputs do not fit {type(model).__name__}.forward{signature}: got "
            f"{len(args)} positional and {sorted(kwargs)} keyword arguments: {error}"
        ) from error
    return dict(bound.arguments)
