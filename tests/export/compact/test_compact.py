"""Compaction on every structure that channels are followed through.

Models run in float64, where what is removed changes the order of sums by 1e-14: a tolerance of 1e-10 leaves room for
depth and none for a channel that was not dead.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import compact, compact_report
from tests.export.compact.compact_models import DEAD, Residual, check, kill, lively


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_all_dimensions_lose_outputs_and_the_next_ones_inputs(dims: int) -> None:
    conv, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
    model = lively(nn.Sequential(conv(2, 8, 3, padding=1), norm(8), nn.ReLU(), pool(2), conv(8, 6, 3, padding=1)))
    kill(model[1])
    check(
        model, (2, *(6,) * dims), {"0.weight": (5, 2, *(3,) * dims), "1.weight": (5,), "4.weight": (6, 5, *(3,) * dims)}
    )


def test_transposed_convolutions() -> None:
    model = lively(nn.Sequential(nn.ConvTranspose2d(3, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)))
    kill(model[0])
    check(model, (3, 4, 4), {"0.weight": (3, 5, 3, 3), "2.weight": (5, 4, 2, 2)})


def test_depthwise_convolutions_follow_their_input_and_silence_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 4, 1)
    )
    kill(lively(model)[2])  # the first convolution is alive: nothing reads what it makes
    result = check(model, (3, 5, 5), {"0.weight": (5, 3, 1, 1), "2.weight": (5, 1, 3, 3), "4.weight": (4, 5, 1, 1)})
    assert compact_report(result).refusals == ()


def test_a_depthwise_multiplier_removes_all_outputs_of_an_input_or_none() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)))
    kill(model[1], channels=[2, 3, 4])
    check(model, (3, 5, 5), {"0.weight": (3, 3, 1, 1), "1.weight": (6, 1, 3, 3), "2.weight": (2, 6, 1, 1)})


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolutions_lose_whole_groups(transposed: bool) -> None:
    middle = (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 12, 3, groups=4)
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.ReLU(), nn.Conv2d(12, 2, 1)))
    with torch.no_grad():
        model[3].weight[:, [3, 4, 5, 7]] = 0.0  # all of group 1, one output of group 2
    shape = (6, 3, 3, 3) if transposed else (9, 2, 3, 3)
    check(model, (3, 5, 5), {"0.weight": (6, 3, 1, 1), "1.weight": shape, "3.weight": (2, 9, 1, 1)})


def test_dead_chains_go_backwards_and_forwards() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))
    with torch.no_grad():
        model[4].weight[:, DEAD] = 0.0  # so those rows of [2] are not needed, and where only they read [0] ...
        model[2].weight[:, 0] = 0.0
        model[2].weight[1, 0] = 1.0  # ... neither is that
    check(model, (4,), {"0.weight": (7, 4), "2.weight": (5, 7), "4.weight": (3, 5)})


def test_a_residual_sum_removes_what_both_sides_lack() -> None:
    model = lively(Residual())
    kill(model.stem, model.conv2)
    kill(model.conv1, channels=[0])
    check(model, (3, 6, 6), {"stem.weight": (5, 3, 3, 3), "conv1.weight": (7, 5, 3, 3), "conv2.weight": (5, 7, 3, 3)})


def test_one_dead_side_of_a_residual_sum_stays_with_its_reason() -> None:
    model = lively(Residual())
    kill(model.conv2)
    result = check(model, (3, 6, 6), {"stem.weight": (8, 3, 3, 3), "conv2.weight": (8, 8, 3, 3)})
    ((where, why),) = compact_report(result).refusals
    assert where == "conv2.weight"
    assert why.startswith("3 dead channels stay: ")


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 1)
        self.wide = nn.Conv2d(14, 8, 1)
        self.gate = nn.Linear(8, 8)
        self.fc = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), self.right(x)], dim=1)
        x = F.silu(self.wide(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        first, second = x.chunk(2, dim=1)
        x = torch.cat([second, first], 1)
        return self.fc(F.adaptive_avg_pool2d(x, 2).view(x.size(0), -1))


def test_concatenation_gates_chunks_and_flattening() -> None:
    model = lively(Branches())
    kill(model.left)
    kill(model.wide)
    kill(model.right, channels=[0])
    expected = {"left.weight": (5, 3, 1, 1), "right.weight": (5, 3, 1, 1), "wide.weight": (8, 10, 1, 1)}
    # The mean keeps its input's channels only if gate could not tell; gate has weights for them, and they are 0.
    result = compact(model, (torch.randn(2, 3, 4, 4).double(),))
    assert {name: tuple(result.get_parameter(name).shape) for name in expected} == {
        **expected,
        "wide.weight": (5, 10, 1, 1),
    }
    x = torch.randn(4, 3, 4, 4).double()
    torch.testing.assert_close(result(x), model(x), rtol=1e-10, atol=1e-10)
    assert tuple(result.get_parameter("fc.weight").shape) == (5, 20)
    assert tuple(result.get_parameter("gate.weight").shape) == (5, 5)


class Attention(nn.Module):
    """Two layers of heads; `fused` makes q, k and v with one layer, as in ViT."""

    def __init__(self, *, fused: bool, sdpa: bool) -> None:
        super().__init__()
        self.fused, self.sdpa, self.heads = fused, sdpa, 4
        if fused:
            self.qkv = nn.Linear(12, 48)
        else:
            self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.proj = nn.Linear(16, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).view(b, n, self.heads, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("sdpa", [False, True])
def test_heads_whose_values_are_zero_go(sdpa: bool) -> None:
    model = lively(Attention(fused=False, sdpa=sdpa))
    kill(model.v, channels=[4, 5, 6, 7, 9])  # head 1 and a part of head 2
    expected = {f"{name}.weight": (12, 12) for name in "qkv"}
    check(model, (5, 12), {**expected, "proj.weight": (12, 12)})


@pytest.mark.parametrize("sdpa", [False, True])
def test_heads_that_the_projection_ignores_go(sdpa: bool) -> None:
    model = lively(Attention(fused=True, sdpa=sdpa))
    with torch.no_grad():
        model.proj.weight[:, 8:] = 0.0
    check(model, (5, 12), {"qkv.weight": (24, 12), "proj.weight": (12, 8)})


def test_heads_whose_queries_and_keys_are_zero_take_a_mean_and_stay() -> None:
    model = lively(Attention(fused=False, sdpa=True))
    kill(model.q, model.k, channels=[4, 5, 6, 7])
    result = check(model, (5, 12), {"q.weight": (16, 12), "v.weight": (16, 12)})
    assert {where for where, _ in compact_report(result).refusals} == {"q.weight", "k.weight"}


def test_a_constant_goes_into_the_bias_of_a_layer_without_padding() -> None:
    model = lively(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, bias=False),
            nn.Flatten(),
            nn.Linear(16, 8),
            nn.Sigmoid(),
            nn.Linear(8, 2),
        )
    )
    kill(model[0], bias=0.7)
    kill(model[4], bias=-0.3)  # sigmoid makes another constant of it
    result = check(model, (3, 6, 6), {"0.weight": (5, 3, 3, 3), "2.weight": (4, 5, 3, 3), "6.weight": (2, 5)})
    assert result.get_parameter("2.bias").shape == (4,)


def test_a_constant_before_padding_differs_at_the_border_and_stays() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)))
    kill(model[0], bias=0.7)
    result = check(model, (3, 6, 6), {"0.weight": (8, 3, 3, 3)})
    assert "3 dead channels stay" in str(compact_report(result))
    kill(model[0], bias=-0.7)  # which ReLU makes 0
    check(model, (3, 6, 6), {"0.weight": (5, 3, 3, 3)})


def test_a_file_of_the_compacted_model_is_smaller_and_the_same(tmp_path: Path) -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()))
    kill(model[0], channels=list(range(12)))
    model.float()
    x = torch.randn(2, 3, 8, 8)
    full = fedmef_fx.export_onnx(model, tmp_path / "full.onnx", example_inputs=(x,), verify=False)
    small = fedmef_fx.export_onnx(model, tmp_path / "small.onnx", example_inputs=(x,), compact=True)
    assert small.bytes < 0.5 * full.bytes
    assert small.parity is not None
    assert small.parity.max_abs < 1e-5  # float32 in two runtimes
