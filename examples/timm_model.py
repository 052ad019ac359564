"""A model of timm's, trained sparse and exported."""

import timm
import timm.optim
import torch
from torch.nn import functional as F

import fedmef_fx

torch.manual_seed(0)
x, y = torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))
net = timm.create_model("resnet18", pretrained=False, num_classes=10)
model = fedmef_fx.transform(net, fedmef_fx.Config(density=0.1), example_inputs=(x,))
optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.05)
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
report = fedmef_fx.export_onnx(model, "model.onnx", example_inputs=(x,), weights="packed")
print(f"{report.bytes} bytes, density {fedmef_fx.density(model):.2f}")
