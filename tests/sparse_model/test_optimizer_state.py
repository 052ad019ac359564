import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedmef_fx.sparse_model.optimizer_state import StateUpdate, forget_state, update_state, watch_optimizers

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=0.1, amsgrad=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.1, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def _watched():
    """Transformed models see to that; here are none."""
    watch_optimizers()


def _train(parameter: nn.Parameter, optimizer: Optimizer, *, mask: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        parameter.grad = torch.arange(1.0, 5.0) * mask
        optimizer.step()


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    return OPTIMIZERS[request.param]


def _trained(make_optimizer) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = make_optimizer([parameter])
    _train(parameter, optimizer, mask=torch.ones(4), steps=3)
    return parameter, optimizer


def _prune(parameter: nn.Parameter, keep: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.mul_(keep)
    forget_state(parameter, keep=keep, before=torch.ones_like(keep))


KEEP = torch.tensor([True, False, True, False])


def test_pruned_weights_never_move_again(make_optimizer):
    parameter, optimizer = _trained(make_optimizer)
    _prune(parameter, KEEP)
    for _ in range(4):
        _train(parameter, optimizer, mask=KEEP, steps=1)
        assert torch.equal(parameter.detach()[~KEEP], torch.zeros(2))


def test_without_it_they_would_move(make_optimizer):
    parameter, optimizer = _trained(make_optimizer)
    with torch.no_grad():
        parameter.mul_(KEEP)
    _train(parameter, optimizer, mask=KEEP, steps=1)
    assert parameter.detach()[~KEEP].abs().min() > 0


def test_survivors_train_as_if_nothing_had_happened(make_optimizer):
    pruned, optimizer = _trained(make_optimizer)
    untouched, other = _trained(make_optimizer)
    _prune(pruned, KEEP)
    _train(pruned, optimizer, mask=KEEP, steps=3)
    _train(untouched, other, mask=torch.ones(4), steps=3)
    assert torch.equal(pruned.detach()[KEEP], untouched.detach()[KEEP])


def test_two_changes_before_a_step_add_up(make_optimizer):
    parameter, optimizer = _trained(make_optimizer)
    _prune(parameter, torch.tensor([False, True, True, True]))
    _prune(parameter, torch.tensor([True, False, True, True]))
    survivor = torch.tensor([False, False, True, True])
    _train(parameter, optimizer, mask=survivor, steps=2)
    assert torch.equal(parameter.detach()[~survivor], torch.zeros(2))


def test_state_is_cleared_once_and_grown_weights_gather_their_own(make_optimizer):
    parameter, optimizer = _trained(make_optimizer)
    _prune(parameter, KEEP)
    _train(parameter, optimizer, mask=torch.ones(4), steps=1)
    after_one_step = parameter.detach().clone()
    _train(parameter, optimizer, mask=torch.ones(4), steps=1)
    assert (parameter.detach() - after_one_step)[~KEEP].abs().min() > 0
    state = [value for value in optimizer.state[parameter].values() if value is not None and value.shape == KEEP.shape]
    assert state
    assert all(value[~KEEP].abs().min() > 0 for value in state)


def test_neither_parameters_nor_optimizers_are_kept_alive():
    parameter, optimizer = _trained(OPTIMIZERS["sgd"])
    references = weakref.ref(parameter), weakref.ref(optimizer)
    _prune(parameter, KEEP)
    del parameter, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    # Whatever is trained next is not affected by what the dead parameter left behind.
    other, optimizer = _trained(OPTIMIZERS["sgd"])
    _train(other, optimizer, mask=torch.ones(4, dtype=torch.bool), steps=1)
    assert optimizer.state[other]["momentum_buffer"].abs().min() > 0


def test_steps_of_optimizers_without_the_parameter_change_nothing():
    parameter, optimizer = _trained(OPTIMIZERS["sgd"])
    other, other_optimizer = _trained(OPTIMIZERS["sgd"])
    _prune(parameter, KEEP)
    momentum = other_optimizer.state[other]["momentum_buffer"].clone()
    other.grad = torch.zeros(4)
    other_optimizer.step()
    # A zero gradient: the momentum decays and collects weight decay, but no coordinate of it is cleared.
    assert momentum.abs().min() > 0
    assert other_optimizer.state[other]["momentum_buffer"].abs().min() > 0
    _train(parameter, optimizer, mask=KEEP, steps=1)
    assert torch.equal(parameter.detach()[~KEEP], torch.zeros(2))


def test_another_hook_on_all_optimizers_does_not_get_in_the_way():
    parameter, optimizer = _trained(OPTIMIZERS["sgd"])
    calls = []
    _prune(parameter, KEEP)
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    try:
        _train(parameter, optimizer, mask=KEEP, steps=2)
    finally:
        handle.remove()
    assert len(calls) == 2


def _repack(parameter: nn.Parameter, move: StateUpdate) -> None:
    values = move.on(parameter.detach())
    parameter.grad = None
    parameter.data = values
    update_state(parameter, move)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_moves_keep_survivors_in_place(bits):
    old, middle, new = torch.tensor(bits).unbind(1)
    dense = torch.arange(1.0, len(bits) + 1) * old
    updated = StateUpdate.between(middle, new).on(StateUpdate.between(old, middle).on(dense[old]))
    assert torch.equal(updated, (dense * middle * new)[new])


def test_packed_state_follows_several_changes_at_once(make_optimizer):
    packed = nn.Parameter(torch.ones(4))
    optimizer = make_optimizer([packed])
    dense, other = _trained(make_optimizer)
    _train(packed, optimizer, mask=torch.ones(4), steps=3)
    masks = [torch.tensor(m) for m in ([1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [1, 0, 1, 1])]
    for old, new in itertools.pairwise(mask.bool() for mask in masks):
        _repack(packed, StateUpdate.between(old, new))
        with torch.no_grad():
            dense.mul_(old & new)
        forget_state(dense, keep=old & new, before=old)
    active = masks[-1].bool()
    for _ in range(2):
        packed.grad = torch.arange(1.0, 5.0)[active]
        optimizer.step()
        _train(dense, other, mask=active, steps=1)
    assert torch.equal(packed.detach(), dense.detach()[active])
    for name, value in optimizer.state[packed].items():
        if isinstance(value, torch.Tensor) and value.dim():
            assert torch.equal(value, other.state[dense][name][active])


def test_a_wrapper_that_shares_state_moves_it_once():
    class Wrapper(SGD):
        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, lr=0.1, momentum=0.9)
            self.state, self.inner = inner.state, inner

        def step(self, closure=None):
            return self.inner.step(closure)

    parameter = nn.Parameter(torch.ones(3))
    wrapper = Wrapper(SGD([parameter], lr=0.1, momentum=0.9))
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    wrapper.step()
    old, new = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([0, 1, 1, 1]).bool()
    _repack(parameter, StateUpdate.between(old, new))
    assert torch.equal(wrapper.state[parameter]["momentum_buffer"], torch.tensor([2.0, 3.0, 0.0]))
