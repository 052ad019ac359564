"""Updates that are malformed, foreign or forged: none is averaged, each is refused with its reason."""

import copy
import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError, WireError
from fedmef_fx.federated import METHODS, Client, Limits, LocalTraining, Server
from fedmef_fx.federated.positions import pack_positions
from fedmef_fx.federated.wire import encode_update
from fedmef_fx.files import container

CLIENT: Final = 3
SAMPLES: Final = 12
CONFIG: Final = Config(density=0.3, normalization="keep", adjustment_interval=1, weight_storage="dense")


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    return fedmef_fx.transform(nn.Sequential(*layers), CONFIG)


def _data(samples: int = SAMPLES) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 1, 4, 4), torch.randint(3, (samples,)))


class _Round:
    """A server in its first adjustment round, and a client's sound answer."""

    def __init__(self, *, seed: int = 0, run: str = "this run", client: int = CLIENT, samples: int = SAMPLES) -> None:
        self.server = Server(
            _network(), method=METHODS["fedtiny"], rounds=9, samples={CLIENT: SAMPLES, 7: SAMPLES}, run=run
        )
        training = LocalTraining(batch_size=4, learning_rate=0.01)
        device = Client(_network(), training)
        torch.manual_seed(seed)
        data = _data(samples)
        for _ in range(2):
            self.state, self.task = self.server.state, self.server.task()
            self.answer = device.answer(self.server.broadcast(client), data, client=client)
            if self.task.counts is None:
                sound = self.server.receive(CLIENT, self.answer)
                self.server.finish_round({CLIENT: sound})
                self.earlier = self.answer


@pytest.fixture(scope="module")
def sound() -> _Round:
    return _Round()


Tensors = dict[str, Tensor]
Fields = dict[str, Any]
Change = Callable[[Tensors, Fields], object]


def _forged(answer: bytes, change: Change) -> bytes:
    """A changed message with a checksum that fits."""
    tensors, fields = container.decode(answer)
    fields.pop("checksum")
    change(tensors, fields)
    return container.encode(tensors, fields | {"checksum": container.digest(tensors, fields)})


def _field(name: str, value: object) -> Change:
    return lambda _, fields: fields.update({name: value})


def _tensor(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: Tensors, _: Fields) -> None:
        tensors[name] = value(tensors[name])

    return change


