"""`Config.output_layer="dense"`, and `Config.paper()` that asks for it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, coverage, masks, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.models import digits_cnn, gpt2_bytes, mobilenet_v2, resnet18, vit_tiny
from fedmef_fx.passes.catalogue import parse_pass

PAPER = Config.paper(density=0.2)


def dense_weights(model: nn.Module, config: Config) -> set[str]:
    sparse = transform(model, config)
    return {row.name for row in coverage(sparse).rows} - masks(sparse).keys()


@pytest.mark.parametrize(
    ("make", "name"),
    [(resnet18, "fc.weight"), (mobilenet_v2, "classifier.1.weight"), (vit_tiny, "head.weight")],
)
def test_the_layer_that_makes_the_output_stays_dense(make: type[nn.Module], name: str) -> None:
    config = PAPER.replace(output_layer="pruned")
    model = make()
    pruned, sparse = dense_weights(model, config), transform(model, PAPER)
    assert name not in pruned
    assert {row.name for row in coverage(sparse).rows} - masks(sparse).keys() - pruned == {name}
    row = next(row for row in coverage(sparse).rows if row.name == name)
    assert "output_layer" in row.reason


class TwoHeads(nn.Module):
    """Two results, one through a softmax, and names that do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.b, self.a = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.z(x))
        return F.softmax(self.b(hidden), -1), self.a(hidden) * 2


class Untraceable(TwoHeads):
    """No graph shows what becomes of its layers' results."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x if float(x.sum()) > 0 else -x)


def test_every_result_counts() -> None:
    assert dense_weights(TwoHeads(), PAPER) == {"a.weight", "b.weight"}


def test_where_no_graph_shows_it_the_last_weight_is_taken() -> None:
    found = dense_weights(Untraceable(), PAPER)
    assert "a.weight" in found
    assert "z.weight" not in found


def test_a_model_of_one_layer_has_nothing_left_to_prune() -> None:
    with pytest.raises(ConfigError, match="no prunable weights"):
        transform(nn.Linear(8, 2), PAPER)


def test_tied_weights_stay_as_they_were() -> None:
    assert dense_weights(gpt2_bytes(), PAPER) == dense_weights(gpt2_bytes(), PAPER.replace(output_layer="pruned"))


def test_the_published_method() -> None:
    config = Config.paper()
    fields = ("activation_sparsity", "activation_bits", "weight_storage", "output_layer", "adjustment_rate")
    assert [getattr(config, name) for name in fields] == [0.9, None, "dense", "dense", 0.4]
    assert Config.paper(activation_sparsity=0.5, seed=3).replace(activation_sparsity=0.9) == config.replace(seed=3)
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="density"):
        Config.paper(density=2)
    step = parse_pass("insert-masks{density=0.2, output_layer='dense'}")
    sparse = transform(digits_cnn(), Config(density=1.0, normalization="keep", activation_sparsity=0.0), passes=(step,))
    assert len(masks(sparse)) == len(masks(transform(digits_cnn(), PAPER))) > 0
    assert torch.equal(*(next(iter(masks(m).values())) for m in (sparse, transform(digits_cnn(), PAPER))))
