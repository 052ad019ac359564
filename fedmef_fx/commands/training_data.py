"""What the commands that train share: data sets by name, the model that suits each, and whether the two fit."""

import contextlib
import copy
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedmef_fx.data import load_cifar10, load_digits
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.federated import RoundRecord
from fedmef_fx.federated.checkpoint import FILE_NAME

__all__ = [
    "DEFAULT_MODELS",
    "Data",
    "check_fits",
    "device_of",
    "load_data",
    "round_note",
    "telling_how_to_go_on",
]


class Data(StrEnum):
    """What to train on."""

    DIGITS = "digits"
    CIFAR10 = "cifar10"


DEFAULT_MODELS: Final = {Data.DIGITS: "digits_cnn", Data.CIFAR10: "resnet18"}


def load_data(data: Data, directory: Path | None) -> tuple[Dataset[Any], Dataset[Any], Tensor]:
    """Training set, test set, and the labels of the training set."""
    if data is Data.DIGITS:
        digits, digits_test = load_digits()
        return digits, digits_test, digits.tensors[1]
    images, images_test = load_cifar10(directory)
    return images, images_test, images.labels


def check_fits(network: torch.nn.Module, dataset: Dataset[Any], *, name: str, data: Data) -> None:
    """Find out whether a model takes the images and gives scores for their classes, before anything is trained."""
    image, label = dataset[0]
    where = f"model {name!r} does not fit --data {data.value}, images of {list(image.shape)}"
    try:
        with torch.no_grad():
            scores = copy.deepcopy(network).eval()(image[None])
            torch.nn.functional.cross_entropy(scores, torch.as_tensor(label)[None])
    except Exception as error:  # whatever the model raises
        raise ConfigError(
            f"{where}: {type(error).__name__}: {error!s:.300}; expected scores [batch, classes]"
        ) from error


def device_of(name: str) -> torch.device:
    """The device that `--device` names."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device: got {name!r}; expected cpu, cuda, cuda:1, ...") from error


@contextlib.contextmanager
def telling_how_to_go_on(directory: Path, *, resume: bool) -> Iterator[None]:
    """A block that says how to go on: after an interruption, and with checkpoints that cannot be used.

    Args:
        directory: Where its checkpoints are.
        resume: Whether the command as it was called goes on with one.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not any(directory.rglob(FILE_NAME)):
            raise KeyboardInterrupt("before the first round was finished: nothing was saved") from interrupt
        command = "the same command" if resume else "the same command, without --restart,"
        raise KeyboardInterrupt(
            f"{command} goes on after the last finished round, which is saved in {directory}"
        ) from interrupt
    except CheckpointError as error:
        raise CheckpointError(f"{error}. On the command line: --restart, or another --output") from error


def round_note(record: RoundRecord) -> str:
    """How a round went, in a few words."""
    accuracy = "" if record.test_accuracy is None else f", accuracy {record.test_accuracy:.4f}"
    return f"loss {record.train_loss:.3f}{accuracy}"
