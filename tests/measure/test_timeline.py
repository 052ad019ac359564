import gc
import itertools
import weakref

import torch
from torch import Tensor, nn

from fedmef_fx.measure.timeline import CATEGORIES, AttributedSaves, StepTimeline
from fedmef_fx.packing import PackedTensor, using_backend


def test_categories_follow_what_tensors_are_for() -> None:
    weight, x = torch.randn(8, 4, requires_grad=True), torch.randn(3, 4)
    timeline = StepTimeline()
    timeline.hold([weight], "weights")
    timeline.hold([x], "inputs")
    assert timeline.current["weights"] == weight.nbytes
    with AttributedSaves(timeline), timeline.during("forward"):
        timeline.enter("first")
        hidden = x @ weight.t()
        timeline.leave(hidden)
        timeline.enter("second", (hidden,))
        result = hidden.exp()  # keeps its result
        timeline.leave(result)
        del hidden
        loss = result.sum()
        timeline.end_forward()
    assert timeline.current["saved"] == result.nbytes
    assert {layer.path: layer.held for layer in timeline.layers if layer.held} == {"second": result.nbytes}
    assert timeline.current["transients"] == loss.nbytes
    with timeline.during("backward"):
        loss.backward()
        timeline.hold([weight.grad], "gradients")
    assert timeline.current["gradients"] == weight.nbytes
    # Autograd has let go of the result; the test has not.
    assert timeline.current["saved"] == 0
    assert timeline.current["transients"] == result.nbytes + loss.nbytes


def test_backward_is_attributed_to_the_layer_that_made_the_node() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    timeline = StepTimeline()
    with timeline.during("forward"):
        timeline.enter("a")
        hidden = x.sin()
        timeline.leave(hidden)
        between = hidden * 2  # the caller's own
        timeline.enter("b", (between,))
        result = between.cos()
        timeline.leave(result)
        timeline.enter("loss", result)
        loss = result.exp().sum()
        timeline.leave(loss)
        timeline.end_forward()
    with timeline.during("backward"):
        loss.backward()
    paths = [event.site.path for event in timeline.events if event.site.phase == "backward"]
    assert [path for path, _ in itertools.groupby(paths)] == ["", "loss", "b", "", "a"]


def test_the_peak_and_what_it_was_made_of() -> None:
    x = torch.zeros(1000)
    timeline = StepTimeline()
    timeline.hold([x], "inputs")
    with timeline.during("forward"):
        y = x + 1
        z = y * 2
        del y
        w = z - 1
        del w
    assert timeline.peak == 3 * 4000
    assert timeline.at_peak == {**dict.fromkeys(CATEGORIES, 0), "inputs": 4000, "transients": 8000}
    assert timeline.peak_site.op == "aten.mul"
    assert str(timeline.peak_site) == "forward, model, aten.mul"
    assert timeline.total == 8000
    assert all(sum(event.live) <= timeline.peak for event in timeline.events)


def test_packed_buffers_are_held_by_the_layer_that_made_them() -> None:
    x = torch.randn(640)
    timeline = StepTimeline()
    with timeline.during("forward"):
        timeline.enter("conv")
        packed = PackedTensor.pack(x, threshold=1.0)
        timeline.leave(())
        timeline.end_forward()
    assert [(layer.path, layer.held) for layer in timeline.layers if layer.held] == [("conv", packed.nbytes)]
    del packed
    assert timeline.current["saved"] == 0


def test_temporaries_of_the_numpy_kernels_count() -> None:
    x = torch.randn(1000)
    with using_backend("numpy"):
        timeline = StepTimeline()
        with timeline.during("forward"):
            packed = PackedTensor.pack(x, threshold=0.0)
    # The pieces before they are joined, and one block's marks and positions.
    assert timeline.peak >= packed.nbytes + 4000 + 1000 * 8
    assert timeline.peak_site.op == "packing kernel"
    assert timeline.total <= x.nbytes + packed.nbytes


def test_a_keeper_that_outlives_the_block_and_a_timeline_that_does_not() -> None:
    timeline = StepTimeline()
    x = torch.randn(10, requires_grad=True)
    with AttributedSaves(timeline), timeline.during("forward"):
        loss = x.exp().sum()
    reference = weakref.ref(timeline)
    del timeline
    gc.collect()
    assert reference() is None
    loss.backward()
    assert x.grad is not None


def test_tensors_that_are_not_strided_are_passed_over() -> None:
    timeline = StepTimeline()
    with timeline.during("optimizer"):
        sparse = torch.eye(3).to_sparse()
        total = (sparse + sparse).to_dense()
    assert isinstance(total, Tensor)
    assert timeline.total >= total.nbytes


def test_a_module_is_excluded_as_the_saved_tensors_meter_excludes_it() -> None:
    layer, x = nn.Linear(4, 2), torch.ones(3, 4, requires_grad=True)
    timeline = StepTimeline()
    timeline.hold(layer.parameters(), "weights")
    with AttributedSaves(timeline, layer) as saves, timeline.during("forward"):
        loss = layer(x).sum()
    assert saves.nbytes == timeline.current["saved"] == x.nbytes
    del loss
    assert timeline.current["saved"] == 0
    assert timeline.current["weights"] == 40


class _Double(torch.autograd.Function):
    """Keeps nothing; its gradient is a tensor of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 2


def _peak_of_backward(*, is_held: bool) -> tuple[int, int]:
    """The peak while the gradients of two readers of one tensor meet, and the bytes of the tensor."""
    x = torch.randn(1000, requires_grad=True)
    hidden = x * 1.0
    first: list[Tensor] = []
    loss = hidden.new_zeros(())
    for _ in range(2):
        result = _Double.apply(hidden)  # type: ignore[no-untyped-call]  # torch's own
        if is_held:
            result.grad_fn.register_hook(lambda grads, _: first.extend(grads))
        loss = loss + result.sum()
        del result
    nbytes = hidden.nbytes
    del hidden
    timeline = StepTimeline()
    timeline.hold([x], "inputs")
    with timeline.during("backward"):
        loss.backward()
        x.new_empty(())  # what is alive is noted with the next operation
    return timeline.peak, nbytes


def test_gradients_of_two_readers_are_added_in_place_as_without_a_timeline() -> None:
    peak, nbytes = _peak_of_backward(is_held=False)
    assert 3 * nbytes <= peak < 4 * nbytes  # x, and the gradients of both readers
    peak, nbytes = _peak_of_backward(is_held=True)  # somebody keeps these: their sum is a third tensor
    assert peak >= 4 * nbytes
