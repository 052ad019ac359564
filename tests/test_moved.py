"""What was written before modules moved still works: imports by old names, checkpoints, pickles, files."""

import importlib
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import federated
from fedmef_fx.moved import MOVED
from tests import forked

OLD = Path(__file__).parent / "before_the_move"
IMAGES = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
SEQUENCES = torch.ones(2, 3, 4)


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.GELU(),
        nn.Linear(8, 3),
    )


def _recurrent() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 3, batch_first=True))


def _output(name: str, model: nn.Module) -> Tensor:
    result: Tensor = model(SEQUENCES)[0] if name == "regions" else model(IMAGES)
    return result


def _expected(name: str) -> Tensor:
    return torch.tensor(json.loads((OLD / "outputs.json").read_text())[name])


@pytest.mark.parametrize("name", sorted(MOVED))
def test_an_old_module_name_leads_to_its_names(name: str) -> None:
    full_name = f"fedmef_fx.{name}"
    sys.modules.pop(full_name, None)
    with pytest.warns(DeprecationWarning, match="has moved; import from fedmef_fx"):
        module = importlib.import_module(full_name)
    names = [
        n for new in MOVED[name].split() for n in getattr(importlib.import_module(f"fedmef_fx.{new}"), "__all__", [])
    ]
    assert all(getattr(module, each) is not None for each in names)


@pytest.mark.filterwarnings("ignore:fedmef_fx.* has moved")
def test_documented_names_are_still_there() -> None:
    from fedmef_fx.clipping import clip_gradients  # noqa: PLC0415 -- the import is what is tested
    from fedmef_fx.memory import codec_nbytes, set_backend  # noqa: PLC0415 -- as above
    from fedmef_fx.model import masked_parameters  # noqa: PLC0415 -- as above

    assert fedmef_fx.memory.set_backend is set_backend  # type: ignore[attr-defined]
    assert fedmef_fx.memory.codec_nbytes is codec_nbytes  # type: ignore[attr-defined]
    assert fedmef_fx.memory(nn.Linear(2, 2), (torch.ones(1, 2),)).peak > 0  # still the function
    assert callable(clip_gradients)
    assert callable(masked_parameters)
    assert callable(fedmef_fx.micro_batches)


@pytest.mark.filterwarnings("ignore:fedmef_fx.* has moved")
def test_a_name_that_is_nowhere_is_an_error_that_says_where_it_was_looked_for() -> None:
    with pytest.raises(ImportError):
        from fedmef_fx.units import nothing  # noqa: F401, PLC0415 -- as above
    with pytest.raises(AttributeError, match=r"fedmef_fx.units has moved to fedmef_fx.training.adjustment; none has"):
        importlib.import_module("fedmef_fx.units").nothing  # noqa: B018


def test_a_module_runs_by_its_old_name(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
    ran, expected = (
        forked.run(code.format(name), folder=tmp_path)
        for name in ("fedmef_fx.fresh_process", "fedmef_fx.measure.fresh_process")
    )
    assert ran.returncode == expected.returncode
    assert ran.stderr.strip().splitlines()[-1] == expected.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["dense", "packed", "regions"])
def test_an_old_checkpoint_loads(name: str) -> None:
    model = fedmef_fx.load(OLD / f"{name}.safetensors", _recurrent() if name == "regions" else _network()).eval()
    torch.testing.assert_close(_output(name, model), _expected(name))


@pytest.mark.filterwarnings("ignore:fedmef_fx.* has moved")
@pytest.mark.parametrize("name", ["dense", "packed", "regions"])
def test_an_old_pickle_loads_and_trains(name: str) -> None:
    model = pickle.loads((OLD / f"{name}.pickle").read_bytes())  # noqa: S301 -- our own file
    torch.testing.assert_close(_output(name, model), _expected(name))
    _output(name, model.train()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_old_federation_goes_on(tmp_path: Path) -> None:
    (tmp_path / "federation.safetensors").write_bytes((OLD / "federation" / "federation.safetensors").read_bytes())
    random = torch.Generator().manual_seed(3)
    clients = [
        torch.utils.data.TensorDataset(
            torch.randn(12, 1, 8, 8, generator=random), torch.randint(0, 3, (12,), generator=random)
        )
        for _ in range(2)
    ]
    torch.manual_seed(0)
    config = fedmef_fx.Config(
        density=0.3,
        activation_sparsity=0.5,
        weight_storage="dense",
        adjustment_space="parameter",
        adjustment_interval=10,
        extrusion_strength=1e-4,
    )
    training = federated.LocalTraining(epochs=1, batch_size=32, schedule="constant", growth_batches=None)
    history = federated.run(_network(), clients, config, rounds=2, training=training, checkpoint_dir=tmp_path)
    assert len(history.rounds) == 2


def test_an_old_file_is_right() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(OLD / "packed.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), _expected("packed"), rtol=1e-4, atol=1e-5)
