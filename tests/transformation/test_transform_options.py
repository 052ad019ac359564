"""What `transform` is told: density, allocation, initial masks, modules to ignore; and masks that change later."""

import pytest
import torch
from torch import nn

import fedmef_fx
from fedmef_fx import Config, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.sparse_model.parameters import masked_parameters
from tests.models import Residual, Tied, build
from tests.transform_checks import OPTIMIZERS, SPARSE, assert_masked_weights_are_zero, loss_of


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("allocation", ["erk", "uniform"])
def test_density_is_exact_to_one_weight(density, allocation):
    sparse = transform(Residual(), Config(density=density, allocation=allocation, weight_storage="dense"))
    parameters = masked_parameters(sparse).values()
    total = sum(parameter.mask.numel() for parameter in parameters)
    assert abs(sum(int(parameter.mask.sum()) for parameter in parameters) - density * total) <= 1
    assert fedmef_fx.density(sparse) == pytest.approx(density, abs=1 / total)


def test_density_one_prunes_nothing_and_inserts_no_masks():
    sparse = transform(Residual(), Config(density=1.0, weight_storage="dense"))
    assert fedmef_fx.masks(sparse) == {}
    assert fedmef_fx.density(sparse) == 1.0
    assert not any(key.endswith("_mask") for key in sparse.state_dict())


def test_magnitude_masks_keep_the_largest_weights():
    model = Residual()
    sparse = transform(model, Config(density=0.3, mask_init="magnitude", weight_storage="dense"))
    for name, mask in fedmef_fx.masks(sparse).items():
        weight = model.get_parameter(name).detach().abs()
        if bool(mask.all()):
            continue
        assert weight[mask].min() >= weight[~mask].max()


def test_tied_weights_share_one_mask():
    sparse = transform(Tied(), Config(density=0.5, weight_storage="dense"))
    assert set(fedmef_fx.masks(sparse)) == {"first.weight", "by_hand"}
    assert sparse.first.weight is sparse.second.weight
    sparse(torch.randn(2, 6)).sum().backward()
    mask = fedmef_fx.masks(sparse)["first.weight"]
    assert bool((sparse.first.weight.grad[~mask] == 0).all())


def test_set_masks_zeroes_grown_weights_and_keeps_the_optimizer_valid():
    model, inputs = build("residual")
    sparse = transform(model, SPARSE)
    optimizer = OPTIMIZERS["sgd"](sparse.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(sparse(*inputs)).backward()
        optimizer.step()
    old = fedmef_fx.masks(sparse)
    values = {name: masked.parameter.detach().clone() for name, masked in masked_parameters(sparse).items()}
    new = {name: mask.roll(1, -1) for name, mask in old.items()}
    fedmef_fx.set_masks(sparse, new)
    for name, (parameter, mask) in masked_parameters(sparse).items():
        assert torch.equal(mask, new[name])
        assert torch.equal(parameter.detach(), torch.where(old[name] & mask, values[name], 0.0))
    optimizer.zero_grad()
    loss_of(sparse(*inputs)).backward()
    optimizer.step()
    assert_masked_weights_are_zero(sparse)


def test_set_masks_refuses_and_changes_nothing():
    sparse = transform(Residual(), SPARSE)
    before = fedmef_fx.masks(sparse)
    good = {"conv1.weight": ~before["conv1.weight"]}
    with pytest.raises(ConfigError, match=r"'nope' has no mask.*conv1\.weight"):
        fedmef_fx.set_masks(sparse, {**good, "nope": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ConfigError, match=r"expected torch.bool of shape \(16, 16, 3, 3\)"):
        fedmef_fx.set_masks(sparse, {**good, "conv2.weight": torch.ones(16, 16, 3, 3)})
    after = fedmef_fx.masks(sparse)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ignore_by_name_glob_and_type():
    model = Residual()
    names = set(fedmef_fx.masks(transform(model, SPARSE)))
    by_name = transform(model, SPARSE.replace(ignore=("conv1",)))
    assert set(fedmef_fx.masks(by_name)) == names - {"conv1.weight"}
    by_glob = transform(model, SPARSE.replace(ignore=("conv*",)))
    assert set(fedmef_fx.masks(by_glob)) == names - {"conv1.weight", "conv2.weight"}
    by_type = transform(model, SPARSE.replace(ignore=(nn.Linear,)))
    assert set(fedmef_fx.masks(by_type)) == names - {"fc.weight"}
    rows = {row.name: row for row in fedmef_fx.coverage(by_name).rows}
    assert rows["conv1.weight"].reason == "ignored by Config.ignore"


def test_names_are_matched_whole_and_not_by_prefix():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    sparse = transform(model, Config(density=0.5, ignore=("1",), weight_storage="dense"))
    assert set(fedmef_fx.masks(sparse)) == {f"{i}.weight" for i in range(12) if i != 1}
