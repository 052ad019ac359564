"""Training with accelerate."""

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fedmef_fx
from fedmef_fx.models import digits_cnn

torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,)))
model = fedmef_fx.transform(digits_cnn(), fedmef_fx.Config(density=0.2))  # before prepare
accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.SGD(model.parameters(), lr=0.05), DataLoader(data, batch_size=16)
)
for images, labels in loader:
    optimizer.zero_grad()
    accelerator.backward(F.cross_entropy(model(images), labels))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

sparse = accelerator.unwrap_model(model)
fedmef_fx.save(sparse, "model.safetensors")
print(f"density {fedmef_fx.density(sparse):.2f}")
