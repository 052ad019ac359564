"""`Extrusion` and the optimizer: learning rates are floored for a step, whatever schedules and scalers do."""

import math

import pytest
import torch
from torch.optim import SGD, Adam

from fedmef_fx.sparsity import extrusion_rate
from fedmef_fx.training.extrusion import Extrusion
from tests.training.extrusion_models import X, gradients, loss_of, make_model, rates_used


def test_the_rate_of_a_step_is_floored_and_the_schedule_is_left_alone():
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.2)
    with Extrusion(model, optimizer, budget_steps=4) as extrusion:
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.001
            gradients(model, X)
            expected = max(0.001, extrusion_rate(step, budget=4, norm=extrusion.norm(), initial_rate=0.2))
            optimizer.step()
            assert extrusion.learning_rate == expected
            assert optimizer.param_groups[0]["lr"] == 0.001


def test_the_floored_rate_is_what_the_step_uses():
    model = make_model()
    model.requires_grad_(False)
    model.a.weight.requires_grad_(True)
    optimizer = SGD([model.a.weight], lr=0.5)
    with Extrusion(model, optimizer, budget_steps=2, counts={"a.weight": 1}) as extrusion:
        optimizer.param_groups[0]["lr"] = 0.0
        before = model.a.weight.detach().clone()
        loss_of(model, X).backward()
        optimizer.step()
        # The difference of two float32 weights below 1 is good to about 1e-7.
        moved = before - model.a.weight.detach()
        assert extrusion.learning_rate > 0
        torch.testing.assert_close(moved, model.a.weight.grad * extrusion.learning_rate, rtol=0, atol=1e-7)


def test_a_constant_schedule_is_inert_and_the_budget_ends():
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.2)
    with Extrusion(model, optimizer, budget_steps=2) as extrusion:
        assert rates_used(optimizer, extrusion, model, [0.2, 0.2]) == [0.2, 0.2]
        assert rates_used(optimizer, extrusion, model, [0.0, 0.0]) == [0.0, 0.0]
        assert extrusion.step == 4


def test_a_scheduler_sees_its_own_rates():
    def rates(*, extrude: bool) -> list[float]:
        model = make_model()
        optimizer = SGD(model.parameters(), lr=0.2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
        seen = []
        extrusion = Extrusion(model, optimizer, budget_steps=4, strength=1e-4 if extrude else 0.0)
        with extrusion:
            for _ in range(4):
                gradients(model, X)
                optimizer.step()
                scheduler.step()
                seen.append(scheduler.get_last_lr()[0])
        return seen

    assert rates(extrude=True) == rates(extrude=False)


def test_each_group_is_floored_by_its_own_initial_rate():
    model = make_model()
    groups = [{"params": [model.a.weight], "lr": 0.1}, {"params": [model.b.weight], "lr": 1.0}]
    optimizer = SGD(groups, lr=0.1)
    used = []
    with Extrusion(model, optimizer, budget_steps=2) as extrusion:
        optimizer.register_step_pre_hook(lambda o, *_: used.extend(group["lr"] for group in o.param_groups))
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        gradients(model, X)
        norm = extrusion.norm()
        optimizer.step()
    assert used == [extrusion_rate(0, budget=2, norm=norm, initial_rate=rate) for rate in (0.1, 1.0)]


def test_a_learning_rate_tensor_stays_the_same_object():
    model = make_model()
    rate = torch.tensor(0.2)
    optimizer = Adam(model.parameters(), lr=rate)
    with Extrusion(model, optimizer, budget_steps=2) as extrusion:
        rate.fill_(0.0)
        gradients(model, X)
        optimizer.step()
        assert extrusion.learning_rate > 0
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0


def test_a_scaled_loss_scales_the_term():
    results = []
    for scale in (None, 1024.0):
        model = make_model()
        optimizer = SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        with Extrusion(model, optimizer, budget_steps=2, strength=0.5, scaler=scaler) as extrusion:
            scaler.scale(loss_of(model, X)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert extrusion.step == 1
        results.append(model.a.weight.detach())
    torch.testing.assert_close(results[0], results[1])  # powers of two, but cancellation of the loss differs


def test_a_step_that_the_scaler_skips_does_not_count():
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with Extrusion(model, optimizer, budget_steps=2, scaler=scaler) as extrusion:
        scaler.scale(loss_of(model, X * math.inf)).backward()
        scaler.step(optimizer)
        assert extrusion.step == 0


@pytest.mark.gpu
def test_scaled_half_precision_training_on_an_accelerator():
    model = make_model().cuda()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    with Extrusion(model, optimizer, budget_steps=50, strength=0.5, scaler=scaler) as extrusion:
        start = extrusion.norm()
        for _ in range(50):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = loss_of(model, X.cuda())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert extrusion.step == 50
        assert extrusion.norm() < 0.1 * start
