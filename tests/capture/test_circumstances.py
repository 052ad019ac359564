"""Models in circumstances: wrapped, pruned, lazy, hooked, compiled, distributed, in other types; calls that vary."""

import copy
import gc
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fedmef_fx
from fedmef_fx import Config, coverage, growth_candidates, masks, report, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.dispatch import tables_in
from fedmef_fx.graph.emit import program_of
from tests import forked
from tests.capture.models import build
from tests.capture.test_any_model import IDENTITY, SPARSE, assert_masks_hold, assert_same, run, train


class Block(nn.Module):
    """Convolution and BatchNorm, specialised to shapes, with an optional argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x, mask=None):
        if x.shape[-1] > 4:
            x = x * 2
        y = torch.relu(self.norm(self.conv(x)))
        return y if mask is None else y * mask


class Model(nn.Module):
    """Python control flow around a block."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(6, 2)

    def forward(self, x):
        y = self.block(x)
        if y.sum() > 0:
            y = y * 2
        return self.head(y.mean((2, 3)))


def python_only(model):
    """A copy whose regions have no graphs, so that Python runs; layers keep theirs."""
    copied = copy.deepcopy(model)
    for _, table in tables_in(copied):
        table.entries = [entry for entry in table.entries if entry.role != "region"]
        table.attempts = 0
    return copied


@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
@pytest.mark.parametrize("training", [True, False])
def test_python_fallbacks_compute_what_the_graphs_compute(normalization, training):
    x = torch.randn(2, 3, 6, 6)
    sparse = transform(
        Model(), Config(density=0.5, normalization=normalization, weight_storage="dense"), example_inputs=(x,)
    )
    assert any(region.role == "fallback" for region in program_of(sparse).regions) == (normalization == "nsconv")
    fallback = python_only(sparse)
    left, right = (run(model, ((x,), {}), training=training) for model in (sparse, fallback))
    torch.testing.assert_close(left, right)
    train(fallback, lambda: ((torch.randn(3, 3, 5, 5),), {}))
    assert_masks_hold(fallback)


def test_other_kinds_of_calls_are_captured_when_they_are_made():
    x = torch.randn(2, 3, 6, 6)
    sparse = transform(Model(), Config(density=0.5, weight_storage="dense"), example_inputs=(x,)).eval()

    def graphs():
        return sum(len(r.graphs) for r in program_of(sparse).regions if r.role == "region")

    before = graphs()
    larger = torch.randn(5, 3, 6, 6)
    expected = python_only(sparse)(larger)
    torch.testing.assert_close(sparse(larger), expected)
    assert graphs() == before + 1
    sparse(larger)
    sparse.block(x, mask=torch.ones(6, 6))
    assert graphs() == before + 2
    train(sparse, lambda: ((larger,), {}))
    assert_masks_hold(sparse)


def test_without_example_inputs_regions_are_captured_at_the_first_call():
    model, inputs = build("shared")
    sparse = transform(model, SPARSE)
    assert {row.tier for row in coverage(sparse).rows} == {"module"}
    call = inputs()
    train(sparse, lambda: call)
    assert [r.path for r in program_of(sparse).regions if r.role == "region"] == [""]
    assert_masks_hold(sparse)


def test_bounded_number_of_captures():
    sparse = transform(Model(), SPARSE, example_inputs=(torch.randn(2, 3, 6, 6),)).eval()
    for size in range(3, 12):
        sparse(torch.randn(size, 3, 6, 6))
    assert sum(r.role == "region" for r in program_of(sparse).regions) <= 1 + 4


def test_masks_of_torch_prune_are_adopted():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    theirs = model[0].weight_mask.bool()
    sparse = transform(model, SPARSE, example_inputs=(torch.randn(2, 8),))
    ours = masks(sparse)["0.weight_orig"]
    assert not (ours & ~theirs).any()
    assert int(ours.sum()) > 0
    assert set(model.state_dict()) <= set(sparse.state_dict())
    train(sparse, lambda: ((torch.randn(2, 8),), {}))
    assert_masks_hold(sparse)


def test_old_style_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 6)
    model(x).sum().backward()  # its weight has a history now, which deepcopy refuses
    assert_same(model(x), transform(model, IDENTITY, example_inputs=(x,))(x))
    sparse = transform(model, Config(density=0.15, normalization="keep", weight_storage="dense"), example_inputs=(x,))
    train(sparse, lambda: ((torch.randn(3, 6),), {}))
    assert_masks_hold(sparse)
    assert "0.weight_v" in masks(sparse)
    assert all(p.isfinite().all() for p in sparse.parameters())


def test_a_weight_norm_whose_rows_are_masked_stays_finite():
    model, inputs = build("parametrized")
    sparse = transform(
        model, Config(density=0.1, activation_sparsity=0.0, weight_storage="dense"), example_inputs=inputs()[0]
    )
    assert (masks(sparse)["normed.parametrizations.weight.original1"].sum(1) == 0).any()
    train(sparse, inputs)
    assert all(p.isfinite().all() for p in sparse.parameters())


def test_lazy_layers():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ConfigError, match=r"parameter '0\.weight' has no shape yet; expected example inputs"):
        transform(model, SPARSE)
    x = torch.randn(2, 3, 6, 6)
    sparse = transform(model, SPARSE, example_inputs=(x,))
    assert coverage(sparse).graph_fraction == 1
    train(sparse, lambda: ((x,), {}))
    assert_masks_hold(sparse)


