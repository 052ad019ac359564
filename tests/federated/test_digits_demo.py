"""The demonstration does what the README says of it; `tests/cli` runs the whole of it."""

import dataclasses

import pytest
import torch

import fedmef_fx
from fedmef_fx.federated import RoundRecord
from fedmef_fx.federated import demo as demo_module
from fedmef_fx.federated.demo import demo_settings, run_demo


def test_the_settings_are_those_of_the_readme() -> None:
    settings = demo_settings(seed=5)
    assert (settings.clients, settings.alpha) == (10, 0.5)
    assert (settings.config.density, settings.config.activation_sparsity, settings.config.seed) == (0.1, 0.9, 5)


def test_two_federations_with_the_same_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(demo_settings(seed=3), rounds=1, clients=4)
    monkeypatch.setattr(demo_module, "demo_settings", lambda *, seed: short)
    seen: list[RoundRecord] = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    result = run_demo(seed=3, progress=seen.append)
    assert seen == [*result.history.rounds, *result.dense.rounds]
    assert seen[0].clients == seen[1].clients
    assert result.dense.bytes_up > result.history.bytes_up
    assert fedmef_fx.density(result.model) == pytest.approx(0.1, abs=1e-4)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    images, labels = result.test.tensors
    with torch.no_grad():
        accuracy = float((result.model(images).argmax(1) == labels).float().mean())
    assert accuracy == pytest.approx(result.history.test_accuracy, abs=3e-3)  # sums in another order
