"""Lightning: transformed models inside a module, transformed modules, callbacks, and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

import fedmef_fx
from fedmef_fx import Config, Extrusion, masks, set_masks, transform
from tests.ecosystem.networks import (
    CONFIG,
    PACKED,
    check_same_state,
    check_sparse,
    image_net,
    images,
    move_masks,
    sparse_net,
)


class _Holder(lightning.LightningModule):
    """Holds a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class _Manual(_Holder):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.automatic_optimization = False
        self.counted = 0

    def training_step(self, batch: Any, _: int) -> None:  # type: ignore[override]
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.counted += 1


class _Extruding(_Holder):
    def on_train_start(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=True)
        self.extrusion = Extrusion(self.network, optimizer, budget_steps=8).__enter__()

    def on_train_end(self) -> None:
        self.extrusion.__exit__(None, None, None)


class _Moving(lightning.Callback):
    """Moves masks once an epoch."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        move_masks(getattr(module, "network", module))


def _loader() -> Any:
    return DataLoader(TensorDataset(*images(16)), batch_size=4)


def _trainer(folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False}
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **(defaults | options),
    )


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_fit_with_a_transformed_network_inside(tmp_path: Path, config: Config) -> None:
    module = _Holder(sparse_net(config))
    _trainer(tmp_path, gradient_clip_val=1.0, callbacks=[_Moving()]).fit(module, _loader())
    check_sparse(module.network, images()[0], expected_density=0.4)


def test_accumulated_batches_equal_larger_ones(tmp_path: Path) -> None:
    config = CONFIG.replace(activation_sparsity=0.0)
    module, other = _Holder(sparse_net(config)), _Holder(sparse_net(config))
    _trainer(tmp_path, accumulate_grad_batches=2).fit(module, _loader())
    _trainer(tmp_path).fit(other, DataLoader(TensorDataset(*images(16)), batch_size=8))
    for left, right in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_fit_a_module_that_was_transformed_itself(tmp_path: Path) -> None:
    module = transform(_Holder(image_net()), CONFIG)
    assert isinstance(module, lightning.LightningModule)
    before = fedmef_fx.dense_state_dict(module)["network.0.weight"].clone()
    _trainer(tmp_path).fit(module, _loader())
    assert not torch.equal(fedmef_fx.dense_state_dict(module)["network.0.weight"], before)
    check_sparse(module, images()[0], expected_density=0.4)


def test_manual_optimisation(tmp_path: Path) -> None:
    module = _Manual(sparse_net())
    _trainer(tmp_path).fit(module, _loader())
    assert module.counted == 8
    check_sparse(module.network, images()[0], expected_density=0.4)


def test_extrusion_in_a_fit(tmp_path: Path) -> None:
    module = _Extruding(sparse_net())
    _trainer(tmp_path).fit(module, _loader())
    assert module.extrusion.step == 8
    check_sparse(module.network, images()[0], expected_density=0.4)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_checkpoint_and_resume(tmp_path: Path, config: Config) -> None:
    module = _Holder(sparse_net(config))
    keeper = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = _trainer(tmp_path, enable_checkpointing=True, callbacks=[keeper, _Moving()])
    trainer.fit(module, _loader())
    resumed = _Holder(sparse_net(config))
    trainer = _trainer(tmp_path, callbacks=[_Moving()])
    trainer.fit(resumed, _loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=False)
    check_same_state(resumed.network, module.network)
    loaded = _Holder.load_from_checkpoint(
        tmp_path / "epoch=1.ckpt", network=sparse_net(config), map_location="cpu", weights_only=False
    )
    check_sparse(loaded.network, images()[0], expected_density=0.4)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("callback", [WeightAveraging, EMAWeightAveraging])
def test_weight_averaging(tmp_path: Path, callback: Any, config: Config) -> None:
    module = _Holder(sparse_net(config))
    _trainer(tmp_path, max_epochs=3, callbacks=[_Moving(), callback()]).fit(module, _loader())
    check_sparse(module.network, images()[0], expected_density=0.4)


class _Recording(lightning.Callback):
    """Keeps what the model computes with after each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        state = fedmef_fx.dense_state_dict(module.network)
        self.seen.append({name: value.clone() for name, value in state.items()})


class _Swapping(lightning.Callback):
    """Lets one active weight of each layer and one that is not change places, once an epoch."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        changed = masks(module.network)
        for mask in changed.values():
            flat = mask.view(-1)
            if not flat.all():
                leaving, coming = flat.nonzero()[0], (~flat).nonzero()[-1]
                flat[leaving], flat[coming] = False, True
        set_masks(module.network, changed)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_stochastic_weight_averaging(tmp_path: Path, config: Config) -> None:
    """Three epochs are averaged, each with other masks."""
    module = _Holder(sparse_net(config))
    recording = _Recording()
    swa = StochasticWeightAveraging(0.005, swa_epoch_start=2, annealing_epochs=1)
    _trainer(tmp_path, max_epochs=4, callbacks=[_Swapping(), recording, swa]).fit(module, _loader())
    check_sparse(module.network, images()[0], expected_density=0.4)
    found = fedmef_fx.dense_state_dict(module.network)
    for name, mask in masks(module.network).items():
        values = torch.stack([state[name] for state in recording.seen[:3]])
        stayed = mask & (values != 0).all(0)
        assert stayed.any()
        torch.testing.assert_close(found[name][stayed], values.mean(0)[stayed], rtol=1e-4, atol=1e-6)


def test_predict_and_validate_after_fit(tmp_path: Path) -> None:
    module = _Holder(sparse_net())
    trainer = _trainer(tmp_path)
    trainer.fit(module, _loader())
    module.predict_step = lambda batch, batch_idx: module(batch[0])  # type: ignore[method-assign]
    found = torch.cat(trainer.predict(module, _loader()))
    torch.testing.assert_close(found, fedmef_fx.freeze(module.network)(images(16)[0]), rtol=1e-4, atol=1e-5)
