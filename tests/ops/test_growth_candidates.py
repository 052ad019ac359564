"""What ops add while growth candidates are collected: a bounded set per mask, exact where everything fits."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError, PassError
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.ops import gradient_collector as ops_growth
from fedmef_fx.ops.gradient_collector import add_candidates, collecting, is_collecting
from fedmef_fx.packing import pack_bits
from tests.references import largest_inactive

MASK = torch.tensor([[True, False, False], [False, True, False]])


def test_offers_without_a_collector_cost_nothing_and_change_nothing():
    add_candidates(MASK, torch.zeros(1))
    assert not is_collecting()


def noisy_gradients(*, batches: int, seed: int) -> torch.Tensor:
    """Gradients [batches, 40, 700] whose average stands out of a batch as little as it does with 8 samples a batch."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(40, 700, generator=generator) * torch.rand(40, 1, generator=generator) * 1e-4
    return mean + 5e-4 * torch.randn(batches, 40, 700, generator=generator)


@pytest.mark.parametrize("batches", [44, 175])
def test_rounded_sums_find_what_exact_ones_would_in_every_round(batches: int) -> None:
    gradients = noisy_gradients(batches=batches, seed=batches)
    mask = torch.zeros(40, 700, dtype=torch.bool)
    mask[:, ::10] = True
    average = gradients.double().mean(0).float()
    # k_l(t) at t = 10 to 95 of 100, as `adjustment_count` gives it for the 2,800 active weights.
    for k in (1092, 560, 27, 6):
        with collecting({"w": (mask, k)}) as collector:
            for gradient in gradients:
                with collector.batch(8.0):
                    add_candidates(mask, gradient)
        sums = collector._layers["w"].sums
        assert sums is not None
        assert sums.numel() > ops_growth.EXACT
        assert sums.nbytes == 2 * int((~mask).sum())
        found, exact = collector.candidates()["w"], largest_inactive(average, mask, k)
        assert torch.isin(exact.positions, found.positions).float().mean() >= 0.97
        torch.testing.assert_close(found.values, torch.take(average, found.positions), rtol=0.03, atol=0)


def test_one_batch_is_exact_however_large_the_weight_is() -> None:
    mask = torch.zeros(200, 300, dtype=torch.bool)
    gradient = torch.randn(200, 300)
    with collecting({"w": (mask, 50)}) as collector, collector.batch(1.0):
        add_candidates(mask, gradient)
    found, exact = collector.candidates()["w"], largest_inactive(gradient, mask, 50)
    assert torch.equal(found.positions, exact.positions)
    assert torch.equal(found.values, exact.values)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 1e30])
