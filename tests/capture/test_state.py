"""A trace leaves no trace: what forward may touch, and whose random numbers count."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedmef_fx.capture.state import unchanged
from fedmef_fx.errors import CaptureError


def test_numbers_that_another_thread_draws_are_not_the_models() -> None:
    worker = threading.Thread(target=lambda: torch.rand(3))
    with unchanged(nn.Linear(2, 2)):
        worker.start()
        worker.join()


@pytest.mark.parametrize("draw", [lambda: torch.rand(3), lambda: torch.empty(3).normal_(), lambda: nn.Linear(2, 2)])
def test_numbers_that_are_drawn_in_a_trace_are_refused_and_undone(draw: Callable[[], object]) -> None:
    module = nn.Linear(2, 2)
    state = torch.get_rng_state()
    with pytest.raises(CaptureError, match="draws random numbers"), unchanged(module):
        draw()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tracer_that_executes_may_draw_and_leaves_the_generator_as_it_was() -> None:
    model, state = nn.Linear(2, 2), torch.get_rng_state()
    first = torch.rand(3)
    torch.set_rng_state(state)
    with unchanged(model, executes=True):
        torch.rand(5)
    assert torch.equal(torch.rand(3), first)
