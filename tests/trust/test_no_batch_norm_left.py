"""After NSConv no BatchNorm is left in the module tree, and the state of the original still goes in and out."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import fedmef_fx
from fedmef_fx import Config, dense_state_dict, freeze, transform


class _Net(nn.Module):
    def __init__(self, *, branches: bool = False, affine: bool = True) -> None:
        super().__init__()
        self.branches = branches
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, affine=affine)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        if self.branches and float(x.detach().mean()) < -9:
            return x
        return self.head(self.second_norm(self.second(x)).relu().mean((2, 3)))


CASES = {"one graph": {}, "branches": {"branches": True}, "not affine": {"affine": False}}
CONFIG = Config(density=0.5, activation_sparsity=0.5)


@pytest.fixture(params=CASES)
def net(request: pytest.FixtureRequest) -> _Net:
    return _Net(**CASES[request.param])


def test_none_is_left_and_the_state_of_the_original_loads(net: _Net) -> None:
    x = torch.randn(4, 3, 8, 8)
    sparse = transform(net, CONFIG, example_inputs=(x,))
    if not net.branches:
        assert not any(isinstance(module, _BatchNorm) for module in sparse.modules())
    net(x)
    own = {k for k in net.state_dict() if "num_batches" in k or "running" in k}
    assert own <= sparse.state_dict().keys()
    if net.norm.affine:
        sparse.load_state_dict(net.state_dict())
        net.load_state_dict(dense_state_dict(sparse))
    old = {name: value for name, value in sparse.state_dict().items() if "num_batches_tracked" not in name}
    sparse.load_state_dict(old)  # from before the counter existed


def test_copies_pickles_files_and_frozen_models_compute_the_same(net: _Net, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    sparse = transform(net, CONFIG, example_inputs=(x,))
    optimizer = torch.optim.SGD(sparse.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        sparse(x).square().mean().backward()
        optimizer.step()
    expected = sparse.eval()(x)
    fedmef_fx.save(sparse, tmp_path / "model.safetensors")
    restored = fedmef_fx.load(tmp_path / "model.safetensors", net, example_inputs=(x,))
    for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), restored.eval()):  # noqa: S301
        assert torch.equal(copied(x), expected)
    torch.testing.assert_close(freeze(sparse)(x), expected)


def test_nothing_synchronises_or_updates_statistics_that_nothing_reads() -> None:
    sparse = transform(_Net(), CONFIG)
    names = dict(nn.SyncBatchNorm.convert_sync_batchnorm(sparse).named_modules())
    assert not any(isinstance(module, _BatchNorm) for module in names.values())
    before = copy.deepcopy(sparse.state_dict())
    update_bn([torch.randn(4, 3, 8, 8)], sparse)
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())


def test_kept_batch_norms_stay() -> None:
    kept = transform(_Net(), Config(density=0.5, normalization="keep"))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in kept.modules()) == 2


def test_a_call_that_comes_up_later_is_normalised_too() -> None:
    x = torch.randn(4, 3, 8, 8)
    sparse = transform(_Net(branches=True), CONFIG, example_inputs=(x,))
    for module in (sparse.train(), sparse.eval()):
        assert torch.allclose(module(torch.cat([x, x]))[:4], module(x), atol=1e-6)  # no statistics of a batch
