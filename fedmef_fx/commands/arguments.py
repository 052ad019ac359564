"""Models and inputs as the command line names them."""

import contextlib
import functools
import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
import typer
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx.commands.command import showing_stages
from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.models import REFERENCE_MODELS

__all__ = [
    "CheckpointOption",
    "InputShape",
    "ModelName",
    "Passes",
    "build_model",
    "example_input",
    "required_input",
    "sizes_of",
    "transformed",
]

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"{', '.join(REFERENCE_MODELS)}, timm:NAME, torchvision:NAME, or package.module:callable, which is "
        "imported from the current directory or as installed and called without arguments.",
        autocompletion=lambda: list(REFERENCE_MODELS),
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option("--input", metavar="SHAPE", help="Shape of the input with its batch, e.g. 1x3x32x32."),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Weights, masks and configuration of a model that `fedmef-fx train` or `save` wrote."
    ),
]
Passes = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Passes to run after those of the configuration, as reports name them: 'name{option=value}; name'.",
    ),
]

_IMAGES: Final = {
    "digits_cnn": (1, 8, 8),
    "resnet18": (3, 32, 32),
    "resnet50": (3, 224, 224),
    "mobilenet_v2": (3, 32, 32),
    "vit_tiny": (3, 32, 32),
}
_TOKENS: Final = {"gpt2_bytes": (128,)}  # length; each is a byte
_COLLECTIONS: Final = {"timm": ("timm", "create_model"), "torchvision": ("torchvision.models", "get_model")}
_SHAPE: Final = re.compile(r"\d+(x\d+)*")


def build_model(name: str, *, seed: int = 0, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a name.

    Args:
        name: Of a reference model, `timm:NAME`, `torchvision:NAME`, or `package.module:callable`.
        seed: Of its initial weights.
        options: Arguments that it is built with.

    Raises:
        ConfigError: No such model, or one that cannot be built; the message says why.
    """
    factory = _factory(name)
    torch.manual_seed(seed)
    try:
        model = factory(**(options or {}))
    except Exception as error:
        given = f"with {', '.join(options)}" if options else "without arguments"
        raise ConfigError(f"model {name!r}: calling it {given} failed: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r}: it returned {type(model).__name__}; expected a torch.nn.Module")
    return model


def _factory(name: str) -> Callable[..., Any]:
    if name in REFERENCE_MODELS:
        return REFERENCE_MODELS[name]
    module_name, colon, attribute = name.partition(":")
    if module_name in _COLLECTIONS and attribute:
        library, create = _COLLECTIONS[module_name]
        try:
            return functools.partial(getattr(importlib.import_module(library), create), attribute)
        except ImportError as error:
            raise ConfigError(f"model {name!r}: {module_name} is not installed: pip install {module_name}") from error
    if not colon or not module_name or not attribute:
        raise ConfigError(f"model {name!r}: expected {' | '.join(REFERENCE_MODELS)}, or package.module:callable")
    with _current_directory_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise ConfigError(f"model {name!r}: importing {module_name!r} failed: {_told(error)}") from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"model {name!r}: {module_name!r} has no {attribute!r}")
        value = getattr(value, part)
    if isinstance(value, nn.Module) or not callable(value):
        raise ConfigError(
            f"model {name!r}: {attribute!r} is {type(value).__name__}; expected a function or class that is called "
            "without arguments, e.g. def build(): return Net()"
        )
    factory: Callable[..., Any] = value
    return factory


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    """An installed script has its own directory on the path, not the one it is called in."""
    directory = str(Path.cwd())
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def transformed(
    model: nn.Module,
    config: Config,
    *,
    checkpoint: Path | None,
    passes: str | None = None,
    print_after: Collection[str] | Literal["all"] = (),
    stop_after: str | None = None,
    printer: Callable[[str], object] | None = None,
) -> nn.Module:
    """A model transformed as a checkpoint says, with its weights and masks, or as a configuration says.

    Args:
        model: The original.
        config: The configuration.
        checkpoint: The checkpoint; None for none. The passes that it asks for can be neither printed nor stopped, and
            none can be added.
        passes: Text of the passes to run after those of the configuration.
        print_after: As in `fedmef_fx.transform`.
        stop_after: Likewise.
        printer: Likewise.
    """
    if checkpoint is None:
        # What is printed on the way would get in the way of the line.
        with contextlib.nullcontext() if print_after else showing_stages():
            return fedmef_fx.transform(
                model, config, passes=passes or (), print_after=print_after, stop_after=stop_after, printer=printer
            )
    if passes:
        raise ConfigError("--checkpoint: is transformed as it was when it was saved; leave out --passes")
    if print_after or stop_after:
        raise ConfigError("--checkpoint: cannot be looked at between the passes; leave out --print-after, --stop-after")
    with showing_stages():
        return fedmef_fx.load(checkpoint, model)


def example_input(name: str, shape: str | None, *, batch: int = 1) -> Tensor | None:
    """An input for a model, drawn at random, always the same.

    Args:
        name: The model's name.
        shape: As the user gave it, batch first; None for the usual one of a reference model.
        batch: Batch size where the shape is not given.

    Returns:
        `f32[*shape]`, or bytes as `i64[*shape]` for a language model; None for a model of the user's without a shape.
    """
    usual = {**_IMAGES, **_TOKENS}
    sizes = sizes_of(shape) if shape is not None else (batch, *usual[name]) if name in usual else None
    if sizes is None:
        return None
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(256, sizes, generator=generator) if name in _TOKENS else torch.randn(sizes, generator=generator)
    )


def required_input(name: str, shape: str | None, *, batch: int = 1) -> Tensor:
    """`example_input` for a command that cannot do without."""
    x = example_input(name, shape, batch=batch)
    if x is None:
        raise typer.BadParameter(f"is needed for {name}, e.g. --input 1x3x32x32", param_hint="--input")
    return x


def sizes_of(shape: str) -> tuple[int, ...]:
    """The sizes that a text such as 1x3x32x32 gives."""
    if not _SHAPE.fullmatch(shape):
        raise typer.BadParameter(
            f"got {shape!r}; expected sizes joined by x, batch first, e.g. 1x3x32x32", param_hint="--input"
        )
    return tuple(map(int, shape.split("x")))
