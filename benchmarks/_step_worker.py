"""The process of one tree for `against.py`: builds a model, then makes one step for each line that comes in.

    python _step_worker.py MODEL BATCH THREADS CONFIG

It writes one line of JSON for each: first where the package is and the live peak of a step, then the elapsed and the
processor time of each step.
"""

import json
import sys
import time

import torch
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx.models import REFERENCE_MODELS


def main() -> None:
    """Answer until standard input ends."""
    name, batch, threads, config = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    model = fedmef_fx.transform(REFERENCE_MODELS[name](), fedmef_fx.Config(**json.loads(config))).train()
    x, y = torch.randn(int(batch), 3, 32, 32), torch.randint(0, 10, (int(batch),))
    report = fedmef_fx.memory(model, (x,), optimizer="sgd-momentum", loss=lambda out: F.cross_entropy(out, y))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    print(json.dumps({"package": fedmef_fx.__file__, "peak": report.peak}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        print(json.dumps([time.perf_counter() - start[0], time.process_time() - start[1]]), flush=True)


if __name__ == "__main__":
    main()
