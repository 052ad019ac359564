"""How many of the exact top-k growth candidates are found over several batches, and in how much memory.

    python benchmarks/growth_candidates.py [--warm 100] [--docs docs/effective-space.md]

The network of `activation_accuracy.py` at density 0.1 on CIFAR-10 (folder: FEDMEF_FX_DATA), untrained and after some
steps of training; 44 batches of 32 and 175 of 8; in rounds t = 10 to 95 of 100, with k_l(t) candidates per layer.
Recall is the share of the exact average's k_l(t) largest that is found, over all layers and in the worst one; the error
of values is relative, the largest. "buffer" is what sums at 4 k_l coordinates find that are chosen anew after each
batch; bytes are those kept between batches. Gradients are computed once per batch; the collector of
`fedmef_fx.ops.gradient_collector` is then shown them for each round, as a backward pass would.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from _docs import fill
from _machine import machine
from activation_accuracy import network
from extrusion import optimizer_of, train
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, growth_candidates, masks, transform
from fedmef_fx.data import Cifar10, load_cifar10
from fedmef_fx.ops.gradient_collector import EXACT, Request, add_candidates, collecting
from fedmef_fx.sparsity.schedule import adjustment_count

Found = Mapping[str, tuple[Tensor, Tensor]]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def compared(found: Found, exact: Mapping[str, Tensor], counts: Mapping[str, int]) -> tuple[float, float, float]:
    """Recall over all layers, that of the worst layer, and the largest relative error of values."""
    hits, error = {}, 0.0
    for name, (positions, values) in found.items():
        truth = exact[name]
        hits[name] = int(torch.isin(truth.abs().topk(counts[name]).indices, positions).sum())
        error = max(error, float((values / truth[positions] - 1).abs().max()))
    return sum(hits.values()) / sum(counts.values()), min(hits[name] / counts[name] for name in found), error


def buffered(gradients: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The streaming rule with sums at 4 k coordinates; gradients are those of each batch at inactive coordinates."""
    kept, sums = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for gradient in gradients:
        totals = gradient.index_add(0, kept, sums)
        kept = totals.abs().topk(min(4 * k, totals.numel())).indices
        sums = totals[kept]
    chosen = sums.abs().topk(k).indices
    return kept[chosen], sums[chosen] / len(gradients)


def collected(each: Mapping[str, list[Tensor]], off: Mapping[str, Tensor], counts: Mapping[str, int]) -> Found:
    """What the collector keeps of the gradients of each batch."""
    masks_of = {name: ~off[name] for name in counts}
    with collecting({name: Request(masks_of[name], k) for name, k in counts.items()}) as collector:
        total = len(next(iter(each.values())))
        for index in range(total):
            with collector.batch(1.0, is_last=index == total - 1):
                for name, mask in masks_of.items():
                    add_candidates(mask, each[name][index])
                    collector.complete(name)
        found = collector.candidates()
    return {name: (found[name].positions, found[name].values) for name in counts}


def rows(model: nn.Module, stage: str, data: Cifar10, *, counts_of: Sequence[tuple[int, int]]) -> list[list[str]]:
    """A row per number of batches and round."""
    result = []
    inactive = {name: ~mask.flatten() for name, mask in masks(model).items()}
    for count, size in counts_of:
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(5))[: count * size]
        each: dict[str, list[Tensor]] = {name: [] for name in inactive}
        for part in chosen.split(size):
            # One batch is exact, however many coordinates are asked for.
            for name, gradient in growth_candidates(model, loss_fn, [data.batch(part)], k=10**9).items():
                each[name].append(torch.zeros(gradient.numel).index_put_((gradient.positions,), gradient.values))
        exact = {name: torch.stack(gradients).double().mean(0).float() for name, gradients in each.items()}
        for t in (10, 50, 90, 95):
            counts = {
                name: adjustment_count(int((~off).sum()), int(off.sum()), round_index=t, stop=100, rate=0.4)
                for name, off in inactive.items()
            }
            counts = {name: k for name, k in counts.items() if k}
            ours = compared(collected(each, inactive, counts), exact, counts)
            old = compared({name: buffered(each[name], k) for name, k in counts.items()}, exact, counts)
            what = [stage, f"{count} of {size}", str(t), str(sum(counts.values()))]
            result.append([*what, *_shown(ours), *_shown(old)])
    return result


def _shown(result: tuple[float, float, float]) -> list[str]:
    return [f"{result[0]:.3f}", f"{result[1]:.3f}", f"{100 * result[2]:.1f} %"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, default=100, help="steps of training of the trained network")
    parser.add_argument("--stages", nargs="+", choices=["untrained", "trained"], default=["untrained", "trained"])
    parser.add_argument("--batches", type=int, nargs="+", choices=[44, 175], default=[44, 175])
    parser.add_argument("--docs", type=Path, help="page whose table is filled in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, _ = load_cifar10()
    headings = ["network", "batches", "t", "k"]
    for method in ("ours", "buffer of 4 k"):
        headings += [f"{method}: recall", "worst layer", "error"]
    torch.manual_seed(0)
    config = Config(density=0.1, activation_sparsity=0.0, weight_storage="dense")
    model = transform(network(), config).train()
    found = []
    for stage in options.stages:
        if stage == "trained":
            order = torch.Generator().manual_seed(0)
            for _ in train(model, optimizer_of(model, 0.2), data, steps=options.warm, order=order):
                pass
        sizes = {44: 32, 175: 8}
        found += rows(copy.deepcopy(model), stage, data, counts_of=[(n, sizes[n]) for n in options.batches])
    off = [int((~mask).sum()) for mask in masks(model).values()]
    nbytes = sum(4 * n if n <= EXACT else 2 * n for n in off)
    note = (
        f"Kept between batches: {nbytes / sum(off):.2f} bytes per inactive coordinate, {nbytes:,} bytes; a buffer of "
        f"4 k with positions: {sum(48 * int(0.4 * int(m.sum())) for m in masks(model).values()):,} bytes at t = 0."
    )
    table = Table(title=machine())
    for name in headings:
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(*row)
    Console(width=160).print(table, note)
    if options.docs is not None:
        lines = [headings, ["---"] * len(headings), *found]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        fill(options.docs, "growth candidates", f"{text}\n\n{note}\n\n{machine()}")


if __name__ == "__main__":
    main()
