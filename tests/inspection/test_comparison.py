"""Two states of a model side by side: counts by hand, laws, every kind of source, and damaged files."""

import copy
import functools
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config, federated
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.files.container import digest, encode
from fedmef_fx.inspection import Comparison, ParameterChange, compare
from tests.inspection.models import HOSTILE_NAMES, linear


def _is_same(comparison: Comparison) -> bool:
    """Whether nothing differs."""
    unchanged = all(row.grown == row.pruned == 0 and row.distance == 0 for row in comparison.rows)
    return unchanged and not comparison.only_before and not comparison.only_after


@functools.cache
def _base() -> nn.Module:
    return fedmef_fx.transform(linear(), Config(density=0.5, weight_storage="dense"))


def _sparse(active: list[int], value: float = 1.0) -> nn.Module:
    """`linear()` with given places of its 8 weights, all of one value, and biases 0."""
    model = copy.deepcopy(_base())
    mask = torch.zeros(8, dtype=torch.bool)
    mask[active] = True
    fedmef_fx.set_masks(model, {"fc.weight": mask.reshape(2, 4)})
    with torch.no_grad():
        model.get_parameter("fc.weight").copy_(mask.reshape(2, 4) * value)
        model.get_parameter("fc.bias").zero_()
    return model


def test_counts_and_distance_by_hand() -> None:
    comparison = compare(_sparse([0, 1, 2, 3]), _sparse([2, 3, 4], 3.0))
    (row,) = comparison.masked_rows
    assert (row.weights, row.active_before, row.active_after, row.kept, row.grown, row.pruned) == (8, 4, 3, 2, 1, 2)
    assert row.overlap == 2 / 5
    # Two weights went from 1 to 0, two from 1 to 3, one from 0 to 3: 1 + 1 + 4 + 4 + 9.
    assert row.distance == pytest.approx(19**0.5, rel=1e-12)
    assert row.relative_distance == pytest.approx(19**0.5 / 2, rel=1e-12)
    assert not _is_same(comparison)


@given(st.lists(st.integers(0, 7), unique=True), st.lists(st.integers(0, 7), unique=True))
@settings(max_examples=40)
def test_laws(before: list[int], after: list[int]) -> None:
    left, right = _sparse(before), _sparse(after)
    (there,), (back,) = compare(left, right).masked_rows, compare(right, left).masked_rows
    assert (there.grown, there.pruned, there.overlap) == (back.pruned, back.grown, back.overlap)
    assert there.kept + there.grown == len(after)
    union = set(before) | set(after)
    assert there.overlap == (len(set(before) & set(after)) / len(union) if union else 1.0)
    assert _is_same(compare(left, left))


def test_other_tensors_count_as_well() -> None:
    left, right = _sparse([0]), _sparse([0])
    assert _is_same(compare(left, right))
    with torch.no_grad():
        right.get_parameter("fc.bias").add_(2)
    comparison = compare(left, right)
    assert not _is_same(comparison)
    assert [row.parameter for row in comparison.rows if row.distance] == ["fc.bias"]
    assert "fc.bias" in str(comparison)
    assert comparison.total.distance == 0, "the total is that of the masked weights"


def test_a_transformed_model_against_its_original() -> None:
    model = linear()
    sparse = fedmef_fx.transform(model, Config(density=0.5, weight_storage="dense"))
    (row,) = compare(model, sparse).masked_rows
    assert (row.active_before, row.active_after, row.pruned, row.grown) == (8, 4, 4, 0)


def test_files_give_what_models_give(tmp_path: Path) -> None:
    left, right = _sparse([0, 1]), _sparse([1, 7], 2.0)
    for name, model in (("a", left), ("b", right)):
        fedmef_fx.save(model, tmp_path / name)
    from_files = compare(tmp_path / "a", str(tmp_path / "b"))
    assert from_files.rows == compare(left, right).rows
    assert from_files.after == str(tmp_path / "b")
    assert _is_same(compare(tmp_path / "a", left))


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    clients = [TensorDataset(torch.randn(20, 8), torch.randint(2, (20,))) for _ in range(2)]
    config = Config(density=0.5, adjustment_interval=1, weight_storage="dense")
    history = federated.run(net, clients, config, rounds=3, checkpoint_dir=directory, keep_rounds=True)
    assert sum(record.adjusted for record in history.rounds) > 0
    history.save(directory / "history.json")
    return directory


