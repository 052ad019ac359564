"""Messages survive the wire exactly, carry no more than they must, and hostile bytes end in WireError."""

import json
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmef_fx.errors import WireError
from fedmef_fx.federated.messages import RoundTask, Update
from fedmef_fx.federated.positions import pack_positions, unpack_positions
from fedmef_fx.federated.state import ModelState, Schema, TensorSpec, read_state
from fedmef_fx.federated.wire import decode_broadcast, decode_update, encode_broadcast, encode_update
from fedmef_fx.files import container
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

NUMEL = 40
SCHEMA = Schema(
    {"features.1.weight": TensorSpec(torch.Size([5, 8]), torch.float32)},
    {
        "features.10.weight": TensorSpec(torch.Size([3]), torch.float32),
        "steps": TensorSpec(torch.Size([]), torch.int64),
    },
)


def _state(version: int = 0, *, active: int = 7, seed: int = 0) -> ModelState:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(NUMEL, dtype=torch.bool)
    mask[torch.randperm(NUMEL, generator=generator)[:active]] = True
    return ModelState(
        version,
        {"features.1.weight": mask.view(5, 8)},
        {"features.1.weight": torch.randn(active, generator=generator)},
        {"features.10.weight": torch.randn(3, generator=generator), "steps": torch.tensor(seed)},
    )


CHANGED = {"features.1.weight": 0, "features.10.weight": 0, "steps": 0}
PLAIN = RoundTask(2, 9)
ADJUSTING = RoundTask(2, 9, {"features.1.weight": 3})


def _update(state: ModelState, task: RoundTask = ADJUSTING, *, count: int = 3) -> Update:
    inactive = (~state.masks["features.1.weight"]).flatten().nonzero().squeeze(1)[:count]
    gradients = {"features.1.weight": SparseGradient(inactive, torch.arange(1.0, 1 + len(inactive)), NUMEL)}
    return Update(
        round_index=task.round_index,
        samples=12,
        loss=0.5,
        peak_saved_bytes=1000,
        values={"features.1.weight": state.values["features.1.weight"] + 1},
        dense={**state.dense, "steps": torch.tensor(77)},
        gradients=gradients if task.counts else {},
    )


def _assert_same(left: ModelState, right: ModelState) -> None:
    assert left.version == right.version
    for a, b in ((left.masks, right.masks), (left.values, right.values), (left.dense, right.dense)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def _tampered(data: bytes, change: Callable[[dict[str, Tensor], dict[str, object]], object]) -> bytes:
    tensors, fields = container.decode(data)
    change(tensors, fields)
    return container.encode(tensors, fields)


BROADCAST = encode_broadcast(ADJUSTING, _state(2), changed=CHANGED)
UPDATE = encode_update(_update(_state(2)), received=_state(2))


def test_a_first_broadcast_brings_everything() -> None:
    task, state = decode_broadcast(BROADCAST, SCHEMA)
    assert task == ADJUSTING
    _assert_same(state, _state(2))


def test_the_same_message_always_has_the_same_bytes() -> None:
    assert encode_broadcast(ADJUSTING, _state(2), changed=CHANGED) == BROADCAST


def test_later_broadcasts_carry_masks_and_dense_tensors_only_if_they_changed() -> None:
    state = _state(5)
    changed = {**CHANGED, "features.10.weight": 4}
    for known, expected in [
        (3, {"value/features.1.weight", "dense/features.10.weight"}),
        (4, {"value/features.1.weight"}),
    ]:
        data = encode_broadcast(PLAIN, state, changed=changed, known=known)
        assert container.decode(data)[0].keys() == expected
        # What the client has from before fills in the rest.
        _assert_same(decode_broadcast(data, SCHEMA, previous=_state(known))[1], state)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sets(st.integers(0, 2), min_size=1)), min_size=1, max_size=8)
)
def test_every_client_always_ends_up_with_the_state_of_the_server(rounds: list[tuple[bool, bool, set[int]]]) -> None:
    changed, known, stores = dict(CHANGED), dict[int, int](), dict[int, ModelState]()
    mask_seed = dense_seed = 0
    for version, (moves_mask, moves_dense, participants) in enumerate(rounds):
        if version and moves_mask:
            mask_seed, changed["features.1.weight"] = version, version
        if version and moves_dense:
            dense_seed = version
            changed |= {"features.10.weight": version, "steps": version}
        topology, rest = _state(seed=mask_seed), _state(seed=dense_seed)
        values = {name: value * (version + 1) for name, value in topology.values.items()}
        state = ModelState(version, topology.masks, values, rest.dense)
        for client in participants:
            data = encode_broadcast(RoundTask(version, 99), state, changed=changed, known=known.get(client))
            stores[client] = decode_broadcast(data, SCHEMA, previous=stores.get(client))[1]
            _assert_same(stores[client], state)
            known[client] = version


