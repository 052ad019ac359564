"""Aggregators: by hand, whatever the order of clients, and against clients that scale or flip their updates."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import (
    Aggregator,
    Client,
    CoordinateMedian,
    Krum,
    LocalTraining,
    MeanAroundMedian,
    NeighbourMixing,
    NormClipping,
    Strategy,
    TrimmedMean,
    Update,
    WeightedMean,
    run,
)
from fedmef_fx.federated.state import ModelState
from fedmef_fx.federated.wire import decode_broadcast, decode_update, encode_update
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

SENT = ModelState(0, {"w": torch.ones(2, dtype=torch.bool)}, {"w": torch.zeros(2)}, {"b": torch.zeros(1)})
ALL: list[Aggregator] = [
    WeightedMean(),
    TrimmedMean(0.2),
    MeanAroundMedian(0.2),
    CoordinateMedian(),
    NormClipping(1.0),
    Krum(1),
    NeighbourMixing(TrimmedMean(0.2), 0.2),
    NeighbourMixing(WeightedMean(), 0.2),
]


def _update(client: int, *values: float, steps: int = 0, grown: dict[int, float] | None = None) -> Update:
    grown = grown or {}
    positions = torch.tensor(sorted(grown), dtype=torch.int64)
    gradient = SparseGradient(positions, torch.tensor([grown[where] for where in sorted(grown)]).float(), 9)
    return Update(
        round_index=0,
        samples=client + 1,
        loss=0.0,
        peak_saved_bytes=0,
        values={"w": torch.tensor(values)},
        dense={"b": torch.zeros(1), "steps": torch.tensor(steps)},
        gradients={"w": gradient},
        client=client,
    )


@pytest.fixture
def sent() -> ModelState:
    return dataclasses.replace(SENT, dense={"b": torch.zeros(1), "steps": torch.tensor(0)})


def _single(updates: Sequence[Update]) -> Update:
    (update,) = updates
    return update


def test_the_trimmed_mean_by_hand(sent: ModelState) -> None:
    updates = [_update(c, *pair, steps=c) for c, pair in enumerate([(1, 5), (2, 9), (3, 1), (90, 3), (-90, 4)])]
    found = _single(TrimmedMean(0.2).combine(updates, sent))
    assert torch.equal(found.values["w"], torch.tensor([2.0, 4.0]))  # of 1 2 3, and of 3 4 5
    assert int(found.dense["steps"]) == 2
    assert found.samples == 15
    # A small share of few clients still leaves out one at either end.
    assert torch.equal(_single(TrimmedMean(0.01).combine(updates, sent)).values["w"], found.values["w"])


def test_the_mean_around_the_median_by_hand(sent: ModelState) -> None:
    pairs = [(1.0, 5.0), (2.0, 9.0), (3.0, 1.0), (90.0, 3.0), (5.0, 4.0)]
    updates = [_update(c, *pair, steps=c) for c, pair in enumerate(pairs)]
    found = _single(MeanAroundMedian(0.2).combine(updates, sent))
    assert torch.equal(found.values["w"], torch.tensor([2.75, 3.25]))  # of 1 2 3 5, and of 1 3 4 5
    assert torch.equal(_single(MeanAroundMedian(0).combine(updates, sent)).values["w"], torch.tensor([20.2, 4.4]))


@given(values=st.lists(st.integers(-50, 50), min_size=3, max_size=9), share=st.floats(0, 0.49))
def test_what_is_left_out_is_what_is_farthest_from_the_median(values: list[int], share: float) -> None:
    sent = dataclasses.replace(SENT, dense={"b": torch.zeros(1), "steps": torch.tensor(0)})
    updates = [_update(c, float(value), 0.0) for c, value in enumerate(values)]
    found = _single(MeanAroundMedian(share).combine(updates, sent)).values["w"][0]
    median = statistics.median(values)
    count = min(math.ceil(share * len(values)), (len(values) - 1) // 2)
    near = sorted(values, key=lambda value: (abs(value - median), value))[: len(values) - count]
    assert float(found) == pytest.approx(statistics.mean(near), abs=1e-5)


@pytest.mark.parametrize("aggregator", [TrimmedMean, MeanAroundMedian])
@pytest.mark.parametrize("share", [0.5, -0.1, True, "0.1", float("nan")])
def test_shares_are_checked(aggregator: type[Aggregator], share: object) -> None:
    with pytest.raises(ConfigError, match=r"expected a number in \[0, 0\.5\)"):
        aggregator(share)  # type: ignore[call-arg]  # which takes one


def test_the_median_by_hand(sent: ModelState) -> None:
    updates = [_update(c, *pair) for c, pair in enumerate([(1, 5), (2, 9), (4, 1), (90, 3)])]
    assert torch.equal(_single(CoordinateMedian().combine(updates, sent)).values["w"], torch.tensor([3.0, 4.0]))
    assert torch.equal(_single(CoordinateMedian().combine(updates[:3], sent)).values["w"], torch.tensor([2.0, 5.0]))


def test_candidates_that_were_left_out_count_as_zero(sent: ModelState) -> None:
    grown = [{1: 2.0, 4: 6.0}, {4: 5.0}, {4: 4.0, 8: 1e6}, {1: 1.0, 4: -1e6}, {1: 3.0}]
    updates = [_update(c, 0, 0, grown=positions) for c, positions in enumerate(grown)]
    found = _single(TrimmedMean(0.2).combine(updates, sent)).gradients["w"]
    assert found.positions.tolist() == [1, 4, 8]
    assert found.values.tolist() == pytest.approx([1.0, 3.0, 0.0])  # of 0 1 2, of 0 4 5, and of 0 0 0


def test_clipping_by_hand(sent: ModelState) -> None:
    near, far = _update(0, 0.6, 0.0), _update(1, 3.0, 4.0, steps=7)
    clipped = NormClipping(1.0).combine([near, far], sent)
    assert clipped[0] is near
    torch.testing.assert_close(clipped[1].values["w"], torch.tensor([0.6, 0.8]))
    assert int(clipped[1].dense["steps"]) == 7


def test_krum_by_hand(sent: ModelState) -> None:
    # Distances of a line: 0 1 2 3 and one far away; the sums over the two nearest are 5 2 2 5 and huge.
    updates = [_update(c, x, 0.0) for c, x in enumerate([0.0, 1.0, 2.0, 3.0, 500.0])]
    assert [u.client for u in Krum(1).combine(updates, sent)] == [1]
    assert [u.client for u in Krum(1, keep=2).combine(updates, sent)] == [1, 2]
    assert [u.client for u in Krum(1, keep=None).combine(updates, sent)] == [1]
    assert 4 not in [u.client for u in Krum(1, keep=4).combine(updates, sent)]


def test_mixing_by_hand(sent: ModelState) -> None:
    # Of a line: the four nearest of the first four are these four, those of the far one are 1 2 3 and itself.
    grown = [{1: 4.0}, {1: 8.0}, {}, {4: 4.0}, {1: 1e6, 4: 1e6}]
    updates = [_update(c, x, 0.0, steps=c, grown=grown[c]) for c, x in enumerate([0.0, 1.0, 2.0, 3.0, 500.0])]
    found = NeighbourMixing(WeightedMean(), 0.2).combine(updates, sent)
    assert [float(update.values["w"][0]) for update in found] == [1.5, 1.5, 1.5, 1.5, 126.5]
    assert [int(update.dense["steps"]) for update in found] == [2, 2, 2, 2, 2]  # 1.5 and 2.5 are rounded to even
    assert [update.samples for update in found] == [1, 2, 3, 4, 5]
    assert found[0].gradients["w"].positions.tolist() == [1, 4]
    assert found[0].gradients["w"].values.tolist() == [3.0, 1.0]
    trimmed = _single(NeighbourMixing(TrimmedMean(0.2), 0.2).combine(updates, sent))
    assert torch.equal(trimmed.values["w"], torch.tensor([1.5, 0.0]))
    assert torch.equal(trimmed.gradients["w"].values, torch.tensor([3.0, 1.0]))
    assert trimmed.samples == 15


def test_what_one_client_knows_outlives_mixing(sent: ModelState) -> None:
    """A weight that one sound client of ten moves keeps a part of it; a trimmed mean alone forgets it."""
    updates = [_update(c, 1.0 if c == 3 else 0.0, 0.1 * c) for c in range(9)] + [_update(9, -50.0, 50.0)]
    alone = _single(TrimmedMean(0.1).combine(updates, sent))
    mixed = _single(NeighbourMixing(TrimmedMean(0.1), 0.1).combine(updates, sent))
    assert float(alone.values["w"][0]) == 0
    assert float(mixed.values["w"][0]) == pytest.approx(1 / 9)


@pytest.mark.parametrize("aggregator", ALL, ids=lambda a: type(a).__name__)
@given(order=st.permutations(range(5)))
def test_the_order_of_clients_does_not_matter(aggregator: Aggregator, order: Sequence[int]) -> None:
    sent = dataclasses.replace(SENT, dense={"b": torch.zeros(1), "steps": torch.tensor(0)})
    generator = torch.Generator().manual_seed(0)
    updates = [
        _update(c, *torch.randn(2, generator=generator).tolist(), steps=c, grown={c: 1.0, 7: 0.1 * c}) for c in range(5)
    ]
    found, expected = (
        sorted(aggregator.combine(chosen, sent), key=lambda u: u.client)
        for chosen in ([updates[index] for index in order], updates)
    )
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left.values["w"], right.values["w"])
        assert torch.equal(left.dense["steps"], right.dense["steps"])
        assert torch.equal(left.gradients["w"].values, right.gradients["w"].values)


def test_blocks_do_not_matter(sent: ModelState, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [_update(c, *torch.randn(2).tolist()) for c in range(5)]
    whole = _single(CoordinateMedian().combine(updates, sent))
    monkeypatch.setattr("fedmef_fx.federated.aggregation._TERMS", 1)
    assert torch.equal(_single(CoordinateMedian().combine(updates, sent)).values["w"], whole.values["w"])


def _attacked(monkeypatch: pytest.MonkeyPatch, bad: set[int], change: Any) -> None:
    """Some clients change what they have learned, in sound messages."""
    honest = Client.answer

    def answer(self: Client, message: bytes, dataset: Dataset[Any], *, client: int) -> bytes:
        data = honest(self, message, dataset, client=client)
        if client not in bad:
            return data
        task, state = decode_broadcast(message, self._schema, previous=self.received)
        update = decode_update(data, task=task, sent=state)
        values = {name: change(value, state.values[name]) for name, value in update.values.items()}
        return encode_update(dataclasses.replace(update, values=values), received=state)

    monkeypatch.setattr(Client, "answer", answer)


def _flipped(after: Tensor, before: Tensor) -> Tensor:
    return before - 10 * (after - before)


@pytest.mark.parametrize(
    ("aggregator", "learns"),
    [
        (WeightedMean(), False),
        (TrimmedMean(0.2), True),
        (MeanAroundMedian(0.2), True),
        (CoordinateMedian(), True),
        (Krum(1, keep=None), True),
        (NeighbourMixing(TrimmedMean(0.2), 0.2), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_client_in_five_that_flips_its_update(
    aggregator: Aggregator,
    learns: bool,
    network: nn.Module,
    clients: list[TensorDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _attacked(monkeypatch, {2}, _flipped)
    data = list(itertools.islice(itertools.cycle(clients), 5))
    history = run(
        network,
        data,
        Config(density=0.3, adjustment_interval=2),
        rounds=3,
        test=clients[0],
        training=LocalTraining(batch_size=8, learning_rate=0.02),
        strategy=Strategy(minimum=5, aggregator=aggregator),
    )
    assert history.failures == []
    first, _, last = (record.test_loss for record in history.rounds)
    assert first is not None
    assert last is not None
    assert (last < first) == learns


def test_the_default_changes_nothing(network: nn.Module, clients: list[TensorDataset]) -> None:
    config = Config(density=0.3, adjustment_interval=1)
    plain = run(network, clients, config, rounds=2).model
    wide = run(network, clients, config, rounds=2, strategy=Strategy(aggregator=NormClipping(1e6))).model
    assert plain is not None
    assert wide is not None
    assert all(torch.equal(value, wide.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("aggregator", ALL[1:], ids=lambda a: type(a).__name__)
def test_clients_with_masks_of_their_own(aggregator: Aggregator, sent: ModelState) -> None:
    updates = [dataclasses.replace(_update(c, 1, 1), masks=dict(SENT.masks)) for c in range(5)]
    with pytest.raises(ConfigError, match="masks of their own"):
        aggregator.combine(updates, sent)


def test_votes_have_no_median(sent: ModelState) -> None:
    updates = [dataclasses.replace(_update(c, 1, 1), votes={"w": torch.tensor([c])}) for c in range(5)]
    for aggregator in (CoordinateMedian(), NeighbourMixing(WeightedMean())):
        with pytest.raises(ConfigError, match="votes for growth"):
            aggregator.combine(updates, sent)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimmedMean(0.5), r"TrimmedMean\.trim: got 0\.5"),
        (lambda: TrimmedMean(True), r"TrimmedMean\.trim"),
        (lambda: NormClipping(0.0), r"NormClipping\.norm"),
        (lambda: NormClipping(float("inf")), r"NormClipping\.norm"),
        (lambda: Krum(-1), r"Krum\.faulty"),
        (lambda: Krum(1, keep=0), r"Krum\.keep"),
        (lambda: NeighbourMixing(faulty=0.5), r"NeighbourMixing\.faulty: got 0\.5"),
        (lambda: NeighbourMixing("mean"), r"NeighbourMixing\.aggregator: got 'mean'; expected an Aggregator"),
        (
            lambda: Strategy(aggregator=NeighbourMixing(WeightedMean())),
            r"Strategy\.minimum: got 1; expected at least 3",
        ),
        (lambda: Strategy(aggregator=Krum(2)), r"Strategy\.minimum: got 1; expected at least 7, which Krum"),
        (lambda: Strategy(aggregator=CoordinateMedian()), r"Strategy\.minimum: got 1; expected at least 3"),
    ],
)
def test_aggregators_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
