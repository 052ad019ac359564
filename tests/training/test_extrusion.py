import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity import adjustment_count
from fedmef_fx.training.extrusion import Extrusion, _Gaps
from tests.training.extrusion_models import NAMES, X, gradients, loss_of, make_model, rates_used


def test_the_gradient_is_that_of_the_surrogate_loss():
    model = make_model()
    plain = gradients(model, X)
    with Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=3, strength=0.25) as extrusion:
        extruded = gradients(model, X)
    for name in NAMES:
        weight = model.get_parameter(name).detach()
        expected = plain[name].clone().flatten()
        marked = extrusion.marked[name]
        expected[marked] += 2 * 0.25 * weight.flatten()[marked]  # d/d theta of lambda * theta^2 (Eq. 2)
        assert marked.numel() > 0
        assert torch.equal(extruded[name].flatten(), expected)
        assert not extruded[name][~model.get_submodule(name[0]).weight_mask].any()


def test_only_the_lowest_active_weights_are_marked():
    model = make_model()
    with torch.no_grad():
        model.a.weight.copy_(torch.arange(1.0, 21.0).reshape(5, 4))
        model.a.weight_mask.copy_(torch.arange(20).reshape(5, 4) % 2 == 1)
        model.a.weight.mul_(model.a.weight_mask)
    counts = {"a.weight": 3}
    with Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=3, counts=counts) as extrusion:
        assert extrusion.marked["a.weight"].tolist() == [1, 3, 5]
        assert extrusion.marked["b.weight"].numel() == 0
        # 2^2 + 4^2 + 6^2 = 56
        assert extrusion.norm() == pytest.approx(math.sqrt(56), rel=1e-6)


def test_the_norm_is_taken_over_all_layers_and_is_not_squared():
    model = make_model()
    with Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=3) as extrusion:
        parts = [model.get_parameter(name).detach().flatten()[extrusion.marked[name]] for name in NAMES]
        assert extrusion.norm() == pytest.approx(float(torch.cat(parts).norm()), rel=1e-6)


@pytest.mark.parametrize(("round_index", "stop"), [(0, None), (0, 20), (5, 20), (20, 20)])
def test_default_counts_follow_the_schedule(round_index, stop):
    model = make_model(adjustment_rate=0.6)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Extrusion(model, optimizer, budget_steps=3, round_index=round_index, stop=stop) as extrusion:
        for name in NAMES:
            mask = model.get_submodule(name[0]).weight_mask
            active = int(mask.sum())
            expected = adjustment_count(
                active, mask.numel() - active, round_index=round_index, stop=stop or 20, rate=0.6
            )
            assert extrusion.marked[name].numel() == expected


def test_marks_stay_fixed_while_weights_change_places():
    model = make_model()
    with Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=3) as extrusion:
        before = {name: positions.clone() for name, positions in extrusion.marked.items()}
        with torch.no_grad():
            model.a.weight.mul_(-10 * (torch.arange(20.0).reshape(5, 4) + 1))
        gradients(model, X)
        assert all(torch.equal(extrusion.marked[name], before[name]) for name in NAMES)


def test_extrusion_shrinks_what_it_marked():
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Extrusion(model, optimizer, budget_steps=200, strength=0.5) as extrusion:
        start = extrusion.norm()
        for _ in range(200):
            gradients(model, X)
            optimizer.step()
        assert extrusion.norm() < 0.05 * start


def test_accumulated_backward_passes_add_the_term_once():
    model = make_model()
    whole, parts = ({}, {})
    for result, pieces in ((whole, [X]), (parts, [X[:3], X[3:]])):
        extrusion = Extrusion(
            model, SGD(model.parameters(), lr=0.1), budget_steps=2, strength=0.5, accumulation_steps=len(pieces)
        )
        with extrusion:
            model.zero_grad()
            for piece in pieces:
                (loss_of(model, piece) / len(pieces)).backward()
        result.update({name: model.get_parameter(name).grad.clone() for name in NAMES})
    for name in NAMES:
        torch.testing.assert_close(whole[name], parts[name])  # the order of float32 additions differs


