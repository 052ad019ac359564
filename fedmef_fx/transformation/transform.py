"""`transform`: the call that turns a model into its sparse, memory-lean twin."""

import difflib
import fnmatch
import functools
import inspect as python_inspect
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fedmef_fx.budget.layer_sparsity import apply_layer_sparsity
from fedmef_fx.budget.plan import MemoryPlan
from fedmef_fx.budget.planner import plan_memory
from fedmef_fx.capture import capture_call, capture_model, duplicate_of, fixed_seed, leaf_regions
from fedmef_fx.config import Config
from fedmef_fx.errors import CaptureError, ConfigError, PassError
from fedmef_fx.export.compact.compact import compact, compact_report
from fedmef_fx.export.compact.report import CompactReport
from fedmef_fx.export.freeze.freeze import freeze
from fedmef_fx.export.onnx.digest import verify_onnx
from fedmef_fx.export.onnx.file_records import FileInspection
from fedmef_fx.export.onnx.inspect_file import inspect_onnx
from fedmef_fx.export.onnx.onnx_file import export_onnx
from fedmef_fx.export.onnx.report import ExportReport
from fedmef_fx.graph.emit import RegionTable, emit, program_of, recompile
from fedmef_fx.graph.pipeline import Pass, PassReport, PassResult, Pipeline, Refusal
from fedmef_fx.graph.program import Program
from fedmef_fx.graph.recording import record_graphs
from fedmef_fx.graph.signature import Call
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.ops.weight_norm import keep_weight_norms_finite
from fedmef_fx.passes.compress_saved import CompressSaved
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.replay_rewrites import ReplayRewrites
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.passes.shrink_saved import ShrinkSaved
from fedmef_fx.sparse_model.masks import Transformation, is_transformed, silence_channels
from fedmef_fx.sparse_model.state_dicts import keep_masks_on_load
from fedmef_fx.transformation.observer import PassObserver

__all__ = [
    "CompactReport",
    "ExportReport",
    "FileInspection",
    "compact",
    "compact_report",
    "export_onnx",
    "extend_region",
    "freeze",
    "inspect_onnx",
    "memory_passes",
    "pack_weights",
    "passes_of",
    "transform",
    "verify_onnx",
]


