import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.extrusion import Extrusion
from fedmef_fx.model import HOLDER, PrunableParameter, Transformation, register_mask
from fedmef_fx.sparsity import adjustment_count, extrusion_rate

NAMES = ("a.weight", "b.weight")


class Masked(nn.Linear):
    """A linear layer whose weight gets no gradient where its mask is off."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.where(self.weight_mask, self.weight, 0.0), self.bias)


def make_model(*, masked: bool = True, density: float = 0.5, **config: object) -> nn.Module:
    """Two masked layers, 4 -> 5 -> 3, as a transformation would leave them."""
    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("a", Masked(4, 5))
    model.add_module("b", Masked(5, 3))
    holder = Transformation(Config(density=density, **config))
    for name in NAMES:
        weight = model.get_parameter(name)
        holder.prunable[name] = PrunableParameter(name, weight.numel(), "graph", masked=masked)
        mask = torch.rand(weight.shape) < density if masked else torch.ones(weight.shape, dtype=torch.bool)
        register_mask(model, name, mask)
    model.add_module(HOLDER, holder)
    return model


def run(model: nn.Module, x: Tensor) -> Tensor:
    return model.b(model.a(x).relu())


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return run(model, x).square().mean()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, x).backward()
    return {name: model.get_parameter(name).grad.clone() for name in NAMES}


X = torch.linspace(-1, 1, 24).reshape(6, 4)


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


def rates_used(optimizer, extrusion: Extrusion, model: nn.Module, scheduled: list[float]) -> list[float]:
    """The learning rate of each step under a schedule, checking that the schedule itself is left alone."""
    used: list[float] = []
    handle = optimizer.register_step_pre_hook(lambda o, *_: used.append(float(o.param_groups[0]["lr"])))
    for rate in scheduled:
        optimizer.param_groups[0]["lr"] = rate
        gradients(model, X)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate
        assert extrusion.learning_rate == used[-1]
    handle.remove()
    return used


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


def test_only_parameters_that_the_optimizer_trains_are_marked():
    model = make_model()
    with Extrusion(model, SGD([model.b.weight], lr=0.1), budget_steps=2) as extrusion:
        assert list(extrusion.marked) == ["b.weight"]


def test_a_model_that_was_not_transformed_is_rejected():
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="is not a transformed model"):
        Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=2)


def test_a_model_without_masks_is_rejected():
    model = make_model(masked=False, density=1.0)
    with pytest.raises(ConfigError, match="no masks"):
        Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=2)


def test_an_optimizer_of_another_model_is_rejected():
    with pytest.raises(ConfigError, match="holds none of the model's masked parameters"):
        Extrusion(make_model(), SGD(make_model().parameters(), lr=0.1), budget_steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_steps": 0}, "budget_steps: got 0"),
        ({"accumulation_steps": 0}, "accumulation_steps: got 0"),
        ({"strength": -1.0}, "strength: got -1"),
        ({"strength": math.nan}, "strength: got nan"),
        ({"round_index": 3}, "stop=100"),
        ({"counts": {"c.weight": 1}}, "'c.weight' has no mask; masked parameters: a.weight, b.weight"),
    ],
)
def test_arguments_out_of_range_are_rejected(arguments, message):
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        Extrusion(model, SGD(model.parameters(), lr=0.1), **({"budget_steps": 2} | arguments))


def test_more_marks_than_active_weights_are_rejected():
    model = make_model()
    with (
        pytest.raises(ConfigError, match="k=21"),
        Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=2, counts={"a.weight": 21}),
    ):
        pass


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