def test_gradients_of_any_size_are_summed(size: float) -> None:
    mask = torch.zeros(200, 300, dtype=torch.bool)
    gradient = torch.randn(200, 300)
    with collecting({"w": (mask, 50)}) as collector:
        for factor in (1.0, 1e-3, 2.0):  # the scale follows the sums
            with collector.batch(1.0):
                add_candidates(mask, size * factor * gradient)
    found, exact = collector.candidates()["w"], largest_inactive(gradient, mask, 50)
    assert torch.isin(exact.positions, found.positions).float().mean() >= 0.97
    # Two roundings to 11 bits.
    torch.testing.assert_close(
        found.values, torch.take(gradient, found.positions) * size * 3.001 / 3, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_batch_leaves_candidates_alone(count: int) -> None:
    mask = torch.rand(300, 400) < 0.1
    gradients = torch.randint(-9, 10, (count, 300, 400)).float()  # many ties, and sums that 16 bits hold
    found, kept = [], []
    for knows_the_last in (False, True):
        with collecting({"w": (mask, 5000)}) as collector, LiveBytes() as live:
            for index, gradient in enumerate(gradients):
                with collector.batch(1.0, is_last=knows_the_last and index == count - 1):
                    add_candidates(mask, gradient)
            kept.append(live.current)
        found.append(collector.candidates()["w"])
    assert torch.equal(found[0].positions, found[1].positions)
    assert torch.equal(found[0].values, found[1].values)
    assert torch.equal(found[1].positions, largest_inactive(gradients.sum(0), mask, 5000).positions)
    # Two bytes less for each of some 108,000 inactive coordinates, against 8 for each candidate.
    assert kept[1] < kept[0] - 2 * 100_000 + 8 * 5000


def test_a_last_batch_in_parts_adds_up_where_it_was_largest() -> None:
    mask = torch.zeros(200, 300, dtype=torch.bool)
    first, second = torch.zeros(2, 200, 300)
    first[0, 5], first[1, 7], second[0, 5], second[3, 3] = 4.0, 2.0, 3.0, -5.0
    with collecting({"w": (mask, 2)}) as collector, collector.batch(1.0, is_last=True):
        for part in (first, second):
            add_candidates(mask, part)
            collector.complete("w")
    assert collector.candidates()["w"].positions.tolist() == [5, 903]
    assert collector.candidates()["w"].values.tolist() == [7.0, -5.0]


def test_sums_of_nothing_but_zeros_stay_zeros() -> None:
    mask = torch.zeros(200, 300, dtype=torch.bool)
    with collecting({"w": (mask, 2)}) as collector:
        for _ in range(2):
            with collector.batch(1.0):
                add_candidates(mask, torch.zeros(200, 300))
    assert collector.candidates()["w"].values.tolist() == [0.0, 0.0]


@given(rows=st.lists(st.lists(st.integers(-9, 9), min_size=6, max_size=6), min_size=1, max_size=5), k=st.integers(0, 4))
def test_streaming_is_exact_when_everything_fits(rows, k):
    gradients = torch.tensor(rows, dtype=torch.float32).reshape(-1, 2, 3)
    with collecting({"w": (MASK, k)}) as collector:
        for weight, gradient in enumerate(gradients, start=1):
            with collector.batch(float(weight)):
                add_candidates(MASK, gradient)
    weights = torch.arange(1.0, len(rows) + 1)
    average = (gradients * weights[:, None, None]).sum(0) / weights.sum()
    reference = largest_inactive(average, MASK, k)
    result = collector.candidates()["w"]
    assert torch.equal(result.positions, reference.positions)
    assert torch.equal(result.values, reference.values)  # sums of small integers are exact


def test_uses_within_a_batch_add_up_before_the_selection():
    # Coordinate 1 wins in each use, coordinate 3 in the sum.
    mask = torch.tensor([True, False, False, False])
    with collecting({"w": (mask, 1)}) as collector, collector.batch(1.0):
        add_candidates(mask, torch.tensor([0.0, 5.0, 0.0, 4.0]))
        add_candidates(mask, torch.tensor([0.0, -5.0, 0.0, 4.0]))
    assert collector.candidates()["w"].positions.tolist() == [3]
    assert collector.candidates()["w"].values.tolist() == [8.0]


def test_masks_are_known_by_their_storage():
    with collecting({"w": (MASK, 2)}) as collector, collector.batch(1.0):
        add_candidates(MASK.clone(), torch.full((2, 3), 7.0))  # another model's
        add_candidates(MASK.detach(), torch.ones(2, 3))  # another object, the same buffer
    assert collector.candidates()["w"].values.tolist() == [1.0, 1.0]


def test_two_models_can_be_collected_at_once_but_one_model_not_twice():
    other = MASK.clone()
    with collecting({"w": (MASK, 1)}) as first, collecting({"w": (other, 1)}) as second:
        with first.batch(1.0), second.batch(1.0):
            add_candidates(other, torch.ones(2, 3))
        with pytest.raises(ConfigError, match="being collected already"), collecting({"w": (MASK, 1)}):
            pass
        assert is_collecting()
    assert first.candidates()["w"].positions.numel() == 0
    assert second.candidates()["w"].positions.numel() == 1
    assert not is_collecting()


def test_half_precision_gradients_are_summed_in_single_precision():
    with collecting({"w": (MASK, 4)}) as collector:
        for _ in range(300):
            with collector.batch(1.0):
                add_candidates(MASK, torch.ones(2, 3, dtype=torch.bfloat16))
    assert collector.candidates()["w"].values.tolist() == [1.0] * 4  # bfloat16 would stop counting at 256


def test_an_op_that_offers_the_wrong_shape_is_a_bug():
    with (
        pytest.raises(PassError, match=r"'w': got a gradient of shape \(3,\); expected \(2, 3\)"),
        collecting({"w": (MASK, 1)}),
    ):
        add_candidates(MASK, torch.ones(3))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_batch_weight_that_is_not_positive_is_rejected(weight):
    with collecting({"w": (MASK, 1)}) as collector, pytest.raises(ConfigError, match="weight"), collector.batch(weight):
        pass


@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=70),
    k=st.integers(1, 20),
    packed=st.booleans(),
)
def test_positions_are_right_wherever_blocks_end(mask: list[bool], k: int, packed: bool) -> None:
    active = torch.tensor(mask)
    gradient = torch.randperm(len(mask)).float() + 1
    buffer = pack_bits(active) if packed else active
    with (
        mock.patch.object(ops_growth, "_BLOCK", 16),
        collecting({"w": (buffer, k)}, packed_shapes={"w": active.shape}) as collector,
        collector.batch(1.0),
    ):
        add_candidates(buffer, gradient)
    found = collector.candidates()["w"]
    expected = largest_inactive(gradient, active, min(k, int((~active).sum())))
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.values, expected.values)
