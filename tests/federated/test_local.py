"""Local training: reproducible, sparse at every moment, extruding when asked to and only then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

import fedmef_fx
from fedmef_fx.errors import ConfigError, DataError
from fedmef_fx.federated import LocalTraining, RoundTask, Update, train_locally
from fedmef_fx.federated.batches import batch_indices, fetch
from fedmef_fx.federated.objective import Objective
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.sparse_model.effective import effective_parameters
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparsity.schedule import adjustment_count
from fedmef_fx.training.adjustment import lowest_units

PLAIN = RoundTask(0, 10)


def _adjusting(model: nn.Module, *, rate: float = 0.4) -> RoundTask:
    counts = {
        name: adjustment_count(int(mask.sum()), int((~mask).sum()), round_index=0, stop=1, rate=rate)
        for name, (_, mask) in masked_parameters(model).items()
    }
    return RoundTask(1, 10, counts)


def _assert_same(left: Update, right: Update) -> None:
    assert left.loss == right.loss
    for a, b in ((left.values, right.values), (left.dense, right.dense)):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert left.gradients.keys() == right.gradients.keys()
    for name, gradient in left.gradients.items():
        assert torch.equal(gradient.positions, right.gradients[name].positions)
        assert torch.equal(gradient.values, right.gradients[name].values)


def test_the_result_depends_on_nothing_else(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    fresh, used = sparse(), sparse()
    start = {name: value.clone() for name, value in used.state_dict().items()}
    # Other data, another random state and thresholds estimated elsewhere must leave no trace.
    train_locally(used, clients[1], LocalTraining(epochs=2), task=PLAIN)
    used.load_state_dict(start)
    used.eval()
    task = _adjusting(fresh)
    expected = train_locally(fresh, clients[0], LocalTraining(), task=task)
    torch.manual_seed(123)
    _assert_same(train_locally(used, clients[0], LocalTraining(), task=task), expected)


def test_torchs_random_state_is_left_alone(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    model = sparse()
    before = torch.get_rng_state()
    train_locally(model, clients[0], LocalTraining(), task=_adjusting(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_clients_and_rounds_have_batches_of_their_own(
    sparse: Callable[..., nn.Module], clients: list[TensorDataset]
) -> None:
    options = LocalTraining(batch_size=4)
    losses = {
        train_locally(sparse(), clients[0], options, task=RoundTask(round_index, 10), client=client).loss
        for round_index in range(2)
        for client in range(2)
    }
    assert len(losses) == 4


def test_training_lowers_the_loss(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    model = sparse()
    losses = [train_locally(model, clients[0], LocalTraining(epochs=4), task=PLAIN).loss for _ in range(4)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_masked_weights_stay_zero_under_momentum_and_decay(
    optimizer: Any, sparse: Callable[..., nn.Module], clients: list[TensorDataset]
) -> None:
    model = sparse(density=0.2, gradient_clipping=0.1)
    options = LocalTraining(
        epochs=3, batch_size=4, optimizer=optimizer, learning_rate=0.02, momentum=0.95, weight_decay=0.1
    )
    train_locally(model, clients[0], options, task=_adjusting(model))
    for parameter, mask in masked_parameters(model).values():
        assert bool((parameter.detach()[~mask] == 0).all())
        assert bool((parameter.detach()[mask] != 0).any())


def _low_norm(model: nn.Module, marked: dict[str, Tensor]) -> float:
    parameters = effective_parameters(model)
    return float(torch.cat([torch.take(parameters[name].dense(), at) for name, at in marked.items()]).norm())


@pytest.mark.parametrize("density", [0.1, 0.3])
def test_extrusion_empties_the_marked_weights_in_adjustment_rounds(
    density: float, sparse: Callable[..., nn.Module], clients: list[TensorDataset]
) -> None:
    norms = {}
    for strength in (0.0, 2.0):
        model = sparse(density=density, extrusion_strength=strength)
        task = _adjusting(model)
        marked = lowest_units(model, effective_parameters(model), task.counts.__getitem__)
        # All of them are active weights: marking masked zeros would make extrusion a no-op at low densities.
        before = _low_norm(model, marked)
        assert before > 0
        train_locally(model, clients[0], LocalTraining(epochs=6, batch_size=8, learning_rate=0.02), task=task)
        norms[strength] = _low_norm(model, marked)
    assert norms[2.0] < 0.5 * norms[0.0]


def test_there_is_no_extrusion_in_other_rounds(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    updates = [
        train_locally(sparse(extrusion_strength=strength), clients[0], LocalTraining(), task=PLAIN)
        for strength in (0.0, 5.0)
    ]
    _assert_same(*updates)


def test_candidates_are_few_inactive_and_only_sent_when_asked_for(
    sparse: Callable[..., nn.Module], clients: list[TensorDataset]
) -> None:
    assert train_locally(sparse(), clients[0], LocalTraining(), task=PLAIN).gradients == {}
    model = sparse()
    task = _adjusting(model)
    masks = fedmef_fx.masks(model)
    for growth_batches in (None, 1):
        options = LocalTraining(batch_size=8, growth_batches=growth_batches)
        update = train_locally(model, clients[0], options, task=task)
        assert update.gradients.keys() == masks.keys()
        for name, gradient in update.gradients.items():
            assert 0 < gradient.positions.numel() <= task.counts[name]
            assert not bool(torch.take(masks[name], gradient.positions).any())


@pytest.mark.parametrize(
    ("options", "looked_at"),
    [({}, 1), ({"growth_batches": 3}, 3), ({"growth_batches": 99}, 5), ({"growth_batches": None}, 5)],
)
def test_adjustments_look_at_one_batch_unless_told_otherwise(
    sparse: Callable[..., nn.Module], options: dict[str, Any], looked_at: int
) -> None:
    data = _Counting()
    model = sparse()
    train_locally(model, data, LocalTraining(epochs=3, batch_size=4, **options), task=_adjusting(model))
    assert data.count - 20 * 3 == 4 * looked_at


class _InWholeBatches(Objective):
    """The default, in a class of its own: what its loss does with samples is not known."""


def test_half_batches_find_the_candidates_of_whole_ones(
    sparse: Callable[..., nn.Module], clients: list[TensorDataset]
) -> None:
    data = TensorDataset(clients[0].tensors[0].double(), clients[0].tensors[1])
    found = []
    for objective in (_InWholeBatches(), Objective()):
        model = sparse(activation_sparsity=0.0).double()
        options = LocalTraining(batch_size=7, growth_batches=None)
        update = train_locally(model, data, options, task=_adjusting(model), loss_fn=objective)
        found.append(update.gradients)
    for name, whole in found[0].items():
        assert torch.equal(found[1][name].positions, whole.positions)
        assert torch.allclose(found[1][name].values, whole.values, rtol=1e-9, atol=1e-12)


def _with_a_scalar(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch of which not all tensors have a row per sample."""
    images, labels = zip(*items, strict=True)
    return {"input": torch.stack(images), "labels": torch.stack(labels), "temperature": torch.tensor(1.0)}


