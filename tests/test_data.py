from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from fedmef_fx.data import Cifar10, dirichlet_partition, load_cifar10, load_digits
from fedmef_fx.errors import ConfigError, DataError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_batch(path: Path, images: Tensor, labels: Tensor) -> None:
    """One file of records: a label byte, then the red, green and blue plane."""
    path.write_bytes(torch.cat([labels.to(torch.uint8)[:, None], images.flatten(1)], dim=1).numpy().tobytes())


def write_cifar10(directory: Path, images: Tensor, labels: Tensor) -> None:
    """Half of the images as the training batches 1 and 3, the other half as the test batch."""
    directory.mkdir(parents=True, exist_ok=True)
    quarter, half = len(labels) // 4, len(labels) // 2
    write_batch(directory / "data_batch_1.bin", images[:quarter], labels[:quarter])
    write_batch(directory / "data_batch_3.bin", images[quarter:half], labels[quarter:half])
    write_batch(directory / "test_batch.bin", images[half:], labels[half:])
    (directory / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)


LABELS = torch.tensor([0, 9, 3, 4, 5, 6, 7, 8])


@pytest.fixture
def folder(tmp_path, images) -> Path:
    write_cifar10(tmp_path, images, LABELS)
    return tmp_path


def test_cifar10_reads_back_what_was_written(folder, images):
    train, test = load_cifar10(folder)
    assert torch.equal(train.images, images[:4])
    assert torch.equal(test.images, images[4:])
    assert train.images.dtype == torch.uint8
    assert train.labels.tolist() == [0, 9, 3, 4]
    assert test.labels.tolist() == [5, 6, 7, 8]
    assert list(train.classes) == CLASSES


def test_cifar10_normalises_items_per_channel(folder, images):
    train, _ = load_cifar10(folder)
    image, label = train[1]
    assert image.dtype == torch.float32
    assert int(label) == 9
    value = images[1, 2, 5, 7].item() / 255
    assert image[2, 5, 7].item() == pytest.approx((value - 0.4465) / 0.2616, abs=1e-5)


def test_cifar10_batches_equal_stacked_items(folder):
    train, _ = load_cifar10(folder)
    indices = torch.tensor([3, 0])
    stacked, labels = train.batch(indices)
    assert torch.equal(stacked, torch.stack([train[3][0], train[0][0]]))
    assert labels.tolist() == [4, 0]
    loaded = next(iter(DataLoader(train, batch_sampler=[indices.tolist()])))
    assert torch.equal(loaded[0], stacked)
    assert torch.equal(loaded[1], labels)
    assert len(train) == 4


def test_cifar10_is_found_through_the_environment_and_in_its_usual_folder(tmp_path, images, monkeypatch):
    write_cifar10(tmp_path / "cifar-10-batches-bin", images, LABELS)
    monkeypatch.setenv("FEDMEF_FX_DATA", str(tmp_path))
    assert len(load_cifar10()[0]) == 4


def test_cifar10_without_a_directory_says_how_to_give_one(monkeypatch):
    monkeypatch.delenv("FEDMEF_FX_DATA", raising=False)
    with pytest.raises(DataError, match="FEDMEF_FX_DATA=data"):
        load_cifar10()