def test_a_compiled_model_is_unwrapped_with_a_notice():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    sparse = transform(torch.compile(model, backend="eager"), SPARSE)
    assert "unwrapped from torch.compile" in str(report(sparse)["capture"])
    assert "0.weight" in masks(sparse)


def test_a_distributed_model_is_refused_with_the_right_order():
    with pytest.raises(ConfigError, match=r"DataParallel\(fedmef_fx.transform\(model.module\)\)"):
        transform(nn.DataParallel(nn.Sequential(nn.Linear(4, 2))), SPARSE)


@pytest.mark.parametrize("name", ["attention", "data-dependent", "functional"])
def test_bfloat16(name):
    model, inputs = build(name)
    model = model.bfloat16()

    def half():
        return (inputs()[0][0].bfloat16(),), {}

    counterpart = transform(model, IDENTITY, example_inputs=half()[0])
    call = half()
    assert_same(run(model, call, training=False), run(counterpart, call, training=False))
    sparse = transform(model, SPARSE, example_inputs=half()[0])
    train(sparse, half)
    assert_masks_hold(sparse)


def why_no_bfloat16_lstm():
    """Why torch cannot run an LSTM in bfloat16 on this processor, in its own words; empty where it can."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nn.LSTM(4, 3)(torch.zeros(2, 1, 4))[0].sum().backward()
    except RuntimeError as error:
        return f"torch has no bfloat16 LSTM here: {error}"
    return ""


@pytest.mark.parametrize("name", ["attention", "data-dependent", "recurrent", "shared"])
def test_autocast(name):
    if name == "recurrent" and (reason := why_no_bfloat16_lstm()):
        pytest.skip(reason)
    model, inputs = build(name)
    counterpart = transform(model, IDENTITY, example_inputs=inputs()[0])
    sparse = transform(model, SPARSE, example_inputs=inputs()[0])
    call = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(model, call, training=False), run(counterpart, call, training=False))
        train(sparse, inputs)
    assert_masks_hold(sparse)


@pytest.mark.parametrize("name", ["attention", "shared", "data-dependent", "in-place"])
def test_conversion_after_the_transform(name):
    model, inputs = build(name)
    sparse = transform(model, SPARSE, example_inputs=inputs()[0]).double()

    def double():
        return (inputs()[0][0].double(),), {}

    train(sparse, double)
    assert_masks_hold(sparse)


def test_hooks_of_the_user_keep_running():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    seen = []
    model = Small()
    model.a.register_forward_hook(lambda *_: seen.append("a"))
    model.register_forward_hook(lambda *_: seen.append("root"))
    sparse = transform(model, SPARSE, example_inputs=(torch.randn(2, 4),))
    for counterpart in (sparse, copy.deepcopy(sparse)):
        seen.clear()
        counterpart(torch.randn(2, 4))
        assert seen == ["a", "root"]
        train(counterpart, lambda: ((torch.randn(2, 4),), {}))
        assert_masks_hold(counterpart)


@pytest.mark.parametrize("name", ["recurrent", "data-dependent", "attention"])
def test_growth_candidates_reach_every_tier(name):
    model, inputs = build(name)
    sparse = transform(model, SPARSE, example_inputs=inputs()[0])
    found = growth_candidates(sparse, lambda m, x: m(x).square().sum(), [inputs()[0][0] for _ in range(2)], k=2)
    read = {row.name for row in coverage(sparse).rows if row.masked and not row.name.startswith("other")}
    for key in read:
        inactive = ~masks(sparse)[key].flatten()
        assert len(found[key].positions) == min(2, int(inactive.sum())), key
        assert inactive[found[key].positions].all()


def test_set_masks_reaches_every_tier():
    model, inputs = build("data-dependent")
    sparse = transform(model, SPARSE, example_inputs=inputs()[0])
    flipped = {name: ~mask for name, mask in masks(sparse).items()}
    fedmef_fx.set_masks(sparse, flipped)
    train(sparse, inputs)
    assert_masks_hold(sparse)
    assert all(torch.equal(mask, flipped[name]) for name, mask in masks(sparse).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "shared", "data-dependent"])
def test_torch_compile_gives_equal_results(name):
    model, inputs = build(name)
    sparse = transform(model, SPARSE, example_inputs=inputs()[0]).eval()
    call = inputs()
    expected = run(sparse, call, training=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = run(torch.compile(sparse, backend="eager"), call, training=False)
    assert_same(expected, got)


def _distributed_worker(rank, path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for name in ("data-dependent", "attention", "recurrent"):
        model, inputs = build(name)
        sparse = transform(model, SPARSE, example_inputs=inputs()[0])
        parallel = nn.parallel.DistributedDataParallel(sparse, find_unused_parameters=True)
        torch.manual_seed(rank)
        train(parallel, inputs)
        assert_masks_hold(sparse)
        for parameter in sparse.parameters():
            other = parameter.detach().clone()
            torch.distributed.broadcast(other, 0)
            assert torch.equal(other, parameter)
        del parallel, sparse
    # Gloo's threads abort a process now and then that tears its group down while its peer still talks to it, or that
    # leaves them to the interpreter's exit. Everything is checked by now.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


@pytest.mark.slow
def test_distributed_data_parallel_on_two_processes(tmp_path):
    forked.run_in_two(_distributed_worker, tmp_path / "store", folder=tmp_path)
