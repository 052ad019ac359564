"""A memory budget is kept, with the least error of the gradients, or refused with the floor."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config, memory, memory_plan, transform
from fedmef_fx.budget import planner
from fedmef_fx.budget.layer_sparsity import packing_sites
from fedmef_fx.budget.plan import LayerLevels, fewest_moves, moves
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.emit import program_of
from fedmef_fx.models import digits_cnn, resnet18
from fedmef_fx.records.memory_plan import MemoryPlan
from fedmef_fx.sparse_model.parameters import masked_parameters

KEEP = Config(normalization="keep", density=0.5, activation_sparsity=0.9, weight_storage="dense")
LEAN = KEEP.replace(weight_storage="packed", packed_dtype="bfloat16")


def network(*, depth: int = 3) -> nn.Sequential:
    """Activations dominate, and with its BatchNorm kept the batch cannot be cut."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 16, 16)


def planned(model: nn.Module, budget: int | str, config: Config, x: Tensor) -> tuple[nn.Module, MemoryPlan]:
    sparse = transform(model, config.replace(memory_budget=budget), example_inputs=(x,))
    plan = memory_plan(sparse)
    assert plan is not None
    return sparse, plan


def peak(model: nn.Module, x: Tensor, micro_batch: int | None = None) -> int:
    return memory(model, (x,), optimizer="sgd-momentum", micro_batch=micro_batch).peak


def floor_of(model: nn.Module, config: Config, x: Tensor) -> int:
    """The smallest budget, as the refusal of a smaller one names it."""
    with pytest.raises(ConfigError, match="cannot be reached") as caught:
        planned(model, 1000, config, x)
    named = re.search(r"at least (\d+) bytes", str(caught.value))
    assert named is not None
    return int(named[1])


def between(model: nn.Module, x: Tensor, share: float, config: Config = KEEP) -> int:
    """A budget that nothing exact holds: so far above the smallest peak, of the way to the exact one."""
    # Next to nothing but the zeros of the ReLUs is dropped at 0.01, and packing still takes place.
    exact = config.replace(weight_storage="packed", activation_sparsity=0.01)
    lean = config.replace(weight_storage="packed", packed_dtype="bfloat16")
    most, least = (peak(transform(model, each), x) for each in (exact, lean))
    assert least < most
    return int(least + share * (most - least))


def gammas(model: nn.Module) -> dict[str, float]:
    return {layer: site.activation_sparsity for layer, site, _, _ in packing_sites(program_of(model).regions)}


def test_a_generous_budget_changes_no_gradient() -> None:
    model, x = digits_cnn(), torch.randn(16, 1, 8, 8)
    sparse, plan = planned(model, "1GB", Config(weight_storage="dense"), x)
    assert (plan.gradient_error, plan.micro_batch, dict(plan.settings)) == (0.0, None, {})
    assert set(gammas(sparse).values()) == {0.0}
    exact = transform(model, Config(activation_sparsity=0.0, weight_storage="dense"))
    for candidate in (sparse, exact):
        F.cross_entropy(candidate(x), torch.zeros(16, dtype=torch.int64)).backward()
    for (name, parameter), other in zip(sparse.named_parameters(), exact.parameters(), strict=True):
        # Packing drops zeros only; what is left to differ is the order of sums.
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-6), name


