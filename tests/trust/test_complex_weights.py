"""Complex weights stay dense, with the reason in coverage and report, and compute and train as in the original."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config, Extrusion, coverage, freeze, masks, report, set_masks, transform


class _Fourier(nn.Module):
    """A layer of a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(2, 8, 1)
        self.modes = nn.Parameter(torch.randn(8, 8, 5, dtype=torch.complex64) * 0.1)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, dtype=torch.complex64)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        spectrum = torch.einsum("bix,iox->box", torch.fft.rfft(x), self.modes)
        spectrum = torch.tanh(self.mix(spectrum))
        spectrum = (spectrum * spectrum.sigmoid()).pow(2)
        return self.head(F.gelu(torch.fft.irfft(spectrum, n=x.shape[-1]) + x).mean(-1))


class _Products(nn.Module):
    """Complex layers and products, and a complex weight made of two real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16, dtype=torch.complex64)
        self.real = nn.Parameter(torch.randn(16, 16) * 0.2)
        self.imaginary = nn.Parameter(torch.randn(16, 16) * 0.2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.to(torch.complex64))
        z = F.linear(z * 1.5, torch.complex(self.real, self.imaginary))
        return self.head((z @ z.mT @ z).tanh().abs())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "fourier": (_Fourier, (4, 2, 8), {"modes", "mix.weight"}),
    "products": (_Products, (4, 8), {"first.weight"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("has_example", [True, False])
def test_they_compute_and_train_as_in_the_original(case: str, *, has_example: bool) -> None:
    make, shape, _ = CASES[case]
    original, x = make(), torch.randn(shape)
    config = Config(density=1.0, normalization="keep", activation_sparsity=0.0)
    same = transform(original, config, example_inputs=(x,) if has_example else None)
    for model in (original, same):
        model(x).square().sum().backward()
    assert torch.equal(same(x), original(x))
    expected = {name: parameter.grad for name, parameter in original.named_parameters()}
    for name, parameter in same.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_they_stay_dense_and_the_coverage_says_why(case: str, storage: str, tmp_path: Path) -> None:
    make, shape, names = CASES[case]
    x = torch.randn(shape)
    config = Config(density=0.5, activation_sparsity=0.5, weight_storage=storage)  # type: ignore[arg-type]
    sparse = transform(make(), config, example_inputs=(x,))
    assert {row.name for row in coverage(sparse).rows if "complex" in row.reason} == names
    assert names <= {refusal.where for result in report(sparse) for refusal in result.refusals}
    assert not names & masks(sparse).keys()

    optimizer = torch.optim.Adam(sparse.parameters())
    set_masks(sparse, {name: mask.roll(1, 0) for name, mask in masks(sparse).items()})
    with Extrusion(sparse, optimizer, budget_steps=2):
        for _ in range(2):
            optimizer.zero_grad()
            sparse(x).square().sum().backward()
            optimizer.step()
    expected = sparse.eval()(x)
    torch.testing.assert_close(freeze(sparse)(x), expected)
    fedmef_fx.save(sparse, tmp_path / "model.safetensors")
    restored = fedmef_fx.load(tmp_path / "model.safetensors", make(), example_inputs=(x,))
    assert torch.equal(restored.eval()(x), expected)
