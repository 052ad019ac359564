"""Packed weights train as dense ones do: step for step, through topology changes, in a fraction of the memory."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from fedmef_fx import Config, Extrusion, density, growth_candidates, masks, memory, report, set_masks, transform
from fedmef_fx.clipping import clip_gradients
from fedmef_fx.memory import LiveBytes
from fedmef_fx.memory.registry import held_buffers
from fedmef_fx.model import masked_parameters
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import nsconv_weight
from fedmef_fx.sparsity.adjust import adjust_mask, largest_inactive
from tests.packed_models import MODELS, build

# Sums over a row run in another order, which costs a few units in the last place of double precision per step.
TIGHT = 1e-12
# Adam divides a gradient by its own size: where one is almost 0, as of weights just grown, it magnifies such noise.
OVER_STEPS = {"sgd": TIGHT, "adamw": 1e-10}

OPTIMIZERS = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda model: AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2, amsgrad=True),
}
CONFIG = Config(density=0.3, activation_sparsity=0.0)


def twins(name: str, config: Config = CONFIG) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The same sparse model in dense and in packed storage, and a batch."""
    model, x, y = build(name)
    dense = transform(model, config)
    packed = transform(model, config.replace(weight_storage="packed"))
    assert {entry.is_packed for entry in masked_parameters(packed).values()} == {True}
    return dense, packed, x, y


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_same_weights(dense: nn.Module, packed: nn.Module, *, tolerance: float = TIGHT) -> None:
    ours, theirs = masked_parameters(packed), masked_parameters(dense)
    for name, entry in ours.items():
        assert torch.equal(entry.mask, theirs[name].mask)
        assert relative(entry.dense(), theirs[name].parameter.detach()) < tolerance, name


def relative(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    if not right.numel():
        return 0.0
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-30))


def change_topology(dense: nn.Module, packed: nn.Module, x: Tensor, y: Tensor, *, uneven: bool) -> None:
    """Prune and grow k weights per layer by the same rule; uneven changes the number of active weights, too."""
    changed = {}
    for name, entry in masked_parameters(dense).items():
        generator = torch.Generator().manual_seed(entry.numel)
        gradient = torch.randn(entry.shape, generator=generator, dtype=torch.float64)
        k = min(entry.active, entry.numel - entry.active) // 3
        mask = adjust_mask(entry.dense(), entry.mask, largest_inactive(gradient, entry.mask, k), k)
        if uneven:
            mask &= torch.rand(mask.shape, generator=generator) < 0.8
            mask |= torch.rand(mask.shape, generator=generator) < 0.05
        changed[name] = mask
    set_masks(dense, changed)
    set_masks(packed, changed)


@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_dense_training_step_for_step(name: str, optimizer: str, normalization: str) -> None:
    dense, packed, x, y = twins(name, CONFIG.replace(normalization=normalization))
    optimizers = [OPTIMIZERS[optimizer](model) for model in (dense, packed)]
    for number in range(24):
        if number in (8, 16):
            change_topology(dense, packed, x, y, uneven=number == 16)
        losses = [step(model, opt, x, y) for model, opt in zip((dense, packed), optimizers, strict=True)]
        assert float((losses[0] - losses[1]).abs() / losses[0]) < OVER_STEPS[optimizer]
    assert_same_weights(dense, packed, tolerance=10 * OVER_STEPS[optimizer])


