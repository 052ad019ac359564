"""What each kind of report carries over the wire, and what a receiver refuses."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedmef_fx.errors import WireError
from fedmef_fx.federated.messages import RoundTask, Update
from fedmef_fx.federated.positions import pack_positions
from fedmef_fx.federated.state import ModelState, Schema, TensorSpec
from fedmef_fx.federated.wire import decode_broadcast, decode_update, encode_broadcast, encode_update
from fedmef_fx.files import container
from fedmef_fx.packing.bitmap import pack_bits
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

MASK = torch.tensor([True, True, False, True, False, False, False, False, False, False])
STATE = ModelState(2, {"w": MASK}, {"w": torch.tensor([1.0, 2.0, 3.0])}, {"b": torch.zeros(2)})
SCHEMA = Schema({"w": TensorSpec(torch.Size([10]), torch.float32)}, {"b": TensorSpec(torch.Size([2]), torch.float32)})
COUNTS = {"w": 2}
OWN = torch.tensor([True, False, True, True, False, False, False, False, False, False])
EMPTY = Update(
    round_index=2, samples=5, loss=0.5, peak_saved_bytes=7, values={"w": torch.ones(3)}, dense={"b": torch.zeros(2)}
)
CANDIDATES = {"w": SparseGradient(torch.tensor([2, 9]), torch.tensor([0.5, 0.25]), 10)}
UPDATES = {
    "positions": dataclasses.replace(EMPTY, votes={"w": torch.tensor([4, 9])}),
    "masks": dataclasses.replace(EMPTY, masks={"w": OWN}),
    "squares": dataclasses.replace(EMPTY, scores={"w": torch.arange(10.0)}),
    "fisher": dataclasses.replace(EMPTY, scores={"w": torch.arange(3.0)}, gradients=CANDIDATES),
    "gradient": dataclasses.replace(EMPTY, values={}, scores={"w": -torch.arange(10.0)}),
    "saliency": dataclasses.replace(EMPTY, values={}, scores={"w": torch.arange(10.0)}),
}
OPENINGS = ("gradient", "saliency")


def _task(report: str) -> RoundTask:
    return RoundTask(2, 9, None if report in OPENINGS else COUNTS, report)  # type: ignore[arg-type]  # a name of a report


@pytest.mark.parametrize("report", sorted(UPDATES))
def test_every_report_survives_the_wire(report: str) -> None:
    task, update = _task(report), UPDATES[report]
    message = encode_broadcast(task, STATE, changed={"w": 0, "b": 0})
    assert decode_broadcast(message, SCHEMA)[0] == task
    found = decode_update(encode_update(update, received=STATE), task=task, sent=STATE)
    for field in ("values", "votes", "scores", "masks"):
        sent, received = getattr(update, field), getattr(found, field)
        assert sent.keys() == received.keys()
        assert all(torch.equal(sent[name], received[name]) for name in sent)
    assert found.gradients.keys() == update.gradients.keys()
    for name, gradient in update.gradients.items():
        assert torch.equal(found.gradients[name].values, gradient.values)


def test_no_report_travels_in_ordinary_rounds() -> None:
    task = RoundTask(2, 9, None, "squares")
    assert decode_update(encode_update(EMPTY, received=STATE), task=task, sent=STATE).scores == {}
    with pytest.raises(WireError, match="unknown tensors"):
        decode_update(encode_update(UPDATES["squares"], received=STATE), task=task, sent=STATE)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("report", "change", "message"),
    [
        ("positions", lambda t: t.pop("position/w"), "'position/w': got nothing"),
        ("positions", lambda t: t.update({"position/w": pack_positions(torch.tensor([0, 9]))}), "of active weights"),
        ("positions", lambda t: t.update({"position/w": pack_positions(torch.tensor([2, 4, 9]))}), "3 positions"),
        ("positions", lambda t: t.update({"gradient/w": torch.ones(2)}), "unknown tensors"),
        ("positions", lambda t: t.update({"position/w": torch.full((2,), 255, dtype=torch.uint8)}), "complete ones"),
        ("masks", lambda t: t.pop("mask/w"), "'mask/w' is missing"),
        ("masks", lambda t: t.update({"mask/w": pack_bits(torch.ones(10, dtype=torch.bool))}), "10 active weights"),
        ("masks", lambda t: t.update({"mask/w": torch.zeros(9, dtype=torch.uint8)}), "'mask/w': got"),
        ("squares", lambda t: t.pop("score/w"), "'score/w' is missing"),
        ("squares", lambda t: t.update({"score/w": torch.ones(3)}), "'score/w': got"),
        ("squares", lambda t: t.update({"score/w": torch.full((10,), torch.nan)}), "NaN"),
        ("fisher", lambda t: t.update({"score/w": torch.ones(10)}), "'score/w': got"),
        ("fisher", lambda t: t.pop("gradient/w"), "no growth candidates"),
        ("saliency", lambda t: t.update({"value/w": torch.ones(3)}), "unknown tensors"),
    ],
)
def test_what_is_no_such_report_is_refused(report: str, change: Change, message: str) -> None:
    tensors, fields = container.decode(encode_update(UPDATES[report], received=STATE))
    change(tensors)
    with pytest.raises(WireError, match=message):
        decode_update(container.encode(tensors, fields), task=_task(report), sent=STATE)


@pytest.mark.parametrize("report", ["nonsense", 3, None, ["masks"], {}])
def test_a_report_that_nobody_knows_is_refused(report: object) -> None:
    tensors, fields = container.decode(encode_broadcast(_task("masks"), STATE, changed={"w": 0, "b": 0}))
    with pytest.raises(WireError, match="broadcast: report"):
        decode_broadcast(container.encode(tensors, {**fields, "report": report}), SCHEMA)
