# %% [markdown]
# # For researchers: FedMef beside baselines
#
# A network and data of your own, FedMef and baselines on the same clients, and what each costs. All of it runs on a
# laptop in less than a minute; every number below was printed while this page was made.

# %%
import torch
from torch import nn
from torch.utils.data import Subset

import fedmef_fx
from fedmef_fx import Config, federated
from fedmef_fx.data import dirichlet_partition, load_digits

torch.manual_seed(0)


class Net(nn.Module):
    """Any module will do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


# %% [markdown]
# ## Clients
# A client is any `Dataset`. Here scikit-learn's digits are shared out by a Dirichlet distribution over the classes.

# %%
train, test = load_digits()
shares = dirichlet_partition(train.tensors[1], clients=5, alpha=0.5, seed=0)
clients = [Subset(train, share.tolist()) for share in shares]
print([len(client) for client in clients])

# %% [markdown]
# ## What becomes of the network
# `transform` shows it before anything is trained: which layers are rewritten, and why others are not.

# %%
config = Config(density=0.2, adjustment_interval=2)
sparse = fedmef_fx.transform(Net(), config)
print(fedmef_fx.coverage(sparse))

# %% [markdown]
# ## FedMef and two baselines
# The same model, clients, seed and rounds; only `method` differs.

# %%
histories = {}
for method in ("fedmef", "static-random", "fedavg"):
    torch.manual_seed(0)
    histories[method] = federated.run(
        Net(),
        clients,
        config,
        rounds=4,
        test=test,
        method=method,
        training=federated.LocalTraining(epochs=1, batch_size=32, learning_rate=0.1),
    )
print(f"{'method':14s} {'accuracy':>8s} {'bytes up':>9s} {'density':>7s}")
for method, history in histories.items():
    print(f"{method:14s} {history.test_accuracy:8.3f} {history.bytes_up:9d} {history.rounds[-1].density:7.2f}")

# %% [markdown]
# A history knows more: loss, accuracy, density, bytes and memory of each round. `history.save("run.json")` writes it.

# %%
print(histories["fedmef"])

# %% [markdown]
# ## Next
# [How a federation works](../federation.md), [what each symbol of the paper is in the code](../paper-to-code.md), and
# the paper's own settings: `Config.paper()`.
