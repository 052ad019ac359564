"""What surrounds a call of `transform` changes neither the result nor, through it, the process."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config, coverage, transform

CONFIG = Config(density=0.3, activation_sparsity=0.5)


class Branch(nn.Module):
    """Python control flow and a recurrent layer: several regions, and a parameter of the hook tier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)
        self.lstm, self.head = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Branch on what the tensor holds."""
        h = self.a(x).relu()
        if h.mean() > -9:
            h = self.b(h).relu()
        result: Tensor = self.head(self.lstm(h[:, None])[0][:, -1])
        return result


def _convolutional() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (_convolutional, (6, 3, 8, 8)),
    "branch": (Branch, (6, 8)),
}


def _make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    return build(), torch.randn(shape)


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        yield
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(mode=False)


@contextlib.contextmanager
def _anomaly() -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(mode=True, check_nan=True):
        yield
        assert torch.is_anomaly_enabled()


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": _default_dtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": _deterministic,
    "anomaly": _anomaly,
}


def _trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Results in both modes and gradients: what shows whether two transformed models are the same."""
    model.train()
    out = model(x)
    out.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.eval()
    return [out.detach(), model(x).detach(), *gradients]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("has_examples", [True, False])
@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("name", sorted(SURROUNDINGS))
def test_the_result_is_that_without_them(name: str, model: str, has_examples: bool) -> None:
    original, x = _make(model)
    examples = (x,) if has_examples else None
    expected = transform(original, CONFIG, example_inputs=examples)
    with SURROUNDINGS[name]():
        result = transform(original, CONFIG, example_inputs=examples)
    assert [(r.name, r.tier) for r in coverage(result).rows] == [(r.name, r.tier) for r in coverage(expected).rows]
    assert str(fedmef_fx.inspect(result)) == str(fedmef_fx.inspect(expected))
    got, wanted = _trained(result, x), _trained(expected, x)
    assert len(got) == len(wanted)
    assert all(map(torch.equal, got, wanted))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_example_inputs_of_inference_mode() -> None:
    original, _ = _make("convolutional")
    with torch.inference_mode():
        x = torch.randn(6, 3, 8, 8)
        result = transform(original, CONFIG, example_inputs=(x,))
    assert len(_trained(result, x.clone())) > 2


def test_a_late_capture_without_gradients_trains_afterwards() -> None:
    original, x = _make("branch")
    result = transform(original, CONFIG)
    with torch.no_grad():
        result(x)
    assert torch.is_grad_enabled()
    result(x).sum().backward()
    assert torch.is_grad_enabled()
    assert all(p.grad is not None for p in result.parameters() if p.requires_grad)


def test_random_states_stay() -> None:
    original, x = _make("convolutional")
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state(legacy=False))
    transform(original, CONFIG, example_inputs=(x,))(x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state(legacy=False)) == states[2]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_several_threads_at_once(model: str) -> None:
    original, x = _make(model)
    expected = _trained(transform(original, CONFIG, example_inputs=(x,)), x)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: transform(original, CONFIG, example_inputs=(x,)), range(8)))
    for result in results:
        assert all(map(torch.equal, _trained(result, x), expected))
    assert _make(model)[0](x).isfinite().all()


@pytest.mark.parametrize("model", sorted(MODELS))
def test_another_thread_draws_random_numbers_meanwhile(model: str) -> None:
    """Torch has one generator for all threads: a model must not be taken for what draws from it."""
    original, x = _make(model)
    expected, is_over = transform(original, CONFIG, example_inputs=(x,)), threading.Event()

    def draw() -> None:
        while not is_over.is_set():
            torch.rand(3)

    worker = threading.Thread(target=draw)
    worker.start()
    try:
        result = transform(original, CONFIG, example_inputs=(x,))
    finally:
        is_over.set()
        worker.join()
    assert [(r.name, r.tier) for r in coverage(result).rows] == [(r.name, r.tier) for r in coverage(expected).rows]
    assert coverage(result).graph_fraction == coverage(expected).graph_fraction


def test_other_threads_go_on_meanwhile() -> None:
    original, x = _make("convolutional")
    plain, expected = _make("convolutional")[0].eval(), _make("convolutional")[0].eval()(x)
    errors: list[BaseException] = []
    is_done = threading.Event()

    def work() -> None:
        try:
            while not is_done.is_set():
                assert type(torch.ones(3)) is Tensor
                assert type(plain(x)) is Tensor
                assert torch.equal(plain(x), expected)
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            transform(original, CONFIG, example_inputs=(x,))
    finally:
        is_done.set()
        worker.join()
    assert errors == []


def test_in_coroutines() -> None:
    original, x = _make("convolutional")

    async def several() -> list[nn.Module]:
        return await asyncio.gather(*(asyncio.to_thread(transform, original, CONFIG) for _ in range(3)))

    for result in asyncio.run(several()):
        assert len(_trained(result, x)) > 2
