"""`compress-saved`: whole models keep 8 bits; forward is exact, gradients are close, nothing stays behind."""

import contextlib
import copy
import functools
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx import Config, freeze, report, transform
from fedmef_fx.capture import capture_graphs
from fedmef_fx.graph.pipeline import Pipeline
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.models import resnet18
from fedmef_fx.ops.keeping import KeepActivation
from fedmef_fx.ops.norms import compressed_batch_norm_module, compressed_norm
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.ops.products import compressed_mul
from fedmef_fx.ops.smooth import compressed_activation, compressed_result
from fedmef_fx.packing.registry import held_buffers
from fedmef_fx.sparse_model.transformation import Transformation
from fedmef_fx.transformation.recipe import memory_passes, passes_of
from tests.models import ZOO, Residual, build
from tests.transformer_models import TRANSFORMERS, ViT

EXACT = Config(density=0.5, normalization="keep", activation_sparsity=0.0, weight_storage="dense")
INT8 = EXACT.replace(saved_precision="int8")
INT4, INT2 = (EXACT.replace(saved_precision=precision) for precision in ("int4", "int2"))
PRUNED = INT8.replace(activation_sparsity=0.9)


def made(name):
    if name in ZOO:
        return build(name)
    make, inputs = TRANSFORMERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(), inputs()


def counterpart(name, config):
    """A transformed model and inputs for it. Only what fixes its sizes when it is traced needs an example."""
    model, inputs = made(name)
    return transform(model, config, example_inputs=inputs if name == "gpt" else None), inputs


@functools.cache
def exact_steps(name):
    """Of a model that keeps everything as it is: outputs and buffers in training, in evaluation, in training."""
    model, inputs = counterpart(name, EXACT)
    found = []
    for training in (True, False, True):
        outputs, _ = step(model.train(training), inputs)
        found.append(([out.detach() for out in outputs], {key: value.clone() for key, value in model.named_buffers()}))
    return found


def tensors(result):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def step(model, inputs):
    """Outputs and gradients of one step with fixed random numbers."""
    model.zero_grad()
    torch.manual_seed(1)
    outputs = tensors(model(*inputs))
    sum(out.float().square().mean() for out in outputs).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model, inputs):
    with SavedTensors(model, *inputs) as saved:
        out = model(*inputs)
    nbytes = saved.nbytes
    sum(t.float().sum() for t in tensors(out)).backward()
    assert saved.nbytes == 0
    return nbytes


def targets(model):
    return [node.target for node in model.graph.nodes]


@pytest.mark.parametrize("config", [INT8, INT4, INT2, PRUNED], ids=["int8", "int4", "int2", "pruned"])
@pytest.mark.parametrize("name", [*ZOO, *TRANSFORMERS])
def test_forward_buffers_and_modes_are_exact(name, config):
    ours, inputs = counterpart(name, config)
    for training, (outputs, buffers) in zip((True, False, True), exact_steps(name), strict=True):
        got, _ = step(ours.train(training), inputs)
        assert len(got) == len(outputs)
        assert all(map(torch.equal, outputs, got))
        assert all(torch.equal(value, ours.get_buffer(key)) for key, value in buffers.items())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_fewer_bits_take_less_and_err_more(name):
    _, exact = step(*counterpart(name, EXACT))
    errors, sizes = [], []
    for config in (INT8, INT4, INT2):
        model, inputs = counterpart(name, config)
        _, got = step(model, inputs)
        errors.append(sum((got[key] - exact[key]).square().sum() for key in exact).sqrt())
        sizes.append(kept_bytes(model, inputs))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    total = sum(value.square().sum() for value in exact.values()).sqrt()
    # One step in 15 of a range of six deviations, and one in 3: what BatchNorm and softmax make of them.
    assert errors[0] < errors[1] < 0.5 * total
    assert errors[1] < errors[2] < 2.0 * total


