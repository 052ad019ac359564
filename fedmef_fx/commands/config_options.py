"""`Config` on the command line: a file, and one option for each field that users change often."""

import functools
import inspect as python_inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fedmef_fx.commands.arguments import Passes
from fedmef_fx.commands.command import Result
from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError

__all__ = ["takes_config"]

_TRANSFORM: Final[dict[str, Any]] = {
    "config_file": Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Configuration as JSON; the options below win.")
    ],
    "density": Annotated[float | None, typer.Option(help="Active share of the prunable weights, (0, 1].")],
    "allocation": Annotated[str | None, typer.Option(help="How layers share the budget: erk or uniform.")],
    "mask_init": Annotated[str | None, typer.Option(help="Initial masks: random or magnitude.")],
    "granularity": Annotated[str | None, typer.Option(help="What masks switch: weight, channel, or N:M such as 2:4.")],
    "normalization": Annotated[
        str | None, typer.Option(help="nsconv turns BatchNorm into normalised kernels, keep leaves it.")
    ],
    "activation_sparsity": Annotated[
        float | None,
        typer.Option("--activation-sparsity", "--gamma", help="Share of saved activations that is dropped, [0, 1)."),
    ],
    "activation_bits": Annotated[
        int | None, typer.Option("--activation-bits", "--bits", help="Bits of what layers keep: 1, 2, 3, 4 or 8.")
    ],
    "saved_precision": Annotated[
        str | None, typer.Option(help="What must not be pruned is saved exact, or as int8, int4, int2.")
    ],
    "packed_dtype": Annotated[
        str | None, typer.Option(help="Values of pruned activations: same, bfloat16 or float16.")
    ],
    "weight_storage": Annotated[
        str | None, typer.Option(help="Where masked weights live: dense with masks, or packed as active values alone.")
    ],
    "ignore": Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Module to leave alone, by name or glob; may be repeated.")
    ],
    "seed": Annotated[int | None, typer.Option(help="Seed of every random choice.")],
}
_TRAINING: Final[dict[str, Any]] = {
    "passes": Passes,
    "adjustment_space": Annotated[
        str | None,
        typer.Option(help="What is pruned, emptied and grown by: effective (NSConv's w_hat) or parameter (theta)."),
    ],
    "adjustment_rate": Annotated[float | None, typer.Option(help="alpha of the adjustment schedule, (0, 1].")],
    "adjustment_interval": Annotated[int | None, typer.Option(help="Rounds between adjustments.")],
    "adjustment_stop": Annotated[int | None, typer.Option(help="Round from which masks stay fixed.")],
    "extrusion_strength": Annotated[float | None, typer.Option(help="lambda of budget-aware extrusion; 0 is off.")],
    "gradient_clipping": Annotated[
        float | None, typer.Option(help="Adaptive gradient clipping: largest ratio of gradient to weight norm.")
    ],
}


def takes_config(*, training: bool = False) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Replace a function's parameter `config` by the command-line options that make it.

    Args:
        training: Whether the command trains and so takes the fields that steer training, too.
    """
    options = {**_TRANSFORM, **(_TRAINING if training else {})}

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(**given: Any) -> Result:
            fields = {name: given.pop(name) for name in options}
            return function(**given, config=_config(**fields))

        signature = python_inspect.signature(function)
        kept = [
            parameter.replace(kind=python_inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if name != "config"
        ]
        added = [
            python_inspect.Parameter(name, python_inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in options.items()
        ]
        # typer reads a command's options from these two.
        call.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]  # a function's
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *added)}
        return call

    return decorate


def _config(config_file: Path | None, **fields: Any) -> Config:
    """The configuration of the file, or the default one, with the options that were given."""
    config = Config() if config_file is None else _read(config_file)
    changes = {name: value for name, value in fields.items() if value is not None and value != []}
    return config.replace(**changes)


def _read(path: Path) -> Config:
    try:
        return Config.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error
