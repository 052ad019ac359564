"""NSConv kernels by Triton, on a GPU or in its interpreter: what torch's operations compute."""

import pytest
import torch

from fedmef_fx.ops import nsconv
from fedmef_fx.ops.nsconv import KernelForm, nsconv_kernel, nsconv_kernel_backward, nsconv_weight

# Triton's interpreter makes numbers of NumPy's arrays of one element, which NumPy warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 3, 3, 3), (4, 1, 5, 5), (3, 1500), (2, 4096), (1, 1)]


@pytest.fixture
def kernels(monkeypatch):
    """Kernels for whatever rows `nsconv` asks for; the list counts the calls."""
    pytest.importorskip("triton")
    from fedmef_fx.ops import triton_rows  # noqa: PLC0415  # imports Triton

    calls = []

    def on_gpu(rows, values):
        calls.append(rows)
        return triton_rows

    monkeypatch.setattr(nsconv, "_on_gpu", on_gpu)
    return calls


def sample(shape):
    """A kernel with an empty row, a row of one weight, and one whose weights are all equal."""
    weight, mask = torch.randn(shape) + 0.3, torch.rand(shape) < 0.4
    rows, active = weight.view(shape[0], -1), mask.view(shape[0], -1)
    if shape[0] >= 3:
        active[0] = False
        active[1] = False
        active[1, -1] = True
        rows[2] = 0.25
    return weight * mask, mask, torch.rand(shape[0]) + 0.5, torch.randn(shape)


@pytest.mark.parametrize("statistics", ["active", "all"])
@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_and_gradients(kernels, monkeypatch, shape, has_mask, statistics):
    weight, mask, gain, grad = sample(shape)
    form = KernelForm(g=1.7, statistics=statistics)
    mask = mask if has_mask else None
    moved = [None if part is None else part.to(DEVICE) for part in (weight, gain, mask)]
    made = nsconv_kernel(*moved, form)
    got = nsconv_kernel_backward(*moved, form, grad.to(DEVICE))
    assert len(kernels) == 4  # statistics twice
    monkeypatch.undo()
    torch.testing.assert_close(made.cpu(), nsconv_kernel(weight, gain, mask, form), rtol=1e-5, atol=1e-6)
    expected = nsconv_kernel_backward(weight, gain, mask, form, grad)
    scale = max(float(part.abs().max()) for part in expected)
    for result, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(result.cpu(), reference, rtol=1e-4, atol=1e-5 * scale)


def test_transposed_kernels(kernels, monkeypatch):
    weight, gain = torch.randn(4, 3, 2, 2), torch.ones(6)
    form = KernelForm(groups=2, transposed=True)
    made = nsconv_weight(weight.to(DEVICE), gain.to(DEVICE), groups=2, transposed=True)
    monkeypatch.undo()
    torch.testing.assert_close(made.cpu(), nsconv_kernel(weight, gain, None, form), rtol=1e-5, atol=1e-6)


def test_operations_of_torch_take_the_rest():
    rows = nsconv.DenseRows(None, 3)
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float64})()
    assert nsconv._on_gpu(rows, on_gpu) is None
    assert nsconv._on_gpu(rows, torch.randn(2, 3)) is None
