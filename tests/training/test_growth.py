import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError, DataError
from fedmef_fx.ops.gradient_collector import add_candidates, is_collecting
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.sparse_model.masks import masks
from fedmef_fx.sparse_model.parameters import register_mask
from fedmef_fx.sparse_model.transformation import CHILD_NAME, PrunableParameter, Transformation
from fedmef_fx.training import growth
from fedmef_fx.training.growth import growth_candidates
from tests.references import largest_inactive

NAMES = ("a.weight", "b.weight")


class CandidateMask(torch.autograd.Function):
    """A masked weight whose backward has the dense gradient in its hands."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        # In place afterwards, as an op is free to do.
        gradient = gradient.clone()
        add_candidates(mask, gradient)
        return gradient.mul_(mask), None


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, CandidateMask.apply(self.weight, self.weight_mask), self.bias)


class Net(nn.Module):
    """4 -> 6 -> 6 -> 3; the middle layer is used `uses` times."""

    def __init__(self, *, uses: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.a = Masked(6, 6)
        self.b = Masked(6, 3)
        self.dropout = nn.Dropout(dropout)
        self.uses = uses

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.stem(x)))
        for _ in range(self.uses):
            x = self.a(x).tanh()
        return self.b(x)


def make_model(*, density: float = 0.3, masked: bool = True, **options: Any) -> Net:
    torch.manual_seed(2)
    model = Net(**options)
    transformation = Transformation(Config(density=density, adjustment_rate=0.5, weight_storage="dense"))
    for name in NAMES:
        weight = model.get_parameter(name)
        transformation.prunable[name] = PrunableParameter(name, weight.numel(), "graph", masked=masked)
        if masked:
            register_mask(model, name, torch.rand(weight.shape) < density)
    model.add_module(CHILD_NAME, transformation)
    return model


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def make_batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def dense_gradients(model: Net, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Reference: gradients of the effective weight, with every mask fully on and the weights already masked."""
    total = sum(len(y) for _, y in batches)
    sums = {name: torch.zeros_like(model.get_parameter(name)) for name in NAMES}
    kept = masks(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in NAMES:
        model.get_buffer(f"{name}_mask").fill_(True)
    for batch in batches:
        gradients = torch.autograd.grad(loss_fn(model, batch), [model.get_parameter(name) for name in NAMES])
        for name, gradient in zip(NAMES, gradients, strict=True):
            sums[name] += gradient * len(batch[1]) / total
    model.load_state_dict(state)
    assert all(torch.equal(masks(model)[name], kept[name]) for name in NAMES)
    return sums


@pytest.mark.parametrize("uses", [1, 3])
def test_one_batch_is_exact_also_for_a_tied_weight(uses):
    model = make_model(uses=uses)
    batch = make_batch(8)
    expected = dense_gradients(model, [batch])
    result = growth_candidates(model, loss_fn, [batch], k=3)
    assert list(result) == list(NAMES)
    for name in NAMES:
        reference = largest_inactive(expected[name], masks(model)[name], 3)
        assert torch.equal(result[name].positions, reference.positions)
        # A sum over uses and a product with the batch size in another order: a few units in the last place.
        torch.testing.assert_close(result[name].values, reference.values, rtol=1e-5, atol=1e-7)
        assert not masks(model)[name].flatten()[result[name].positions].any()


def test_batches_are_averaged_by_their_sizes():
    # 4 * k covers all inactive coordinates of both layers, so several batches are exact, too.
    model = make_model()
    batches = [make_batch(2, 1), make_batch(9, 2), make_batch(5, 3)]
    expected = dense_gradients(model, batches)
    result = growth_candidates(model, loss_fn, iter(batches), k=8)
    for name in NAMES:
        reference = largest_inactive(expected[name], masks(model)[name], 8)
        assert torch.equal(result[name].positions, reference.positions)
        torch.testing.assert_close(result[name].values, reference.values, rtol=1e-5, atol=1e-7)


def test_the_default_is_the_adjustment_share_of_the_active_weights():
    model = make_model()
    result = growth_candidates(model, loss_fn, [make_batch(8)])
    for name, mask in masks(model).items():
        assert result[name].positions.numel() == min(int(mask.sum()) // 2, int((~mask).sum()))


def test_k_by_name_and_more_than_there_are_inactive_coordinates():
    model = make_model()
    result = growth_candidates(model, loss_fn, [make_batch(8)], k={"b.weight": 1000})
    assert result["a.weight"].positions.numel() == 0
    assert torch.equal(result["b.weight"].positions, (~model.b.weight_mask).flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_changed(training):
    model = make_model(dropout=0.5).train(training)
    loss_fn(model, make_batch(4, 7)).backward()
    parameters = {name: (parameter, parameter.grad) for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    with torch.no_grad():
        growth_candidates(model, loss_fn, [make_batch(8), make_batch(8, 1)], k=3)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    for name, parameter in model.named_parameters():
        assert (parameter, parameter.grad) == parameters[name]
        assert torch.equal(parameter.grad, gradients[name])
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks
    assert all(module.training is training for module in model.modules())
    assert not is_collecting()


def test_activation_thresholds_are_those_of_training_afterwards():
    model = make_model()
    site = PackActivation(0.5, sample=64, interval=8)
    model.add_module("site", site)
    site(torch.randn(10))
    estimator, kept, threshold = site.estimator, site.estimator.kept, copy.copy(site.estimator)

    def packing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        site(batch[0] * 100)
        return loss_fn(model, batch)

    growth_candidates(model, packing, [make_batch(8)] * 9, k=3)
    assert site.estimator is estimator
    assert estimator.kept == kept
    # The next training step reads the same threshold as it would have without the growth in between.
    assert estimator.threshold(torch.ones(10)) == threshold.threshold(torch.ones(10))


def test_no_gradients_appear_where_there_were_none():
    model = make_model()
    growth_candidates(model, loss_fn, [make_batch(8)], k=3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_everything_is_put_back_when_the_loss_fails():
    model = make_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss_fn(model, batch)
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        growth_candidates(model, failing, [make_batch(8)], k=3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not is_collecting()


def test_at_most_one_dense_gradient_is_alive(monkeypatch):
    model = make_model()
    alive = []
    backward = CandidateMask.backward

    def watching(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return backward(ctx, gradient)

    monkeypatch.setattr(CandidateMask, "backward", staticmethod(watching))
    growth_candidates(model, loss_fn, [make_batch(8)], k=3)
    assert alive == [0, 0]


def test_parameters_of_others_in_the_loss_collect_no_gradient():
    model, teacher = make_model(), nn.Linear(4, 3)
    growth_candidates(model, lambda m, batch: (m(batch[0]) - teacher(batch[0])).square().mean(), [make_batch(4)], k=1)
    assert teacher.weight.grad is None


def test_parameters_without_gradient_have_no_candidates():
    model = make_model()
    model.a.weight.requires_grad_(False)
    result = growth_candidates(model, lambda m, x: m.a(x).sum(), [torch.ones(2, 6)], k=3)
    assert all(result[name].positions.numel() == 0 for name in NAMES)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ((torch.zeros(4, 2), torch.zeros(9)), 4),
        ({"name": "x", "pixels": torch.zeros(3, 2)}, 3),
        ([("x", torch.zeros(())), [torch.zeros(7)]], 7),
        ("text", None),
    ],
)
def test_the_size_of_a_batch_is_that_of_its_first_tensor(batch, size):
    assert growth.batch_size_of(batch) == size


def test_a_model_that_was_not_transformed_or_has_no_masks_is_rejected():
    with pytest.raises(ConfigError, match="is not a transformed model"):
        growth_candidates(nn.Linear(2, 2), loss_fn, [make_batch(2)])
    with pytest.raises(ConfigError, match="no masks"):
        growth_candidates(make_model(masked=False), loss_fn, [make_batch(2)])


def test_no_batches_are_rejected():
    with pytest.raises(DataError, match="no batches"):
        growth_candidates(make_model(), loss_fn, [], k=3)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]), r"shape \(4, 3\); expected a scalar"),
        (lambda model, batch: model(batch[0]).sum().detach(), "without a gradient"),
        (lambda model, batch: model(batch[0]).sum() * float("inf"), "not a number|finite"),
    ],
)
def test_a_loss_that_cannot_be_used_is_rejected(loss, message):
    with pytest.raises(ConfigError, match=message):
        growth_candidates(make_model(), loss, [make_batch(4)], k=3)