def test_a_tied_weight_gets_the_term_once():
    model = make_model()
    x = torch.ones(2, 4)

    def twice() -> Tensor:
        model.zero_grad()
        (model.a(x).sum() + model.a(2 * x).sum()).backward()
        return model.a.weight.grad.clone()

    plain = twice()
    with Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=2, strength=1.0) as extrusion:
        difference = (twice() - plain).flatten()
    marked = extrusion.marked["a.weight"]
    torch.testing.assert_close(difference[marked], 2 * model.a.weight.detach().flatten()[marked])
    assert int((difference != 0).sum()) == marked.numel()


def test_no_graph_is_recorded_and_double_backward_still_works():
    model = make_model()
    with Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=2, strength=1.0):
        (gradient,) = torch.autograd.grad(loss_of(model, X), model.a.weight, create_graph=True)
    second = torch.autograd.grad(gradient.sum(), model.a.weight)[0]
    (plain,) = torch.autograd.grad(loss_of(model, X), model.a.weight, create_graph=True)
    assert torch.equal(second, torch.autograd.grad(plain.sum(), model.a.weight)[0])


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_and_autocast(autocast):
    model = make_model()
    x = X
    if not autocast:
        model, x = model.bfloat16(), X.bfloat16()
    optimizer = SGD(model.parameters(), lr=0.1)

    def gradient() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(model, x)
        loss.backward()
        return model.a.weight.grad.clone()

    plain = gradient()
    with Extrusion(model, optimizer, budget_steps=2, strength=0.5) as extrusion:
        extruded = gradient()
        optimizer.step()
    marked = extrusion.marked["a.weight"]
    assert extruded.dtype == model.a.weight.dtype
    assert not torch.equal(extruded.flatten()[marked], plain.flatten()[marked])


def test_hooks_and_rates_are_gone_after_an_exception():
    model = make_model()
    plain = gradients(model, X)
    optimizer = SGD(model.parameters(), lr=0.2)

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle of a step")

    def train() -> None:
        with Extrusion(model, optimizer, budget_steps=2, strength=1.0):
            optimizer.param_groups[0]["lr"] = 0.0
            gradients(model, X)
            handle = optimizer.register_step_pre_hook(fail)
            try:
                optimizer.step()
            finally:
                handle.remove()

    with pytest.raises(RuntimeError, match="in the middle"):
        train()
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    after = gradients(model, X)
    assert all(torch.equal(plain[name], after[name]) for name in NAMES)


def test_an_instance_can_be_used_again_but_not_twice_at_once():
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    extrusion = Extrusion(model, optimizer, budget_steps=2)
    with extrusion:
        gradients(model, X)
        optimizer.step()
        with pytest.raises(ConfigError, match="entered twice"):
            extrusion.__enter__()
    with extrusion:
        assert extrusion.step == 0
        assert extrusion.learning_rate is None


def test_strength_zero_marks_and_does_nothing_else():
    model = make_model(extrusion_strength=0.0)
    plain = gradients(model, X)
    optimizer = SGD(model.parameters(), lr=0.2)
    with Extrusion(model, optimizer, budget_steps=2) as extrusion:
        inside = gradients(model, X)
        assert all(torch.equal(plain[name], inside[name]) for name in NAMES)
        assert extrusion.norm() > 0
        assert rates_used(optimizer, extrusion, model, [0.0]) == [0.0]


@given(positions=st.sets(st.one_of(st.integers(0, 600), st.integers(0, 2**20))))
@example(positions={254, 255, 256})
@example(positions={0, 255, 510, 766})
def test_positions_are_kept_as_gaps(positions: set[int]) -> None:
    expected = torch.tensor(sorted(positions), dtype=torch.int64)
    found = _Gaps(expected).positions()
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
