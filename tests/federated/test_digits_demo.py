"""The demonstration does what the README says of it."""

import pytest
import torch

import fedmef_fx
from fedmef_fx.federated import RoundRecord
from fedmef_fx.federated.demo import demo_settings, run_demo


def test_the_settings_are_those_of_the_readme() -> None:
    settings = demo_settings(seed=5)
    assert (settings.clients, settings.alpha) == (10, 0.5)
    assert (settings.config.density, settings.config.activation_sparsity, settings.config.seed) == (0.1, 0.9, 5)


@pytest.mark.slow
def test_the_demo_learns_the_digits() -> None:
    seen: list[RoundRecord] = []
    threads = torch.get_num_threads()
    result = run_demo(progress=seen.append)
    assert len(seen) == result.settings.rounds
    assert result.history.test_accuracy is not None
    assert result.history.test_accuracy >= 0.95
    assert fedmef_fx.density(result.model) == pytest.approx(0.1, abs=1e-4)
    assert torch.get_num_threads() == threads
    images, labels = result.test.tensors
    with torch.no_grad():
        accuracy = float((result.model(images).argmax(1) == labels).float().mean())
    assert accuracy == pytest.approx(result.history.test_accuracy, abs=1e-3)  # sums in another order
