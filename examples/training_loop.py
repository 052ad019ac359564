"""A training loop of one's own: sparse from the start, with masks that are adjusted as it goes."""

import torch
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx.models import digits_cnn

torch.manual_seed(0)
x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
model = fedmef_fx.transform(digits_cnn(), fedmef_fx.Config(density=0.2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

for _ in range(5):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()  # masked weights stay 0


def loss_of(net: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


weights, masks = fedmef_fx.dense_state_dict(model), fedmef_fx.masks(model)
for name, found in fedmef_fx.growth_candidates(model, loss_of, [(x, y)], k=8).items():
    flat = masks[name].flatten().clone()
    active = flat.nonzero().flatten()
    smallest = weights[name].flatten()[active].abs().argsort()[: found.positions.numel()]
    flat[active[smallest]] = False  # as many leave
    flat[found.positions] = True  # as grow
    masks[name] = flat.view(masks[name].shape)
fedmef_fx.set_masks(model, masks)  # the optimizer stays valid
print(f"loss {loss.item():.2f}, density {fedmef_fx.density(model):.2f}")
