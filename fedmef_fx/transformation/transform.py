"""`transform`: the call that turns a model into its sparse, memory-lean version."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Literal

from torch import nn

from fedmef_fx.budget.layer_sparsity import apply_layer_levels
from fedmef_fx.budget.planner import plan_memory
from fedmef_fx.capture import capture_model, duplicate_of, leaf_regions, neutral_surroundings, ordinary_tensors
from fedmef_fx.config import Config, check_config
from fedmef_fx.display.stages import stage
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.emit import emit, program_of, recompile
from fedmef_fx.graph.pipeline import Pass, Pipeline
from fedmef_fx.graph.program import Program
from fedmef_fx.graph.recording import record_graphs
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.ops.weight_norm import keep_weight_norms_finite
from fedmef_fx.passes._reused_memory import withdraw_claims
from fedmef_fx.passes.catalogue import parse_passes
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from fedmef_fx.records.memory_plan import MemoryPlan
from fedmef_fx.records.passes import PassReport, PassResult
from fedmef_fx.sparse_model.channels import zero_dead_channels
from fedmef_fx.sparse_model.state_dicts import keep_masks_on_load
from fedmef_fx.sparse_model.transformation import Transformation, transformation_of
from fedmef_fx.transformation.checks import check_model, check_passes, example_call, materialize, unwrapped
from fedmef_fx.transformation.late_capture import extend_region
from fedmef_fx.transformation.observer import PassObserver
from fedmef_fx.transformation.recipe import config_after, passes_of

__all__ = [
    "pack_weights",
    "transform",
]

_LOGGER: Final = logging.getLogger(__name__)


def transform(
    model: nn.Module,
    config: Config | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    passes: str | Sequence[Pass | str] = (),
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
        passes: Passes of your own, which run after those of the configuration, are verified and reported as they are,
            and run on what is captured later, too. Each is an object with a `name` and `run(program)`, or the text of
            one of ours or of an installed package's: `"rescale-residuals"`, `"compress-saved{ignore=('head',)}"`; one
            text may hold several, with `;` between them. They run after those of `Config.passes` and stand there, as
            text, in the result's configuration, which files and federations keep; see `docs/passes.md`.
        print_after: Names of passes after which the graphs are printed as text ("capture" for those before the first
            pass), or "all".
        stop_after: Name of the last pass to run. The result runs and trains, with what was rewritten until then;
            without masks after "capture" and "functionalize-weights".
        printer: Called with each text; None prints on stderr.

    Returns:
        The model as an instance of its own class (a subclass of it) that runs traced regions and keeps its Python code
        for the rest, other methods included. Where one graph serves both modes and all calls, it also has `.graph` and
        `.code`.

    Raises:
        ConfigError: No prunable weights, an unknown name in `ignore`, example inputs that the model itself refuses, a
            model wrapped for distributed training, something in `passes` that is no pass, or a pass of `print_after`
            or `stop_after` that does not run.
        PassError: A pass of `passes` failed; the cause is chained.
        VerificationError: A pass of `passes` left a program that breaks an invariant.

    Example:
        >>> import torch, fedmef_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> sparse = fedmef_fx.transform(net, fedmef_fx.Config(density=0.5))
        >>> round(fedmef_fx.density(sparse), 2)
        0.5
    """
    check_config(config, where="transform")
    config = config or Config()
    own_passes = (*parse_passes(config.passes), *parse_passes(passes))
    config = config.replace(passes=())  # from here on they are objects
    with neutral_surroundings(model):
        example_inputs, example_kwargs = ordinary_tensors((example_inputs, example_kwargs))
        model, notices = unwrapped(model)
        check_model(model, config)
        check_passes(model, own_passes)
        plan = None
        if config.memory_budget is not None:
            plain = functools.partial(
                transform, model, example_inputs=example_inputs, example_kwargs=example_kwargs, passes=own_passes
            )
            config, plan = plan_memory(config, plain, example_inputs, example_kwargs)
        names = [step.name for step in (*passes_of(config), *own_passes)]
        observer = PassObserver(names, print_after=print_after, stop_after=stop_after, printer=printer)
        result = _transformed(model, config, (example_inputs, example_kwargs), own_passes, observer)
        transformation = transformation_of(result)
        planned = () if plan is None else (_planned(plan),)
        capture, *reports = transformation.reports
        capture = dataclasses.replace(capture, refusals=(*notices, *capture.refusals))
        transformation.reports, transformation.plan = PassReport((*planned, capture, *reports)), plan
    prunable = transformation.prunable.values()
    _LOGGER.info(
        "transform: %s: %d of %d prunable parameters have masks",
        type(model).__name__,
        sum(entry.masked for entry in prunable),
        len(prunable),
    )
    return result


