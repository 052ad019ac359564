"""Data for experiments: scikit-learn's digits, CIFAR-10 in its binary format, and Dirichlet partitions for clients."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedmef_fx.errors import ConfigError, DataError

__all__ = ["DATA_VARIABLE", "Cifar10", "dirichlet_partition", "load_cifar10", "load_digits"]

DATA_VARIABLE: Final = "FEDMEF_FX_DATA"
"""Environment variable that names the directory with the CIFAR-10 files."""

_CLASSES: Final = 10
_RECORD_BYTES: Final = 1 + 3 * 32 * 32
_FOLDER: Final = "cifar-10-batches-bin"

# Per-channel mean and deviation of the 50,000 training images, pixel values scaled to [0, 1].
_MEAN: Final = (0.4914, 0.4822, 0.4465)
_STD: Final = (0.2470, 0.2435, 0.2616)


def load_digits(*, test_share: float = 0.2, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 handwritten digits of scikit-learn, which need no download.

    Args:
        test_share: Share of each class that goes into the test set, in (0, 1).
        seed: Of the split; the same seed always gives the same one.

    Returns:
        Training and test set of images `f32[1, 8, 8]` and labels (int64). Both are standardised with mean and deviation
        of all training pixels.

    Raises:
        ConfigError: A test share outside (0, 1).
    """
    if not 0 < test_share < 1:
        raise ConfigError(f"load_digits: test_share: got {test_share!r}; expected a number in (0, 1)")
    from sklearn import datasets  # noqa: PLC0415 - takes about a second, which only its users should wait

    pixels, targets = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.as_tensor(targets, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(_CLASSES):
        members = (labels == label).nonzero().squeeze(1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        in_test[shuffled[: round(test_share * len(members))]] = True
    images = (images - images[~in_test].mean()) / images[~in_test].std()
    return TensorDataset(images[~in_test], labels[~in_test]), TensorDataset(images[in_test], labels[in_test])


class Cifar10(Dataset[tuple[Tensor, Tensor]]):
    """CIFAR-10 images that stay one byte per value in memory and are normalised when they are read.

    An item is an image `f32[3, 32, 32]`, normalised per channel, and its label (int64 scalar).

    Args:
        images: `u8[n, 3, 32, 32]`.
        labels: `i64[n]`, each in [0, 10).
        classes: The ten class names.

    Attributes:
        images: As given.
        labels: As given.
        classes: As given.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, classes: Sequence[str]) -> None:
        self.images = images
        self.labels = labels
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._normalised(self.images[index]), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The items of a batch at once; a `DataLoader` calls this."""
        images, labels = self.batch(torch.as_tensor(indices, dtype=torch.int64))
        return list(zip(images, labels, strict=True))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Several items stacked.

        Args:
            indices: `i64[b]`.

        Returns:
            Normalised images `f32[b, 3, 32, 32]` and labels `i64[b]`.
        """
        return self._normalised(self.images[indices]), self.labels[indices]

    @staticmethod
    def _normalised(images: Tensor) -> Tensor:
        mean = torch.tensor(_MEAN).view(3, 1, 1) * 255
        deviation = torch.tensor(_STD).view(3, 1, 1) * 255
        return images.float().sub_(mean).div_(deviation)


def load_cifar10(directory: str | Path | None = None) -> tuple[Cifar10, Cifar10]:
    """CIFAR-10 from its binary files; nothing is downloaded.

    Args:
        directory: Holds `data_batch_*.bin` (any of the five), `test_batch.bin` and `batches.meta.txt`, itself or in a
            folder `cifar-10-batches-bin`. Default: what the environment variable FEDMEF_FX_DATA says.

    Returns:
        Training and test set.

    Raises:
        DataError: No directory, a missing file, or one that is not in the format; the message names file and offset.
    """
    folder = _cifar10_folder(directory)
    classes = (folder / "batches.meta.txt").read_text().split()
    if len(classes) != _CLASSES:
        raise DataError(f"{folder / 'batches.meta.txt'}: got {len(classes)} class names; expected {_CLASSES}")
    train = [_read_records(path) for path in sorted(folder.glob("data_batch_*.bin"))]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return Cifar10(images, labels, classes=classes), Cifar10(*_read_records(folder / "test_batch.bin"), classes=classes)


def _cifar10_folder(directory: str | Path | None) -> Path:
    """The folder with all files that `load_cifar10` needs."""
    chosen = os.environ.get(DATA_VARIABLE) if directory is None else directory
    if not chosen:
        raise DataError(
            f"load_cifar10: got no directory; expected the one with {_FOLDER}, e.g. load_cifar10('data') or the "
            f"environment variable {DATA_VARIABLE}=data"
        )
    root = Path(chosen)
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; expected the one with the binary version of CIFAR-10")
    folder = root / _FOLDER if (root / _FOLDER).is_dir() else root
    for pattern in ("data_batch_*.bin", "test_batch.bin", "batches.meta.txt"):
        if not any(folder.glob(pattern)):
            raise DataError(f"{folder / pattern}: no such file; expected the binary version of CIFAR-10")
    return folder


def _read_records(path: Path) -> tuple[Tensor, Tensor]:
    """Images `u8[n, 3, 32, 32]` and labels `i64[n]` of one file; a record is a label byte and three 32 x 32 planes."""
    content = np.fromfile(path, dtype=np.uint8)
    if not content.size or content.size % _RECORD_BYTES:
        complete = content.size - content.size % _RECORD_BYTES
        raise DataError(
            f"{path}: got {content.size} bytes, the last complete record ends at offset {complete}; expected a "
            f"positive multiple of {_RECORD_BYTES}, the size of a record: the file is truncated or of another format"
        )
    records = torch.from_numpy(content).view(-1, _RECORD_BYTES)
    labels = records[:, 0].to(torch.int64)
    wrong = (labels >= _CLASSES).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise DataError(
            f"{path}: offset {index * _RECORD_BYTES}: got label {int(labels[index])} in record {index}; "
            f"expected 0 to {_CLASSES - 1}"
        )
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def dirichlet_partition(
    labels: Tensor | npt.ArrayLike, *, clients: int, alpha: float, seed: int, min_samples: int = 1
) -> list[Tensor]:
    """Split samples between clients with label skew: each class is shared in Dirichlet(alpha) proportions.

    Clients that end up below `min_samples` then get samples of the client that has the most.

    Args:
        labels: Integer class of each sample, `[n]`: a tensor, a numpy array, or a list such as `dataset.targets`.
        clients: Number of clients, >= 1.
        alpha: Concentration, > 0: small gives each client few classes, large gives all the same mixture.
        seed: Integer >= 0.
        min_samples: Least number of samples per client, >= 0.

    Returns:
        One int64 tensor of ascending sample indices per client; each sample is in exactly one of them.

    Raises:
        ConfigError: An argument out of range, or fewer samples than `clients * min_samples`.
    """
    values = _class_numbers(labels)
    _check_partition(values, clients=clients, alpha=alpha, seed=seed, min_samples=min_samples)
    generator = np.random.default_rng(seed)
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(values):
        members = generator.permutation(np.flatnonzero(values == label))
        proportions = generator.dirichlet(np.full(clients, alpha))
        bounds = np.rint(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for share, part in zip(shares, np.split(members, bounds), strict=True):
            share.extend(part.tolist())
    for share in shares:
        while len(share) < min_samples:
            richest = max(shares, key=len)
            share.append(richest.pop(int(generator.integers(len(richest)))))
    return [torch.tensor(sorted(share), dtype=torch.int64) for share in shares]


def _class_numbers(labels: Tensor | npt.ArrayLike) -> npt.NDArray[np.integer[Any]]:
    """Labels as an array of integers `[n]`.

    Raises:
        ConfigError: They are something else.
    """
    try:
        values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of several lengths, a type that numpy lacks
        raise _no_labels(f"{type(labels).__name__}: {error}") from error
    if values.ndim == 1 and values.size and values.dtype == object and all(isinstance(v, Tensor) for v in values):
        values = np.asarray([value.item() for value in values])
    if values.size == 0 and values.ndim == 1:
        values = values.astype(np.int64)  # an empty list is one of floats for numpy
    if values.ndim != 1 or values.dtype.kind not in "biu":
        raise _no_labels(f"{type(labels).__name__} of {values.dtype}, shape {values.shape}")
    return values


def _no_labels(got: str) -> ConfigError:
    return ConfigError(
        f"dirichlet_partition: labels: got {got}; expected integers of shape [n], the class of each sample: a tensor, "
        "a numpy array or a list"
    )


def _check_partition(
    labels: npt.NDArray[np.integer[Any]], *, clients: int, alpha: float, seed: int, min_samples: int
) -> None:
    for name, value, low in (("clients", clients, 1), ("seed", seed, 0), ("min_samples", min_samples, 0)):
        if value < low:
            raise ConfigError(f"dirichlet_partition: {name}: got {value!r}; expected an integer >= {low}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"dirichlet_partition: alpha: got {alpha!r}; expected a finite number > 0")
    if clients * min_samples > len(labels):
        raise ConfigError(
            f"dirichlet_partition: got {len(labels)} samples for {clients} clients with at least {min_samples} each; "
            f"expected {clients * min_samples} samples, or fewer clients"
        )
