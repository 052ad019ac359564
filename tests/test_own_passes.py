"""Passes of one's own and of installed packages, in configurations, files and federations; graphs edited by hand."""

import copy
import operator
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import CheckpointError, ConfigError, VerificationError
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.transformation.transform import pack_weights

ROOT = Path(__file__).resolve().parent.parent
ReplaceSilu = runpy.run_path(str(ROOT / "examples" / "own_pass.py"))["ReplaceSilu"]
CONFIG = Config(density=0.5)
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
DOUBLING = """
import dataclasses, operator
from typing import ClassVar
from fedmef_fx.passes import PassResult, set_provenance

@dataclasses.dataclass(frozen=True)
class Multiply:
    name: ClassVar[str] = "multiply-result"
    factor: float = 2.0

    def run(self, program):
        names = []
        for region, _, graph in program.graphs():
            output = graph.output_node()
            (result,) = output.args
            with graph.inserting_before(output):
                scaled = graph.call_function(operator.mul, (result, self.factor))
            set_provenance(scaled, by=self.name, origin=result.name)
            output.args = (scaled,)
            names.append(region.full_name(result.name))
        return PassResult(self.name, tuple(names))

not_a_pass = 3
"""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that offers `multiply-result`, and two names that are no pass."""
    (tmp_path / "doubling.py").write_text(DOUBLING, encoding="utf-8")
    info = tmp_path / "doubling-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doubling\nVersion: 1.0\n", encoding="utf-8")
    points = "multiply-result = doubling:Multiply\nbroken = doubling:nothing\nnumber = doubling:not_a_pass\n"
    (info / "entry_points.txt").write_text(f"[fedmef_fx.passes]\n{points}", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


def texts(model: nn.Module) -> tuple[str, ...]:
    return transformation_of(model).config.passes


def test_the_example_does_what_its_page_says() -> None:
    model = fedmef_fx.transform(net(), CONFIG, passes=[ReplaceSilu()]).eval()
    plain = fedmef_fx.transform(nn.Sequential(net()[0], nn.Hardswish(), net()[2]), CONFIG).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(X), plain(X))
    assert fedmef_fx.report(model)["replace-silu"].modified
    assert "[replace-silu <- " in str(fedmef_fx.inspect(model))
    assert len((ROOT / "examples" / "own_pass.py").read_text().splitlines()) <= 50


def test_the_example_refuses_what_it_cannot_rewrite() -> None:
    model = fedmef_fx.transform(
        nn.Sequential(nn.Linear(6, 8), nn.SiLU(inplace=True), nn.Linear(8, 3)), CONFIG, passes=[ReplaceSilu()]
    )
    (refusal,) = fedmef_fx.report(model)["replace-silu"].refusals
    assert refusal.reason == "it writes into its input"


def test_a_file_names_the_passes_that_it_needs(tmp_path: Path) -> None:
    model = fedmef_fx.transform(net(), CONFIG, passes=[ReplaceSilu(ignore=("other",))])
    assert texts(model) == ("replace-silu{ignore=('other',)}",)
    fedmef_fx.save(model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"needs passes that are not there: replace-silu\{ignore=\('other',\)\}"):
        fedmef_fx.load(tmp_path / "m.safetensors", net())
    for offered in (ReplaceSilu, ReplaceSilu(ignore=("other",))):
        again = fedmef_fx.load(tmp_path / "m.safetensors", net(), passes=[offered])
        assert torch.equal(again.eval()(X), model.eval()(X))
        assert texts(again) == texts(model)
    with pytest.raises(CheckpointError, match="needs passes that are not there"):
        fedmef_fx.load(tmp_path / "m.safetensors", net(), passes=[ReplaceSilu()])  # other options
    with pytest.raises(CheckpointError, match=r"was made with the passes .*replace-silu"):
        fedmef_fx.load(tmp_path / "m.safetensors", fedmef_fx.transform(net(), CONFIG))


def test_own_memory_passes_come_back_from_a_file_too(tmp_path: Path) -> None:
    plain = Config(density=0.5, activation_sparsity=0.0)
    model = fedmef_fx.transform(net(), plain, passes="compress-saved; pack-weights")
    assert [text.partition("{")[0] for text in texts(model)] == ["compress-saved"], "the field says the other one"
    fedmef_fx.save(model, tmp_path / "m.safetensors")
    again = fedmef_fx.load(tmp_path / "m.safetensors", net())
    assert fedmef_fx.report(again)["compress-saved"].modified
    assert fedmef_fx.report(again)["pack-weights"].modified


@pytest.mark.usefixtures("installed")
def test_a_package_offers_passes(tmp_path: Path) -> None:
    config = CONFIG.replace(passes="multiply-result{factor=3.0}")
    assert Config.from_json(config.to_json()) == config
    model = fedmef_fx.transform(net(), config)
    assert torch.allclose(model.eval()(X), 3 * fedmef_fx.transform(net(), CONFIG).eval()(X))
    fedmef_fx.save(model, tmp_path / "m.safetensors")
    again = fedmef_fx.load(tmp_path / "m.safetensors", net())
    assert torch.equal(again.eval()(X), model(X))
    data = torch.utils.data.TensorDataset(torch.randn(8, 6), torch.arange(8) % 3)
    history = fedmef_fx.federated.run(
        net(), [data, data], config, rounds=1, test=data, checkpoint_dir=tmp_path / "run", keep_rounds=True
    )
    assert history.model is not None
    assert texts(history.model) == ("multiply-result{factor=3.0}",)
    resumed = fedmef_fx.federated.run(net(), [data, data], config, rounds=1, test=data, checkpoint_dir=tmp_path / "run")
    assert resumed.rounds == history.rounds
    with pytest.raises(CheckpointError, match="belongs to another run: config"):
        fedmef_fx.federated.run(net(), [data, data], CONFIG, rounds=1, test=data, checkpoint_dir=tmp_path / "run")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("multiply-result{factr=3.0}", "did you mean factor"),
        ("multiply-result{factor='a'}", "expected a finite number"),
        ("broken", "importing doubling:nothing of doubling failed: AttributeError"),
        ("number", "doubling:not_a_pass of doubling is no pass of that name"),
        ("nowhere", "no pass is named 'nowhere'"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fedmef_fx.transform(net(), CONFIG.replace(passes=text))


@pytest.mark.parametrize("passes", [3, [ReplaceSilu()], (None,), {"a": 1}])
def test_a_configuration_holds_texts(passes: object) -> None:
    with pytest.raises(ConfigError, match=r"Config\.passes: got .*expected texts"):
        CONFIG.replace(passes=passes)


def test_a_broken_pass_of_ones_own_is_told_as_such() -> None:
    class Careless(ReplaceSilu):  # type: ignore[misc, valid-type]  # of a script
        name = "careless"

        def replace(self, region: object, node: torch.fx.Node) -> None:
            super().replace(region, node)
            next(iter(node.graph.nodes)).meta.clear()
            for new in node.graph.find_nodes(op="call_function", target=nn.functional.hardswish):
                new.meta.clear()

    with pytest.raises(VerificationError, match=r"pass careless: .*has no provenance.*set_provenance") as caught:
        fedmef_fx.transform(net(), CONFIG, passes=[Careless()])
    assert "please report" not in str(caught.value)


def _edited(model: nn.Module) -> nn.Module:
    graph = model.graph
    output = graph.output_node()
    (result,) = output.args
    with graph.inserting_before(output):
        output.args = (graph.call_function(operator.mul, (result, 2.0)),)
    model.recompile()
    return model


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_save_refuses_a_graph_that_was_edited_by_hand(how: object, tmp_path: Path) -> None:
    model = fedmef_fx.transform(net(), CONFIG).eval()
    before = model(X)
    edited = how(_edited(model))  # type: ignore[operator]  # one of the functions above
    assert torch.equal(edited(X), 2 * before)
    with pytest.raises(CheckpointError, match=r"edited by hand.*passes=\[MyPass\(\)\].*torch.save"):
        fedmef_fx.save(edited, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_an_edit_is_not_forgotten_when_a_pass_runs_later(tmp_path: Path) -> None:
    model = fedmef_fx.transform(net(), CONFIG)
    _edited(model)
    pack_weights(model)
    with pytest.raises(CheckpointError, match="edited by hand"):
        fedmef_fx.save(model, tmp_path / "m.safetensors")


def test_looking_at_a_graph_and_passes_of_ours_are_no_edits(tmp_path: Path) -> None:
    model = fedmef_fx.transform(net(), CONFIG)
    assert str(model.graph)
    pack_weights(model)
    fedmef_fx.save(model, tmp_path / "m.safetensors")
