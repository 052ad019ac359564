"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates of server and clients correct the drift of each client."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config, federated
from fedmef_fx.federated import LocalRound, LocalTraining, ModelState, ServerRound, Strategy, Update


class Scaffold(Strategy):
    """Control variates: the server's is the mean of the clients'."""

    def extras(self, client: int, now: ServerRound) -> Mapping[str, Tensor]:
        return {f"control/{name}": tensor for name, tensor in now.recall("control").items()}

    def expected(self, now: ServerRound) -> Mapping[str, Tensor]:
        return now.group("change")

    def before_step(self, local: LocalRound) -> None:
        common, own = local.sent("control"), local.recall("control")
        local.add_to_gradients({name: common[name] - own[name] for name in common})

    def after_training(self, local: LocalRound) -> None:
        common, own, start = local.sent("control"), local.recall("control"), local.started()
        scale = 1 / (local.steps * local.learning_rate)
        new = {n: own[n] - common[n] + scale * (start[n] - w) for n, w in local.weights().items()}
        local.send("change", {name: new[name] - own[name] for name in new})
        local.remember("control", new)

    def server_step(self, averaged: ModelState, updates: Sequence[Update], now: ServerRound) -> ModelState:
        changes = {n: sum(u.extras[f"change/{n}"] for u in updates) / now.clients for n in now.weights()}
        now.remember("control", {name: c + changes[name] for name, c in now.recall("control").items()})
        return averaged


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    labels = [torch.randint(2, (40,)) + client % 2 for client in range(4)]  # each client lacks a class
    clients = [TensorDataset(torch.randn(40, 8) + 2 * nn.functional.one_hot(y, 8), y) for y in labels]
    everything = TensorDataset(*map(torch.cat, zip(*(client.tensors for client in clients), strict=True)))
    training = LocalTraining(schedule="constant", momentum=0.0)
    history = federated.run(
        net, clients, Config(density=0.5), rounds=6, test=everything, training=training, strategy=Scaffold()
    )
    print(history)
