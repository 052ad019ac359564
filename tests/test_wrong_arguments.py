"""Arguments of another kind than a function takes: one error that says what was got and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import federated
from fedmef_fx.errors import FedmefError

X, Y = torch.randn(4, 6), torch.randint(0, 3, (4,))
DATA = TensorDataset(X, Y)
RUN: dict[str, Any] = {"rounds": 1}


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "a dictionary as configuration": (
        lambda: fedmef_fx.transform(_network(), {"density": 0.1}),  # type: ignore[arg-type]
        r"transform: config: got \{'density': 0\.1\}; expected a fedmef_fx\.Config.*Config\(\*\*fields\)",
    ),
    "the class instead of a configuration": (
        lambda: fedmef_fx.transform(_network(), fedmef_fx.Config),  # type: ignore[arg-type]
        r"transform: config: got <class .*expected a fedmef_fx\.Config",
    ),
    "a number as configuration of a federation": (
        lambda: federated.run(_network(), [DATA], 0.1, **RUN),  # type: ignore[arg-type]
        r"federated\.run: config: got 0\.1; expected a fedmef_fx\.Config",
    ),
    "a dictionary as configuration of a comparison": (
        lambda: federated.compare_methods(_network, [DATA], ["fedavg"], {"density": 1}, **RUN),  # type: ignore[arg-type]
        r"compare_methods: config: got \{'density': 1\}",
    ),
    "an array as example": (
        lambda: fedmef_fx.transform(_network(), example_inputs=(X.numpy(),)),
        r"^[^\n]{,200}input=ndarray\[4, 6\], which is no torch\.Tensor",
    ),
    "a method as strategy": (
        lambda: federated.run(_network(), [DATA], strategy="fedavg", **RUN),  # type: ignore[arg-type]
        r"strategy: got 'fedavg'; expected a federated\.Strategy.*method=",
    ),
    "one data set instead of a list": (
        lambda: federated.run(_network(), DATA, **RUN),  # type: ignore[arg-type]
        r"clients: got TensorDataset; expected a list of data sets, one per client",
    ),
    "a generator of clients": (
        lambda: federated.run(_network(), (data for data in [DATA]), **RUN),  # type: ignore[arg-type]
        r"clients: got generator; expected a list",
    ),
    "a name as test set": (
        lambda: federated.run(_network(), [DATA], test="digits", **RUN),  # type: ignore[arg-type]
        r"got str as data; expected a data set",
    ),
    "model before path": (
        lambda: fedmef_fx.load(_network(), "model.safetensors"),  # type: ignore[arg-type]
        r"load: got Sequential as path and str as model; expected .*load\('model\.safetensors', model\)",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_error_says_what_was_got_and_what_to_do(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(FedmefError, match=message):
        call()