def _first(number: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = number
        return tensor

    return change


def _without(table: str, name: str) -> Change:
    return lambda tensors, fields: {"tensor": tensors, "field": fields}[table].pop(name)


def _with(name: str, value: Tensor) -> Change:
    return lambda tensors, _: tensors.update({name: value})


WEIGHT = "value/0.weight"
KINDS: dict[str, tuple[Change, str]] = {
    # from elsewhere
    "another run": (_field("run", "that run"), "another run"),
    "run of another type": (_field("run", ["this run"]), "another run"),
    "no run": (_without("field", "run"), "got fields"),
    "other masks": (_field("masks", "0" * 32), "other masks"),
    "masks of another type": (_field("masks", None), "other masks"),
    "no masks": (_without("field", "masks"), "got fields"),
    "another client": (_field("client", 7), "another client's update"),
    "client of another type": (_field("client", "3"), "client"),
    "client as a number that is equal": (_field("client", 3.0), "client"),
    "a negative client": (_field("client", -1), "client"),
    "no client": (_without("field", "client"), "got fields"),
    "an earlier round": (_field("round", 0), "round: got 0"),
    "a later round": (_field("round", 2), "round: got 2"),
    "round as a truth": (_field("round", True), "round: got True"),
    "another format": (_field("format", 2), "expected 1, 'update'"),
    "another kind": (_field("kind", "broadcast"), "expected 1, 'update'"),
    "an unknown field": (_field("weight", 1e9), "got fields"),
    # what it says of itself
    "more samples than declared": (_field("samples", 13), "which this client declared"),
    "2^53 samples": (_field("samples", 2**53), "which this client declared"),
    "no samples": (_field("samples", 0), "samples: got 0"),
    "negative samples": (_field("samples", -12), "samples: got -12"),
    "samples as a float": (_field("samples", 12.0), "samples"),
    "a huge loss": (_field("loss", 1e300), "loss: got 1e"),
    "loss as text": (_field("loss", "0.5"), "loss"),
    "negative memory": (_field("peak_saved_bytes", -1), "peak_saved_bytes"),
    # weights
    "values of 3e38": (_tensor(WEIGHT, _first(3e38)), r"up to 3e\+38"),
    "values of -3e38": (_tensor(WEIGHT, _first(-3e38)), r"up to 3e\+38"),
    "NaN": (_tensor(WEIGHT, _first(torch.nan)), "NaN"),
    "infinite values": (_tensor(WEIGHT, _first(-torch.inf)), "infinite"),
    "a norm out of range": (_tensor(WEIGHT, lambda t: torch.full_like(t, 1e5)), "norm"),
    "too few values": (_tensor(WEIGHT, lambda t: t[1:]), "expected torch.float32"),
    "too many values": (_tensor(WEIGHT, lambda t: torch.cat([t, t])), "expected torch.float32"),
    "values of another shape": (_tensor(WEIGHT, lambda t: t[None]), "expected torch.float32"),
    "values of another dtype": (_tensor(WEIGHT, lambda t: t.double()), "torch.float64"),
    "values as integers": (_tensor(WEIGHT, lambda t: t.int()), "torch.int32"),
    "no values": (_without("tensor", WEIGHT), "is missing"),
    "dense weights": (_with("dense/0.weight", torch.ones(4, 1, 3, 3)), "unknown tensors"),
    "an unknown tensor": (_with("value/1.weight", torch.ones(4)), "unknown tensors"),
    "a mask that nobody asked for": (_with("mask/0.weight", torch.zeros(5, dtype=torch.uint8)), "unknown tensors"),
    "scores that nobody asked for": (_with("score/0.weight", torch.ones(36)), "unknown tensors"),
    # other parameters and buffers
    "a negative variance": (_tensor("dense/1.running_var", _first(-1e-3)), "a variance of -0.001"),
    "a variance of NaN": (_tensor("dense/1.running_var", _first(torch.nan)), "NaN"),
    "a mean of 1e38": (_tensor("dense/1.running_mean", _first(1e38)), "dense/1.running_mean"),
    "a bias of 1e38": (_tensor("dense/4.bias", _first(1e38)), "dense/4.bias"),
    "a counter below 0": (_tensor("dense/1.num_batches_tracked", lambda t: t - 2**40), "num_batches_tracked"),
    "a counter out of range": (_tensor("dense/1.num_batches_tracked", lambda t: t + 2**62), "num_batches_tracked"),
    "a counter as a float": (_tensor("dense/1.num_batches_tracked", lambda t: t.float()), "torch.float32"),
    "another shape of a buffer": (_tensor("dense/1.running_var", lambda t: t[:1]), "expected torch.float32"),
    # growth candidates
    "gradients of 3e38": (_tensor("gradient/0.weight", _first(3e38)), r"up to 3e\+38"),
    "gradients of NaN": (_tensor("gradient/0.weight", _first(torch.nan)), "finite"),
    "more gradients than positions": (_tensor("gradient/0.weight", lambda t: torch.cat([t, t])), "expected up to"),
    "fewer gradients than positions": (_tensor("gradient/0.weight", lambda t: t[1:]), "complete ones"),
    "no gradients": (_without("tensor", "gradient/0.weight"), "no growth candidates"),
    "no positions": (_without("tensor", "position/0.weight"), "no growth candidates"),
    "positions beyond the tensor": (
        lambda tensors, _: tensors.update(
            {"position/0.weight": pack_positions(torch.arange(100, 100 + len(tensors["gradient/0.weight"])))}
        ),
        "beyond the tensor",
    ),
    "positions that never end": (_tensor("position/0.weight", lambda t: t | 0x80), "complete ones"),
    "positions as floats": (_tensor("position/0.weight", lambda t: t.float()), "packed positions"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_refused_with_its_reason(kind: str, sound: _Round) -> None:
    change, reason = KINDS[kind]
    _is_refused(sound.server, _forged(sound.answer, change), reason)


def _is_refused(server: Server, answer: bytes, reason: str, *, client: int = CLIENT) -> None:
    state, known, weights = server.state, dict(server.known), copy.deepcopy(server.model.state_dict())
    with pytest.raises(WireError, match=rf"client {client}, round 1: (.|\n)*{reason}"):
        server.receive(client, answer)
    assert server.state is state
    assert server.known == known
    assert all(torch.equal(weights[name], tensor) for name, tensor in server.model.state_dict().items())


def test_the_sound_answer_is_taken(sound: _Round) -> None:
    assert copy.deepcopy(sound.server).receive(CLIENT, sound.answer).client == CLIENT


@pytest.mark.parametrize(
    ("origin", "reason"),
    [
        ({"run": "that run"}, "another run"),
        ({"seed": 1}, "other masks"),
        ({"samples": SAMPLES + 1}, "declared"),
        ({"client": 7}, "another client's update"),
    ],
)
def test_true_answers_from_elsewhere(origin: dict[str, Any], reason: str, sound: _Round) -> None:
    if "samples" in origin or "client" in origin:
        training = LocalTraining(batch_size=4, learning_rate=0.01)
        client = origin.get("client", CLIENT)
        device = Client(_network(), training)
        other = device.answer(sound.server.broadcast(99), _data(origin.get("samples", SAMPLES)), client=client)
    else:
        other = _Round(**origin)
        # Other data lead to other masks after the first adjustment.
        other.server.finish_round({CLIENT: other.server.receive(CLIENT, other.answer)})
        own = copy.deepcopy(sound.server)
        own.finish_round({CLIENT: own.receive(CLIENT, sound.answer)})
        late = Client(_network(), LocalTraining(batch_size=4)).answer(
            other.server.broadcast(99), _data(), client=CLIENT
        )
        with pytest.raises(WireError, match=f"client {CLIENT}, round 2: (.|\n)*{reason}"):
            own.receive(CLIENT, late)
        return
    _is_refused(sound.server, other, reason)


def test_an_answer_to_the_round_before(sound: _Round) -> None:
    _is_refused(sound.server, sound.earlier, "round: got 0")


def test_a_client_that_is_not_in_the_run(sound: _Round) -> None:
    _is_refused(sound.server, sound.answer, "not in this run", client=4)


def test_the_servers_own_message(sound: _Round) -> None:
    _is_refused(sound.server, sound.server.broadcast(CLIENT), "kind 'broadcast'")


def test_every_flipped_bit_of_a_weight_is_noticed(sound: _Round) -> None:
    start = 8 + struct.unpack_from("<Q", sound.answer)[0]
    for position in range(start, len(sound.answer), 29):
        damaged = bytearray(sound.answer)
        damaged[position] ^= 1 << position % 8
        _is_refused(sound.server, bytes(damaged), "")


def test_a_checksum_of_another_type(sound: _Round) -> None:
    tensors, fields = container.decode(sound.answer)
    _is_refused(sound.server, container.encode(tensors, fields | {"checksum": None}), "checksum")


@pytest.mark.parametrize("header", [b'{"a":[' + b"[]," * 21_000_000 + b"[]]}", b"[" * 2**26])
def test_a_hostile_header_is_refused_unread(header: bytes, sound: _Round) -> None:
    answer = struct.pack("<Q", len(header)) + header
    tracemalloc.start()
    try:
        _is_refused(sound.server, answer, "expected at most")
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_a_header_longer_than_the_model_allows_is_refused_unread(sound: _Round) -> None:
    header = json.dumps({"a": [[]] * 5000}).encode()
    _is_refused(sound.server, struct.pack("<Q", len(header)) + header, "a header of")


def test_a_client_refuses_a_hostile_broadcast() -> None:
    client = Client(_network(), LocalTraining())
    with pytest.raises(WireError, match="expected at most"):
        client.answer(struct.pack("<Q", 2**25) + b"[" * 2**25, _data(), client=0)


def test_a_client_refuses_what_builds_on_another_run() -> None:
    device, data = Client(_network(), LocalTraining(batch_size=4)), _data()
    runs = [Server(_network(), method=METHODS["fedtiny"], rounds=3, run=name) for name in ("a", "b")]
    device.answer(runs[0].broadcast(0), data, client=0)
    runs[1].known[0] = 0
    with pytest.raises(WireError, match=r"run 'b'.*in run 'a'.*complete one"):
        device.answer(runs[1].broadcast(0), data, client=0)


def test_a_client_refuses_masks_that_it_does_not_have() -> None:
    device, data = Client(_network(), LocalTraining(batch_size=4)), _data()
    server = Server(_network(), method=METHODS["fedtiny"], rounds=3)
    device.answer(server.broadcast(0), data, client=0)
    message = server.broadcast(0)
    tensors, fields = container.decode(message)
    fields.pop("checksum")
    fields["masks"] = "0" * 32
    with pytest.raises(WireError, match="digest does not fit the masks"):
        device.answer(
            container.encode(tensors, fields | {"checksum": container.digest(tensors, fields)}), data, client=0
        )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_answers(sound: _Round, data: st.DataObject) -> None:
    """Bytes that are exchanged, cut out, repeated or put in between: refused, or the same answer in another writing."""
    answer, server = bytearray(sound.answer), sound.server
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(answer) - 1))
        length = data.draw(st.integers(0, 40))
        piece = data.draw(st.binary(max_size=8))
        answer[place : place + length] = data.draw(st.sampled_from([piece, bytes(answer[place : place + length]) * 2]))
        if not answer:
            answer = bytearray(b"{")
    try:
        update = server.receive(CLIENT, bytes(answer))
    except WireError as error:
        assert str(error).startswith("client 3, round 1: ")  # noqa: PT017  # that it is no other error is the test
    else:
        assert encode_update(update, received=sound.state) == sound.answer


def test_bounds_can_be_moved(sound: _Round) -> None:
    answer = _forged(sound.answer, _tensor(WEIGHT, _first(50.0)))
    assert copy.deepcopy(sound.server).receive(CLIENT, answer).client == CLIENT
    strict = copy.deepcopy(sound.server)
    strict._limits = Limits(value=10.0)
    _is_refused(strict, answer, "up to 50")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"value": 0.0}, r"Limits\.value: got 0\.0; expected a number > 0"),
        ({"growth": float("nan")}, r"Limits\.growth"),
        ({"samples": 0}, r"Limits\.samples: got 0; expected an integer >= 1"),
        ({"steps": 1.5}, r"Limits\.steps"),
    ],
)
def test_bounds_that_are_none(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(**bounds)
