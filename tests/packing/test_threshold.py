import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing import PackedTensor, ThresholdEstimator


def kept_share(x: torch.Tensor, threshold: float) -> float:
    return PackedTensor.pack(x, threshold=threshold).kept


@given(st.integers(1, 500), st.floats(0.01, 0.99))
def test_small_tensors_keep_exactly_the_wanted_number(numel: int, target: float) -> None:
    x = torch.randperm(numel) + 1.0
    threshold = ThresholdEstimator(kept_target=target).threshold(x)
    assert (x > threshold).sum().item() == round(target * numel)


@pytest.mark.parametrize("target", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(64, 64, 28, 28), (32, 49, 7, 7, 49), (8192 * 64 + 1,)])
def test_large_tensors_keep_about_the_wanted_share(shape: tuple[int, ...], target: float) -> None:
    # Channels differ by orders of magnitude: a sample that met only some of them would be far off.
    scale = torch.logspace(-3, 3, shape[1]).view(-1, *[1] * (len(shape) - 2)) if len(shape) > 1 else torch.tensor(1.0)
    x = torch.randn(shape) * scale
    kept = kept_share(x, ThresholdEstimator(kept_target=target).threshold(x))
    # 6 standard deviations of a share estimated from 8192 elements
    assert kept == pytest.approx(target, abs=6 * math.sqrt(target * (1 - target) / 8192))


@pytest.mark.parametrize("numel", [8192 * 2, 8192 * 49, 8192 * 64, 8192 * 64 - 3, 3**13, 9999 * 100])
def test_the_sampling_step_shares_no_factor_with_the_size(numel: int) -> None:
    step = ThresholdEstimator(kept_target=0.1)._step(numel)
    assert step % 2 == 1
    assert math.gcd(step, numel) == 1
    assert 8192 <= -(-numel // step) <= 2 * 8192


def test_nothing_dropped_means_threshold_zero() -> None:
    assert ThresholdEstimator(kept_target=1.0).threshold(torch.randn(9)) == 0.0
    assert ThresholdEstimator(kept_target=0.99).threshold(torch.randn(9)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_are_never_stored(dtype: torch.dtype) -> None:
    x = torch.zeros(1000, dtype=dtype)
    estimator = ThresholdEstimator(kept_target=0.1)
    assert estimator.threshold(x) == 0.0
    x[:30] = 2.0
    estimator.reset()
    assert kept_share(x, estimator.threshold(x)) == 0.03
    assert ThresholdEstimator(kept_target=0.1).threshold(torch.empty(0, dtype=dtype)) == 0.0


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, -2.0]), min_size=1, max_size=40),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_nan_and_infinity_are_kept_whatever_their_share(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    threshold = ThresholdEstimator(kept_target=0.2).threshold(x)
    assert math.isfinite(threshold)
    assert threshold >= 0
    back = PackedTensor.pack(x, threshold=threshold).unpack()
    assert torch.equal(back.isfinite(), x.isfinite())


def test_one_estimate_serves_an_interval() -> None:
    estimator = ThresholdEstimator(kept_target=0.5, interval=3)
    x = torch.rand(100)
    used = [estimator.threshold(x * step) for step in range(1, 8)]
    assert used[0] == used[1] == used[2] < used[3] == used[4] == used[5] < used[6]


@pytest.mark.parametrize(("kept", "renewed"), [(0.1, False), (0.12, False), (0.08, False), (0.13, True), (0.07, True)])
def test_drift_renews_the_estimate(kept: float, renewed: bool) -> None:
    estimator = ThresholdEstimator(kept_target=0.1)
    x = torch.rand(1000)
    first = estimator.threshold(x)
    estimator.observe(round(kept * 1000), 1000)
    assert estimator.kept == pytest.approx(kept)
    second = estimator.threshold(x * 2)
    assert (second != first) is renewed
    assert estimator.threshold(x * 3) == second


def test_too_few_large_elements_are_no_drift() -> None:
    estimator = ThresholdEstimator(kept_target=0.5)
    x = torch.zeros(100)
    x[0] = 1.0
    assert estimator.threshold(x) == 0.0
    estimator.observe(1, 100)
    assert estimator.threshold(torch.rand(100)) == 0.0  # still the old estimate
    estimator.observe(100, 100)
    assert estimator.threshold(torch.rand(100)) > 0.0
    estimator.observe(0, 0)


def test_reset_makes_the_future_independent_of_the_past() -> None:
    inputs = [torch.randn(300) * scale for scale in (1, 5, 2, 9)]

    def run(estimator: ThresholdEstimator) -> list[float]:
        used = []
        for x in inputs:
            used.append(estimator.threshold(x))
            estimator.observe(int((x.abs() > used[-1]).sum()), x.numel())
        return used

    worn = ThresholdEstimator(kept_target=0.2, interval=3)
    run(worn)
    worn.reset()
    assert worn.kept is None
    assert run(worn) == run(ThresholdEstimator(kept_target=0.2, interval=3))


def test_bad_options_are_refused() -> None:
    for target in (0.0, 1.1, math.nan):
        with pytest.raises(ConfigError, match="kept_target"):
            ThresholdEstimator(kept_target=target)
    with pytest.raises(ConfigError, match="interval=0"):
        ThresholdEstimator(kept_target=0.5, interval=0)