@pytest.mark.parametrize("previous", [None, _state(1), _state(6)])
def test_a_broadcast_on_a_version_that_the_client_lacks_is_refused(previous: ModelState | None) -> None:
    data = encode_broadcast(PLAIN, _state(5), changed=CHANGED, known=3)
    with pytest.raises(WireError, match=r"builds on version 3.*ask the server for a complete one"):
        decode_broadcast(data, SCHEMA, previous=previous)


@pytest.mark.parametrize("task", [PLAIN, ADJUSTING])
def test_an_update_survives(task: RoundTask) -> None:
    sent = _state(2)
    update = _update(sent, task)
    read = decode_update(encode_update(update, received=sent), task=task, sent=sent)
    assert (read.round_index, read.samples, read.loss, read.peak_saved_bytes) == (2, 12, 0.5, 1000)
    assert torch.equal(read.values["features.1.weight"], update.values["features.1.weight"])
    assert all(torch.equal(read.dense[name], update.dense[name]) for name in update.dense)
    assert read.gradients.keys() == update.gradients.keys()
    for name, gradient in update.gradients.items():
        assert torch.equal(read.gradients[name].positions, gradient.positions)
        assert torch.equal(read.gradients[name].values, gradient.values)


def test_an_update_carries_active_values_and_candidates_and_nothing_dense() -> None:
    tensors, _ = container.decode(UPDATE)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    assert sizes == {
        "value/features.1.weight": 7,
        "position/features.1.weight": 3,
        "gradient/features.1.weight": 3,
        "dense/steps": 1,  # features.10.weight did not change
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_values_keep_their_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    state = ModelState(0, {}, {}, {name: p.detach() for name, p in model.named_parameters()})
    schema = Schema({}, {name: TensorSpec.of(p) for name, p in model.named_parameters()})
    data = encode_broadcast(PLAIN, state, changed=dict.fromkeys(state.dense, 0))
    _assert_same(decode_broadcast(data, schema)[1], state)


def test_bytes_shrink_with_density(sparse: Callable[..., nn.Module]) -> None:
    def upload(density: float) -> int:
        model = sparse(density=density)
        state = read_state(model, version=0)
        update = Update(0, 1, 0.0, 0, state.values, state.dense, {})
        return len(encode_update(update, received=state))

    weights = sum(p.numel() for p in sparse().parameters())
    assert upload(0.1) < upload(0.5) < 4 * weights


def _set(where: str, key: str, value: object) -> Callable[[dict[str, Tensor], dict[str, object]], object]:
    def change(tensors: dict[str, Tensor], fields: dict[str, object]) -> None:
        (tensors if where == "tensor" else fields)[key] = value  # type: ignore[index]  # one of the two

    return change


WEIGHT = "features.1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("field", "format", 2), "expected 1, 'broadcast'"),
        (_set("field", "kind", "update"), "expected 1, 'broadcast'"),
        (_set("field", "extra", 1), "got fields"),
        (_set("field", "round", -1), "round: got -1"),
        (_set("field", "round", True), "round: got True"),
        (_set("field", "rounds", 1), "round: got 2"),
        (_set("field", "version", 2**60), "version"),
        (_set("field", "known", 3), "known: got 3"),
        (_set("field", "counts", [1]), "counts"),
        (_set("field", "counts", {WEIGHT: 8}), r"expected an integer in \[0, 7\]"),
        (_set("tensor", f"mask/{WEIGHT}", torch.zeros(6, dtype=torch.uint8)), "another model"),
        (_set("tensor", f"mask/{WEIGHT}", torch.zeros(5, dtype=torch.uint8)), "another model, or topology"),
        (_set("tensor", f"value/{WEIGHT}", torch.zeros(7, dtype=torch.float64)), "float64"),
        (_set("tensor", f"value/{WEIGHT}", torch.full((7,), torch.nan)), "NaN"),
        (_set("tensor", f"value/{WEIGHT}", torch.full((7,), torch.inf)), "infinite"),
        (_set("tensor", "dense/features.1", torch.zeros(3)), "unknown tensors"),
        (_set("tensor", "other", torch.zeros(3)), "unknown tensors"),
        (lambda tensors, _: tensors.pop("dense/steps"), "'dense/steps' is missing"),
        (lambda tensors, _: tensors.pop(f"mask/{WEIGHT}"), "is missing"),
        (lambda tensors, _: tensors.pop(f"value/{WEIGHT}"), "is missing"),
    ],
)
def test_a_wrong_broadcast_is_refused(
    change: Callable[[dict[str, Tensor], dict[str, object]], object], message: str
) -> None:
    with pytest.raises(WireError, match=message):
        decode_broadcast(_tampered(BROADCAST, change), SCHEMA)


def _positions(*positions: int) -> Tensor:
    return pack_positions(torch.tensor(positions))