@pytest.mark.parametrize("config", [INT4, INT2], ids=["int4", "int2"])
def test_infinities_in_few_bits_break_no_softmax(config):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(16, 16)

        def forward(self, x):
            scores = self.mix(x) @ x.mT
            masked = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf"))
            return torch.log_softmax(masked, -1).nan_to_num(neginf=0.0) @ x

    torch.manual_seed(0)
    _, got = step(transform(Attention(), config), (torch.randn(2, 8, 16, requires_grad=True),))
    assert all(bool(value.isfinite().all()) for value in got.values())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gradients_point_where_the_exact_ones_do(name):
    _, expected = step(*counterpart(name, EXACT))
    _, got = step(*counterpart(name, INT8))
    assert got.keys() == expected.keys()
    # 8 bits of a normal block have an error of 1 to 2 % of its deviation; BatchNorm's backward subtracts its mean parts
    # and thereby magnifies it, to 7 % on the smallest gradients of these models.
    whole = sum((got[key] - expected[key]).square().sum() for key in got).sqrt()
    assert whole < 0.05 * sum(value.square().sum() for value in expected.values()).sqrt()
    for key, value in expected.items():
        if value.norm() > 1e-4 * max(v.norm() for v in expected.values()):
            assert F.cosine_similarity(got[key].flatten(), value.flatten(), dim=0) > 0.99, key


@pytest.mark.parametrize(
    ("name", "int8", "pruned"),
    [
        ("gpt", 0.3, 0.3),
        ("vit", 0.25, 0.22),
        ("fused vit", 0.22, 0.2),
        ("gated", 0.45, 0.25),
        ("squeeze-excite", 0.4, 0.22),
    ],
)
def test_held_bytes_fall(name, int8, pruned):
    dense = kept_bytes(*counterpart(name, EXACT))
    assert kept_bytes(*counterpart(name, INT8)) < int8 * dense
    assert kept_bytes(*counterpart(name, PRUNED)) < pruned * dense


def test_held_bytes_fall_where_batch_norm_stays():
    model, inputs = resnet18(), (torch.randn(2, 3, 32, 32),)
    dense = kept_bytes(transform(model, EXACT), inputs)
    without = kept_bytes(transform(model, PRUNED.replace(saved_precision="exact")), inputs)
    ours = transform(model, PRUNED)
    assert targets(ours).count(compressed_batch_norm_module) == 20
    # Per element of a convolution's result: 1 byte for BatchNorm, a bit for ReLU, half a byte for the next layer; dense
    # are 8, or 4 where ReLU worked in place. Masked weights are kept by neither.
    assert kept_bytes(ours, inputs) < 0.35 * without < 0.35 * dense


@pytest.mark.parametrize("name", ["vit", "gpt", "squeeze-excite"])
def test_copies_pickles_and_frozen_models_compute_the_same(name):
    ours, inputs = counterpart(name, PRUNED)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # noqa: S301 -- our own bytes
        assert kept_bytes(copied, inputs) > 0
    plain = freeze(ours)
    ours.eval()
    with torch.no_grad():
        for want, have in zip(tensors(ours(*inputs)), tensors(plain(*inputs)), strict=True):
            assert torch.allclose(want, have, rtol=1e-4, atol=1e-5)  # BatchNorm folds into weights
    assert not any(type(module).__module__.startswith("fedmef_fx") for module in plain.modules())


def test_one_copy_serves_all_readers():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.norm = nn.LayerNorm(16)

        def forward(self, x):
            x = self.a(x)
            gate = torch.sigmoid(x)  # its result serves both
            y = F.gelu(x) * gate  # GELU's result is computed again from x
            return self.b(x) + self.c(self.norm(x)) * gate + y

    sparse = transform(Block(), PRUNED)
    assert targets(sparse).count(compressed_activation) == 1
    assert targets(sparse).count(compressed_result) == 1
    sites = [node for node in sparse.graph.nodes if isinstance(node.target, str) and "fedmef_sites" in node.target]
    assert [site.args[0].name for site in sites if isinstance(sparse.get_submodule(site.target), KeepActivation)] == [
        "pruned_linear",
        "pruned_linear_2",  # c's result, the other operand of a product
    ]
    assert not [site for site in sites if isinstance(sparse.get_submodule(site.target), PackActivation)]
    x = torch.randn(64, 16)
    with SavedTensors(sparse, x) as saved:
        out = sparse(x)
    # x, sigmoid(x) and c's result; a's input is the caller's and b, c take theirs from x.
    assert saved.by_kind() == {"dense": 0, "packed values": 0, "bitmap": 0, "8-bit": 3 * (1024 + 4 * 8)}
    out.sum().backward()


