"""Any data as clients, any batch: structures, loaders, streams, lazy data, models with outputs of many kinds."""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import ConfigError, DataError, RoundError
from fedmef_fx.federated import ClientData, History, LocalTraining, Objective, run
from fedmef_fx.federated.batches import batches
from fedmef_fx.federated.evaluation import evaluation_of
from fedmef_fx.federated.state import read_state

FAST = LocalTraining(epochs=1, batch_size=8, learning_rate=0.05)
CONFIG = Config(density=0.5, adjustment_interval=1)
CPU = torch.device("cpu")


def _points(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    return torch.randn(samples, 6, generator=generator) + 2 * F.one_hot(labels, 6), labels


POINTS = [_points(size, seed) for seed, size in enumerate([24, 9])]
TEST = _points(40, 7)


class _Rows(Dataset[Any]):
    """Items of any structure."""

    def __init__(self, points: tuple[Tensor, Tensor], make: Any) -> None:
        self._points, self._make = points, make

    def __len__(self) -> int:
        return len(self._points[0])

    def __getitem__(self, index: int) -> Any:
        return self._make(*(part[index] for part in self._points))


class _Stream(IterableDataset[Any]):
    def __init__(self, points: tuple[Tensor, Tensor], *, repeats: bool = False) -> None:
        self._points, self._repeats = points, repeats

    def __iter__(self) -> Iterator[Any]:
        rows = list(zip(*self._points, strict=True))
        return iter(itertools.cycle(rows) if self._repeats else rows)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def _play(model: nn.Module, clients: list[Any], **options: Any) -> History:
    return run(model, clients, options.pop("config", CONFIG), **{"rounds": 2, "training": FAST, **options})


def _assert_same(left: History, right: History) -> None:
    assert left.model is not None
    assert right.model is not None
    found, expected = read_state(left.model, version=0), read_state(right.model, version=0)
    assert found.mask_digest == expected.mask_digest
    assert all(torch.equal(values, expected.values[name]) for name, values in found.values.items())
    assert all(torch.equal(tensor, expected.dense[name]) for name, tensor in found.dense.items())


class _Named(nn.Module):
    """Takes names, gives a dictionary, and computes its own loss where it gets labels."""

    def __init__(self, *, has_loss: bool = False) -> None:
        super().__init__()
        self.net, self.has_loss = _net(), has_loss

    def forward(self, x: Tensor, scale: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x * scale)
        if self.has_loss and labels is not None:
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}
        return {"logits": logits}


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x * scale), scale


ONE = torch.ones(1)
PLAIN = [TensorDataset(*points) for points in POINTS]


@pytest.mark.parametrize(
    ("model", "make"),
    [
        (_Named(), lambda x, y: {"x": x, "scale": ONE, "labels": y, "name": "left out"}),
        (_Named(has_loss=True), lambda x, y: {"x": x, "scale": ONE, "labels": y}),
        (_Two(), lambda x, y: (x, ONE, y)),
        (_Two(), lambda x, y: [x, ONE, y]),
    ],
    ids=["dictionary", "own loss", "two inputs", "a list"],
)
def test_batches_of_many_kinds_train_alike(model: nn.Module, make: Any) -> None:
    config = CONFIG.replace(activation_bits=None)  # models that differ trace alike, but draw other numbers for codes
    options: dict[str, Any] = {"config": config, "test": _Rows(TEST, make)}
    found = _play(model, [_Rows(points, make) for points in POINTS], **options)
    expected = _play(_Sizes(), PLAIN, config=config, test=TensorDataset(*TEST))
    assert not found.failures
    _assert_same(found, expected)
    assert found.test_accuracy == expected.test_accuracy
    assert [record.adjusted for record in found.rounds] == [False, True]


def test_without_labels_the_target_is_the_input() -> None:
    auto = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))
    expected = _play(auto, [TensorDataset(x, x) for x, _ in POINTS], loss_fn=F.mse_loss)
    makers: list[Any] = [TensorDataset, lambda x: _Rows((x, x), lambda x, _: x)]
    for make in makers:
        found = _play(auto, [make(x) for x, _ in POINTS], loss_fn=F.mse_loss, test=make(TEST[0]))
        assert not found.failures
        _assert_same(found, expected)
        assert found.test_accuracy is None


class _Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)


def test_items_that_need_a_collate_fn() -> None:
    def make(x: Tensor, y: Tensor) -> Any:
        return {"rows": x.tolist(), "y": [int(y)]}  # what torch stacks to something else

    def collate(items: list[Any]) -> Any:
        return {"rows": torch.tensor([i["rows"] for i in items]), "y": torch.tensor([i["y"][0] for i in items])}

    found = _play(_Sizes(), [_Rows(p, make) for p in POINTS], collate_fn=collate, test=_Rows(TEST, make))
    assert not found.failures
    _assert_same(found, _play(_Sizes(), PLAIN))
    assert found.test_accuracy is not None