ACTIVE = int(_state(2).masks[WEIGHT].flatten().nonzero()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("field", "round", 3), "round: got 3"),
        (_set("field", "samples", 0), "samples: got 0"),
        (_set("field", "samples", 1.5), "samples"),
        (_set("field", "loss", "0.5"), "loss"),
        (_set("field", "peak_saved_bytes", -1), "peak_saved_bytes"),
        (_set("tensor", f"value/{WEIGHT}", torch.zeros(NUMEL)), "expected torch.float32\\[7\\]"),
        (_set("tensor", f"gradient/{WEIGHT}", torch.zeros(NUMEL)), "expected up to 3"),
        (_set("tensor", f"gradient/{WEIGHT}", torch.full((3,), torch.nan)), "finite"),
        (_set("tensor", f"gradient/{WEIGHT}", torch.zeros(3, dtype=torch.int64)), "expected up to 3 numbers"),
        (_set("tensor", f"position/{WEIGHT}", torch.zeros(3)), "expected packed positions"),
        (_set("tensor", f"position/{WEIGHT}", _positions(0, 1, NUMEL)), "beyond the tensor"),
        (_set("tensor", f"position/{WEIGHT}", _positions(*sorted({ACTIVE, 38, 39}))), "active weights"),
        (_set("tensor", "gradient/features.10.weight", torch.zeros(3)), "unknown tensors"),
        (lambda tensors, _: tensors.pop(f"position/{WEIGHT}"), "no growth candidates"),
    ],
)
def test_a_wrong_update_is_refused(
    change: Callable[[dict[str, Tensor], dict[str, object]], object], message: str
) -> None:
    with pytest.raises(WireError, match=message):
        decode_update(_tampered(UPDATE, change), task=ADJUSTING, sent=_state(2))


def test_candidates_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(WireError, match="unknown tensors"):
        decode_update(UPDATE, task=PLAIN, sent=_state(2))


def _container(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"__metadata__": {"fedmef": "{}"}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63),
        _container(b"not json"),
        _container(b"\xff\xfe"),
        _container(b"[" * 100_000),
        _container(b'{"a": ' * 100_000),
        _container(b"9" * 10_000),
        _container([1]),
        _container({}),
        _container({"__metadata__": {"fedmef": 1}}),
        _container({"__metadata__": {"fedmef": "[]"}}),
        _container({"__metadata__": []}),
        _container(b'{"__metadata__": {"fedmef": "{}", "fedmef": "{}"}}'),
        _container({**GOOD, "a": 1}),
        _container({**GOOD, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": 1}}, b"1234"),
        _container({**GOOD, "a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        _container({**GOOD, "a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        _container({**GOOD, "a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        _container({**GOOD, "a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"),
        _container({**GOOD, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        _container({**GOOD, "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12341234"),
        _container({**GOOD, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"123"),
        _container({**GOOD, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"),
        _container({**GOOD, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
        _container({**GOOD, "a": {"dtype": "F32", "shape": [2**47] * 15 + [0], "data_offsets": [0, 0]}}),
        _container({**GOOD, "a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\x02"),
        _container(
            {
                **GOOD,
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            b"1234",
        ),
    ],
)
def test_what_is_no_container_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="container"):
        container.decode(data)


def _survives(data: bytes) -> None:
    """Decoding either works or raises WireError; anything else fails the test."""
    for decoder in (
        lambda: decode_broadcast(data, SCHEMA, previous=_state(1)),
        lambda: decode_update(data, task=ADJUSTING, sent=_state(2)),
    ):
        try:
            decoder()
        except WireError as error:
            assert str(error)  # noqa: PT017  # that it is no other error is the test


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    _survives(data)


@given(st.binary(max_size=200), st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_random_headers(data: bytes, header: dict[str, object]) -> None:
    _survives(_container({**header, **GOOD}, data))


@given(st.sampled_from([BROADCAST, UPDATE]), st.data())
def test_truncated_bytes(message: bytes, data: st.DataObject) -> None:
    _survives(message[: data.draw(st.integers(0, len(message) - 1))])


@settings(max_examples=300)
@given(st.sampled_from([BROADCAST, UPDATE]), st.data())
def test_flipped_bytes(message: bytes, data: st.DataObject) -> None:
    changed = bytearray(message)
    for index in data.draw(st.lists(st.integers(0, len(message) - 1), min_size=1, max_size=4)):
        changed[index] = data.draw(st.integers(0, 255))
    _survives(bytes(changed))


@given(st.sets(st.integers(0, 2**30), max_size=50))
def test_positions_survive(positions: set[int]) -> None:
    expected = torch.tensor(sorted(positions), dtype=torch.int64)
    packed = pack_positions(expected)
    assert torch.equal(unpack_positions(packed, count=len(positions), numel=2**30 + 1), expected)


def test_dense_positions_take_one_byte_each() -> None:
    positions = torch.randperm(100_000)[:5_000].sort().values
    assert pack_positions(positions).numel() < 1.05 * 5_000


@given(st.binary(max_size=30), st.integers(0, 10))
def test_hostile_positions(data: bytes, count: int) -> None:
    packed = torch.tensor(list(data), dtype=torch.uint8)
    try:
        positions = unpack_positions(packed, count=count, numel=1000)
    except WireError:
        return
    # There is one form only: what is accepted is what the encoder writes.
    assert torch.equal(pack_positions(positions), packed)
    assert all(0 <= position < 1000 for position in positions.tolist())
