"""A batch that is decoded a few samples at a time has the bits of one that is decoded whole."""

import math

import pytest
import torch

from fedmef_fx.packing import BlockCode, BlockwiseTensor, PackedTensor, RectifiedTensor, clamp
from fedmef_fx.packing.sample_parts import KeptSamples, samples_of, samples_together

SHAPE = torch.Size((9, 32, 32, 32))


def kept_tensors(x):
    """The same batch in each form that can be decoded in parts."""
    code = BlockCode(bits=2)
    out, bits = clamp(x)
    yield BlockwiseTensor.encode(x, code, key=1)
    yield RectifiedTensor.encode(out, bits, code, key=1)
    out, bits = clamp(x, high=1.0)
    yield RectifiedTensor.encode(out, bits, code, high=1.0, key=1)
    out, bits = clamp(x, high=3.5)  # few elements at the bound: positions
    yield RectifiedTensor.encode(out, bits, code, high=3.5, key=1)
    yield PackedTensor.pack(x, threshold=0.5)
    yield PackedTensor.pack(x, threshold=0.5).coded(code, key=1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("multiple", [1, 2])
def test_parts_are_those_of_the_whole(memory_format, multiple):
    x = torch.randn(SHAPE).to(memory_format=memory_format)
    for kept in kept_tensors(x):
        samples = KeptSamples(kept, SHAPE, torch.float32)
        places, parts = zip(*samples.parts(multiple=multiple), strict=True)
        assert torch.equal(torch.cat(parts), samples.whole())
        assert len(places) > 1
        assert all(place.start % multiple == 0 for place in places)
        assert all(part.stride() == x.stride() for part in parts)


def test_what_cannot_be_cut_is_one_part():
    x = torch.randn(SHAPE)
    x[3, 0, 0, 0] = math.nan  # its place is counted from the start of the tensor
    exceptional = BlockwiseTensor.encode(x, BlockCode(bits=2), key=1)
    turned = BlockwiseTensor.encode(torch.randn(32, 32, 32, 9).permute(3, 0, 1, 2), BlockCode(bits=2), key=1)
    for kept in (exceptional, turned):
        ((place, part),) = KeptSamples(kept, SHAPE, torch.float32).parts()
        assert place == slice(None)
        assert torch.equal(part.nan_to_num(7.0), kept.unpack().nan_to_num(7.0))


def test_a_tensor_and_a_small_batch_are_one_part():
    x = torch.randn(4, 8)
    assert [place for place, _ in samples_of(x)] == [slice(None)]
    assert [len(part) for _, part in samples_of(KeptSamples(PackedTensor.pack(x), x.shape, x.dtype))] == [4]


def test_the_number_of_samples_in_a_part():
    assert samples_together(torch.Size((0, 5))) == 0
    assert samples_together(torch.Size((64, 1 << 14))) == 4
    assert samples_together(torch.Size((64, 1 << 14)), multiple=3) == 6
    assert samples_together(torch.Size((64, 1 << 14)), least=1 << 18) == 16
    assert samples_together(torch.Size((2, 1 << 20)), multiple=4) == 2