def _transformed(
    model: nn.Module,
    config: Config,
    examples: tuple[Sequence[Any] | None, Mapping[str, Any] | None],
    own_passes: Sequence[Pass],
    observer: PassObserver,
) -> nn.Module:
    """A transformed copy of a model that was checked, with the reports of capture and passes."""
    steps = (*passes_of(config), *own_passes)
    masks = any(isinstance(step, InsertMasks) and step.density < 1 for step in steps)
    original_mode = {name: module.training for name, module in model.named_modules()}
    duplicate = duplicate_of(model)
    call = example_call(duplicate, *examples)
    materialize(duplicate, call)
    if masks:
        keep_weight_norms_finite(duplicate)
    start = time.perf_counter()
    with stage(_LOGGER, "transform: capture"):
        captured = capture_model(duplicate, call)
    program = Program(
        duplicate,
        captured.regions,
        Transformation(config),
        captured.products,
        tuple(captured.failures),
        pending=captured.pending,
    )
    normalizes = any(isinstance(step, NormalizeKernels) for step in steps)
    # Python code that calls layers gets their masks from hooks where it may run forward, from graphs elsewhere.
    fallbacks = normalizes or (masks and program.is_one_graph)
    program.regions += leaf_regions(duplicate, program.regions, fallbacks=fallbacks)
    capture = PassResult(
        "capture",
        tuple(dict.fromkeys(r.path or type(model).__name__ for r in captured.regions if r.role != "fallback")),
        tuple(captured.failures),
        time.perf_counter() - start,
    )
    program.transformation.original = record_graphs(program)
    observer.after("capture", program)
    reports = Pipeline(steps[: observer.number], after_pass=observer.beside(Verifier.of(program))).run(program)
    if own_passes:
        withdraw_claims(program)
    ran = list(zip(steps, reports, strict=False))[len(steps) - len(own_passes) :]
    config = program.transformation.config = config_after(config, ran)
    if observer.runs_all:
        _apply_layer_levels(program, config)
    program.transformation.reports = PassReport((capture, *reports))
    # What is captured later would go through all passes.
    rescales = program.is_one_graph and config.normalization == "nsconv" and config.residual == "rescale"
    recipe = functools.partial(
        extend_region, config=config, passes=own_passes, rescales=rescales, transformation=program.transformation
    )
    extend = recipe if observer.runs_all else None
    if rescales and extend is not None:
        # Where Python calls them, their sums need the factor, too.
        program.pending += RescaleResiduals.modules_with_sums(program)
    result = emit(program, extend=extend)
    zero_dead_channels(result)
    for name, module in result.named_modules():
        module.training = original_mode.get(name, model.training)
    keep_masks_on_load(result)
    return result


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
    program.transformation.config = program.transformation.config.replace(weight_storage="packed")
    program.transformation.reports = PassReport((*program.transformation.reports, result))
    return result


def _planned(plan: MemoryPlan) -> PassResult:
    choices = tuple(f"{label}: {text}" for label, text in plan.rows())
    layers = tuple(f"{choice.layer}: {choice.level}" for choice in plan.layers)
    return PassResult(f"plan-memory{{budget={plan.budget}}}", (*choices, *layers), seconds=plan.seconds)


def _apply_layer_levels(program: Program, config: Config) -> None:
    for field, unused in apply_layer_levels(program.regions, config).items():
        if unused and not program.pending:
            raise ConfigError(
                f"Config.{field}: no layer whose input is packed is named {unused[0]!r}; expected names as in "
                "fedmef_fx.memory(model, inputs).layers; of layers that share an input the first one counts"
            )
