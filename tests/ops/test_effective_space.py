"""The surrogate loss on w_hat, and where grown weights rest: by hand, by autograd and by finite differences."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from fedmef_fx.ops.effective_space import effective_values, penalty_gradients, resting_weights
from fedmef_fx.ops.effective_weight import StoredWeight
from fedmef_fx.ops.nsconv import KernelForm, nsconv_weight
from fedmef_fx.packing.bitmap import pack_bits

FORMS = {
    "plain": ((4, 3, 2, 2), KernelForm(1.7)),
    "all": ((4, 3, 2, 2), KernelForm(1.7, statistics="all")),
    "transposed": ((3, 4, 2, 2), KernelForm(0.8, 1, transposed=True)),
    "grouped transposed": ((4, 3, 2, 2), KernelForm(0.8, 2, transposed=True, statistics="all")),
}


def stored_weight(kind: str, *, packed: bool) -> tuple[StoredWeight, Tensor, Tensor, Tensor]:
    """A weight as it is stored, and its dense form, mask and gain; the first rows have 0, 1 and equal weights."""
    shape, form = FORMS[kind]
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    rows, mask = form.rows(weight).clone(), form.rows(torch.rand(shape, generator=generator) < 0.6).clone()
    mask[0], mask[1], mask[2] = False, False, True
    mask[1, 1], rows[2] = True, 0.3
    mask, weight = form.kernel(mask, torch.Size(shape)), form.kernel(rows, torch.Size(shape))
    weight = torch.where(mask, weight, 0.0)
    gain = torch.rand(rows.shape[0], dtype=torch.float64, generator=generator) + 0.5
    if packed:
        return StoredWeight(weight[mask], gain, pack_bits(mask), form, torch.Size(shape)), weight, mask, gain
    return StoredWeight(weight, gain, mask, form), weight, mask, gain


def kernel_of(weight: Tensor, gain: Tensor, mask: Tensor, form: KernelForm) -> Tensor:
    return nsconv_weight(weight, gain, mask, **form._asdict())


def test_the_term_by_hand() -> None:
    # Active weights 1, 2, 6: mean 3, b = (-2, -1, 3), s = 14, c = 2. The second has the least effect, not the first.
    stored = StoredWeight(
        torch.tensor([[1.0, 0.0, 2.0, 6.0]]), torch.tensor([2.0]), torch.tensor([[True, False, True, True]])
    )
    w_hat = effective_values(stored)
    torch.testing.assert_close(w_hat, 2 / math.sqrt(14) * torch.tensor([[-2.0, 0.0, -1.0, 3.0]]))
    assert float(w_hat.abs()[0, 2]) < float(w_hat.abs()[0, 0])
    # h = 2 * 0.5 * w_hat = -q with q = 2 / sqrt(14) there, <h, b> = q; with q^2 = 2 / 7 for both factors:
    # q^2 * (1/3 + 2/14, -1 + 1/3 + 1/14, 1/3 - 3/14)
    gradient, gain = penalty_gradients(stored, torch.tensor([2]), 0.5)
    torch.testing.assert_close(gradient, torch.tensor([[20.0, 0.0, -25.0, 5.0]]) / 147)
    assert gain is not None
    torch.testing.assert_close(gain, torch.tensor([1 / 7]))  # 2 * 0.5 / 2 * (2 / 14) * 2


def test_a_weight_that_is_not_standardised_has_the_term_of_the_paper() -> None:
    weight = torch.tensor([[1.0, 0.0, -2.0]])
    gradient, gain = penalty_gradients(StoredWeight(weight, None, weight != 0), torch.tensor([2]), 0.25)
    assert torch.equal(gradient, torch.tensor([[0.0, 0.0, -1.0]]))
    assert gain is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", FORMS)
def test_the_term_has_the_gradient_of_autograd(kind: str, packed: bool) -> None:
    stored, weight, mask, gain = stored_weight(kind, packed=packed)
    marked = mask & (torch.rand(mask.shape) < 0.5)
    places = marked[mask].nonzero().squeeze(1) if packed else marked.flatten().nonzero().squeeze(1)
    gradient, gain_gradient = penalty_gradients(stored, places, 0.3)
    weight.requires_grad_()
    gain.requires_grad_()
    loss = 0.3 * kernel_of(weight, gain, mask, stored.form)[marked].square().sum()
    expected = torch.autograd.grad(loss, (weight, gain))
    # Double precision; sums over a row run in another order.
    torch.testing.assert_close(gradient, expected[0][mask] if packed else expected[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gain_gradient, expected[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", FORMS)
def test_the_term_has_the_gradient_of_finite_differences(kind: str, packed: bool) -> None:
    stored, _, mask, gain = stored_weight(kind, packed=packed)
    active = torch.arange(int(mask.sum())) if packed else mask.flatten().nonzero().squeeze(1)
    # Rows of equal weights sit on the guard, where the kernel jumps.
    rows = stored.form.rows(torch.ones(mask.shape, dtype=torch.long)).cumsum(0) - 1
    row_of = stored.form.kernel(rows, mask.shape)
    in_row = row_of[mask] if packed else row_of.flatten()[active]
    places = active[in_row >= 3][::2]  # every second: of all together the sum is constant

    class Term(Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, gain: Tensor) -> Tensor:
            ctx.stored = stored._replace(weight=weight, gain=gain)
            return 0.3 * torch.take(effective_values(ctx.stored), places).square().sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            weight, gain = penalty_gradients(ctx.stored, places, 0.3)
            assert gain is not None
            return grad * weight, grad * gain

    inputs = stored.weight.clone().requires_grad_(), gain.clone().requires_grad_()
    assert torch.autograd.gradcheck(Term.apply, inputs, nondet_tol=1e-12)


@pytest.mark.parametrize("kind", FORMS)
def test_packed_and_dense_have_the_same_effective_weights(kind: str) -> None:
    dense, weight, mask, gain = stored_weight(kind, packed=False)
    packed = stored_weight(kind, packed=True)[0]
    expected = kernel_of(weight, gain, mask, dense.form)
    assert torch.equal(effective_values(dense), expected)
    torch.testing.assert_close(effective_values(packed), expected[mask], rtol=1e-12, atol=0)


def test_the_rest_of_grown_weights_by_hand() -> None:
    weight = torch.tensor([[1.0, 3.0, 9.0, 0.0]])
    survivors, grown = torch.tensor([[True, True, False, False]]), torch.tensor([[False, False, False, True]])
    assert torch.equal(resting_weights(weight, KernelForm(), survivors=survivors, grown=grown), torch.full((1, 4), 2.0))
    # Over all four weights: w = (1 + 3 + w) / 4.
    rest = resting_weights(weight, KernelForm(statistics="all"), survivors=survivors, grown=grown)
    torch.testing.assert_close(rest, torch.full((1, 4), 4 / 3))


@pytest.mark.parametrize("kind", FORMS)
def test_grown_weights_have_no_effect(kind: str) -> None:
    stored, weight, mask, gain = stored_weight(kind, packed=False)
    form = stored.form
    new = ~mask & (torch.rand(mask.shape) < 0.7)
    before = kernel_of(weight, gain, mask, form)
    rest = resting_weights(weight, form, survivors=mask, grown=new)
    after = kernel_of(torch.where(new, rest, weight), gain, mask | new, form)
    # Where a row has a deviation: one with a single weight or equal ones keeps a scale of its own.
    has_mean = form.rows(mask).sum(1) > 1
    has_mean[2] = False
    assert bool(has_mean.any())
    grown = form.rows(torch.where(new, after, 0.0))
    assert float(grown[has_mean].abs().max()) < 1e-12
    assert not form.rows(rest)[~has_mean].any()
    assert bool(after.isfinite().all())
    if form.statistics == "active":
        change = form.rows(after - before)[has_mean]
        assert float(change.abs().max()) < 1e-12  # neither mean nor deviation has changed


def test_a_row_that_is_grown_from_nothing_starts_at_zero() -> None:
    weight, everything = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    for form in (KernelForm(), KernelForm(statistics="all")):
        rest = resting_weights(weight, form, survivors=~everything, grown=everything)
        assert torch.equal(rest, torch.zeros(1, 4))
