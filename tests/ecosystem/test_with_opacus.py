"""opacus: validation, per-sample gradients, and noise on them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

opacus = pytest.importorskip("opacus")

from opacus import PrivacyEngine
from opacus.validators import ModuleValidator

from fedmef_fx import dense_state_dict, transform
from tests.ecosystem.networks import CONFIG, PACKED, check_sparse, image_net, images, loss_of, sparse_net


def _plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))


def test_the_validator_finds_no_batch_norm() -> None:
    assert ModuleValidator.validate(image_net().train())
    assert not ModuleValidator.validate(sparse_net().train())


def test_fixed_models_are_transformed() -> None:
    fixed = ModuleValidator.fix(image_net())  # GroupNorm in place of BatchNorm
    sparse = transform(fixed, CONFIG)
    assert ModuleValidator.is_valid(sparse.train())
    check_sparse(sparse, images()[0], expected_density=0.4)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [image_net, _plain], ids=["convolutions", "linear"])
def test_per_sample_gradients_by_hooks_are_refused_and_not_wrong(make: Any, *, strict: bool) -> None:
    """opacus takes layers apart that have buffers, as masks are, at no setting, and says so."""
    model = transform(make(), CONFIG.replace(activation_sparsity=0.0))
    with pytest.raises(NotImplementedError, match="buffers"):
        opacus.GradSampleModule(model, strict=strict)
    loader = DataLoader(TensorDataset(*images(16)), batch_size=4)
    with pytest.raises(NotImplementedError, match="buffers"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), 0.05),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_a_private_step_by_hand() -> None:
    """What opacus would do: the gradient of each sample, clipped, summed, with noise."""
    model, (x, y) = transform(_plain(), CONFIG.replace(activation_sparsity=0.0)), images(4)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.05)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for index in range(len(x)):
        optimizer.zero_grad()
        loss_of(model, x[index : index + 1], y[index : index + 1]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for kept, parameter in zip(total, parameters, strict=True):
            kept.add_(parameter.grad)
    for kept, parameter in zip(total, parameters, strict=True):
        parameter.grad = (kept + torch.randn_like(kept)) / len(x)
    optimizer.step()
    check_sparse(model, x, expected_density=0.4)


def test_a_frozen_model_has_per_sample_gradients() -> None:
    """Private fine-tuning of the plain model that a sparse one becomes."""
    sparse, (x, y) = transform(_plain(), CONFIG).eval(), images(4)
    plain = _plain()
    plain.load_state_dict(dense_state_dict(sparse))
    wrapped = opacus.GradSampleModule(plain, loss_reduction="sum")
    nn.functional.cross_entropy(wrapped(x), y, reduction="sum").backward()
    weight = plain.get_parameter("1.weight")
    torch.testing.assert_close(weight.grad_sample.sum(0), weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(wrapped(x), sparse(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_noise_on_gradients_by_hand(config: Any) -> None:
    model, (x, y) = sparse_net(config), images()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(torch.randn_like(parameter.grad), alpha=0.1)
        optimizer.step()
    check_sparse(model, x, expected_density=0.4)