@pytest.mark.parametrize("statistics", ["active", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_autograd_of_the_equations(name: str, statistics: str) -> None:
    """With nothing dropped, both storages give what autograd gives for the kernel written out in torch functions."""
    dense, packed, x, y = twins(name, CONFIG.replace(nsconv_statistics=statistics, activation_sparsity=0.0))
    eager = _written_out(dense)
    for model in (dense, packed):
        F.cross_entropy(model(x), y).backward()
    F.cross_entropy(eager(x), y).backward()
    expected = dict(eager.named_parameters())
    for model in (dense, packed):
        entries = masked_parameters(model)
        for parameter_name, parameter in model.named_parameters():
            entry = entries.get(parameter_name)
            got = parameter.grad if entry is None or parameter.grad is None else entry.expand(parameter.grad)
            if got is not None:
                assert relative(got, expected[parameter_name].grad) < TIGHT, parameter_name


def _written_out(model: nn.Module) -> nn.Module:
    """A copy of a dense-storage model whose kernels are plain torch functions that autograd looks into."""
    eager = copy.deepcopy(model)
    for node in eager.graph.nodes:
        if node.target is nsconv_weight:
            node.target = _kernel
        elif node.target is masked_weight:
            node.target = torch.mul
    eager.recompile()
    return eager


def _kernel(weight, gain, mask, *, g, groups, transposed, statistics):
    """w_hat of `ops/nsconv.py` for rows with a spread, without its guards but the one for a single weight."""
    rows = weight
    keep = mask.double()
    if transposed:
        shape = (groups, weight.shape[0] // groups, weight.shape[1], -1)
        rows, keep = (t.reshape(shape).transpose(1, 2).flatten(0, 1) for t in (weight, keep))
    rows, keep = rows.flatten(1), keep.flatten(1)
    number = keep.sum(1, keepdim=True)
    counted = torch.full_like(number, rows.shape[1]) if statistics == "all" else number.clamp_min(1)
    mean = torch.where(number > 1, (rows * keep).sum(1, keepdim=True) / counted, 0.0)
    base = (rows * keep - mean) * keep
    square = base.square().sum(1, keepdim=True)
    if statistics == "all":
        square = square + (rows.shape[1] - number) * mean.square()
    kernel = g * gain.unsqueeze(1) * base / square.clamp_min(1e-6).sqrt()
    if not transposed:
        return kernel.reshape(weight.shape)
    inner = kernel.reshape(groups, weight.shape[1], weight.shape[0] // groups, -1)
    return inner.transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("name", MODELS)
def test_pruned_activations_are_the_same(name: str) -> None:
    dense, packed, x, y = twins(name, CONFIG.replace(activation_sparsity=0.7))
    optimizers = [SGD(model.parameters(), lr=0.02, momentum=0.9) for model in (dense, packed)]
    for _ in range(10):
        losses = [step(model, opt, x, y) for model, opt in zip((dense, packed), optimizers, strict=True)]
    assert float((losses[0] - losses[1]).abs() / losses[0]) < TIGHT
    assert_same_weights(dense, packed)


@pytest.mark.parametrize("name", MODELS)
def test_growth_candidates_are_the_same(name: str) -> None:
    dense, packed, x, y = twins(name)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    for batches in ([(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])]):
        theirs, ours = (growth_candidates(model, loss_fn, batches, k=5) for model in (dense, packed))
        for key, candidates in theirs.items():
            assert torch.equal(ours[key].positions, candidates.positions)
            assert relative(ours[key].values, candidates.values) < TIGHT
            assert not masks(packed)[key].flatten()[ours[key].positions].any()
    assert all(parameter.grad is None for parameter in packed.parameters())


def test_extrusion_marks_and_moves_the_same_weights() -> None:
    dense, packed, x, y = twins("conv")
    results = []
    for model in (dense, packed):
        optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
        with Extrusion(model, optimizer, budget_steps=6, strength=0.05) as extrusion:
            for _ in range(6):
                step(model, optimizer, x, y)
        results.append((extrusion.marked, extrusion.norm(), extrusion.learning_rate))
    for name, positions in results[0][0].items():
        assert torch.equal(positions, results[1][0][name])
    assert results[1][1:] == pytest.approx(results[0][1:], rel=1e-6)  # the norm is taken in single precision
    assert_same_weights(dense, packed)


def test_extrusion_follows_a_topology_change_inside_of_it() -> None:
    dense, packed, x, y = twins("conv")
    for model in (dense, packed):
        optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
        with Extrusion(model, optimizer, budget_steps=6, strength=0.05):
            step(model, optimizer, x, y)
            set_masks(model, {name: mask.roll(1) for name, mask in masks(model).items()})
            step(model, optimizer, x, y)
    assert_same_weights(dense, packed)


@pytest.mark.parametrize("name", MODELS)
def test_adaptive_clipping_is_the_same(name: str) -> None:
    dense, packed, x, y = twins(name)
    counts = []
    for model in (dense, packed):
        F.cross_entropy(model(x), y).backward()
        counts.append(clip_gradients(model, 0.01))
    assert counts[0] == counts[1] > 0
    for key, entry in masked_parameters(packed).items():
        assert relative(entry.expand(entry.parameter.grad), masked_parameters(dense)[key].parameter.grad) < TIGHT


def test_only_active_values_have_gradients_and_optimizer_state() -> None:
    _, packed, x, y = twins("conv")
    optimizer = Adam(packed.parameters(), lr=1e-3)
    step(packed, optimizer, x, y)
    for _ in range(2):
        for entry in masked_parameters(packed).values():
            active = int(entry.mask.sum())
            assert entry.parameter.shape == entry.parameter.grad.shape == (active,)
            assert optimizer.state[entry.parameter]["exp_avg"].shape == (active,)
            assert optimizer.state[entry.parameter]["exp_avg_sq"].shape == (active,)
        change_topology(packed, packed, x, y, uneven=True)
        step(packed, optimizer, x, y)


@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, amsgrad=True)])
def test_momentum_of_survivors_is_kept_and_of_grown_weights_zero(optimizer) -> None:
    _, packed, x, y = twins("conv")
    opt = optimizer(packed.parameters())
    for _ in range(3):
        step(packed, opt, x, y)
    entry = masked_parameters(packed)["conv2.weight"]
    before = {k: entry.expand(v) for k, v in opt.state[entry.parameter].items() if v is not None and v.dim()}
    count = opt.state[entry.parameter].get("step")
    old, new = entry.mask, torch.rand(entry.shape) < 0.5
    set_masks(packed, {"conv2.weight": new})
    opt.param_groups[0]["lr"] = 0.0
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    weights = entry.values()
    opt.zero_grad(set_to_none=True)  # a step without gradients moves nothing, but the state is brought up to date
    opt.step()
    assert torch.equal(entry.values(), weights)
    for key, value in before.items():
        after = entry.expand(opt.state[entry.parameter][key])
        assert torch.equal(after, torch.where(old & new, value, 0.0))
    assert opt.state[entry.parameter].get("step") == count


