"""What a server does with bytes from strangers: mutated updates, and headers that are large for their own sake.

    python benchmarks/federation.py [--blobs 10000] [--seed 0]

A sound update of a small network in an adjustment round is changed in 1 to 4 places (bytes exchanged, cut out, repeated
or put in between) and given to the server. Counted are answers that were refused with a reason, those that were taken
and mean the same, and, of which there should be none, those that were taken and mean something else, or ended in
another error.
"""

import argparse
import collections
import random
import struct
import time
import tracemalloc

import torch
from _machine import machine
from torch import nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import WireError
from fedmef_fx.federated import METHODS, Client, LocalTraining, Server
from fedmef_fx.federated.wire import encode_update


def network() -> nn.Module:
    """A transformed network with a BatchNorm."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    return fedmef_fx.transform(nn.Sequential(*layers), Config(density=0.3, normalization="keep", adjustment_interval=1))


def sound_answer() -> tuple[Server, bytes]:
    """A server in its first adjustment round, and a client's answer."""
    server = Server(network(), method=METHODS["fedtiny"], rounds=9, samples={0: 12})
    client = Client(network(), LocalTraining(batch_size=4, learning_rate=0.01))
    data = TensorDataset(torch.randn(12, 1, 4, 4), torch.randint(3, (12,)))
    while True:
        answer = client.answer(server.broadcast(0), data, client=0)
        if server.task().counts is not None:
            return server, answer
        server.finish_round({0: server.receive(0, answer)})


def mutated(answer: bytes, draw: random.Random) -> bytes:
    """The answer, changed in a few places."""
    result = bytearray(answer)
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(result) + 1), draw.randint(0, 40)
        piece = bytes(result[place : place + length])
        result[place : place + length] = draw.choice([draw.randbytes(draw.randint(0, 8)), piece * 2, b""])
    return bytes(result)


def outcome(server: Server, answer: bytes, data: bytes) -> str:
    """What the server makes of an answer."""
    try:
        update = server.receive(0, data)
    except WireError:
        return "refused with a reason"
    except Exception as error:  # what this looks for
        return f"ended in {type(error).__name__}"
    return "taken, the same" if encode_update(update, received=server.state) == answer else "taken, something else"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blobs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(machine())
    server, answer = sound_answer()
    draw = random.Random(options.seed)  # noqa: S311  # no secret
    counts = collections.Counter(outcome(server, answer, mutated(answer, draw)) for _ in range(options.blobs))
    for what, count in counts.most_common():
        print(f"{count:8d} of {options.blobs} mutated updates: {what}")
    for name, header in (("empty lists", b"[" + b"[]," * 22_369_621 + b"1"), ("open brackets", b"[" * 2**26)):
        data = struct.pack("<Q", len(header)) + header
        start = time.perf_counter()
        what = outcome(server, answer, data)
        seconds = time.perf_counter() - start
        tracemalloc.start()
        outcome(server, answer, data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(
            f"header of {len(header) / 2**20:.0f} MiB of {name}: {what} in {seconds * 1e3:.2f} ms, {peak / 1e3:.0f} kB"
        )


if __name__ == "__main__":
    main()
