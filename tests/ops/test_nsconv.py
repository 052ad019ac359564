import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.ops.nsconv import DEGENERATE, EPS, KernelForm, nsconv_weight, standardized
from fedmef_fx.packing.bitmap import pack_bits


def reference(weight, gain, mask, g, statistics):
    """The equation of the module docstring, written out with ordinary autograd for one kernel in rows."""
    rows = []
    for w, m, c in zip(weight, mask, gain, strict=True):
        n = int(m.sum())
        active = w * m
        if n == 0:
            rows.append(torch.zeros_like(w) * c)
            continue
        count = n if statistics == "active" else w.numel()
        mean = active.sum() / count
        if statistics == "active":
            std = (((w - mean) * m).square().sum() / n).sqrt()
        else:
            std = (active - mean).square().mean().sqrt()
        rows.append(g * c * (w - mean) * m / (std * math.sqrt(count)))
    return torch.stack(rows)


@pytest.fixture
def kernel():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    mask = torch.rand(5, 12, generator=generator) < 0.5
    gain = torch.rand(5, dtype=torch.float64, generator=generator) + 0.5
    return weight * mask, gain, mask


def test_by_hand():
    # Active weights 1 and 3: mean 2, deviation 1, N = 2, so w_hat = 2 * 0.5 * (-1, 1) / sqrt(2).
    weight, mask = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[True, False, True]])
    got = nsconv_weight(weight, torch.tensor([0.5]), mask, g=2.0)
    assert torch.allclose(got, torch.tensor([[-1.0, 0.0, 1.0]]) / math.sqrt(2))


@pytest.mark.parametrize("statistics", ["active", "all"])
def test_equation_and_gradients(kernel, statistics):
    weight, gain, mask = (t.clone() for t in kernel)
    weight.requires_grad_()
    gain.requires_grad_()
    got = nsconv_weight(weight, gain, mask, g=1.7, statistics=statistics)
    expected = reference(weight, gain, mask, 1.7, statistics)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)
    direction = torch.randn_like(got)
    wanted = torch.autograd.grad((expected * direction).sum(), (weight, gain))
    found = torch.autograd.grad((got * direction).sum(), (weight, gain))
    for w, f in zip(wanted, found, strict=True):
        assert torch.allclose(w, f, rtol=1e-11, atol=1e-13)
    assert bool((found[0][~mask] == 0).all())


@given(st.integers(0, 10_000), st.floats(0.1, 2.0), st.integers(2, 9))
def test_moments(seed, g, fan_in):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, fan_in, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, fan_in, generator=generator) < 0.7
    gain = torch.rand(4, dtype=torch.float64, generator=generator) + 0.1
    kernel = nsconv_weight(weight * mask, gain, mask, g=g)
    assert bool((kernel[~mask] == 0).all())
    number = mask.sum(1)
    mean = (weight * mask).sum(1) / number.clamp_min(1)
    deviations = torch.where(mask, weight - mean[:, None], 0.0).norm(dim=1)
    is_spread = deviations > 2 * DEGENERATE * (weight * mask).norm(dim=1)  # others fall back to their direction
    zero = torch.zeros((), dtype=torch.float64)
    assert torch.allclose(kernel.sum(1)[is_spread], zero, atol=1e-10)
    full = (g * gain).square()
    assert bool((kernel.square().sum(1)[number > 0] <= full[number > 0] * (1 + 1e-9)).all())


def test_rows_without_active_weights_are_zero():
    kernel = nsconv_weight(torch.zeros(2, 4), torch.ones(2), torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(kernel, torch.zeros(2, 4))


def test_a_single_active_weight_keeps_its_sign_and_moves():
    weight = torch.tensor([[0.0, -0.3, 0.0]], dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    kernel = nsconv_weight(weight, gain, torch.tensor([[False, True, False]]), g=1.5)
    assert torch.allclose(kernel, torch.tensor([[0.0, -3.0, 0.0]], dtype=torch.float64))
    kernel.sum().backward()
    assert gain.grad.item() == pytest.approx(-1.5)


def test_equal_weights_do_not_vanish():
    kernel = nsconv_weight(torch.full((1, 4), 0.2), torch.ones(1))
    assert torch.allclose(kernel, torch.full((1, 4), 0.5))


def test_a_kernel_that_was_just_grown_is_alive_and_bounded():
    weight = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    nsconv_weight(weight, torch.ones(1, dtype=torch.float64))[0, 0].backward()
    assert weight.grad[0, 0].item() == pytest.approx(1 / math.sqrt(EPS))


def test_gradients_near_the_guards():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    weight = torch.tensor([[1.0, 1.0 + 3 * DEGENERATE, 1.0, 0.0], [0.5, 0.0, 0.0, 0.0]], dtype=torch.float64)
    gain = torch.tensor([1.2, 0.7], dtype=torch.float64)

    def function(w, c):
        return nsconv_weight(w, c, mask, g=1.3)

    inputs = (weight.requires_grad_(), gain.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_kernels_are_normalised_per_output_channel(groups):
    inputs, per_group = 4, 3
    weight = torch.randn(inputs, per_group, 2, 2, dtype=torch.float64)
    gain = torch.rand(groups * per_group, dtype=torch.float64) + 0.5
    kernel = nsconv_weight(weight, gain, groups=groups, transposed=True)
    for channel in range(groups * per_group):
        group, within = divmod(channel, per_group)
        rows = kernel[group * inputs // groups : (group + 1) * inputs // groups, within]
        assert rows.sum().item() == pytest.approx(0, abs=1e-12)
        assert rows.square().sum().item() == pytest.approx(gain[channel].item() ** 2)


def test_relu_gain_keeps_unit_variance():
    torch.manual_seed(0)
    x = torch.randn(4096, 256).relu() * math.sqrt(2 / (1 - 1 / math.pi))
    kernel = nsconv_weight(torch.randn(64, 256), torch.ones(64))
    assert (x @ kernel.t()).var(0).mean().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("statistics", ["active", "all"])
def test_a_mean_that_dominates_is_rounded_once(statistics):
    # Nearly equal weights: the deviation is 2 to 9 thousandths of the mean, just above what counts as none.
    generator = torch.Generator().manual_seed(1)
    deviation = torch.linspace(0.002, 0.009, 200, dtype=torch.float64)[:, None]
    weight = 0.37 * (1 + deviation * torch.randn(200, 9, dtype=torch.float64, generator=generator))
    mask = torch.rand(200, 9, generator=generator) < (0.5 if statistics == "active" else 1.1)
    weight = (weight * mask).float()

    got = nsconv_weight(weight, torch.ones(200), mask, statistics=statistics).double()
    exact = nsconv_weight(weight.double(), torch.ones(200, dtype=torch.float64), mask, statistics=statistics)

    # Half a unit in the last place of the mean, over the deviation, times the root of nine weights.
    bound = 3 * 2.0**-25 * 0.5 / (0.37 * 0.002 / 2)
    assert (got - exact).abs().max() < bound


def test_packed_and_dense_weights_have_one_kernel():
    generator = torch.Generator().manual_seed(1)
    weight = 0.37 * (1 + 0.004 * torch.randn(200, 9, generator=generator))
    mask = torch.rand(200, 9, generator=generator) < 0.4
    form = KernelForm(1.0)
    rows = form.packed_rows(pack_bits(mask), mask.shape)
    values = weight[mask]
    packed = standardized(values, rows, form.standardize(values, rows, torch.ones(200)))
    dense = nsconv_weight(weight * mask, torch.ones(200), mask)[mask]
    assert (packed - dense).abs().max() < 1e-6  # a rounding of the scale; 1e-4 where means differ in their last bit
