"""A federation's rounds, and the densities of its layers, in TensorBoard."""

import torch
from torch.utils.data import TensorDataset
from torch.utils.tensorboard import SummaryWriter

import fedmef_fx
from fedmef_fx.federated import RoundRecord
from fedmef_fx.models import digits_cnn

torch.manual_seed(0)
clients = [TensorDataset(torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))) for _ in range(3)]
writer = SummaryWriter("runs/fedmef")  # tensorboard --logdir runs


def write(record: RoundRecord) -> None:
    for name in ("train_loss", "test_accuracy", "density", "bytes_up", "bytes_down", "peak_saved_bytes"):
        value = getattr(record, name)
        if value is not None:
            writer.add_scalar(name, value, record.round_index)
    for layer, moved in record.churn.items():
        writer.add_scalar(f"moved weights/{layer}", moved, record.round_index)


config = fedmef_fx.Config(density=0.2, adjustment_interval=1)
history = fedmef_fx.federated.run(digits_cnn(), clients, config, rounds=3, test=clients[0], progress=write)
for name, mask in fedmef_fx.masks(history.model).items():
    writer.add_histogram(f"active per output/{name}", mask.flatten(1).float().mean(1), len(history.rounds))
writer.close()
print(f"density {history.rounds[-1].density:.2f}")
