"""What layers keep of their inputs in codes of few bits: `Config.activation_bits`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.ops.rectified import rectified
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.packing import BlockCode
from fedmef_fx.passes.catalogue import parse_pass
from fedmef_fx.sparse_model.thresholds import thresholds, thresholds_from_json, thresholds_to_json

EXACT = Config(density=1.0, normalization="keep", activation_sparsity=0.0)
TWO_BITS = EXACT.replace(activation_bits=2)


def network(activation: nn.Module, *, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), activation, nn.Conv2d(8, 8, 3), copy.deepcopy(activation)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 4))


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
LABELS = torch.arange(6) % 4


def gradients(model: nn.Module, images: Tensor = IMAGES) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(images), LABELS).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sites(model: nn.Module) -> list[PackActivation]:
    return [module for module in model.modules() if isinstance(module, PackActivation)]


ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.Tanh(), nn.Identity()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_results_and_input_gradients_are_exact(activation: nn.Module, gamma: float, bits: int) -> None:
    config = TWO_BITS.replace(activation_bits=bits, activation_sparsity=gamma)
    plain, coded = (transform(network(activation), c) for c in (EXACT, config))
    x, y = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    assert torch.equal(plain(x), coded(y))
    plain(x).square().sum().backward()
    coded(y).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    # The same sums, in the order that another convolution takes.
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-6)
    exact, found = (dict(model.named_parameters()) for model in (plain, coded))
    for name in exact:
        if "bias" in name:
            assert torch.allclose(exact[name].grad, found[name].grad, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_mean_of_many_gradients_is_the_exact_one(activation: nn.Module) -> None:
    plain, coded = transform(network(activation), EXACT), transform(network(activation), TWO_BITS)
    exact = gradients(plain)
    draws = [gradients(coded) for _ in range(60)]
    for name in exact:
        found = torch.stack([draw[name] for draw in draws])
        if "weight" not in name or found.std(0).max() < 1e-6:  # read the images, which their caller holds
            continue
        # Six sigma of a mean of 60, per weight, and what noise in steps of 2^-16 and float32 leave.
        bound = 6 * found.std(0) / 60**0.5 + 1e-3 * exact[name].abs().max()
        assert bool(((found.mean(0) - exact[name]).abs() <= bound).all()), name


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_more_bits_mean_smaller_errors(bits: int) -> None:
    exact = gradients(transform(network(nn.ReLU()), EXACT))["5.weight"]
    config = TWO_BITS.replace(activation_bits=bits, activation_rounding="nearest")
    found = gradients(transform(network(nn.ReLU()), config))["5.weight"]
    # Half of a range of about three deviations over 2^bits - 1 steps, and averages that make it smaller.
    assert float((found - exact).norm() / exact.norm()) < 1.5 / (2**bits - 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True)], ids=str)
def test_of_a_relu_the_positive_part_is_coded_next_to_its_mask(
    activation: nn.Module, layout: torch.memory_format
) -> None:
    model = transform(network(activation), TWO_BITS)
    images = IMAGES.contiguous(memory_format=layout)
    with SavedTensors(model, images) as saved:
        loss = model(images).sum()
    kinds = saved.by_kind()
    first, second = sites(model)
    shares = [site.estimator.kept for site in (first, second)]
    numels = (6 * 8 * 64, 6 * 8 * 36)
    counts = [round((share or 0) * numel) for share, numel in zip(shares, numels, strict=True)]
    code, is_shared = BlockCode(2), shares[1] is not None
    # Flatten copies a channels-last tensor into another order: that is coded as a whole.
    assert is_shared == (layout == torch.contiguous_format)
    coded = counts if is_shared else [counts[0], numels[1]]
    assert kinds["bitmap"] == sum(numels) // 8  # the two masks, once each
    assert kinds["packed values"] == sum(code.nbytes(count, torch.float32) for count in coded)
    assert kinds["dense"] == 0
    assert 0.3 < (shares[0] or 0) < 0.7
    loss.backward()
    assert saved.nbytes == 0


def test_of_a_tensor_with_all_signs_everything_is_coded() -> None:
    model = transform(network(nn.Identity()), TWO_BITS.replace(activation_block=64))
    with SavedTensors(model, IMAGES) as saved:
        loss = model(IMAGES).sum()
    code = BlockCode(2, 64)
    numels = (6 * 8 * 64, 6 * 8 * 36)
    assert saved.by_kind()["packed values"] == sum(code.nbytes(n, torch.float32) for n in numels)
    assert saved.by_kind()["bitmap"] == 0
    loss.backward()


def test_with_a_sparsity_what_is_above_the_threshold_is_coded() -> None:
    model = transform(network(nn.ReLU()), EXACT.replace(activation_sparsity=0.9, activation_bits=4))
    with SavedTensors(model, IMAGES) as saved:
        loss = model(IMAGES).sum()
    numels = (6 * 8 * 64, 6 * 8 * 36)
    counts = [round((site.estimator.kept or 0) * n) for site, n in zip(sites(model), numels, strict=True)]
    assert all(0.05 < count / n < 0.15 for count, n in zip(counts, numels, strict=True))
    assert saved.by_kind()["bitmap"] == 2 * sum(numels) // 8  # the ReLU's, and those of what is kept
    assert saved.by_kind()["packed values"] == sum(BlockCode(4).nbytes(c, torch.float32) for c in counts)
    loss.backward()


def test_what_a_relu_keeps_serves_nothing_else() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    y = sign_relu(x * 1)
    assert rectified(y) is not None
    assert rectified(y.view(4, 2)) is not None
    for other in (y * 1, y[:1], y.t(), y.detach(), torch.relu(x), sign_relu(x.detach())):
        assert rectified(other) is None


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_retained_graph_gives_the_same_gradients_again(gamma: float) -> None:
    model = transform(network(nn.ReLU6()), TWO_BITS.replace(activation_sparsity=gamma))
    loss = F.cross_entropy(model(IMAGES), LABELS)
    found = []
    for retain in (True, False):
        model.zero_grad()
        loss.backward(retain_graph=retain)  # type: ignore[no-untyped-call]
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("way", ["copy", "state", "save", "json"])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_noise_goes_on_where_it_was(way: str, gamma: float, tmp_path: Path) -> None:
    config = Config(density=0.5, activation_sparsity=gamma, activation_bits=2, seed=3)
    model = transform(network(nn.ReLU()), config)
    for _ in range(2):
        first = gradients(model)
    if way == "copy":
        other = copy.deepcopy(model)
    elif way == "save":
        fedmef_fx.save(model, tmp_path / "model.safetensors")
        other = fedmef_fx.load(tmp_path / "model.safetensors", network(nn.ReLU()))
    else:
        other = transform(network(nn.ReLU()), config)
        other.load_state_dict(model.state_dict())
    if way == "json":
        assert torch.equal(thresholds_from_json(thresholds_to_json(model)), thresholds(model))
    expected, found = gradients(model), gradients(other)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(first[name], found[name]) for name in expected)


def test_without_gradients_no_noise_is_drawn() -> None:
    model = transform(network(nn.ReLU()), TWO_BITS)
    with torch.no_grad():
        model(IMAGES)
    assert [site.noise.draws for site in sites(model)] == [0, 0]
    gradients(model)
    assert [site.noise.draws for site in sites(model)] == [1, 1]


def test_a_seed_and_a_place_have_their_own_noise() -> None:
    seeds = [site.noise.seed for s in (0, 1) for site in sites(transform(network(nn.ReLU()), TWO_BITS.replace(seed=s)))]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("levels", ["range", "centroids"])
def test_other_formats_train(dtype: torch.dtype, levels: Any) -> None:
    model = transform(network(nn.ReLU()).to(dtype), TWO_BITS.replace(activation_levels=levels))
    found = gradients(model, IMAGES.to(dtype))
    assert all(bool(grad.isfinite().all()) and grad.dtype == dtype for grad in found.values())


def test_an_empty_batch_has_empty_codes() -> None:
    model = transform(network(nn.ReLU()), TWO_BITS)
    model(IMAGES[:0]).sum().backward()
    assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)


def test_the_pass_has_a_text() -> None:
    text = "prune-activations{activation_sparsity=0.0, activation_bits=2, activation_block=64, seed=3}"
    step = parse_pass(text)
    assert (step.activation_bits, step.activation_block) == (2, 64)  # type: ignore[attr-defined]
    model = transform(network(nn.ReLU()), EXACT, passes=f"shrink-saved; {text}")
    assert [site.code for site in sites(model)] == [BlockCode(2, 64, rounding="stochastic")] * 2
    assert "activation_bits=2" in str(fedmef_fx.report(model))
    with pytest.raises(ConfigError, match="activation_bits"):
        parse_pass("prune-activations{activation_bits=5}")
    with pytest.raises(ConfigError, match="activation_block"):
        transform(network(nn.ReLU()), EXACT, passes="prune-activations{activation_bits=2, activation_block=12}")
