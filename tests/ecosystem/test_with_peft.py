"""peft: adapters put on before and after a transformation, merged, saved and loaded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from fedmef_fx import density, freeze, masks, transform
from tests.ecosystem.networks import CONFIG, PACKED, check_sparse, train, vectors


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


def _lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["first", "second"], modules_to_save=["head"], lora_alpha=4)


def _trained_difference(model: Any, x: Tensor, y: Tensor) -> Tensor:
    before = model(x).detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    train(model, optimizer, x, y)
    return (model(x).detach() - before).abs().max()


def test_adapters_on_a_transformed_model_take_effect() -> None:
    x, y = vectors()
    sparse = transform(_Net(), CONFIG)
    kept = {name: mask.clone() for name, mask in masks(sparse).items()}
    adapted = get_peft_model(sparse, _lora())
    assert _trained_difference(adapted, x, y) > 1e-4
    changed = [name for name, p in adapted.named_parameters() if "lora_A" in name and p.grad is not None]
    assert changed
    assert kept


def test_masks_hold_when_adapters_are_merged() -> None:
    x, y = vectors()
    adapted = get_peft_model(transform(_Net(), CONFIG), _lora())
    train(adapted, torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.5), x, y)
    adapted.eval()
    merged = adapted.merge_and_unload()
    check_sparse(merged, x)


def test_a_model_with_adapters_is_transformed() -> None:
    x, y = vectors()
    sparse = transform(get_peft_model(_Net(), _lora()), CONFIG, example_inputs=(x,))
    frozen = {name: p.detach().clone() for name, p in sparse.named_parameters() if not p.requires_grad}
    assert _trained_difference(sparse, x, y) > 1e-4
    for name, parameter in sparse.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
    check_sparse(sparse, x)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_a_merged_model_is_transformed(config: Any) -> None:
    x, y = vectors()
    adapted = get_peft_model(_Net(), _lora())
    train(adapted, torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.5), x, y)
    merged = adapted.merge_and_unload()
    sparse = transform(merged, config)
    train(sparse, torch.optim.SGD([p for p in sparse.parameters() if p.requires_grad], 0.05), x, y)
    check_sparse(sparse, x)
    assert 0 < density(sparse) < 1


def test_adapters_on_a_frozen_model() -> None:
    """A frozen model is a plain GraphModule without layers: adapters go on the plain copy of the original."""
    x, _ = vectors()
    sparse = transform(_Net(), CONFIG).eval()
    plain = _Net()
    plain.load_state_dict(freeze(sparse).state_dict())
    adapted = get_peft_model(plain, _lora()).eval()
    torch.testing.assert_close(adapted(x), sparse(x), rtol=1e-4, atol=1e-5)


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    x, y = vectors()
    sparse = transform(_Net(), CONFIG)
    base = copy.deepcopy(sparse)
    adapted = get_peft_model(sparse, _lora())
    train(adapted, torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.5), x, y)
    adapted.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded.eval()(x), adapted.eval()(x), rtol=1e-4, atol=1e-5)