def test_batches_that_have_no_parts_are_looked_at_whole(
    sparse: Callable[..., nn.Module], clients: list[TensorDataset]
) -> None:
    model = sparse()
    options = LocalTraining(batch_size=8, growth_batches=None)
    update = train_locally(model, clients[0], options, task=_adjusting(model), collate=_with_a_scalar)
    assert all(gradient.positions.numel() for gradient in update.gradients.values())


def test_an_adjustment_takes_little_more_than_training() -> None:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    data = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))
    model = fedmef_fx.transform(network, fedmef_fx.Config(density=0.1))
    peaks = []
    for task in (PLAIN, _adjusting(model)):
        with LiveBytes(model) as live:
            train_locally(model, data, LocalTraining(batch_size=16), task=task)
        peaks.append(live.peak)
    assert peaks[1] < 1.05 * peaks[0]


def test_saved_bytes_are_measured(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    lean, dense = (
        train_locally(sparse(activation_sparsity=gamma), clients[0], LocalTraining(), task=PLAIN).peak_saved_bytes
        for gamma in (0.9, 0.0)
    )
    assert 0 < lean < 0.5 * dense


def test_a_single_sample_is_enough(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    model = sparse()
    update = train_locally(model, Subset(clients[0], [3]), LocalTraining(epochs=2), task=_adjusting(model))
    assert update.samples == 1


def test_a_single_sample_without_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    data = TensorDataset(torch.randn(1, 2), torch.tensor([1]))
    kept = fedmef_fx.transform(model, fedmef_fx.Config(normalization="keep", weight_storage="dense"))
    with pytest.raises(ConfigError, match=r'client 7: got a batch of a single sample.*normalization="nsconv"'):
        train_locally(kept, data, LocalTraining(), task=PLAIN, client=7)
    train_locally(
        fedmef_fx.transform(model, fedmef_fx.Config(density=0.5, weight_storage="dense")),
        data,
        LocalTraining(),
        task=PLAIN,
    )


def test_a_last_single_sample_joins_the_batch_before() -> None:
    sizes = {n: [len(part) for part in batch_indices(torch.arange(n), 4)] for n in (1, 4, 5, 6, 9)}
    assert sizes == {1: [1], 4: [4], 5: [5], 6: [4, 2], 9: [4, 5]}
    assert [len(part) for part in batch_indices(torch.arange(3), 1)] == [1, 1, 1]


def test_no_samples(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    with pytest.raises(ConfigError, match="client 4: got a data set without samples"):
        train_locally(sparse(), Subset(clients[0], []), LocalTraining(), task=PLAIN, client=4)


def test_divergence_is_named(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    options = LocalTraining(learning_rate=1e30, epochs=3, batch_size=4)
    with pytest.raises(ConfigError, match=r"client 2, round 0: the loss became .*: training has diverged"):
        train_locally(sparse(), clients[0], options, task=PLAIN, client=2)


def test_clipping_bounds_the_steps(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    moved = {}
    for clipping in (None, 1e-4):
        model = sparse(gradient_clipping=clipping)
        before = model.get_parameter("conv2.weight").detach().clone()
        train_locally(model, clients[0], LocalTraining(), task=PLAIN)
        moved[clipping] = float((model.get_parameter("conv2.weight").detach() - before).norm())
    assert 0 < moved[1e-4] < 0.01 * moved[None]


def test_schedules_decay_the_rate(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    assert LocalTraining(learning_rate=0.4).learning_rate_in(RoundTask(5, 10)) == 0.4
    decaying = LocalTraining(learning_rate=0.4, round_schedule="cosine")
    rates = [decaying.learning_rate_in(RoundTask(round_index, 10)) for round_index in (0, 5, 9)]
    assert rates == pytest.approx([0.4, 0.2, 0.4 * 0.024471741852423234])  # (1 + cos(0.9 pi)) / 2
    results = [
        train_locally(sparse(), clients[0], LocalTraining(batch_size=4, schedule=schedule), task=PLAIN)
        for schedule in ("constant", "cosine")
    ]
    assert results[0].loss != results[1].loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: got 0; expected an integer >= 1"),
        ({"epochs": 1.0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0; expected a number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"optimizer": "lion"}, "'sgd' | 'adam'"),
        ({"schedule": "step"}, "'constant' | 'cosine'"),
        ({"growth_batches": 0}, "growth_batches"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        LocalTraining(**options)


class _Counting(Dataset[Any]):
    """Twenty samples, and how often one was read."""

    count = 0

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.count += 1
        return torch.full((1, 4, 4), float(index)), torch.tensor(index % 3)


class _Pairs(Dataset[Any]):
    def __init__(self, source: TensorDataset) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        image, label = self.source[index]
        return image, int(label)


def test_any_map_style_data_set_gives_the_same_batches(clients: list[TensorDataset]) -> None:
    chosen = torch.tensor([5, 0, 3])
    expected = clients[0][chosen]
    nested = Subset(Subset(clients[0], list(range(10))), [9, 5, 0, 3])
    for found in (fetch(clients[0], chosen), fetch(_Pairs(clients[0]), chosen), fetch(nested, torch.tensor([1, 2, 3]))):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_items_that_are_no_tensors() -> None:
    with pytest.raises(DataError, match=r"e\.g\. \(input, target\)"):
        fetch(_Texts(), torch.tensor([0]))


class _Texts(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        return "text"


def test_micro_batches_train_as_whole_batches_do(
    sparse: Callable[..., nn.Module], clients: list[TensorDataset]
) -> None:
    data = TensorDataset(clients[0].tensors[0].double(), clients[0].tensors[1])
    whole, parts = (
        train_locally(
            sparse(activation_sparsity=0.0, micro_batch=size).double(),
            data,
            LocalTraining(batch_size=16),
            task=PLAIN,
        )
        for size in (None, 5)
    )
    assert parts.loss == pytest.approx(whole.loss, rel=1e-9)
    for name, values in whole.values.items():
        # Only the order of additions differs.
        assert torch.allclose(parts.values[name], values, rtol=1e-9, atol=1e-12)
    assert parts.peak_saved_bytes < 0.5 * whole.peak_saved_bytes


def test_micro_batches_need_a_model_without_batch_statistics(clients: list[TensorDataset]) -> None:
    config = fedmef_fx.Config(normalization="keep", micro_batch=4, weight_storage="dense")
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(ConfigError, match="statistics of the batch"):
        train_locally(fedmef_fx.transform(network, config), clients[0], LocalTraining(), task=PLAIN)
