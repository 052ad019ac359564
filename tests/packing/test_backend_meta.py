"""Without values, packing gives buffers of the sizes that it gives with values."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing import GradientBits, PackedTensor, clamp
from fedmef_fx.packing.layout import has_no_values, is_same_memory


@pytest.fixture(params=["meta", "fake"])
def x(request: pytest.FixtureRequest) -> Iterator[Tensor]:
    real = torch.randn(3, 5, 7)
    if request.param == "meta":
        yield real.to("meta")
        return
    with FakeTensorMode() as mode:
        yield mode.from_tensor(real)


def test_sizes_of_what_is_packed(x: Tensor) -> None:
    packed = PackedTensor.predicted(x, kept=0.25)
    assert packed.values.numel() == 26  # a quarter of 105, rounded
    assert packed.bitmap.numel() == 14
    assert packed.nbytes == 26 * 4 + 14
    assert packed.unpack().shape == x.shape
    assert packed.device == x.device
    assert PackedTensor.pack(x, threshold=1.0).values.numel() == 105, "what is kept is not known: all of it"


def test_sizes_of_what_is_clamped(x: Tensor) -> None:
    out, bits = clamp(x)
    assert (out.shape, bits.nbytes) == (x.shape, 14)
    assert bits.apply(x).shape == x.shape
    again, same = clamp(x, inplace=True)
    assert is_same_memory(again, x)
    assert same.nbytes == 14


def test_bits_of_booleans(x: Tensor) -> None:
    bits = GradientBits.of(x > 0)
    assert bits.nbytes == 14
    assert has_no_values(bits.bitmap)


def test_what_cannot_be_packed_is_refused_without_values_as_well() -> None:
    with pytest.raises(ConfigError, match="int64"):
        PackedTensor.pack(torch.ones(3, dtype=torch.int64, device="meta"))


def test_same_memory() -> None:
    x = torch.randn(4, 4)
    assert is_same_memory(x, x.view(16))
    assert not is_same_memory(x, x[1:])
    assert not is_same_memory(x, x.clone())
    assert not has_no_values(x)