def transform(
    model: nn.Module,
    config: Config | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    print_after: Collection[str] | Literal["all"] = (),
    stop_after: str | None = None,
    printer: Callable[[str], object] | None = None,
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
        print_after: Names of passes after which the graphs are printed as text ("capture" for those before the first
            pass), or "all".
        stop_after: Name of the last pass to run. The result runs and trains, with what was rewritten until then;
            without masks after "capture" and "functionalize-weights".
        printer: Called with each text; None prints on stderr.

    Returns:
        A `torch.fx.GraphModule` where one graph serves both modes and all calls, otherwise a module of the model's own
        class (a subclass of it) that holds traced regions and keeps its Python forward for the rest.

    Raises:
        ConfigError: No prunable weights, an unknown name in `ignore`, example inputs that the model itself refuses, a
            model wrapped for distributed training, or a pass of `print_after` or `stop_after` that does not run.

    Example:
        >>> import torch, fedmef_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> sparse = fedmef_fx.transform(net, fedmef_fx.Config(density=0.5))
        >>> round(fedmef_fx.density(sparse), 2)
        0.5
    """
    config = config or Config()
    model, notices = _unwrapped(model)
    _check_model(model, config)
    plan = None
    if config.memory_budget is not None:
        plain = functools.partial(transform, model, example_inputs=example_inputs, example_kwargs=example_kwargs)
        config, plan = plan_memory(config, plain, example_inputs, example_kwargs)
    observer = PassObserver(
        [step.name for step in passes_of(config)], print_after=print_after, stop_after=stop_after, printer=printer
    )
    original_mode = {name: module.training for name, module in model.named_modules()}
    duplicate = duplicate_of(model)
    call = _example_call(duplicate, example_inputs, example_kwargs)
    _materialize(duplicate, call)
    if config.density < 1:
        keep_weight_norms_finite(duplicate)
    start = time.perf_counter()
    captured = capture_model(duplicate, call)
    program = Program(
        duplicate,
        captured.regions,
        Transformation(config),
        captured.products,
        tuple(captured.failures),
        pending=captured.pending,
    )
    if not program.is_one_graph:
        program.regions += leaf_regions(duplicate, program.regions, fallbacks=config.normalization == "nsconv")
    capture = PassResult(
        "capture",
        tuple(dict.fromkeys(region.path or type(model).__name__ for region in captured.regions)),
        (*notices, *captured.failures),
        time.perf_counter() - start,
    )
    program.facts.original = record_graphs(program)
    observer.after("capture", program)
    steps = [step for step in passes_of(config) if step.name in observer.runs]
    reports = Pipeline(steps, after_pass=observer.beside(Verifier.of(program))).run(program)
    if stop_after is None:
        _apply_layer_sparsity(program, config)
    planned = () if plan is None else (_planned(plan),)
    program.facts.reports, program.facts.plan = PassReport((*planned, capture, *reports)), plan
    # What is captured later would go through all passes.
    extend = functools.partial(extend_region, config=config) if stop_after is None else None
    result = emit(program, extend=extend)
    silence_channels(result)
    for name, module in result.named_modules():
        module.training = original_mode.get(name, model.training)
    keep_masks_on_load(result)
    return result


def extend_region(module: nn.Module, table: RegionTable, call: Call, *, config: Config) -> None:
    """Capture a region's owner for a kind of call that no graph serves yet, with the masks and kernels that it has.

    Args:
        module: The owner, in the mode of the call.
        table: Gains the graph; stays as it is where the call cannot be captured faithfully.
        call: The call.
        config: Of the transformation.
    """
    table.attempts -= 1
    try:
        regions = capture_call(module, table.path, call)
        program = Program(module, list(regions), Transformation(config))
        Pipeline([ReplayRewrites(config.nsconv_statistics, config.ignore), *memory_passes(config)]).run(program)
    except (CaptureError, PassError):
        return
    apply_layer_sparsity(regions, config.layer_sparsity)
    for region in regions:
        table.add(region)


def pack_weights(model: nn.Module) -> PassResult:
    """Store the masked weights of a transformed model packed, in place: `Config.weight_storage` for a finished model.

    Masked parameters become other objects, so optimizers have to be made afterwards.

    Args:
        model: A transformed model. One that is packed already stays as it is.

    Returns:
        Which weights were packed, and which were not and why; `fedmef_fx.report(model)` has it, too.

    Raises:
        ConfigError: `model` was not made by `transform`.
    """
    program = program_of(model)
    (result,) = Pipeline([PackWeights()]).run(program)
    recompile(model)
    program.facts.config = program.facts.config.replace(weight_storage="packed")
    program.facts.reports = PassReport((*program.facts.reports, result))
    return result


def passes_of(config: Config) -> tuple[Pass, ...]:
    """The passes that a configuration asks for, in order."""
    steps: list[Pass] = [
        FunctionalizeWeights(config.ignore),
        InsertMasks(
            config.density,
            config.allocation,
            config.mask_init,
            config.seed,
            config.ignore,
            config.granularity,
            config.channel_multiple,
        ),
    ]
    if config.normalization == "nsconv":
        steps.append(NormalizeKernels(config.nsconv_statistics, config.ignore))
        if config.residual == "rescale":
            steps.append(RescaleResiduals())
    steps += memory_passes(config)
    return (*steps, PackWeights()) if config.weight_storage == "packed" else tuple(steps)


def memory_passes(config: Config) -> tuple[Pass, ...]:
    """The passes that shrink what autograd keeps.

    With 8-bit codecs and nothing pruned, layers keep their inputs in 8 bits, too.
    """
    compressing = config.saved_precision == "int8"
    if config.activation_sparsity == 0 and not compressing:
        return ()
    options = (config.activation_sparsity, config.threshold_sample, config.threshold_interval, config.ignore)
    first = (CompressSaved(config.ignore),) if compressing else ()
    return (*first, ShrinkSaved(), PruneActivations(*options, config.packed_dtype))


def _planned(plan: MemoryPlan) -> PassResult:
    choices = tuple(f"{label}: {text}" for label, text in plan.rows())
    layers = tuple(f"{choice.layer}: gamma {choice.gamma:g}" for choice in plan.layers)
    return PassResult(f"plan-memory{{budget={plan.budget}}}", (*choices, *layers), seconds=plan.seconds)


def _apply_layer_sparsity(program: Program, config: Config) -> None:
    unused = apply_layer_sparsity(program.regions, config.layer_sparsity)
    if unused and config.activation_sparsity > 0 and not program.pending:
        raise ConfigError(
            f"Config.layer_sparsity: no layer whose input is pruned is named {unused[0]!r}; expected names as in "
            "fedmef_fx.memory(model, inputs).layers; of layers that share an input the first one counts"
        )


def _check_model(model: nn.Module, config: Config) -> None:
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
    for entry in config.ignore:
        pattern = str(entry)
        matches = pattern.startswith("type:") or any(fnmatch.fnmatchcase(name, pattern) for name in names)
        if not matches:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ConfigError(f"Config.ignore: no module of {type(model).__name__} is named {pattern!r}{hint}")


def _unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[Refusal, ...]]:
    """The model itself, out of what torch wraps around it, and what was done."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        kind = type(model).__name__
        raise ConfigError(
            f"transform: got a model wrapped in {kind}; expected the model itself, wrapped afterwards: "
            f"model = {kind}(fedmef_fx.transform(model.module))"
        )
    inner = vars(model).get("_modules", {}).get("_orig_mod") if isinstance(model, nn.Module) else None
    if inner is None:
        return model, ()
    notice = Refusal(type(model).__name__, "unwrapped from torch.compile; compile the result: torch.compile(result)")
    return inner, (notice,)


def _example_call(
    model: nn.Module, example_inputs: Sequence[Any] | None, example_kwargs: Mapping[str, Any] | None
) -> Call | None:
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


def _materialize(model: nn.Module, call: Call | None) -> None:
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