def test_what_something_else_keeps_is_not_kept_twice():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            gelu_of_input = F.gelu(x)
            x = self.a(x)
            return self.b(F.gelu(x)) * torch.cumprod(x, 0) + gelu_of_input, torch.tanh(x)

    sparse = transform(Kept(), PRUNED)
    reasons = {(r.where, r.reason) for r in report(sparse)["compress-saved"].refusals}
    assert ("x", "stays dense: an input of the model, which its caller holds") in reasons
    assert ("linear", "stays dense: cumprod keeps its input") in reasons
    assert ("tanh", "stays dense: returned by the model") in reasons
    assert compressed_result not in targets(sparse)


def test_refusals_have_reasons():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.tracking = nn.InstanceNorm2d(4, track_running_stats=True)
            self.hooked = nn.GELU()
            self.hooked.register_forward_hook(lambda *_: None)

        def forward(self, x):
            x = self.hooked(self.a(x))
            y = self.tracking(self.b(x))
            z = F.silu(y, inplace=True)
            return z.softmax(None) + y if False else z + y.mean()

    sparse = transform(Odd(), PRUNED)
    reasons = {r.where: r.reason for r in report(sparse)["compress-saved"].refusals}
    assert reasons == {
        "hooked": "it has hooks or parametrizations, which need the module call",
        "tracking": "it tracks statistics of the batch",
        "silu": "it works in place on a tensor with other users",
    }


def test_tiny_tensors_stay_as_they_are_and_say_so():
    sparse = transform(nn.Sequential(nn.Linear(4, 2), nn.GELU(), nn.Linear(2, 1)), INT8)
    x = torch.randn(1, 4)
    out = sparse(x)
    sites = [module for module in sparse.modules() if isinstance(module, KeepActivation)]
    assert [site.reason for site in sites] == ["keeps dense: 10 bytes against 8"]
    out.sum().backward()


def test_a_bitmap_that_would_lose_is_not_used():
    config = Config(density=1.0, activation_sparsity=0.01, weight_storage="dense")
    sparse = transform(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2)), config)
    x = torch.randn(32, 8)
    with SavedTensors(sparse, x) as saved:
        out = sparse(x)
    assert saved.by_kind() == {"dense": 32 * 64 * 4, "packed values": 0, "bitmap": 0, "8-bit": 0}
    (site,) = [module for module in sparse.modules() if isinstance(module, PackActivation)]
    assert site.reason.startswith("keeps dense: ")
    out.sum().backward()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packed_values_of_16_bits_take_half(dtype):
    model, x = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 2)), torch.randn(64, 8)
    kinds, grads = {}, {}
    for value_dtype in ("same", dtype):
        sparse = transform(
            model, Config(density=1.0, activation_sparsity=0.8, packed_dtype=value_dtype, weight_storage="dense")
        )
        with SavedTensors(sparse, x) as saved:
            out = sparse(x)
        kinds[value_dtype] = saved.by_kind()
        out.sum().backward()
        grads[value_dtype] = sparse.get_parameter("2.weight").grad
    assert kinds[dtype]["packed values"] * 2 == kinds["same"]["packed values"]
    assert kinds[dtype]["bitmap"] == kinds["same"]["bitmap"]
    # A sum of positive values, each rounded to 8 bits or more of mantissa.
    assert torch.allclose(grads[dtype], grads["same"], rtol=2**-8)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_exceptions_leave_no_buffers(where):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("on purpose")

    fails = False

    def hook(_, __, out):
        if fails and where == "forward":
            raise ArithmeticError("on purpose")
        return Failing.apply(out) if fails else out

    gc.collect()
    before = len(held_buffers())
    model, x = ViT(fused=True), torch.randn(2, 3, 32, 32)
    model.blocks = nn.Sequential(model.blocks[0], nn.Identity(), model.blocks[1])
    model.blocks[1].register_forward_hook(hook)
    sparse = transform(model, PRUNED)
    for fails in (True, False):
        with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
            sparse(x).sum().backward()
        gc.collect()
        assert len(held_buffers()) == before


