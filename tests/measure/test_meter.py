import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.ops.pooling import max_pool
from fedmef_fx.packing import GradientBits, PackedTensor, clamp
from fedmef_fx.packing.registry import held_buffers


class PackedRelu(torch.autograd.Function):
    """Keeps its bits on the context, where autograd's hooks do not see them, and a packed copy of its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, ctx.bits = clamp(x)
        ctx.packed = PackedTensor.pack(out, threshold=0.5)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.bits.apply(grads[0])


class SavedBits(torch.autograd.Function):
    """Saves a bitmap the official way, so that both the hooks and the registry know it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        bits = GradientBits.of(x > 0)
        ctx.save_for_backward(bits.bitmap)
        ctx.layout = bits.layout
        return x.relu()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return GradientBits(ctx.saved_tensors[0], ctx.layout).apply(grads[0])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def test_each_storage_counts_once_and_parameters_do_not() -> None:
    model, x = network(), torch.randn(10, 16)
    with SavedTensors(model) as saved:
        loss = model(x).sum()
    # The input of each linear layer; the ReLU's output is the second of them.
    assert saved.by_kind() == {"dense": 4 * (10 * 16 + 10 * 32), "packed values": 0, "bitmap": 0, "8-bit": 0}
    with SavedTensors(model, x) as without_input:
        other = model(x).sum()
    assert without_input.nbytes == 4 * 10 * 32
    with SavedTensors() as everything:
        third = model(x).sum()
    assert everything.nbytes == saved.nbytes + 4 * 32 * 8  # and the second weight; the first has no use for a backward
    del loss, other, third
    assert saved.nbytes == without_input.nbytes == everything.nbytes == 0


def test_a_view_counts_with_its_whole_storage() -> None:
    x = torch.randn(100, 8)
    weight = torch.randn(8, 2, requires_grad=True)
    with SavedTensors() as saved:
        out = x[:1] @ weight
    assert saved.nbytes == x.nbytes
    del out


def test_packed_buffers_count_where_hooks_cannot_see() -> None:
    x = torch.randn(100, 64, requires_grad=True)
    outside = PackedTensor.pack(torch.randn(1000))
    with SavedTensors() as saved:
        y = PackedRelu.apply(x)
        kinds = saved.by_kind()
    later = PackedTensor.pack(torch.randn(1000))
    kept = int((x > 0.5).sum())
    assert kinds == saved.by_kind() == {"dense": 0, "packed values": 4 * kept, "bitmap": 2 * 800, "8-bit": 0}
    y.sum().backward()
    del y
    assert saved.nbytes == 0
    assert outside.nbytes > 0
    assert later.nbytes > 0


def test_a_buffer_that_is_saved_and_announced_counts_once() -> None:
    x = torch.randn(800, requires_grad=True)
    with SavedTensors(x) as saved:
        loss = SavedBits.apply(x).sum()
    assert saved.by_kind() == {"dense": 0, "packed values": 0, "bitmap": 100, "8-bit": 0}
    loss.backward()
    assert saved.nbytes == 0


def test_gradients_are_those_without_the_meter() -> None:
    model, x = network(), torch.randn(10, 16)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with SavedTensors(model) as saved:
        loss = model(x).square().sum()
        got = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, got, expected))
    assert saved.nbytes == 0


def test_double_backward_works_under_the_meter() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with SavedTensors():
        assert torch.autograd.gradgradcheck(lambda t: (t.sigmoid() * t).exp(), (x,))


def test_many_steps_leave_nothing_behind() -> None:
    # Leftovers of other tests must not be freed halfway through this one.
    gc.collect()
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    before = len(held_buffers())
    with SavedTensors(model) as saved, LiveBytes(model) as live:
        sizes = []
        for _ in range(50):
            loss = PackedRelu.apply(model(torch.randn(10, 16))).sum()
            loss.backward()
            model.zero_grad()
            del loss
            sizes.append((saved.nbytes, live.current, live.peak))
    assert len(set(sizes[1:])) <= 2  # the peak may still move by what a random number of kept values costs
    assert sizes[-1][0] == 0
    assert {current for _, current, _ in sizes} == {sum(p.nbytes for p in model.parameters())}
    assert len(held_buffers()) == before
    assert len(saved._saved) == 0


def test_meters_keep_nothing_alive() -> None:
    model, x = network(), torch.randn(10, 16)
    with SavedTensors(model) as saved, LiveBytes(model) as live:
        loss = model(x).sum()
    references = [weakref.ref(tensor) for tensor in (model[0].weight, x, loss)]
    del model, x, loss
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert saved.nbytes == 0
    assert live.current == 0


def test_announced_buffers_stay_known_without_a_python_reference() -> None:
    bits = GradientBits.of(torch.randn(80) > 0)
    known = set(held_buffers())
    alias = bits.bitmap.view(2, 5)  # the same storage, another Python object
    del bits
    gc.collect()
    assert set(held_buffers()) == known
    del alias
    assert len(held_buffers()) == len(known) - 1


def test_live_bytes_follow_a_step() -> None:
    x = torch.randn(1000)
    with LiveBytes(x) as live:
        assert live.current == live.peak == 4000
        y = x * 2
        z = y.view(10, 100).t() + 1
        assert live.current == 12000
        del y
        assert live.current == 8000
        assert live.peak == 12000
        live.reset_peak()
        assert live.peak == 8000
        packed = PackedTensor.pack(x.abs() + 1)
    assert live.current == 8000 + packed.nbytes
    assert live.peak >= live.current
    del z
    assert live.current == 4000 + packed.nbytes


def test_live_bytes_notice_a_resized_storage() -> None:
    with LiveBytes() as live:
        x = torch.ones(10)
        x.resize_(100)
    assert live.current == 400


def test_window_offsets_of_a_max_pooling_are_seen() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with SavedTensors(x) as saved:
        out = max_pool(x, kernel=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1))
    assert saved.nbytes == out.numel() // 4  # 2 bits per result
    out.sum().backward()
    assert saved.nbytes == 0
