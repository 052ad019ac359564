"""LoRA adapters (peft) on a sparse base: the base is pruned once and stays, the adapters train dense."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import fedmef_fx

torch.manual_seed(0)
x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))
net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
base = fedmef_fx.transform(net, fedmef_fx.Config(density=0.3, mask_init="magnitude", weight_storage="dense"))
model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(5):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
print(f"density of the base {fedmef_fx.density(base):.2f}")
