"""Weights of a pretrained model: state dicts in files that run no code when they are read."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmef_fx.errors import DataError

__all__ = ["load_weights"]

_NESTED = ("state_dict", "model", "model_state_dict")
"""Under which key training scripts keep the state dict."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model: `.safetensors`, or what `torch.save` wrote, read with `weights_only`.

    Raises:
        DataError: A file that cannot be read or holds no state dict, or one of another model.
    """
    state = _state(path)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unexpected or wrong:
        name = min(wrong, default="")
        parts = [
            f"{len(missing)} are missing, e.g. {missing[0]!r}" if missing else "",
            f"{len(unexpected)} belong to another model, e.g. {unexpected[0]!r}" if unexpected else "",
            f"{name!r} is {list(state[name].shape)}, expected {list(own[name].shape)}" if wrong else "",
        ]
        raise DataError(f"--weights {path}: do not fit {type(model).__name__}: {'; '.join(filter(None, parts))}")
    model.load_state_dict(state)


def _state(path: Path) -> dict[str, Tensor]:
    where = f"--weights {path}"
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError as error:
        raise DataError(f"{where}: there is no such file") from error
    except Exception as error:  # both readers raise whatever their formats do
        raise DataError(
            f"{where}: cannot be read: {_in_one_line(error)}; expected a state dict, as .safetensors "
            "or as torch.save(model.state_dict(), path) writes it"
        ) from error
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{where}: holds {type(loaded).__name__}; expected a state dict: names and tensors")
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def _in_one_line(error: Exception) -> str:
    """The beginning of an error, without line breaks and the codes that make terminals write bold."""
    words = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()
    return f"{type(error).__name__}: {' '.join(words):.160}"
