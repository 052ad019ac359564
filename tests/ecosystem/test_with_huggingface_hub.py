"""huggingface_hub: sparse models of one's own class in folders, without network."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("huggingface_hub")

from fedmef_fx import Config, density, masks, transform
from fedmef_fx.checkpoint.hub import SparseHubMixin
from fedmef_fx.errors import CheckpointError, ConfigError


class Net(nn.Module, SparseHubMixin):
    def __init__(self, *, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def test_a_folder_holds_weights_masks_and_arguments(tmp_path: Path) -> None:
    sparse = transform(Net(width=16), Config(density=0.25))
    sparse.save_pretrained(tmp_path / "net")
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in (tmp_path / "net").iterdir()}
    again = Net.from_pretrained(tmp_path / "net")
    assert isinstance(again, Net)
    assert again.width == 16
    assert density(again) == density(sparse)
    assert all(torch.equal(mask, masks(sparse)[name]) for name, mask in masks(again).items())
    x = torch.randn(3, 4)
    assert torch.equal(again(x), sparse(x))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(type(again).from_pretrained(tmp_path / "again")(x), sparse(x))


def test_what_cannot_be_stored_or_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transform"):
        Net().save_pretrained(tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        Net.from_pretrained(tmp_path / "empty")
    transform(Net(), Config(density=0.5)).save_pretrained(tmp_path / "net")
    with pytest.raises(CheckpointError):
        Net.from_pretrained(tmp_path / "net", width=4)
