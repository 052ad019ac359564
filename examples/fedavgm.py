"""FedAvgM (Hsu et al., 2019): momentum at the server, for clients whose data differ."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config, federated
from fedmef_fx.federated import ModelState, ServerRound, Strategy, Update


@dataclasses.dataclass(kw_only=True)
class FedAvgM(Strategy):
    """A running sum of the clients' mean moves."""

    rate: float = 1.0
    momentum: float = 0.6

    def server_step(self, averaged: ModelState, updates: Sequence[Update], now: ServerRound) -> ModelState:
        velocities = now.recall("velocity", averaged)
        for name, change in now.changes(averaged).items():
            velocities[name] = self.momentum * velocities[name] + change
        now.remember("velocity", velocities, averaged)
        return now.moved(averaged, {name: self.rate * velocity for name, velocity in velocities.items()})


def blobs(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    points = torch.randn(samples, 8, generator=generator) + 2 * nn.functional.one_hot(labels, 8)
    return TensorDataset(points, labels)


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    history = federated.run(
        net,
        [blobs(40, seed) for seed in range(4)],
        Config(density=0.5),
        rounds=6,
        test=blobs(200, 9),
        strategy=FedAvgM(),
    )
    print(history)
