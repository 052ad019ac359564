"""Products and attention with operands in 8 bits."""

import pytest
import torch
from torch.nn import functional as F

from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.ops.keeping import remasked
from fedmef_fx.ops.products import compressed_attention, compressed_matmul, compressed_mul
from fedmef_fx.packing import BlockwiseTensor

MULTIPLICATIONS = [((4, 5, 6), (4, 5, 6)), ((4, 5, 6), (4, 1, 1)), ((6,), (4, 5, 6)), ((4, 1, 6), (1, 5, 1))]
MATRICES = [
    ((5, 6), (6, 7)),
    ((3, 5, 6), (6, 7)),
    ((2, 3, 5, 6), (2, 3, 6, 7)),
    ((2, 1, 5, 6), (3, 6, 7)),
    ((5, 6), (3, 6, 7)),
    ((6,), (6, 7)),
    ((3, 5, 6), (6,)),
]


def operands(shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def decoded(*tensors):
    kept = [BlockwiseTensor.encode(t.detach()) for t in tensors]
    return kept, [k.unpack().requires_grad_() for k in kept]


def gradients(out, inputs, direction):
    return torch.autograd.grad(out, inputs, direction)


@pytest.mark.parametrize("shapes", MULTIPLICATIONS)
def test_multiplication(shapes):
    a, b = operands(shapes)
    assert torch.autograd.gradcheck(lambda a, b: compressed_mul(a, None, b, None), (a, b))
    kept, values = decoded(a, b)
    got = compressed_mul(a, kept[0], b, kept[1])
    assert torch.equal(got, a * b)
    direction = torch.randn_like(got)
    expected = gradients(values[0] * values[1], values, direction)
    assert all(map(torch.equal, gradients(got, (a, b), direction), expected))


@pytest.mark.parametrize("shapes", MATRICES)
def test_matrix_product(shapes):
    a, b = operands(shapes)
    assert torch.autograd.gradcheck(lambda a, b: compressed_matmul(a, None, b, None), (a, b))
    kept, values = decoded(a, b)
    got = compressed_matmul(a, kept[0], b, kept[1])
    assert torch.equal(got, a @ b)
    direction = torch.randn_like(got)
    expected = gradients(values[0] @ values[1], values, direction)
    for want, have in zip(expected, gradients(got, (a, b), direction), strict=True):
        assert torch.allclose(want, have, rtol=1e-12, atol=1e-12)  # another order of summation


def test_matrix_product_with_a_bias():
    a, b, bias = operands([(5, 6), (6, 7), (7,)])
    assert torch.equal(compressed_matmul(a, None, b, None, bias), torch.addmm(bias, a, b))
    assert torch.autograd.gradcheck(lambda *t: compressed_matmul(t[0], None, t[1], None, t[2]), (a, b, bias))


def test_an_operand_is_kept_only_for_the_gradient_of_the_other():
    a, b = torch.randn(40, 50, requires_grad=True), torch.randn(40, 50)
    for op in (compressed_mul, lambda a, ka, b, kb: compressed_matmul(a, ka, b.t(), kb)):
        hidden = a * 1
        with SavedTensors(a, b) as saved:
            kept = BlockwiseTensor.encode(hidden.detach())
            out = op(hidden, kept, b, None)
            del kept
        assert saved.nbytes == 0
        out.sum().backward()


def test_numbers_pass():
    assert compressed_mul(2, None, 3, None) == 6
    x = torch.ones(3, requires_grad=True)
    compressed_mul(x, None, 2.0, None).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_a_masked_weight_is_made_again():
    weight, mask = torch.randn(6, 7), torch.rand(6, 7) < 0.5
    handle = remasked(weight, mask)
    assert handle.nbytes == 0
    assert torch.equal(handle.unpack(), torch.where(mask, weight, 0.0))


def test_autocast_multiplies_in_low_precision():
    a, b = operands([(3, 5, 6), (6, 7)], torch.float32)
    kept, _ = decoded(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = compressed_matmul(a, kept[0], b, kept[1])
        assert torch.equal(got, a @ b)
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32
    assert torch.allclose(a.grad, b.detach().sum(1).expand_as(a), atol=0.1)  # bfloat16 has 8 bits


ATTENTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "boolean mask": {"attn_mask": torch.rand(1, 1, 9, 9) < 0.8},
    "additive mask": {"attn_mask": torch.randn(9, 9)},
}


def heads(dtype=torch.float32, tokens=9):
    return [torch.randn(2, 3, tokens, 16, dtype=dtype, requires_grad=True) for _ in range(3)]


def interleaved(tensors, kept):
    return [item for pair in zip(tensors, kept, strict=True) for item in pair]


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention(kind):
    options = ATTENTIONS[kind]
    tensors = heads()
    kept, values = decoded(*tensors)
    got = compressed_attention(*interleaved(tensors, kept), **options)
    assert torch.equal(got, F.scaled_dot_product_attention(*tensors, **options))
    direction = torch.randn_like(got)
    expected = gradients(F.scaled_dot_product_attention(*values, **options), values, direction)
    assert all(map(torch.equal, gradients(got, tensors, direction), expected))
    exact = compressed_attention(*interleaved(tensors, [None] * 3), **options)
    expected = gradients(F.scaled_dot_product_attention(*tensors, **options), tensors, direction)
    assert all(map(torch.equal, gradients(exact, tensors, direction), expected))


def test_attention_gradients_check():
    tensors = heads(torch.float64, tokens=4)
    assert torch.autograd.gradcheck(
        lambda *t: compressed_attention(*interleaved(t, [None] * 3), is_causal=True), tensors
    )


def test_a_trained_mask_gets_its_gradient():
    tensors, mask = heads(), torch.randn(9, 9, requires_grad=True)
    kept, values = decoded(*tensors)
    compressed_attention(*interleaved(tensors, kept), mask).sum().backward()
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*values, attn_mask=mask).sum(), mask)[0]
    assert torch.equal(mask.grad, expected)


def test_dropout_drops_the_same_again_and_leaves_the_generator_alone():
    tensors = heads()
    kept, values = decoded(*tensors)
    torch.manual_seed(5)
    got = compressed_attention(*interleaved(tensors, kept), dropout_p=0.4)
    after = torch.get_rng_state()
    torch.rand(3)
    direction = torch.randn_like(got)
    state = torch.get_rng_state()
    have = gradients(got, tensors, direction)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    at_kept = F.scaled_dot_product_attention(*values, dropout_p=0.4)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(map(torch.equal, have, gradients(at_kept, values, direction)))
    torch.manual_seed(5)
    assert torch.equal(got, F.scaled_dot_product_attention(*tensors, dropout_p=0.4))


def test_attention_keeps_neither_probabilities_nor_its_result():
    tensors = [t * 1 for t in heads(tokens=64)]
    with SavedTensors() as saved:
        kept = [BlockwiseTensor.encode(t.detach()) for t in tensors]
        out = compressed_attention(*interleaved(tensors, kept))
        del kept
    assert saved.by_kind() == {
        "dense": 0,
        "packed values": 0,
        "bitmap": 0,
        "8-bit": sum(t.numel() + t.numel() // 256 * 8 for t in tensors),
    }
    out.sum().backward()
    assert saved.nbytes == 0
