"""Changes of weights in 16 and 8 bits, with error feedback."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import ConfigError, WireError
from fedmef_fx.federated import History, LocalTraining, ModelState, Strategy, Update, run
from fedmef_fx.federated.messages import RoundTask
from fedmef_fx.federated.state import read_state
from fedmef_fx.federated.uplink import coded_changes
from fedmef_fx.federated.wire import decode_update, encode_update
from fedmef_fx.packing.bitmap import pack_bits

FAST = LocalTraining(epochs=1, batch_size=8, learning_rate=0.05)
CONFIG = Config(density=0.4, adjustment_interval=1)
MASK = torch.arange(700).reshape(10, 70) % 2 == 0
SENT = ModelState(
    3, {"w": MASK}, {"w": torch.linspace(-1, 1, 350)}, {"b": torch.ones(300), "n": torch.tensor(4)}, "run"
)
TASK = RoundTask(3, 9)


def _answer(change: Tensor, uplink: Any, kept: dict[str, Tensor]) -> bytes:
    update = Update(
        round_index=3,
        samples=7,
        loss=0.5,
        peak_saved_bytes=0,
        values={"w": SENT.values["w"] + change},
        dense={"b": SENT.dense["b"] + change[:300], "n": SENT.dense["n"] + 1},
    )
    coded = coded_changes(update, SENT, ["w", "b"], uplink, kept)
    return encode_update(update, received=SENT, coded=coded, left_out=["w", "b"])


def _read(data: bytes, uplink: Any) -> Update:
    return decode_update(data, task=TASK, sent=SENT, uplink=uplink, trained=("b",))


@pytest.mark.parametrize(("uplink", "share"), [("float16", 2.0**-11), ("int8", 0.5 / 127)])
def test_what_a_code_loses_comes_with_later_rounds(uplink: Any, share: float) -> None:
    torch.manual_seed(0)
    change, kept = torch.randn(350), {}
    told = torch.zeros(350)
    for rounds in range(1, 21):
        update = _read(_answer(change, uplink, kept), uplink)
        told += update.values["w"] - SENT.values["w"]
        # What is missing is the error of one round, however many there were; and the rounding of the sums.
        assert (told - rounds * change).abs().max() <= 1.1 * share * 2 * change.abs().max() + 1e-5
    assert torch.equal(update.dense["n"], torch.tensor(5))
    assert set(kept) == {"uplink/value/w", "uplink/mask/w", "uplink/value/b"}


def test_bytes() -> None:
    exact = 4 * (350 + 300)
    for uplink, size in (("float16", 2), ("int8", 1)):
        # The header states names, shapes and places of the tensors.
        assert len(_answer(torch.ones(350), uplink, {})) < exact / 4 * size + 900


@pytest.mark.parametrize(
    ("uplink", "change", "message"),
    [
        ("int8", float("nan"), r"'scale/w': got infinite values or NaN"),
        ("float16", float("nan"), r"'change/w': got infinite values or NaN"),
        ("int8", 1e30, "expected at most 1e.09"),
    ],
)
def test_changes_that_cannot_be_taken(uplink: Any, change: float, message: str) -> None:
    with pytest.raises(WireError, match=message):
        _read(_answer(torch.full((350,), change), uplink, {}), uplink)


@pytest.mark.parametrize(("sent_as", "read_as"), [("float16", "int8"), ("int8", "float16"), ("int8", "exact")])
def test_another_uplink_is_refused(sent_as: Any, read_as: Any) -> None:
    with pytest.raises(WireError, match=r"update: |is missing"):
        _read(_answer(torch.ones(350), sent_as, {}), read_as)


def test_a_mask_of_ones_own_is_what_changes_are_under() -> None:
    own = ~MASK
    task = RoundTask(3, 9, {"w": 350}, "masks")
    weights = torch.linspace(1, 2, 350)
    update = Update(
        round_index=3, samples=7, loss=0.5, peak_saved_bytes=0, values={"w": weights}, dense=dict(SENT.dense),
        masks={"w": own},
    )  # fmt: skip
    coded = coded_changes(update, SENT, ["w"], "float16", {})
    data = encode_update(update, received=SENT, coded=coded, left_out=["w"])
    found = decode_update(data, task=task, sent=SENT, uplink="float16")
    assert torch.equal(pack_bits(found.masks["w"]), pack_bits(own))
    assert torch.allclose(found.values["w"], weights, rtol=1e-3)


def _data(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    return TensorDataset(torch.randn(samples, 6, generator=generator) + 2 * nn.functional.one_hot(labels, 6), labels)


CLIENTS = [_data(24, 0), _data(17, 1)]


def _play(**options: Any) -> History:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 3))
    return run(net, CLIENTS, CONFIG, **{"rounds": 3, "training": FAST, **options})


@pytest.mark.parametrize("method", ["fedmef", "feddst", "fedavg", "ssfl"])
def test_a_federation_in_few_bits_is_near_the_exact_one(method: str) -> None:
    exact, coded = (_play(method=method, strategy=Strategy(uplink=uplink)) for uplink in ("exact", "int8"))
    assert not coded.failures
    assert coded.rounds[1].bytes_up < exact.rounds[1].bytes_up
    # The first round starts from the same weights: what differs is half a step of the code.
    assert abs(coded.rounds[1].train_loss - exact.rounds[1].train_loss) < 0.05


def test_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    config: Any = {"strategy": Strategy(uplink="int8", clients_per_round=1)}
    whole = _play(**config)
    with pytest.raises(KeyboardInterrupt):
        _play(checkpoint_dir=tmp_path, progress=_interrupting(2), **config)
    again = _play(checkpoint_dir=tmp_path, **config)
    assert whole.model is not None
    assert again.model is not None
    found, expected = read_state(again.model, version=0), read_state(whole.model, version=0)
    assert all(torch.equal(values, expected.values[name]) for name, values in found.values.items())


def _interrupting(after: int) -> Any:
    def progress(record: Any) -> None:
        if record.round_index + 1 == after:
            raise KeyboardInterrupt

    return progress


def test_uplinks_that_there_are_not() -> None:
    with pytest.raises(ConfigError, match=r"Strategy\.uplink: got 'int4'; expected 'exact' \| 'float16' \| 'int8'"):
        Strategy(uplink="int4")  # type: ignore[arg-type]  # wrong on purpose
    assert dataclasses.replace(Strategy(), uplink="int8").settings()["uplink"] == "int8"
