"""Measure the resident memory of a training step in a process that does nothing else.

The step travels to that process as a pickle in a temporary file: models, losses and optimizer factories are arbitrary
Python objects, and it is this process's own object on its way to this process's own child. The file lies in a folder
that no other user can write to and is deleted at once; bytes from anywhere else are never unpickled. A fork would need
no pickle, but it starts with the memory of its parent, in which a step finds room without growing.

    python -m fedmef_fx.measure.fresh_process STEP      # what the child runs; prints JSON
"""

import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx.errors import FedmefError
from fedmef_fx.measure.resident import (
    ALLOCATOR_SETTINGS,
    ResidentGrowth,
    forget_peak,
    resident_bytes,
    return_free_memory,
    why_not,
)
from fedmef_fx.measure.training_step import TrainingStep
from fedmef_fx.packing import PackedTensor, backend, clamp, set_backend

__all__ = ["NotMeasurableError", "resident_growth"]

_TIMEOUT_SECONDS: Final = 600


class NotMeasurableError(FedmefError):
    """Resident memory cannot be measured here or for this model; the message says why."""


def resident_growth(**arguments: Any) -> ResidentGrowth:
    """Run two training steps in a fresh process.

    Args:
        **arguments: Of `TrainingStep.of`.

    Raises:
        NotMeasurableError: No Linux, an object that cannot be sent to another process, or a process that failed.
    """
    reason = why_not()
    if reason:
        raise NotMeasurableError(reason)
    try:
        step = pickle.dumps({"backend": backend().name, "threads": torch.get_num_threads()})
        step += pickle.dumps(arguments)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise NotMeasurableError(f"it cannot be sent to another process: {error}") from error
    with tempfile.TemporaryDirectory(prefix="fedmef-fx-") as folder:
        file = Path(folder, "step")
        file.write_bytes(step)
        del step
        command = [sys.executable, "-m", "fedmef_fx.measure.fresh_process", str(file)]
        environment = {**os.environ, **ALLOCATOR_SETTINGS, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(  # noqa: S603 -- this interpreter on this module
                command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise NotMeasurableError(f"two steps took more than {_TIMEOUT_SECONDS} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        hint = "; define it in a module that can be imported" if "__main__" in last else ""
        raise NotMeasurableError(f"the fresh process failed: {last}{hint}")
    return ResidentGrowth(**json.loads(done.stdout.strip().splitlines()[-1]))


def _warm_up() -> None:
    """Let everything that is set up once be set up: threads, kernels, oneDNN, the optimizer's modules."""
    layer = nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    loss = F.cross_entropy(layer(torch.randn(2, 3, 8, 8)).flatten(1), torch.tensor([0, 1]))
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    optimizer.step()
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(1000, dtype=dtype)
        out, bits = clamp(x)
        bits.apply(out)
        PackedTensor.pack(x, threshold=0.5).unpack()


def _measure(file: Path) -> dict[str, int]:
    with file.open("rb") as stream:
        settings = pickle.load(stream)  # noqa: S301 -- written by our own parent process, see above
        set_backend(settings["backend"])
        torch.set_num_threads(settings["threads"])
        _warm_up()
        gc.collect()
        return_free_memory()
        base = resident_bytes()
        arguments = pickle.load(stream)  # noqa: S301 -- as above
    file.unlink()
    step = TrainingStep.of(**arguments)
    arguments.clear()  # the step has copies
    gc.collect()
    return_free_memory()
    built = resident_bytes()
    forget_peak()
    with step.isolated():
        for _ in range(2):
            step.run()
    return {"base": base, "model": built - base, "step": resident_bytes("VmHWM") - built}


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]))))