def test_many_steps_leave_nothing():
    sparse, (x,) = transform(ViT(fused=False), PRUNED), TRANSFORMERS["vit"][1]()
    optimizer = torch.optim.AdamW(sparse.parameters())
    gc.collect()
    before, sizes = len(held_buffers()), []
    for _ in range(4):
        optimizer.zero_grad()
        with SavedTensors(sparse, x) as saved:
            loss = sparse(x).square().mean()
        sizes.append(saved.by_kind()["8-bit"])
        loss.backward()
        optimizer.step()
        assert saved.nbytes == 0
    del loss
    assert len(set(sizes)) == 1
    assert len(held_buffers()) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model, x = ViT(fused=True).to(dtype), torch.randn(2, 3, 32, 32).to(dtype)
    exact, ours = transform(model, EXACT), transform(model, INT8)
    (expected,), grads = step(exact, (x,))
    (got,), approximate = step(ours, (x,))
    assert torch.equal(expected, got)
    assert all(approximate[name].dtype == dtype for name in grads)
    weight = "blocks.1.mlp.0.weight"
    assert F.cosine_similarity(grads[weight].flatten(), approximate[weight].flatten(), dim=0) > 0.99


def test_autocast():
    model, x = ViT(fused=True), torch.randn(2, 3, 32, 32)
    exact, ours = transform(model, EXACT), transform(model, INT8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        expected = exact(x)
        torch.manual_seed(1)
        got = ours(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(expected, got)
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


def test_a_frozen_batch_norm_in_a_training_model_stays_frozen():
    model = Residual()
    model.norm1.eval()
    exact, ours = transform(model, EXACT), transform(model, INT8)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(exact(x), ours(x))
    assert torch.equal(ours.norm1.running_mean, torch.zeros(16))
    assert not torch.equal(ours.norm.running_mean, torch.zeros(8))
    ours.norm.eval()
    before = ours.norm.running_mean.clone()
    ours(x)
    assert torch.equal(ours.norm.running_mean, before)


def test_the_pass_is_idempotent_and_named():
    steps = passes_of(PRUNED)
    assert [p.name for p in steps][-3:] == ["compress-saved", "shrink-saved", "prune-activations"]
    assert "compress-saved" not in [p.name for p in passes_of(PRUNED.replace(saved_precision="exact"))]
    assert memory_passes(EXACT) == ()
    for name in ("residual", "pre_activation", "conv3d", "drop_path"):
        model, _ = build(name)
        program = Program(model, [Region("", model, capture_graphs(model))], Transformation(PRUNED))
        Pipeline(steps, after_pass=Verifier.of(program)).run(program)
        before = [str(graph) for _, _, graph in program.graphs()]
        for again in steps[-3:]:
            assert not [name for name in again.run(program).rewrites if "linear" not in name]
        assert [str(graph) for _, _, graph in program.graphs()] == before


def test_graph_text():
    sparse = transform(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), INT8)
    names = [str(getattr(t, "__name__", t)) for t in targets(sparse)]
    assert names[names.index("pruned_linear") : names.index("compressed_norm") + 2] == [
        "pruned_linear",
        "fedmef_sites.linear",
        "1.weight",
        "1.bias",
        "compressed_norm",
        "recomputed",
    ]
    assert compressed_norm in targets(sparse)
    assert compressed_mul not in targets(sparse)


@pytest.mark.slow
def test_compile_works_as_it_does_without_the_codecs():
    model, x = ViT(fused=True), torch.randn(2, 3, 32, 32)
    results = {}
    for name, config in (("plain", EXACT.replace(activation_sparsity=0.5)), ("int8", PRUNED)):
        sparse = transform(model, config).eval()
        try:
            # What the compiler warns of once in a process would stop the first model and not the second.
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                results[name] = torch.compile(sparse, backend="eager")(x)
        except Exception as error:
            results[name] = type(error)
    torch._dynamo.reset()
    assert type(results["plain"]) is type(results["int8"])
    if isinstance(results["plain"], torch.Tensor):
        assert torch.allclose(results["plain"], results["int8"])