def test_set_masks_keeps_objects_weights_and_gradients() -> None:
    _, packed, x, y = twins("conv")
    F.cross_entropy(packed(x), y).backward()
    entry = masked_parameters(packed)["conv3.weight"]
    weight, gradient, old = entry.dense(), entry.expand(entry.parameter.grad), entry.mask
    new = torch.rand(entry.shape) < 0.6
    set_masks(packed, {"conv3.weight": new})
    after = masked_parameters(packed)["conv3.weight"]
    assert after.parameter is entry.parameter
    assert torch.equal(after.mask, new)
    assert torch.equal(after.dense(), torch.where(old & new, weight, 0.0))
    assert torch.equal(after.expand(after.parameter.grad), torch.where(old & new, gradient, 0.0))


def test_a_graph_of_an_earlier_topology_does_not_get_in_the_way() -> None:
    dense, packed, x, y = twins("conv")
    kept = []  # as a training loop that keeps its losses for logging does
    for model in (dense, packed):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        kept.append(loss)
        set_masks(model, {name: ~mask for name, mask in masks(model).items()})
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    for key, entry in masked_parameters(packed).items():
        assert relative(entry.expand(entry.parameter.grad), masked_parameters(dense)[key].parameter.grad) < TIGHT


def test_layers_without_active_weights_and_dense_ones_train() -> None:
    dense, packed, x, y = twins("conv")
    empty = {name: torch.zeros_like(mask) for name, mask in masks(packed).items()}
    full = {name: torch.ones_like(mask) for name, mask in masks(packed).items()}
    optimizers = [OPTIMIZERS["adamw"](model) for model in (dense, packed)]
    for changed in (empty, full, {**full, "conv2.weight": empty["conv2.weight"]}):
        for model in (dense, packed):
            set_masks(model, changed)
        losses = [step(model, opt, x, y) for model, opt in zip((dense, packed), optimizers, strict=True)]
        for model in (dense, packed):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            clip_gradients(model, 0.01)
        assert float((losses[0] - losses[1]).abs()) < TIGHT
    assert_same_weights(dense, packed)


