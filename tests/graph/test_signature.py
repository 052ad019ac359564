"""Calls that look alike are served by one graph."""

import torch
from torch import Tensor, nn

from fedmef_fx.graph.signature import Call, Signature


class _Scale(nn.Module):
    def forward(self, x: Tensor, factor: object = 1, *, mask: Tensor | None = None) -> Tensor:
        return x


def _call(*args: object, **kwargs: object) -> Call:
    call = Call.of(_Scale(), args, kwargs)
    assert call is not None
    return call


def test_defaults_and_keywords_make_no_difference() -> None:
    x = torch.ones(2, 3)
    signature = Signature.of(_call(x), exact=False)

    assert all(signature.accepts(call) for call in (_call(x=x), _call(x, 1), _call(x, mask=None)))


def test_other_values_types_dtypes_and_ranks_are_other_calls() -> None:
    x = torch.ones(2, 3)
    signature = Signature.of(_call(x), exact=False)

    assert not any(signature.accepts(call) for call in (_call(x, 2), _call(x, True), _call(x.double()), _call(x[0])))


def test_only_an_exact_signature_minds_the_shape() -> None:
    call, longer = _call(torch.ones(2, 3)), _call(torch.ones(5, 3))

    assert Signature.of(call, exact=False).accepts(longer)
    assert not Signature.of(call, exact=True).accepts(longer)


def test_arguments_that_forward_does_not_take_are_no_call() -> None:
    assert Call.of(_Scale(), (), {"y": torch.ones(1)}) is None
    assert _call(torch.ones(1), object()).opaque == "object"
