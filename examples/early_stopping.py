"""Early stopping, the best model, own numbers about clients and server, another optimizer at the clients."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config, federated
from fedmef_fx.federated import EarlyStopping, KeepBest, LocalRound, LocalTraining, Server, Strategy


class Watched(Strategy):
    """Numbers of one's own."""

    def after_training(self, local: LocalRound) -> None:
        local.metrics["norm"] = float(torch.cat([w.flatten() for w in local.weights().values()]).norm())

    def metrics(self, server: Server) -> Mapping[str, float]:
        return {"largest": max(float(values.abs().max()) for values in server.state.values.values())}


def blobs(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    points = torch.randn(samples, 8, generator=generator) + 2 * nn.functional.one_hot(labels, 8)
    return TensorDataset(points, labels)


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    training = LocalTraining(optimizer=lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate))
    best = KeepBest("test_accuracy")
    history = federated.run(
        net,
        [blobs(40, seed) for seed in range(4)],
        Config(density=0.5),
        rounds=30,
        test=blobs(200, 9),
        training=training,
        strategy=Watched(),
        on_round=[best, EarlyStopping("test_loss", patience=3), lambda record, server: print(record.metrics)],
        client_tests=[blobs(50, 20 + seed) for seed in range(4)],
    )
    print(f"ended after {len(history.rounds)} rounds, best in round {best.record.round_index}")
    fedmef_fx.save(best.model(), "best.safetensors")
