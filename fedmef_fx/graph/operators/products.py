"""Products: what multiplies tensors with each other, among them all layers."""

import dataclasses
import operator
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx.graph.operators.operator import Keeps, Operator

__all__ = ["ROWS", "Layer"]

_LAYER = ("input", "weight", "bias")
_ANY = ("*",)
_ATTENTION_WEIGHTS = ("in_proj_weight", "out_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer(Operator):
    """A convolution or linear layer; its weight, `[out, in/groups, *kernel]`, and bias follow its input.

    Attributes:
        spatial: Spatial dimensions; 0 for a linear layer.
        transposed: Whether it is a transposed convolution, whose weight is `[in, out/groups, *kernel]`.
    """

    keeps: Keeps = "inputs"
    weights: tuple[str, ...] = ("weight",)
    has_rows: bool = True
    spatial: int = 0
    transposed: bool = False


def _convolution(spatial: int, module: type[nn.Module]) -> Layer:
    geometry = ("stride", "padding", "dilation", "groups")
    return Layer.of_torch(
        f"conv{spatial}d",
        modules=(module,),
        kind="conv",
        options=geometry,
        signature=(*_LAYER, *geometry),
        spatial=spatial,
    )


def _transposed(spatial: int, module: type[nn.Module]) -> Layer:
    return Layer.of_torch(
        f"conv_transpose{spatial}d",
        modules=(module,),
        kind="conv",
        options=("stride", "padding", "dilation", "groups", "output_padding"),
        signature=(*_LAYER, "stride", "padding", "output_padding", "groups", "dilation"),
        spatial=spatial,
        transposed=True,
    )


def _matrix_product(name: str, *aliases: str, **facts: Any) -> Operator:
    facts = {"signature": ("input", "other")} | facts
    return Operator.of_torch(name, *aliases, keeps="inputs", weights=_ANY, in_8_bits="product", **facts)


def _other_product(name: str, *aliases: str) -> Operator:
    return Operator.of_torch(name, *aliases, weights=_ANY)


def _opaque(name: str, *modules: type[nn.Module], weights: tuple[str, ...] = _ANY, **facts: Any) -> Operator:
    return Operator.of_torch(name, modules=modules, weights=weights, has_rows=True, **facts)


def _cell(name: str, *modules: type[nn.Module]) -> Operator:
    signature = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    return _opaque(name, *modules, weights=("w_ih", "w_hh"), signature=signature, is_composite=bool(modules))


def _lookup(name: str, module: type[nn.Module], **facts: Any) -> Operator:
    return Operator.of_torch(
        name,
        spaces=(F,),
        modules=(module,),
        options=("weight", "max_norm"),
        kind="embedding",
        has_other_parameters=True,
        sizes=(("embedding_dim", "weight", 1),),
        **facts,
    )


ROWS: Final = (
    Layer.of_torch("linear", modules=(nn.Linear,), kind="linear", signature=_LAYER),
    _convolution(1, nn.Conv1d),
    _convolution(2, nn.Conv2d),
    _convolution(3, nn.Conv3d),
    _transposed(1, nn.ConvTranspose1d),
    _transposed(2, nn.ConvTranspose2d),
    _transposed(3, nn.ConvTranspose3d),
    # Of other subclasses it is known how their weight lies, not what they compute.
    Layer(name="convolution", modules=(nn.modules.conv._ConvNd,)),
    Layer(name="transposed_convolution", modules=(nn.modules.conv._ConvTransposeNd,), transposed=True),
    _lookup("embedding", nn.Embedding, keeps="nothing"),  # its indices only
    _lookup("embedding_bag", nn.EmbeddingBag),
    _matrix_product("matmul", "__matmul__", "__rmatmul__", functions=(torch.matmul, operator.matmul), kind="matmul"),
    _matrix_product("bmm", kind="matmul"),
    _matrix_product("mm", kind="matmul"),
    _matrix_product("addmm", signature=("bias", "input", "other")),
    _other_product("addbmm"),
    _other_product("baddbmm"),
    _other_product("einsum"),
    _other_product("grouped_mm", "_grouped_mm"),
    _other_product("mv"),
    _other_product("tensordot"),
    Operator.of_torch(
        "bilinear",
        modules=(nn.Bilinear,),
        signature=("input1", "input2", "weight", "bias"),
        weights=("weight",),
        is_composite=True,
    ),
    _opaque("gru", nn.GRU),
    _opaque("lstm", nn.LSTM),
    _opaque("rnn_relu"),
    _opaque("rnn_tanh", nn.RNN, nn.RNNBase),
    _cell("gru_cell", nn.GRUCell),
    _cell("lstm_cell", nn.LSTMCell),
    _cell("rnn_relu_cell"),
    _cell("rnn_tanh_cell", nn.RNNCell, nn.RNNCellBase),
    _opaque("multi_head_attention_forward", nn.MultiheadAttention, weights=_ATTENTION_WEIGHTS, is_composite=True),
    Operator.of_torch(
        "scaled_dot_product_attention",
        signature=("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        kind="attention",
        in_8_bits="attention",
    ),
    Operator(
        name="transformer",
        modules=(
            nn.Transformer,
            nn.TransformerDecoder,
            nn.TransformerDecoderLayer,
            nn.TransformerEncoder,
            nn.TransformerEncoderLayer,
        ),
        is_composite=True,
    ),
)
