"""Channel and N:M masks in transformed models: coupling, silence, growth, extrusion, federations."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config, Extrusion, compact, compact_report, federated, growth_candidates, masks, set_masks
from fedmef_fx.federated import LocalTraining
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.training.adjustment import unit_sizes

CHANNEL = Config(
    granularity="channel",
    density=0.5,
    channel_multiple=2,
    allocation="uniform",
    activation_sparsity=0,
    seed=1,
    weight_storage="dense",
)


class Coupled(nn.Module):
    """A residual sum, an inverted residual and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.norm3 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu6(self.norm1(self.conv1(x)))
        y = F.relu6(self.norm2(self.depth(y)))
        x = F.relu(x + self.norm3(self.conv2(y)))
        return self.fc(x.mean((2, 3)))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 6, 6), torch.randint(4, (size,))


def rows(mask: Tensor) -> Tensor:
    flat = mask.flatten(1)
    assert (flat.all(1) | ~flat.any(1)).all()
    return flat.all(1)


@pytest.mark.parametrize("mask_init", ["random", "magnitude"])
def test_masks_are_whole_channels_the_same_where_layers_are_summed(mask_init: str) -> None:
    model = fedmef_fx.transform(Coupled(), CHANNEL.replace(mask_init=mask_init))
    found = masks(model)
    assert set(found) == {"stem.weight", "conv1.weight", "conv2.weight"}
    assert torch.equal(rows(found["stem.weight"]), rows(found["conv2.weight"]))
    assert {name: int(rows(mask).sum()) for name, mask in found.items()} == {
        "stem.weight": 4,
        "conv1.weight": 6,
        "conv2.weight": 4,
    }
    reasons = {refusal.where: refusal.reason for refusal in fedmef_fx.report(model)["insert-masks"].refusals}
    assert "outputs of the model" in reasons["fc.weight"]
    assert "depthwise" in reasons["depth.weight"]
    assert "stem.weight + conv2.weight: 4 of 8 channels" in str(fedmef_fx.report(model))


@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
def test_channels_that_are_off_stay_exactly_zero_and_are_removed(normalization: str) -> None:
    model = fedmef_fx.transform(Coupled(), CHANNEL.replace(normalization=normalization))
    model = copy.deepcopy(model)  # hooks have to survive it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
    off = ~rows(masks(model)["conv1.weight"])
    for name in ("norm1.bias", "norm2.bias"):
        assert not model.get_parameter(name)[off].any()
        assert model.get_parameter(name)[~off].all()
    small = compact(model, (torch.randn(2, 3, 6, 6),))
    shapes = {
        name: tuple(small.get_parameter(f"{name}.weight").shape[:2]) for name in ("stem", "conv1", "depth", "conv2")
    }
    assert shapes == {"stem": (4, 3), "conv1": (6, 4), "depth": (6, 1), "conv2": (4, 6)}
    assert compact_report(small).refusals == ()
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-6)  # float32, other sums


