"""What a server does with bytes from strangers, and what memory it takes as clients become more.

    python benchmarks/federation.py [--blobs 10000] [--seed 0] [--clients 1 10 100]

A sound update of a small network in an adjustment round is changed in 1 to 4 places (bytes exchanged, cut out, repeated
or put in between) and given to the server. Counted are answers that were refused with a reason, those that were taken
and mean the same, and, of which there should be none, those that were taken and mean something else, or ended in
another error.

Memory is the largest resident set of a fresh process that holds the server of ResNet18 (11 million weights, density
0.1), receives the updates of so many clients in an adjustment round, and averages them. The updates are made up: small
changes, and growth candidates at random places. The rest of what a process takes (Python, torch) is part of it.
"""

import argparse
import collections
import random
import resource
import statistics
import struct
import subprocess
import sys
import time
import tracemalloc

import torch
from _machine import machine
from torch import nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config, models
from fedmef_fx.errors import WireError
from fedmef_fx.federated import METHODS, Client, LocalTraining, Server, Update
from fedmef_fx.federated.wire import encode_update
from fedmef_fx.sparsity.sparse_gradient import SparseGradient


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


def made_up(server: Server, client: int) -> bytes:
    """An answer to an adjustment round."""
    state, task = server.state, server.task()
    generator = torch.Generator().manual_seed(client)
    gradients = {}
    for name, count in (task.counts or {}).items():
        mask = state.masks[name].flatten()
        found = torch.randint(len(mask), (3 * count,), generator=generator).unique()
        found = found[~mask[found]]
        chosen = found[torch.randperm(len(found), generator=generator)[:count]].sort().values
        gradients[name] = SparseGradient(chosen, torch.randn(len(chosen), generator=generator), len(mask))
    values = {name: v + 0.01 * torch.randn(v.shape, generator=generator) for name, v in state.values.items()}
    dense = {
        name: t + 0.01 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for name, t in state.dense.items()
    }
    update = Update(
        round_index=task.round_index,
        samples=100 + client,
        loss=1.0,
        peak_saved_bytes=0,
        values=values,
        dense=dense,
        gradients=gradients,
        client=client,
    )
    return encode_update(update, received=state)


def serve(clients: int) -> None:
    """One adjustment round with so many clients, in this process; prints time and memory."""
    torch.manual_seed(0)
    model = fedmef_fx.transform(models.resnet18(), Config(density=0.1, adjustment_interval=1))
    server = Server(model, method=METHODS["fedmef"], rounds=9)
    server.skip_round()  # masks stay as they are in round 0
    seconds, updates = [], {}
    for client in range(clients):
        answer = made_up(server, client)
        start = time.perf_counter()
        updates[client] = server.receive(client, answer)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    moved = sum(server.finish_round(updates).values())
    finish = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{clients:4d} clients: peak {peak:.0f} MiB; receiving {statistics.median(seconds):.3f} s a client, averaging "
        f"and adjusting {finish / clients:.3f} s a client; {moved} weights moved",
        flush=True,
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blobs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    print(machine())
    for clients in options.clients:
        subprocess.run([sys.executable, __file__, "--serve", str(clients)], check=True)  # noqa: S603  # this script
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