def test_parts_of_the_batch_come_before_pruning() -> None:
    model, x = digits_cnn(), torch.randn(64, 1, 8, 8)
    whole = peak(transform(model, Config(activation_sparsity=0.0, weight_storage="dense")), x)
    sparse, plan = planned(model, whole // 2, Config(weight_storage="dense"), x)
    assert plan.micro_batch in (8, 16, 32)
    assert plan.gradient_error == 0.0
    measured = peak(sparse, x, plan.micro_batch)
    assert measured <= whole // 2
    assert plan.predicted_peak == pytest.approx(measured, rel=0.1)


def test_layers_are_pruned_as_little_as_the_budget_allows(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    # Gamma is all that is left to plan: 8 bits for what BatchNorm keeps would spare it here.
    monkeypatch.setattr(planner, "_LOSSY", ())
    model, errors = network(depth=4), []
    most, least = planned(model, "1GB", LEAN, images)[1].predicted_peak, floor_of(model, LEAN, images)
    for share in (0.8, 0.3):
        budget = int(least + share * (most - least))
        sparse, plan = planned(model, budget, LEAN, images)
        chosen = gammas(sparse)
        assert plan.predicted_peak <= budget
        assert plan.predicted_peak == pytest.approx(peak(sparse, images), rel=0.1)
        assert chosen == {choice.layer: choice.gamma for choice in plan.layers}
        assert 0 < max(chosen.values()) <= 0.9
        assert min(chosen.values()) < 0.9, "not everywhere"
        assert plan.micro_batch is None
        assert any("statistics of the batch" in reason for reason in plan.reasons)
        errors.append(plan.gradient_error)
    assert 0 < errors[0] < errors[1]
    # The same peak with one gamma everywhere costs no less.
    everywhere = (transform(model, LEAN.replace(activation_sparsity=g)) for g in (0.5, 0.7, 0.8, 0.9))
    uniform = next(each for each in everywhere if peak(each, images) <= budget)
    assert relative_error(uniform, model, images, LEAN) >= errors[1] * (1 - 1e-6)


def gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Of the loss that planning measures with, of the weights in dense form."""
    torch.manual_seed(0)
    out = model.train()(x)
    (out - torch.randn_like(out)).square().mean().backward()
    masked, found = masked_parameters(model), []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found.append(masked[name].expand(parameter.grad) if name in masked else parameter.grad)
    return torch.cat([gradient.flatten() for gradient in found])


def relative_error(pruned: nn.Module, model: nn.Module, x: Tensor, config: Config) -> float:
    exact = gradients(transform(model, config.replace(activation_sparsity=0.0)), x)
    return float((gradients(pruned, x) - exact).norm() / exact.norm())


def test_the_error_is_the_one_that_training_has(images: Tensor) -> None:
    model = network()
    sparse, plan = planned(model, between(model, images, 0.4), KEEP, images)
    assert plan.settings["weight_storage"] == "packed"
    assert plan.gradient_error > 0
    assert relative_error(sparse, model, images, KEEP) == pytest.approx(plan.gradient_error, rel=0.01)


def test_what_is_exact_comes_first() -> None:
    """Packed weights, and not a gamma, where they hold the budget; nothing is compared then."""
    model, x = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()), torch.randn(4, 64)
    config = Config(density=0.1, weight_storage="dense")
    dense, packed = (
        peak(transform(model, config.replace(activation_sparsity=0.0, weight_storage=storage)), x)
        for storage in ("dense", "packed")
    )
    assert packed < dense
    sparse, plan = planned(model, (dense + packed) // 2, config, x)
    assert dict(plan.settings) == {"weight_storage": "packed"}
    assert set(gammas(sparse).values()) == {0.0}
    assert plan.gradient_error == 0.0
    assert not any("error" in reason for reason in plan.reasons)


def test_the_fewest_moves_are_found() -> None:
    levels = (0.0, 0.5, 0.9)
    layers = [
        LayerLevels(str(i), levels, tuple(round(size * (1 - g)) for g in levels), (0.0, error, 3 * error))
        for i, (size, error) in enumerate([(100, 1.0), (4000, 2.0), (700, 0.1), (900, 9.0), (50, 0.5)])
    ]
    order = moves(layers)
    every = [[levels[order[:count].count(i)] for i in range(len(layers))] for count in range(len(order) + 1)]

    def peak_of(gammas: list[float]) -> int:
        kept = [layer.nbytes[levels.index(gamma)] for layer, gamma in zip(layers, gammas, strict=True)]
        return max(2 * sum(kept), 3 * kept[1] + 500)  # its moment changes

    for budget in range(peak_of(every[-1]), peak_of(every[0]), 37):
        assert fewest_moves(layers, peak_of, budget) == next(g for g in every if peak_of(g) <= budget)


def test_a_budget_below_the_floor_names_the_floor() -> None:
    model, x = (
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)),
        torch.ones(64, 8),
    )
    with pytest.raises(
        ConfigError, match=r"cannot be reached; the floor is .* with .* and gamma 0, 2 bits .*sgd-momentum"
    ) as e:
        planned(model, "10kB", Config(weight_storage="dense"), x)
    floor = int(re.search(r"at least (\d+) bytes", str(e.value))[1])  # type: ignore[index]  # it matched
    assert floor > 10_000
    _, plan = planned(model, floor, Config(weight_storage="dense"), x)
    assert plan.predicted_peak <= floor
    with pytest.raises(ConfigError, match="cannot be reached"):
        planned(model, floor - 1, Config(weight_storage="dense"), x)


def test_what_a_budget_needs(images: Tensor) -> None:
    with pytest.raises(ConfigError, match="no example inputs"):
        transform(network(), Config(memory_budget="1GB", weight_storage="dense"))
    with pytest.raises(ConfigError, match="is a tensor"):
        transform(network(), Config(memory_budget="1GB", weight_storage="dense"), example_inputs=images)
    with pytest.raises(ConfigError, match="64 parsecs"):
        Config(memory_budget="64 parsecs", weight_storage="dense")
    with pytest.raises(ConfigError, match="budget_optimizer"):
        Config(budget_optimizer="lion", weight_storage="dense")  # type: ignore[arg-type]  # on purpose


def test_nothing_leaks_into_the_callers_world(images: Tensor) -> None:
    model = network()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    sparse, _ = planned(model, "1GB", KEEP, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in (*model.parameters(), *sparse.parameters()))
    assert all(site.estimator.kept is None for _, site, _, _ in packing_sites(program_of(sparse).regions))


def test_the_plan_is_told_and_kept(images: Tensor, tmp_path: Path) -> None:
    model = network()
    sparse, plan = planned(model, between(model, images, 0.5, LEAN), LEAN, images)
    assert json.loads(json.dumps(plan.as_dict()))["predicted_peak"] == plan.predicted_peak
    text = str(plan)
    for choice in plan.layers:
        assert choice.layer in text
    assert "because: " in text
    assert any("gamma" in line for line in fedmef_fx.report(sparse)["plan-memory"].rewrites)
    assert memory_plan(transform(model, KEEP)) is None
    fedmef_fx.save(sparse, tmp_path / "model")
    assert gammas(fedmef_fx.load(tmp_path / "model", model)) == gammas(sparse)


def test_single_layers() -> None:
    model = digits_cnn()
    names = list(gammas(transform(model)))
    config = Config(layer_sparsity={"*": 0.5, names[1]: 0.0, names[2]: 0.99}, weight_storage="dense")  # type: ignore[arg-type]  # a mapping
    assert Config.from_json(config.to_json()) == config
    found = gammas(transform(model, config))
    assert found[names[1]] == 0.0
    assert found[names[2]] == 0.9, "at most activation_sparsity"
    assert found[names[0]] == 0.5
    with pytest.raises(ConfigError, match="'nowhere'"):
        transform(model, Config(layer_sparsity=(("nowhere", 0.5),), weight_storage="dense"))
    for bad in ("conv1", {"conv1": 1.0}, {"": 0.5}, {"conv1": "much"}, [("conv1",)]):
        with pytest.raises(ConfigError, match=r"Config\.layer_sparsity"):
            Config(layer_sparsity=bad, weight_storage="dense")  # type: ignore[arg-type]  # on purpose


def test_a_residual_network_within_its_budget() -> None:
    model, x, packed = resnet18(), torch.randn(4, 3, 16, 16), Config(weight_storage="packed")
    model.layer1[1], model.layer3, model.layer4 = nn.Identity(), nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128, 10)
    budget = between(model, x, 0.4, packed)
    sparse, plan = planned(model, budget, packed, x)
    assert plan.gradient_error > 0
    assert plan.predicted_peak <= budget
    measured = peak(sparse, x, plan.micro_batch)
    assert plan.predicted_peak == pytest.approx(measured, rel=0.1)
    assert measured <= 1.1 * budget


CODED = KEEP.replace(activation_sparsity=0.0, activation_bits=1, activation_rounding="nearest")


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_bits_are_planned_beside_gamma(images: Tensor, gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_LOSSY", ())
    config = CODED.replace(activation_sparsity=gamma, weight_storage="packed")
    model, errors = network(), []
    most, least = planned(model, "1GB", config, images)[1].predicted_peak, floor_of(model, config, images)
    for share in (0.8, 0.2):
        budget = int(least + share * (most - least))
        sparse, plan = planned(model, budget, config, images)
        assert plan.predicted_peak <= budget
        assert plan.predicted_peak == pytest.approx(peak(sparse, images), rel=0.02)
        assert any(choice.bits is not None for choice in plan.layers)
        chosen = {
            layer: site.code and site.code.bits for layer, site, _, _ in packing_sites(program_of(sparse).regions)
        }
        assert chosen == {choice.layer: choice.bits for choice in plan.layers}
        assert gammas(sparse) == {choice.layer: choice.gamma for choice in plan.layers}
        if gamma == 0.0:
            assert set(gammas(sparse).values()) == {0.0}
        assert relative_error(sparse, model, images, config.replace(activation_bits=None)) == pytest.approx(
            plan.gradient_error, rel=0.01
        )
        errors.append(plan.gradient_error)
    assert 0 < errors[0] < errors[1]
    # Codes hold a budget with a smaller error than a gamma does.
    if gamma:
        dropping, only = planned(model, budget, config.replace(activation_bits=None), images)
        assert plan.gradient_error < only.gradient_error
        assert dropping is not sparse


def test_codes_of_a_fixed_size_are_predicted_exactly() -> None:
    layers = [nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 80), nn.GELU(), nn.Linear(80, 4)]
    model, x = nn.Sequential(*layers), torch.randn(40, 64)
    for bits in (1, 2, 3, 4, 8):
        coded = transform(
            model, Config(density=0.5, activation_sparsity=0.0, activation_bits=bits, weight_storage="dense")
        )
        options = {"optimizer": "sgd-momentum"}
        measured, predicted = memory(coded, (x,), **options), memory(coded, (x,), **options, predict=True)  # type: ignore[arg-type]
        assert predicted.saved == measured.saved
        assert predicted.saved["8-bit" if bits == 8 else "packed values"] > 0


def test_bits_of_single_layers() -> None:
    model = digits_cnn()
    names = list(gammas(transform(model)))
    config = Config(
        activation_sparsity=0.0,
        activation_bits=2,
        layer_bits={"*": 4, names[1]: None, names[2]: 8},
        weight_storage="dense",
    )  # type: ignore[arg-type]  # a mapping
    assert Config.from_json(config.to_json()) == config
    sites = {layer: site for layer, site, _, _ in packing_sites(program_of(transform(model, config)).regions)}
    assert [sites[name].code and sites[name].code.bits for name in names[:3]] == [4, None, 8]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"layer_bits.*'nowhere'"):
        transform(model, Config(activation_bits=2, layer_bits=(("nowhere", 4),), weight_storage="dense"))
    for bad in ("conv1", {"conv1": 5}, {"": 4}, {"conv1": 2.0}, [("conv1",)]):
        with pytest.raises(ConfigError, match=r"Config\.layer_bits: got"):
            Config(activation_bits=2, layer_bits=bad, weight_storage="dense")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ConfigError, match="activation_bits=None"):
        Config(activation_bits=None, layer_bits=(("conv1", 4),), weight_storage="dense")
