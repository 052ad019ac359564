"""Passes of the caller's own run after those of the configuration, verified and reported as they are."""

import dataclasses
import operator
from typing import ClassVar

import pytest
import torch
from torch import nn

import fedmef_fx
from fedmef_fx import Config, report, transform
from fedmef_fx.errors import ConfigError, PassError, VerificationError
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.passes.pack_weights import PackWeights
from fedmef_fx.records.passes import PassResult
from tests.models import Residual

CONFIG = Config(density=0.5, weight_storage="dense")
PLAIN = Config(density=1.0, normalization="keep", activation_sparsity=0.0, weight_storage="dense")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Multiplies what the model returns."""

    name: ClassVar[str] = "scale"
    factor: float = 2.0
    is_honest: bool = True

    def run(self, program):
        done = []
        for region, _, graph in program.graphs():
            output = graph.output_node()
            (result,) = output.args
            with graph.inserting_before(output):
                scaled = graph.call_function(operator.mul, (result, self.factor))
            output.args = (scaled,)
            if self.is_honest:
                set_provenance(scaled, by=self.name, origin=result.name)
            done.append(region.full_name(result.name))
        return PassResult(self.name, tuple(done))


class Broken(Scale):
    """Fails."""

    name: ClassVar[str] = "broken"

    def run(self, program):
        raise ZeroDivisionError("why")


class Silent(Scale):
    """Returns nothing."""

    name: ClassVar[str] = "silent"

    def run(self, program):
        return None


def test_a_pass_of_the_callers_runs_last_and_is_reported():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = transform(model, PLAIN, passes=(Scale(3.0), "shrink-saved"))
    assert torch.equal(sparse(x), 3 * model(x))
    assert [result.name for result in report(sparse)][-2:] == ["scale{factor=3.0, is_honest=True}", "shrink-saved"]
    assert report(sparse)["scale"].modified
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_verified():
    with pytest.raises(VerificationError, match=r"pass scale: .*has no provenance"):
        transform(nn.Sequential(nn.Linear(4, 3)), PLAIN, passes=(Scale(is_honest=False),))


def test_its_failure_is_named():
    with pytest.raises(PassError, match="pass broken: ZeroDivisionError: why"):
        transform(nn.Sequential(nn.Linear(4, 3)), PLAIN, passes=(Broken(),))
    with pytest.raises(PassError, match="pass silent: run returned NoneType; expected a PassResult"):
        transform(nn.Sequential(nn.Linear(4, 3)), PLAIN, passes=(Silent(),))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("insert-masks{density=7}", r"pass insert-masks: density: got 7; expected a number in \(0, 1\]"),
        ("compress-saved{ignore=('stm',)}", "pass compress-saved: ignore: no module .*did you mean 'stem'"),
        ((PackWeights,), "got the class PackWeights"),
        ("pack-weight", "did you mean pack-weights"),
    ],
)
def test_mistakes_are_found_before_anything_runs(passes, message):
    with pytest.raises(ConfigError, match=message):
        transform(Residual(), CONFIG, passes=passes)


def test_our_passes_as_text_do_what_the_configuration_does():
    by_config = transform(Residual(), Config(density=0.4, activation_sparsity=0.0, weight_storage="dense"))
    torch.manual_seed(0)
    model = Residual()
    by_text = transform(model, PLAIN, passes="insert-masks{density=0.4}; normalize-kernels; rescale-residuals")
    assert str(by_text.graph) == str(by_config.graph)
    assert fedmef_fx.density(by_text) == fedmef_fx.density(by_config)


def test_a_checkpoint_knows_what_they_did_to_weights_and_results(tmp_path):
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    sparse = transform(model, PLAIN, passes="insert-masks{density=0.4}; normalize-kernels; rescale-residuals")
    fedmef_fx.save(sparse, tmp_path / "model.safetensors")
    loaded = fedmef_fx.load(tmp_path / "model.safetensors", Residual()).eval()
    assert torch.equal(loaded(x), sparse(x))


def test_a_second_drawing_of_masks_is_refused():
    sparse = transform(Residual(), CONFIG, passes="insert-masks{density=0.1}")
    assert fedmef_fx.density(sparse) == pytest.approx(0.5, abs=1e-3)
    assert not list(report(sparse))[-1].modified
    assert "has a mask already" in list(report(sparse))[-1].refusals[0].reason


def test_stop_after_and_print_after_know_them():
    texts = []
    options = {"print_after": ["scale"], "printer": texts.append}
    sparse = transform(nn.Sequential(nn.Linear(4, 3)), PLAIN, passes=(Scale(),), **options)
    assert texts[0].startswith("# after scale\n")
    sparse = transform(nn.Sequential(nn.Linear(4, 3)), PLAIN, passes=(Scale(),), stop_after="functionalize-weights")
    assert [result.name.partition("{")[0] for result in report(sparse)] == ["capture", "functionalize-weights"]


class ByLength(nn.Module):
    """Python decides by the length of the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) + 1 if len(x) > 3 else self.layer(x)


def test_graphs_that_are_captured_later_get_them_too():
    model, x = ByLength(), torch.randn(5, 4)
    sparse = transform(model, PLAIN, example_inputs=(x[:2],), passes=(Scale(3.0),))
    assert torch.equal(sparse(x[:2]), 3 * model(x[:2]))
    assert torch.equal(sparse(x), 3 * model(x))