@pytest.mark.parametrize(
    ("k", "message"), [({"c": 1}, "'c' has no mask"), (-1, "got k=-1"), ({"a.weight": -1}, "k=-1")]
)
def test_a_k_that_cannot_be_used_is_rejected(k, message):
    with pytest.raises(ConfigError, match=message):
        growth_candidates(make_model(), loss_fn, [make_batch(4)], k=k)


@pytest.mark.gpu
def test_backward_in_threads_of_autograd_is_collected_on_an_accelerator():
    model, batches = make_model(dropout=0.5), [make_batch(8), make_batch(4, 1)]
    expected = growth_candidates(model.eval(), loss_fn, batches, k=5)
    model.cuda()
    generator = torch.cuda.get_rng_state()
    result = growth_candidates(model, loss_fn, [(x.cuda(), y.cuda()) for x, y in batches], k=5)
    growth_candidates(model.train(), loss_fn, [(x.cuda(), y.cuda()) for x, y in batches], k=5)
    assert torch.equal(generator, torch.cuda.get_rng_state())
    for name in NAMES:
        assert torch.equal(result[name].positions.cpu(), expected[name].positions)
        # Kernels add in another order.
        torch.testing.assert_close(result[name].values.cpu(), expected[name].values, rtol=1e-4, atol=1e-6)