def test_gradients_accumulate_and_are_clipped_by_norm() -> None:
    dense, packed, x, y = twins("grouped")
    norms = []
    for model in (dense, packed):
        for part in (slice(0, 2), slice(2, 6)):
            F.cross_entropy(model(x[part]), y[part]).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
    assert norms[0] == pytest.approx(norms[1], rel=TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaling(dtype: torch.dtype) -> None:
    dense, packed, x, y = twins("conv")
    grads = []
    for model in (dense.float(), packed.float()):
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        optimizer = SGD(model.parameters(), lr=0.01)
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        entries = masked_parameters(model)
        grads.append({key: entry.expand(entry.parameter.grad) for key, entry in entries.items()})
        scaler.step(optimizer)
    assert all(gradient.dtype == torch.float32 for gradient in grads[1].values())
    # The kernels agree to single precision; rounded to 16 bits a few of them land on neighbouring numbers.
    assert all(relative(grads[1][key], gradient) < 2e-2 for key, gradient in grads[0].items())


def test_distributed_training_between_topology_changes(tmp_path: Path) -> None:
    dense, packed, x, y = twins("conv")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        optimizers = [OPTIMIZERS["sgd"](model) for model in (dense, packed)]
        for number in range(2):
            parallel = [nn.parallel.DistributedDataParallel(model) for model in (dense, packed)]
            for _ in range(3):
                losses = [step(model, opt, x, y) for model, opt in zip(parallel, optimizers, strict=True)]
            assert float((losses[0] - losses[1]).abs()) < TIGHT
            del parallel
            for model, opt in zip((dense, packed), optimizers, strict=True):
                opt.zero_grad()
                uneven = {name: mask.roll(3) & mask for name, mask in masks(model).items()}
                set_masks(model, uneven if number else {name: ~mask for name, mask in uneven.items()})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["weight", "gain"])
def test_frozen_weights_and_gains(kind: str) -> None:
    dense, packed, x, y = twins("conv", CONFIG.replace(activation_sparsity=0.5))
    for model in (dense, packed):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(("norm" in name) == (kind == "weight"))
        F.cross_entropy(model(x), y).backward()
    for name, parameter in packed.named_parameters():
        expected = dense.get_parameter(name).grad
        assert (parameter.grad is None) == (expected is None) == (not parameter.requires_grad)
        if "norm" in name and expected is not None:
            assert relative(parameter.grad, expected) < TIGHT
            assert parameter.grad.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_training_on_cuda_equals_dense_training(name: str) -> None:
    dense, packed, x, y = twins(name)
    x, y = x.cuda(), y.cuda()
    models = [dense.cuda(), packed.cuda()]
    optimizers = [OPTIMIZERS["sgd"](model) for model in models]
    for number in range(6):
        if number == 3:
            for model in models:
                set_masks(model, {key: mask.roll(1) for key, mask in masks(model).items()})
        losses = [step(model, opt, x, y) for model, opt in zip(models, optimizers, strict=True)]
    assert float((losses[0] - losses[1]).abs()) < 1e-10  # sums on the device have no fixed order
    assert_same_weights(dense, packed, tolerance=1e-9)