def test_growth_finds_channels_behind_relus_and_depthwise_convolutions() -> None:
    model = fedmef_fx.transform(Coupled(), CHANNEL)
    before = copy.deepcopy(model.state_dict())
    found = growth_candidates(model, loss_of, [batch(), batch()], k=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found["conv2.weight"].positions.numel() == 0  # stem.weight leads their group
    for name in ("stem.weight", "conv1.weight"):
        mask = masks(model)[name]
        row_size = mask[0].numel()
        assert found[name].positions.numel() == 2
        assert (found[name].positions % row_size == 0).all()
        assert not rows(mask)[found[name].positions // row_size].any()
        assert (found[name].values > 0).all()


def test_a_channel_that_grows_learns() -> None:
    model = fedmef_fx.transform(Coupled(), CHANNEL)
    off = ~rows(masks(model)["stem.weight"])
    channel = int(off.nonzero()[0])
    new = {name: mask.clone() for name, mask in masks(model).items()}
    for name in ("stem.weight", "conv2.weight"):
        new[name][channel] = True
    set_masks(model, new)
    assert not model.get_parameter("stem.weight")[channel].any()
    assert 0 < model.get_parameter("norm.bias")[channel].item() < 1e-20
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_of(model, batch()).backward()
    optimizer.step()
    assert model.get_parameter("stem.weight")[channel].any()
    new["stem.weight"][channel] = new["conv2.weight"][channel] = False
    set_masks(model, new)
    assert model.get_parameter("norm.bias")[channel].item() == 0.0


def test_extrusion_marks_all_weights_of_the_lowest_channels() -> None:
    model = fedmef_fx.transform(Coupled(), CHANNEL)
    with torch.no_grad():
        low = int(rows(masks(model)["stem.weight"]).nonzero()[1])
        model.get_parameter("stem.weight")[low] *= 1e-3
        model.get_parameter("conv2.weight")[low] *= 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Extrusion(model, optimizer, budget_steps=1, counts={"stem.weight": 1}) as extrusion:
        assert extrusion.marked["stem.weight"].tolist() == list(range(low * 27, low * 27 + 27))
        assert extrusion.marked["conv2.weight"].tolist() == list(range(low * 12, low * 12 + 12))
        assert extrusion.marked["conv1.weight"].numel() == 0


def test_loading_silences_too() -> None:
    model = fedmef_fx.transform(Coupled(), CHANNEL)
    original = Coupled()
    nn.init.ones_(original.norm.bias)
    model.load_state_dict(original.state_dict(), strict=False)
    assert torch.equal(model.get_parameter("norm.bias") != 0, rows(masks(model)["stem.weight"]))


def test_patterns_are_laid_out_along_inputs_and_refused_where_they_do_not_fit() -> None:
    model = fedmef_fx.transform(Coupled(), Config(granularity="2:4", activation_sparsity=0, weight_storage="dense"))
    found = masks(model)
    assert set(found) == {"conv1.weight", "conv2.weight", "fc.weight"}
    for mask in found.values():
        assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
    assert fedmef_fx.density(model) == 0.5
    assert "keep 0.5000 of their weights; Config.density is 0.1" in str(fedmef_fx.report(model)["insert-masks"])
    reasons = {refusal.where: refusal.reason for refusal in fedmef_fx.report(model)["insert-masks"].refusals}
    assert "no multiple of 4" in reasons["stem.weight"]
    candidates = growth_candidates(model, loss_of, [batch()], k=3)
    for name, gradient in candidates.items():
        assert gradient.positions.numel() == 3
        assert not torch.take(found[name], gradient.positions).any()


def test_opaque_layers_are_not_coupled_and_the_last_weight_may_be_a_classifier() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.rnn(x)
            return self.fc(out[:, -1]) if float(x.sum()) < 1e9 else out

    model = fedmef_fx.transform(Recurrent(), CHANNEL)
    reasons = {row.name: row.reason for row in fedmef_fx.coverage(model).rows}
    assert "coupled to no other" in reasons["rnn.weight_ih_l0"]
    assert "outputs of the model" in reasons["fc.weight"]


@pytest.fixture
def clients() -> list[TensorDataset]:
    return [TensorDataset(*batch(12)), TensorDataset(*batch(7))]


def whole_rows(mask: Tensor) -> Tensor:
    return rows(mask).sum()


def per_group(mask: Tensor) -> Tensor:
    return mask.movedim(1, -1).reshape(-1, 4).sum(1)


@pytest.mark.parametrize(
    ("granularity", "normalization", "budget"),
    [("channel", "nsconv", whole_rows), ("channel", "keep", whole_rows), ("2:4", "nsconv", per_group)],
)
def test_a_federation_adjusts_units_and_keeps_their_budget(
    granularity: str, normalization: str, budget: Callable[[Tensor], Tensor], clients: list[TensorDataset]
) -> None:
    config = CHANNEL.replace(
        granularity=granularity, normalization=normalization, adjustment_interval=1, gradient_clipping=0.05
    )
    start = masks(fedmef_fx.transform(Coupled(), config))
    history = federated.run(
        Coupled(), clients, config, rounds=3, training=LocalTraining(batch_size=4, learning_rate=0.05)
    )
    assert history.model is not None
    end = masks(history.model)
    assert all(torch.equal(budget(end[name]), budget(mask)) for name, mask in start.items())
    assert any(sum(record.churn.values()) for record in history.rounds)
    assert all(int(mask.sum()) == int(start[name].sum()) for name, mask in end.items())
    if granularity == "channel":
        assert torch.equal(rows(end["stem.weight"]), rows(end["conv2.weight"]))
        x = torch.randn(3, 3, 6, 6)
        small = compact(history.model, (x,))
        assert small.get_parameter("conv1.weight").shape[:2] == (6, 4)


def test_sizes_are_counted_in_units() -> None:
    model = fedmef_fx.transform(Coupled(), CHANNEL)
    assert unit_sizes(model) == {"stem.weight": (4, 4), "conv1.weight": (6, 6), "conv2.weight": (0, 0)}
    assert list(masked_parameters(model)) == list(unit_sizes(model))
