"""An average of the weights over training (EMA) that obeys the masks."""

import torch
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx.models import digits_cnn

torch.manual_seed(0)
x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
model = fedmef_fx.transform(digits_cnn(), fedmef_fx.Config(density=0.2))
average = fedmef_fx.averaged(model, 0.9)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

for _ in range(5):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    average.update_parameters(model)

fedmef_fx.save(average.module, "average.safetensors")
print(f"density of the average {fedmef_fx.density(average.module):.2f}")