@pytest.mark.parametrize("items", [["a", "b"], [object(), object()], [{"x": "text"}]])
def test_items_that_make_no_batch(items: list[Any]) -> None:
    class _Items(Dataset[Any]):
        def __len__(self) -> int:
            return len(items)

        def __getitem__(self, index: int) -> Any:
            return items[index]

    with pytest.raises(DataError, match="expected"):
        next(batches(_Items(), batch_size=2, shuffle=False, device=CPU))


def test_streams_come_in_their_order() -> None:
    stream = _Stream((torch.arange(9.0).unsqueeze(1), torch.arange(9)))
    sizes = [len(y) for _, y in batches(stream, batch_size=4, shuffle=True, device=CPU)]
    assert sizes == [4, 5]  # a last single sample joins those before it
    found = [
        y
        for _, y in batches(
            _Stream((torch.zeros(9, 1), torch.arange(9)), repeats=True),
            batch_size=4,
            shuffle=False,
            device=CPU,
            samples=11,
        )
    ]
    assert torch.cat(found).tolist() == [*range(9), 0, 1]


@pytest.mark.parametrize("declared", [None, 20])
def test_streams_as_clients(declared: int | None) -> None:
    streams = [_Stream(points, repeats=declared is not None) for points in POINTS]
    data = [ClientData(stream, samples=declared) for stream in streams] if declared else streams
    history = _play(_net(), data, test=_Stream(TEST))
    assert not history.failures
    assert [n["samples"] for n in history.rounds[0].by_client.values()] == ([20, 20] if declared else [24, 9])
    assert history.settings["client_samples"] == [declared, declared]
    assert history.test_accuracy == _play(_net(), data, test=TensorDataset(*TEST)).test_accuracy


def test_a_stream_that_has_less_than_was_declared() -> None:
    with pytest.raises(
        RoundError, match=r"unreadable: .*got 24 samples in an epoch; expected 50, as the client declared"
    ):
        _play(_net(), [ClientData(_Stream(POINTS[0]), samples=50)])
    with pytest.raises(RoundError, match=r"unreadable: .*got 24 samples; expected 50, as the client declared"):
        _play(_net(), [ClientData(PLAIN[0], samples=50)])


def test_loaders_have_their_own_batches() -> None:
    seen: list[int] = []

    class _Watching(Objective):
        def outputs(self, model: nn.Module, batch: Any) -> Any:
            seen.append(len(batch[0]))
            return super().outputs(model, batch)

    loaders = [DataLoader(data, batch_size=6, shuffle=True, drop_last=True) for data in PLAIN]
    history = _play(_net(), loaders, loss_fn=_Watching(), method="fedavg", rounds=1)
    assert set(seen) == {6}
    assert len(seen) == 4 + 1
    assert [numbers["samples"] for numbers in history.rounds[0].by_client.values()] == [24, 9]
    in_order = [DataLoader(data, batch_size=8) for data in (_Stream(points) for points in POINTS)]
    assert not _play(_net(), in_order, method="fedavg", rounds=1).failures


def test_a_loader_with_workers_and_a_generator_is_reproducible(tmp_path: Any) -> None:
    def loaders() -> list[DataLoader[Any]]:
        generator = torch.Generator().manual_seed(3)
        return [DataLoader(d, batch_size=6, shuffle=True, num_workers=1, generator=generator) for d in PLAIN[:1]]

    whole = _play(_net(), loaders())
    _play(_net(), loaders(), rounds=1, config=CONFIG.replace(adjustment_stop=2), checkpoint_dir=tmp_path)
    expected = _play(_net(), loaders(), config=CONFIG.replace(adjustment_stop=2))
    _assert_same(_play(_net(), loaders(), config=CONFIG.replace(adjustment_stop=2), checkpoint_dir=tmp_path), expected)
    assert not whole.failures


class _Augmented(Dataset[Any]):
    """Draws noise from whatever generator it is told to."""

    def __init__(self, points: tuple[Tensor, Tensor], kind: str) -> None:
        self._points, self._kind = points, kind
        self.transforms = [{"numpy": np.random.default_rng(0), "python": random.Random(0)}]  # noqa: S311  # no secret
        self.legacy, self.torch = np.random.RandomState(0), torch.Generator()

    def __len__(self) -> int:
        return len(self._points[0])

    def __getitem__(self, index: int) -> Any:
        draws: dict[str, Any] = {
            "own numpy": self.transforms[0]["numpy"].random,
            "own python": self.transforms[0]["python"].random,
            "own legacy": self.legacy.rand,
            "own torch": lambda: torch.rand((), generator=self.torch),
            "numpy": np.random.rand,
            "python": random.random,
            "torch": lambda: torch.rand(()),
        }
        x, y = (part[index] for part in self._points)
        return x + float(draws[self._kind]()), y


@pytest.mark.parametrize("kind", ["own numpy", "own python", "own legacy", "own torch", "numpy", "python", "torch"])
def test_random_numbers_in_client_data_are_reproducible(kind: str) -> None:
    np.random.seed(1)
    random.seed(1)
    data = [_Augmented(POINTS[0], kind)]
    states = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]  # a tuple here
    first = _play(_net(), data, method="fedavg", rounds=1)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states  # type: ignore[union-attr]  # the same
    # What was drawn before makes no difference, other seeds do.
    np.random.seed(2)
    random.seed(2)
    assert len(data[0][0]) == 2
    _assert_same(_play(_net(), data, method="fedavg", rounds=1), first)
    other = _play(_net(), data, method="fedavg", rounds=1, config=CONFIG.replace(seed=5))
    assert other.rounds[0].train_loss != first.rounds[0].train_loss