def test_cifar10_in_a_missing_directory(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such directory"):
        load_cifar10(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["test_batch.bin", "batches.meta.txt"])
def test_cifar10_with_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: no such file"):
        load_cifar10(folder)


def test_cifar10_without_training_files(folder):
    for path in folder.glob("data_batch_*.bin"):
        path.unlink()
    with pytest.raises(DataError, match=r"data_batch_\*\.bin: no such file"):
        load_cifar10(folder)


def test_a_truncated_cifar10_file(folder):
    path = folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    message = r"data_batch_3\.bin: got 6145 bytes, the last complete record ends at offset 3073; expected .* of 3073"
    with pytest.raises(DataError, match=message):
        load_cifar10(folder)


def test_an_empty_cifar10_file(folder):
    (folder / "test_batch.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"test_batch\.bin: got 0 bytes"):
        load_cifar10(folder)


def test_a_label_out_of_range(folder, images):
    write_batch(folder / "data_batch_1.bin", images[:3], torch.tensor([1, 10, 200]))
    with pytest.raises(DataError, match=r"data_batch_1\.bin: offset 3073: got label 10 in record 1; expected 0 to 9"):
        load_cifar10(folder)


def test_class_names_of_another_data_set(folder):
    (folder / "batches.meta.txt").write_text("apple\npear\n")
    with pytest.raises(DataError, match=r"batches\.meta\.txt: got 2 class names; expected 10"):
        load_cifar10(folder)


def test_the_real_cifar10(cifar_dir):
    train, test = load_cifar10(cifar_dir)
    assert list(train.classes) == CLASSES
    assert len(train) % 10000 == 0
    # A batch has 10,000 images with about 1,000 of each class; mean and deviation are those of all 50,000.
    values = train.batch(torch.arange(2000))[0]
    assert values.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (values.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    assert test.labels.unique().tolist() == list(range(10))


def test_digits_are_standardised_and_split_by_class():
    train, test = load_digits()
    images, labels = train.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-4
    assert len(train) + len(test) == 1797
    for label in range(10):
        share = (test.tensors[1] == label).sum() / ((test.tensors[1] == label).sum() + (labels == label).sum())
        assert abs(share - 0.2) < 0.005  # one image of the about 180 of a class


def test_digits_depend_on_the_seed_alone():
    first, again, other = load_digits(seed=1)[1], load_digits(seed=1)[1], load_digits(seed=2)[1]
    assert torch.equal(first.tensors[0], again.tensors[0])
    assert not torch.equal(first.tensors[0], other.tensors[0])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_digits_need_both_sets(share):
    with pytest.raises(ConfigError, match="test_share"):
        load_digits(test_share=share)


@given(
    labels=st.lists(st.integers(0, 4), max_size=60),
    clients=st.integers(1, 6),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 1e5]),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_a_partition_gives_each_sample_to_one_client(labels, clients, alpha, seed, data):
    least = data.draw(st.integers(0, len(labels) // clients))
    arguments = {"clients": clients, "alpha": alpha, "seed": seed, "min_samples": least}
    parts = dirichlet_partition(torch.tensor(labels, dtype=torch.int64), **arguments)
    assert len(parts) == clients
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    assert all(len(part) >= least and part.dtype == torch.int64 for part in parts)
    assert all(torch.equal(part, part.sort().values) for part in parts)
    again = dirichlet_partition(torch.tensor(labels, dtype=torch.int64), **arguments)
    assert all(torch.equal(part, other) for part, other in zip(parts, again, strict=True))


def test_alpha_is_the_amount_of_skew():
    labels = torch.arange(10).repeat(100)

    def largest_share(alpha: float) -> float:
        parts = dirichlet_partition(labels, clients=10, alpha=alpha, seed=0, min_samples=10)
        return float(np.mean([max(Counter(labels[part].tolist()).values()) / len(part) for part in parts]))

    assert largest_share(1e4) < 0.15  # 0.1 for identical mixtures
    assert largest_share(0.05) > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": 0}, "clients: got 0; expected an integer >= 1"),
        ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"alpha": float("inf")}, "alpha: got inf"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"seed": -1}, "seed: got -1"),
        ({"min_samples": -1}, "min_samples: got -1"),
        ({"clients": 11}, "got 10 samples for 11 clients with at least 1 each; expected 11 samples"),
        ({"clients": 3, "min_samples": 4}, "expected 12 samples, or fewer clients"),
    ],
)
def test_impossible_partitions_are_rejected(change, message):
    arguments = {"clients": 2, "alpha": 1.0, "seed": 0} | change
    with pytest.raises(ConfigError, match=message):
        dirichlet_partition(torch.arange(10), **arguments)


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)])
def test_labels_have_to_be_a_vector_of_integers(labels):
    with pytest.raises(ConfigError, match=r"expected integers of shape \[n\]"):
        dirichlet_partition(labels, clients=2, alpha=1.0, seed=0)


@pytest.mark.parametrize("labels", [[[0], [1, 2]], ["cat", "dog"], [0.5, 1.0], 3, torch.zeros(3, dtype=torch.bfloat16)])
def test_labels_of_other_kinds_are_refused(labels):
    with pytest.raises(ConfigError, match=r"expected integers of shape \[n\].* a list"):
        dirichlet_partition(labels, clients=1, alpha=1.0, seed=0)


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.asarray,
        lambda values: np.asarray(values, dtype=np.uint8),
        lambda v: [torch.tensor(x) for x in v],
    ],
)
def test_labels_may_be_lists_and_arrays(kind):
    values = [0, 1, 2] * 10
    wanted = dirichlet_partition(torch.tensor(values), clients=3, alpha=0.5, seed=0)
    parts = dirichlet_partition(kind(values), clients=3, alpha=0.5, seed=0)
    assert all(map(torch.equal, parts, wanted))
    assert [len(part) for part in dirichlet_partition([], clients=2, alpha=1.0, seed=0, min_samples=0)] == [0, 0]


def test_cifar10_is_built_from_tensors():
    data = Cifar10(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([1, 2]), classes=CLASSES)
    assert data[0][0][0, 0, 0].item() == pytest.approx(-0.4914 / 0.2470, abs=1e-6)
