"""FedAdam (Reddi et al., ICLR 2021): the server takes what clients moved for a gradient, and steps with Adam."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config, federated
from fedmef_fx.federated import ModelState, ServerRound, Strategy, Update


@dataclasses.dataclass(kw_only=True)
class FedAdam(Strategy):
    """Moments of the clients' mean move, as Adam keeps them of a gradient."""

    rate: float = 0.03
    first: float = 0.9
    second: float = 0.99
    tau: float = 1e-3

    def server_step(self, averaged: ModelState, updates: Sequence[Update], now: ServerRound) -> ModelState:
        means, squares, moves = now.recall("mean", averaged), now.recall("square", averaged), {}
        for name, change in now.changes(averaged).items():
            means[name] = self.first * means[name] + (1 - self.first) * change
            squares[name] = self.second * squares[name] + (1 - self.second) * change.square()
            moves[name] = self.rate * means[name] / (squares[name].sqrt() + self.tau)
        now.remember("mean", means, averaged)  # after an adjustment of masks, it is 0 where weights were grown
        now.remember("square", squares, averaged)
        return now.moved(averaged, moves)


def blobs(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    points = torch.randn(samples, 8, generator=generator) + 2 * nn.functional.one_hot(labels, 8)
    return TensorDataset(points, labels)


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    clients = [blobs(40, seed) for seed in range(4)]
    print(federated.run(net, clients, Config(density=0.5), rounds=6, test=blobs(200, 9), strategy=FedAdam()))
