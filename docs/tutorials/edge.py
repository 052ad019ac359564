# %% [markdown]
# # For the edge: within limits, as ONNX
#
# A network has to train in little memory and leave as a small file that a runtime on a board takes.

# %%
import torch

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.models import mobilenet_v2

torch.manual_seed(0)
x = torch.randn(8, 3, 32, 32)
net = mobilenet_v2()

# %% [markdown]
# ## How much memory a step takes
# One step is run and measured: weights, gradients, optimizer and what is kept for backward.

# %%
before = fedmef_fx.memory(net, (x,), optimizer="sgd-momentum")
sparse = fedmef_fx.transform(net, Config(density=0.1, weight_storage="packed"), example_inputs=(x,))
after = fedmef_fx.memory(sparse, (x,), optimizer="sgd-momentum")
print(f"peak of a step: {before.peak / 1e6:.1f} MB before, {after.peak / 1e6:.1f} MB after")

# %% [markdown]
# ## Train it
# With the loop, optimizer and data that you have.

# %%
optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
labels = torch.arange(8)
for step in range(3):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(sparse(x), labels)
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.2f}")

# %% [markdown]
# ## The file
# Masks and normalisation are folded; packed weights decode themselves when the file is loaded. The report says how far
# the file is from the model in onnxruntime.

# %%
report = fedmef_fx.export_onnx(sparse, "model.onnx", example_inputs=(x[:2],), weights="packed")
dense = sum(parameter.nbytes for parameter in net.parameters())
print(f"{report.bytes} bytes, of {dense} of the dense weights")
print(f"largest difference: {report.parity.max_abs:.1e}")
print(fedmef_fx.verify_onnx("model.onnx").weights)

# %% [markdown]
# ## Next
# [Files and runtimes](../onnx.md), [channels taken out, for speed](../compact.md), [budgets in bytes](../memory.md).