def test_rounds_of_a_run_show_the_churn_of_the_history(run_directory: Path) -> None:
    churn = [record.churn for record in federated.History.load(run_directory / "history.json").rounds]
    for index, expected in enumerate(churn):
        paths = [run_directory / f"round-{number:05d}.safetensors" for number in (index, index + 1)]
        comparison = compare(*paths)
        grown = {row.parameter: row.grown for row in comparison.masked_rows}
        assert grown == (expected or dict.fromkeys(grown, 0))
        assert all(row.grown == row.pruned for row in comparison.masked_rows), "an adjustment keeps the budget"
        assert comparison.total.distance > 0
    assert _is_same(compare(run_directory, run_directory / "round-00003.safetensors"))


def test_a_run_that_keeps_rounds_needs_a_directory() -> None:
    clients = [TensorDataset(torch.randn(4, 4), torch.randint(2, (4,)))]
    with pytest.raises(ConfigError, match="keep_rounds=True needs a directory"):
        federated.run(nn.Linear(4, 2), clients, rounds=1, keep_rounds=True)


def test_json_is_closed_and_has_no_infinities() -> None:
    left, right = _sparse([0]), _sparse([])
    with torch.no_grad():
        right.get_parameter("fc.bias").fill_(float("inf"))
    text = compare(left, right).to_json()
    document = json.loads(text)
    assert (document["schema"], document["version"]) == ("fedmef-fx/comparison", 1)
    assert next(row for row in document["parameters"] if row["parameter"] == "fc.bias")["distance"] is None
    assert document["total"]["pruned"] == 1


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_stay_in_their_place(name: str) -> None:
    row = ParameterChange(name, (2,), True, 2, 1, 1, 0.5, 1.0)
    comparison = Comparison(name, name, (row,), only_after=(name,))
    text, page = str(comparison), comparison._repr_html_()
    assert all(line.isprintable() for line in text.splitlines())
    assert len(text.splitlines()) == 5
    assert "<script" not in page
    assert page.count("<tr>") == 3
    assert max(map(len, text.splitlines()[2:])) < 300, "a name of 10,000 characters widens no table"


def test_states_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"0.weight is \[2, 4\] before and \[2, 5\] after"):
        compare(nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(5, 2)))
    with pytest.raises(ConfigError, match="no parameter in common"):
        compare(nn.Linear(4, 2), linear())
    with pytest.raises(ConfigError, match="got int; expected a model or the path"):
        compare(3, linear())  # type: ignore[arg-type]  # the mistake under test
    comparison = compare(nn.Linear(4, 2), nn.Linear(4, 2, bias=False))
    assert comparison.only_before == ("bias",)
    assert "only in before: bias" in str(comparison)


def test_files_that_are_none(tmp_path: Path, run_directory: Path) -> None:
    model = _sparse([0])
    fedmef_fx.save(model, tmp_path / "good")
    (tmp_path / "truncated").write_bytes((tmp_path / "good").read_bytes()[:-3])
    (tmp_path / "half").write_bytes((run_directory / "round-00001.safetensors").read_bytes()[:-3])
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "huge").write_bytes(b"\xff" * 8 + b"{}")
    (tmp_path / "empty").touch()
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    for name in ("truncated", "half", "text", "huge", "empty", "foreign", "absent", "."):
        with pytest.raises(CheckpointError):
            compare(tmp_path / name, model)


@pytest.mark.parametrize("shape", ["many", [-1], [2**40, 2**40], [4], [8.0], None])
def test_a_round_that_claims_wrong_shapes(tmp_path: Path, shape: object) -> None:
    fields = {"shapes": {"w": shape}, "version": 1}
    tensors = {"mask/w": torch.zeros(9, dtype=torch.uint8), "value/w": torch.zeros(3)}
    metadata = {"format": 1, "kind": "checkpoint", "digest": digest(tensors, fields), **fields}
    (tmp_path / "round").write_bytes(encode(tensors, metadata))
    with pytest.raises(CheckpointError):
        compare(tmp_path / "round", _sparse([0]))


def test_packed_weights_compare_like_dense_ones(tmp_path: Path) -> None:
    dense, packed = (
        fedmef_fx.transform(linear(), Config(density=0.5, weight_storage=storage)) for storage in ("dense", "packed")
    )
    fedmef_fx.load(_saved(dense, tmp_path), packed)
    assert _is_same(compare(dense, packed))
    assert _is_same(compare(_saved(packed, tmp_path), dense))


def _saved(model: nn.Module, folder: Path) -> Path:
    fedmef_fx.save(model, folder / "model.safetensors")
    return folder / "model.safetensors"