def test_lazy_data_are_opened_when_their_client_is_chosen() -> None:
    opened: list[int] = []

    def opener(index: int) -> Any:
        def open_data() -> Any:
            opened.append(index)
            return TensorDataset(*POINTS[index])

        return open_data

    data = [opener(0), ClientData(opener(1), samples=9)]
    history = _play(_net(), data, clients_per_round=1, rounds=4)
    assert opened == [record.clients[0] for record in history.rounds]
    assert history.settings["client_samples"] == [None, 9]
    _assert_same(history, _play(_net(), PLAIN, clients_per_round=1, rounds=4))


def test_lazy_data_that_cannot_be_opened() -> None:
    def broken() -> Any:
        raise OSError(2, "No such file", "/home/ann/x.pt")

    history = _play(_net(), [*PLAIN, broken, lambda: broken], rounds=1)
    assert [(f.client, f.cause) for f in history.failures] == [(2, "unreadable"), (3, "unreadable")]
    assert "ann" not in history.failures[0].text


def test_a_language_model_of_characters() -> None:
    text = "to be or not to be, that is the question. " * 8
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(letter) for letter in text])
    windows = codes[: len(codes) // 12 * 12].reshape(-1, 12)

    class _Letters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(len(alphabet), 16)
            self.mixed, self.out = nn.Conv1d(16, 24, 3), nn.Linear(24, len(alphabet))

        def forward(self, letters: Tensor) -> Tensor:
            found = F.pad(self.embedding(letters).transpose(1, 2), (2, 0))
            return self.out(F.relu(self.mixed(found)).transpose(1, 2))  # [batch, time, letters]

    torch.manual_seed(0)
    data = TensorDataset(windows[:, :-1], windows[:, 1:])
    clients = [torch.utils.data.Subset(data, range(start, len(data), 2)) for start in range(2)]
    training = dataclasses.replace(FAST, epochs=4, optimizer="adam", learning_rate=0.02)
    perplexity = {"perplexity": lambda out, letters: F.cross_entropy(out.flatten(0, 1), letters.flatten()).exp()}
    history = _play(_Letters(), clients, rounds=3, training=training, test=data, metrics=perplexity)
    assert not history.failures
    first, *_, last = history.rounds
    assert last.metrics["perplexity"] < first.metrics["perplexity"] < len(alphabet)
    assert (last.test_accuracy or 0.0) > 0.4
    assert last.adjusted


def test_metrics_of_ones_own() -> None:
    metrics = {"above": lambda outputs, targets: (outputs.argmax(1) > targets).float().mean()}
    history = _play(_net(), PLAIN, metrics=metrics, test=TensorDataset(*TEST), client_tests=[PLAIN[0], None])
    record = history.rounds[-1]
    assert 0 <= record.metrics["above"] <= 1
    assert 0 <= record.by_client[0]["above"] <= 1
    with pytest.raises(ConfigError, match="metrics: 'wrong': got"):
        _play(_net(), PLAIN, metrics={"wrong": lambda outputs, targets: outputs}, test=PLAIN[0])


def test_outputs_that_make_no_loss() -> None:
    class _Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: Tensor) -> dict[str, str]:
            self.net(x)
            return {"answer": "42"}

    with pytest.raises(RoundError, match="ConfigError: loss: got outputs dict and a target Tensor; expected logits"):
        _play(_Odd(), PLAIN, rounds=1, method="fedavg")
    with pytest.raises(RoundError, match="unreadable: batch: got pixels; expected names that the model takes: x"):
        _play(_Odd(), [_Rows(POINTS[0], lambda x, y: {"pixels": x})], rounds=1, method="fedavg")


def test_an_objective_of_ones_own() -> None:
    class _Swapped(Objective):
        def outputs(self, model: nn.Module, batch: Any) -> Any:
            return model(batch[1])

        def target(self, batch: Any) -> Any:
            return batch[0]

    swapped = [TensorDataset(y, x) for x, y in POINTS]
    found = _play(_net(), swapped, loss_fn=_Swapped(), test=TensorDataset(TEST[1], TEST[0]))
    expected = _play(_net(), PLAIN, test=TensorDataset(*TEST))
    _assert_same(found, expected)
    assert found.test_accuracy == expected.test_accuracy


def test_positions_that_do_not_count() -> None:
    logits = torch.eye(3).expand(2, 3, 3)  # predicts 0, 1, 2

    class _Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return logits[..., :3][:, :2] * self.weight

    target = torch.tensor([[0, -100], [1, 1]])
    found = evaluation_of(_Fixed(), TensorDataset(torch.zeros(2, 2), target))
    assert found.accuracy == 2 / 3


def test_tests_per_client_are_counted() -> None:
    with pytest.raises(ConfigError, match="client_tests: got 1; expected 2"):
        _play(_net(), PLAIN, client_tests=[None])