def test_half_precision_models_run() -> None:
    _, packed, x, _ = twins("grouped")
    expected = packed.eval()(x)
    assert torch.allclose(packed.bfloat16()(x.bfloat16()).double(), expected, atol=0.1)


def test_copies_are_independent_and_equal() -> None:
    _, packed, x, y = twins("conv")
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(x), packed(x))
    set_masks(twin, {name: ~mask for name, mask in masks(twin).items()})
    step(twin, SGD(twin.parameters(), lr=0.1), x, y)
    assert density(twin) == pytest.approx(1 - density(packed), abs=0.01)
    assert packed(x).shape == twin(x).shape


def test_memory_of_weights_gradients_and_peak() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    x = torch.randn(2, 512)
    dense, packed = (transform(model, Config(density=0.1, weight_storage=s)) for s in ("dense", "packed"))
    assert report(packed)["pack-weights"].refusals == ()
    theirs, ours = memory(dense, (x,)), memory(packed, (x,))
    one = 512 * 512 * 4
    assert ours.weights < 0.11 * theirs.weights
    assert ours.gradients < 0.11 * theirs.gradients
    assert ours.buffers < 0.13 * theirs.buffers
    # Above all that stays there is one dense tensor at a time, the active values in some copies, and a block of
    # temporaries of the kernels.
    assert ours.peak - ours.weights - ours.gradients - ours.buffers < 1.6 * one


def test_a_convolution_never_holds_more_than_its_weight_and_its_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    packed = transform(model, Config(density=0.1, weight_storage="packed"))
    x = torch.randn(1, 64, 4, 4)
    with LiveBytes(packed, x) as live:
        before = live.current
        packed(x).sum().backward()
    assert live.peak - before < 2.6 * 64 * 64 * 9 * 4


class Broken(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("broken")


def _fail_in_forward(model: nn.Module, x: Tensor) -> None:
    model(x[:, :, :3])  # too small for the last convolution


def _fail_before_backward(model: nn.Module, x: Tensor) -> None:
    Broken.apply(model(x)).sum().backward()


def _fail_after_backward(model: nn.Module, x: Tensor) -> None:
    model(Broken.apply(x.requires_grad_())).sum().backward()


@pytest.mark.parametrize("fail", [_fail_in_forward, _fail_before_backward, _fail_after_backward])
def test_exceptions_leave_no_packed_buffers_alive(fail) -> None:
    gc.collect()
    before = set(held_buffers())
    model, x, _ = build("conv")
    packed = transform(model, CONFIG.replace(activation_sparsity=0.5, weight_storage="packed"))
    with pytest.raises(RuntimeError):
        fail(packed, x)
    gc.collect()
    assert set(held_buffers()) <= before


def test_hundreds_of_steps_leak_nothing() -> None:
    _, packed, x, y = twins("grouped", CONFIG.replace(activation_sparsity=0.5))
    optimizer = SGD(packed.parameters(), lr=0.01, momentum=0.9)
    counts = []
    for number in range(210):
        step(packed, optimizer, x, y)
        if number % 35 == 0:
            change_topology(packed, packed, x, y, uneven=False)
            optimizer.zero_grad()
        if number % 70 == 69:
            gc.collect()
            counts.append((len(held_buffers()), sum(issubclass(type(o), Tensor) for o in gc.get_objects())))
    assert counts[1] == counts[2]


def test_a_model_can_be_freed() -> None:
    _, packed, x, y = twins("grouped")
    step(packed, SGD(packed.parameters(), lr=0.01), x, y)
    set_masks(packed, {name: ~mask for name, mask in masks(packed).items()})
    reference = weakref.ref(masked_parameters(packed)["head.weight"].parameter)
    del packed
    gc.collect()
    assert reference() is None
