"""FedProx (Li et al., MLSys 2020): clients stay near what they were sent, and slow ones do fewer epochs."""

import dataclasses

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config, federated
from fedmef_fx.federated import LocalRound, LocalTraining, RoundTask, Strategy


@dataclasses.dataclass(kw_only=True)
class FedProx(Strategy):
    """`mu` is how strongly clients are held back; `slow` ones train for one epoch."""

    mu: float = 0.1
    slow: tuple[int, ...] = ()

    def local_training(self, training: LocalTraining, task: RoundTask, *, client: int, samples: int) -> LocalTraining:
        return dataclasses.replace(training, epochs=1) if client in self.slow else training

    def before_step(self, local: LocalRound) -> None:
        # The gradient of mu / 2 * |w - w_sent|^2.
        started = local.started()
        local.add_to_gradients({name: self.mu * (w - started[name]) for name, w in local.weights().items()})

    def after_training(self, local: LocalRound) -> None:
        started = local.started()
        moved = sum(float((w - started[name]).square().sum()) for name, w in local.weights().items())
        local.metrics["moved"] = moved**0.5


def blobs(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    points = torch.randn(samples, 8, generator=generator) + 2 * nn.functional.one_hot(labels, 8)
    return TensorDataset(points, labels)


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    clients = [blobs(40, seed) for seed in range(4)]
    strategy = FedProx(slow=(1, 3))
    history = federated.run(net, clients, Config(density=0.5), rounds=6, test=blobs(200, 9), strategy=strategy)
    for record in history.rounds:
        print(record.round_index, record.test_accuracy, record.metrics)
