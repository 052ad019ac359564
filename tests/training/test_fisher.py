"""Gradients of all weights, and the diagonal Fisher factors, against definitions and values computed by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError, DataError
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.training.fisher import input_squares, mean_gradients_and_fisher
from fedmef_fx.training.full_gradients import mean_gradients, mean_squared_gradients

Batch = tuple[Tensor, Tensor]


def _sparse(model: nn.Module, **options: Any) -> nn.Module:
    chosen = {"density": 0.5, "normalization": "keep", "activation_sparsity": 0.0, **options}
    return fedmef_fx.transform(model, Config(**chosen))


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def test_fisher_of_a_linear_layer_by_hand() -> None:
    model = _sparse(nn.Sequential(nn.Linear(2, 1, bias=False)))
    masked_parameters(model)["0.weight"].write(torch.tensor([1.0]))
    mask = fedmef_fx.masks(model)["0.weight"].flatten()
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    y = x @ mask.float()[:, None] - torch.tensor([[1.0], [2.0]])  # errors of 1 and 2
    gradients, fisher = mean_gradients_and_fisher(model, _loss, [(x, y)])
    # dL_n/dy: 2 and 4. g: ((2 * 1 + 4 * 3) / 2, (2 * 2 + 4 * 0) / 2); diag(A): (5, 2); diag(G): (4 + 16) / 2.
    assert gradients["0.weight"].tolist() == [7.0, 2.0]
    assert fisher["0.weight"].tolist() == [50.0, 20.0]


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {"groups": 2}, {"padding": "same"}, {"groups": 4}],
)
def test_fisher_of_a_convolution_is_that_of_its_patches(options: dict[str, Any], storage: str) -> None:
    layer = nn.Conv2d(4, 4, 3, bias=False, **options)
    model = _sparse(nn.Sequential(layer), weight_storage=storage)
    plain = nn.Conv2d(4, 4, 3, bias=False, **options)
    plain.weight.data = masked_parameters(model)["0.weight"].dense()
    batches = [torch.randn(size, 4, 7, 6) for size in (5, 3)]
    targets = [torch.randn_like(plain(x)) for x in batches]
    _, fisher = mean_gradients_and_fisher(model, _loss, list(zip(batches, targets, strict=True)))
    groups = layer.groups
    geometry = {key: options.get(key, default) for key, default in (("padding", 0), ("stride", 1), ("dilation", 1))}
    geometry["padding"] = 1 if geometry["padding"] == "same" else geometry["padding"]
    inputs, outputs = torch.zeros(4, 9), torch.zeros(4)
    for x, target in zip(batches, targets, strict=True):
        patches = F.unfold(x, 3, **geometry).view(len(x), 4, 9, -1)  # the very thing that the product avoids
        inputs += patches.square().sum((0, 3)) / 8
        out = plain(x).requires_grad_()
        (gradient,) = torch.autograd.grad(F.mse_loss(out, target), out)
        outputs += (gradient * len(x)).square().mean((2, 3)).sum(0) / 8
    expected = outputs.view(groups, -1, 1) * inputs.view(groups, 1, -1)
    # Sums of some hundred products in single precision.
    assert torch.allclose(fisher["0.weight"], expected.flatten(), rtol=1e-4, atol=1e-9)


def test_fisher_of_every_kind_of_call() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 4))
    _, fisher = mean_gradients_and_fisher(_sparse(net), _loss, [(torch.randn(4, 2, 4), torch.randn(4, 4))])
    assert {name: values.numel() for name, values in fisher.items()} == {"0.weight": 12, "3.weight": 36}
    assert all(bool((values >= 0).all()) for values in fisher.values())


def test_squares_are_summed_at_the_places_of_the_output() -> None:
    squares = torch.arange(5.0)[None]
    found = input_squares(squares, (2,), out=(2,), stride=(2,), dilation=(1,))
    assert found.tolist() == [[0.0 + 2.0, 1.0 + 3.0]]


@pytest.mark.parametrize("net", [nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), nn.Sequential(nn.Bilinear(2, 2, 2))])
def test_layers_without_such_factors_are_refused_by_name(net: nn.Module) -> None:
    model = _sparse(net)

    def loss(network: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = (
            network(x).sum() if isinstance(net[0], nn.ConvTranspose2d) else network[0](x[0, 0], x[0, 1]).sum()
        )  # type: ignore[operator]  # a module
        return result

    with pytest.raises(ConfigError, match=r"fisher: '0.weight'.*ignore=\('0',\)"):
        mean_gradients_and_fisher(model, loss, [torch.randn(1, 2, 2, 2)])


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("normalization", ["keep", "nsconv"])
def test_gradients_of_all_weights_are_those_of_the_effective_weight(storage: str, normalization: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    model = _sparse(net, weight_storage=storage, normalization=normalization, adjustment_space="parameter").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randn(size, 2, 4, 4), torch.randn(size, 3)) for size in (4, 2)]
    found = mean_gradients(model, _loss, batches)
    squares = mean_squared_gradients(model, _loss, batches)
    single = [mean_gradients(model, _loss, [batch]) for batch in batches]
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, parameter in masked_parameters(model).items():
        average = (single[0][name] * 4 + single[1][name] * 2) / 6
        assert torch.allclose(found[name], average, atol=1e-6)  # rounding of one sum
        assert torch.allclose(squares[name], (single[0][name] ** 2 * 4 + single[1][name] ** 2 * 2) / 6, atol=1e-6)
        candidates = fedmef_fx.growth_candidates(model, _loss, batches, k=parameter.numel)[name]
        assert torch.allclose(found[name][candidates.positions], candidates.values, atol=1e-6)
        loss = sum(_loss(model, batch) * len(batch[0]) for batch in batches) / 6
        (gradient,) = torch.autograd.grad(loss, parameter.parameter)  # type: ignore[arg-type]  # a tensor by now
        active = found[name][parameter.positions()]
        if name == "4.weight" or normalization == "keep":
            assert torch.allclose(active, parameter.collect(gradient), atol=1e-6)


def test_no_batches_and_no_finite_gradients() -> None:
    model = _sparse(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(DataError, match="no batches"):
        mean_gradients(model, _loss, [])
    with pytest.raises(ConfigError, match="expected finite ones"):
        mean_gradients(model, _loss, [(torch.full((1, 2), torch.inf), torch.zeros(1, 2))])
