"""What tests of `transform` have in common."""

import torch

from fedmef_fx import Config
from fedmef_fx.sparse_model.parameters import masked_parameters

IDENTITY = Config(density=1.0, normalization="keep", activation_sparsity=0.0, weight_storage="dense")


SPARSE = Config(density=0.3, weight_storage="dense")


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


def outputs(result):
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def seeded(model, inputs, *, training, seed=1):
    model.train(training)
    torch.manual_seed(seed)
    return outputs(model(*inputs))


def loss_of(result):
    return sum(tensor.square().mean() for tensor in outputs(result))


def assert_masked_weights_are_zero(model):
    parameters = masked_parameters(model)
    assert parameters
    for name, (parameter, mask) in parameters.items():
        assert bool((parameter.detach()[~mask] == 0).all()), name
