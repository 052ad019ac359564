"""SNIP, SynFlow and SSFL: which weights stay, by values computed by hand, and what travels before the first round."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import METHODS, LocalTraining, Server, Update, run
from fedmef_fx.federated.methods.snip import ConnectionSensitivity
from fedmef_fx.federated.methods.ssfl import AveragedSaliency
from fedmef_fx.federated.methods.synflow import SynapticFlow
from fedmef_fx.federated.opening import activate_all
from fedmef_fx.sparse_model.parameters import masked_parameters

FAST = LocalTraining(batch_size=8, learning_rate=0.02)
SAMPLE = torch.zeros(2)


def _linear(*weights: Sequence[Sequence[float]]) -> nn.Module:
    """Linear layers without biases of given weights, all active."""
    layers = [nn.Linear(len(rows[0]), len(rows), bias=False) for rows in weights]
    for layer, rows in zip(layers, weights, strict=True):
        layer.weight.data = torch.tensor(rows)
    original = nn.Sequential(*layers)
    model = fedmef_fx.transform(
        original, Config(density=0.5, normalization="keep", activation_sparsity=0.0, weight_storage="dense")
    )
    activate_all(model, original, method="test")
    return model


def _report(samples: int, **scores: Sequence[float]) -> Update:
    found = {name.replace("layer", "") + ".weight": torch.tensor(values) for name, values in scores.items()}
    return Update(round_index=0, samples=samples, loss=0.0, peak_saved_bytes=0, values={}, dense={}, scores=found)


def _active(masks: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.flatten().nonzero().squeeze(1).tolist() for name, mask in masks.items()}


def test_snip_keeps_what_the_common_loss_is_sensitive_to() -> None:
    model = _linear([[1.0, -2.0], [3.0, 0.5]])
    # Averages, weighted 1 : 3: [1, 0, -0.5, 4]; times w, absolute: [1, 0, 1.5, 2].
    updates = [_report(1, layer0=[1.0, 3.0, 4.0, 4.0]), _report(3, layer0=[1.0, -1.0, -2.0, 4.0])]
    found = ConnectionSensitivity().masks(model, updates, active=2, sample=SAMPLE)
    assert _active(found) == {"0.weight": [2, 3]}


def test_ssfl_averages_saliencies_that_do_not_cancel() -> None:
    model = _linear([[1.0, -2.0], [3.0, 0.5]])
    # Averages, weighted 1 : 3: [0.25, 3, 1, 0.75].
    updates = [_report(1, layer0=[1.0, 3.0, 4.0, 0.0]), _report(3, layer0=[0.0, 3.0, 0.0, 1.0])]
    found = AveragedSaliency().masks(model, updates, active=2, sample=SAMPLE)
    assert _active(found) == {"0.weight": [1, 2]}


def test_scores_of_all_layers_compete() -> None:
    model = _linear([[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0]])
    found = AveragedSaliency().masks(
        model, [_report(1, layer0=[1.0, 2.0, 3.0, 4.0], layer1=[9.0, 8.0])], active=3, sample=SAMPLE
    )
    assert _active(found) == {"0.weight": [3], "1.weight": [0, 1]}


def test_synaptic_flow_by_hand() -> None:
    # R = 5 (1 + 2) + 1 (3 + 4) = 22: scores of the first layer 5, 10, 3, 4, of the second 15, 7. Signs play no part.
    model = _linear([[1.0, -2.0], [3.0, 4.0]], [[-5.0, 1.0]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = SynapticFlow(steps=1).masks(model, [], active=3, sample=SAMPLE)
    assert _active(found) == {"0.weight": [1], "1.weight": [0, 1]}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_synaptic_flow_in_steps_cuts_through_no_layer() -> None:
    # In a single step the wide first layer, over whose many weights the flow is spread, would lose all of them.
    model = _linear([[0.1] * 8] * 8, [[1.0] * 8])
    one, many = (SynapticFlow(steps=s).masks(model, [], active=8, sample=torch.zeros(8)) for s in (1, 100))
    assert not one["0.weight"].any()
    assert many["0.weight"].any()
    assert many["1.weight"].any()


def test_synaptic_flow_needs_numbers_to_feed() -> None:
    with pytest.raises(ConfigError, match=r"synflow: got inputs of torch\.int64"):
        SynapticFlow().masks(_linear([[1.0]]), [], active=1, sample=torch.tensor([1]))


@pytest.mark.parametrize("method", ["snip", "ssfl", "synflow"])
def test_a_run_starts_with_the_original_weights_under_the_found_masks(
    method: str, network: nn.Module, clients: list[TensorDataset]
) -> None:
    config = Config(density=0.3, weight_storage="dense")
    history = run(network, clients, config, rounds=1, training=LocalTraining(learning_rate=1e-12), method=method)
    assert history.model is not None
    assert fedmef_fx.density(history.model) == pytest.approx(0.3, abs=1e-3)  # within one weight in total
    for name, parameter in masked_parameters(history.model).items():
        expected = network.get_parameter(name) * parameter.mask
        assert torch.allclose(parameter.dense(), expected, atol=1e-6)  # a rate of 1e-12 moves nothing


@pytest.mark.parametrize("method", ["snip", "ssfl", "synflow"])
def test_dense_reports_travel_once_or_never(method: str, network: nn.Module, clients: list[TensorDataset]) -> None:
    found = run(network, clients, Config(density=0.3, weight_storage="dense"), rounds=2, training=FAST, method=method)
    static = run(
        network, clients, Config(density=0.3, weight_storage="dense"), rounds=2, training=FAST, method="static-random"
    )
    assert found.model is not None
    weights = sum(parameter.numel for parameter in masked_parameters(found.model).values())
    extra = found.rounds[0].bytes_up - static.rounds[0].bytes_up
    if method == "synflow":
        assert extra == 0
    else:
        # Every one of the three clients sends 4 bytes a weight; headers of messages take well under 1 kB each.
        assert 0 <= extra - 3 * 4 * weights < 3 * 1000
        assert found.rounds[0].bytes_down - static.rounds[0].bytes_down > 3 * 4 * weights
    assert found.rounds[1].bytes_up == pytest.approx(static.rounds[1].bytes_up, abs=64)  # headers


def test_a_transformed_model_has_lost_what_an_opening_scores(network: nn.Module, clients: list[TensorDataset]) -> None:
    config = METHODS["snip"].configure(Config(density=0.3, weight_storage="dense"))
    with pytest.raises(ConfigError, match="method 'snip' scores all weights before the first round"):
        run(fedmef_fx.transform(network, config), clients, rounds=1, method="snip")


def test_an_opening_happens_once(network: nn.Module) -> None:
    model = fedmef_fx.transform(network, METHODS["synflow"].configure(Config(density=0.3, weight_storage="dense")))
    activate_all(model, network, method="synflow")
    server = Server(model, method=METHODS["synflow"], rounds=1)
    assert server.is_opening
    assert not server.asks_for_opening
    server.open({}, sample=torch.zeros(1, 4, 4))
    assert not server.is_opening
    with pytest.raises(ConfigError, match="one that is over"):
        server.open({}, sample=torch.zeros(1, 4, 4))
