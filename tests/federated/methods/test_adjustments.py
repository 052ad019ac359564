"""PruneFL, FedDST, FedRTS and FedFit: who prunes, what grows and what travels, by small cases computed by hand."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import METHODS, LocalTraining, Method, RoundTask, Server, Update, run, train_locally
from fedmef_fx.federated.methods.baseline import baseline
from fedmef_fx.federated.methods.feddst import averaged_where_active
from fedmef_fx.federated.methods.fedrts import ThompsonSampling
from fedmef_fx.federated.methods.prunefl import chosen_by_squares
from fedmef_fx.federated.methods.top_gradients import TopGradients
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

FAST = LocalTraining(batch_size=8, learning_rate=0.02)
CONFIG = Config(density=0.3, adjustment_interval=2, weight_storage="dense")
NAME = "0.weight"


def _server(method: str | Method, mask: list[int], weights: list[float], **options: Any) -> Server:
    """A server whose model is one linear layer of eight weights, in round 1, which adjusts; k is 2 of 4."""
    original = nn.Sequential(nn.Linear(4, 2, bias=False))
    policy = METHODS[method] if isinstance(method, str) else method
    config = Config(density=0.5, adjustment_interval=1, adjustment_rate=1.0, adjustment_stop=2, **options)
    model = fedmef_fx.transform(original, policy.configure(config))
    server = Server(model, method=policy, rounds=3)
    fedmef_fx.set_masks(model, {NAME: torch.tensor(mask).bool().view(2, 4)})
    masked_parameters(model)[NAME].write(torch.tensor(weights))
    server._advance(1)
    assert server.task().counts == {NAME: 2}
    return server


def _update(values: list[float], samples: int = 1, **found: Mapping[str, Any]) -> Update:
    trained = {NAME: torch.tensor(values)}
    return Update(round_index=1, samples=samples, loss=1.0, peak_saved_bytes=0, values=trained, dense={}, **found)


def _positions(server: Server) -> list[int]:
    return masked_parameters(server.model)[NAME].positions().tolist()


@pytest.mark.parametrize(("prune_marked", "left"), [(False, [0, 3, 6, 7]), (True, [2, 3, 6, 7])])
def test_the_server_prunes_what_is_lowest_now_or_what_clients_were_told_to_empty(
    prune_marked: bool, left: list[int]
) -> None:
    method = Method(name="fedmef", adjustment=TopGradients(prune_marked=prune_marked))
    server = _server(method, [1, 1, 1, 1, 0, 0, 0, 0], [0.1, -0.2, 5.0, 4.0])
    # Weights 0 and 1 were lowest; after the round 1 and 2 are.
    candidates = SparseGradient(torch.tensor([6, 7]), torch.tensor([1.0, 2.0]), 8)
    assert server.finish_round({0: _update([3.0, 0.2, 0.5, 4.0], gradients={NAME: candidates})}) == {NAME: 2}
    assert _positions(server) == left


def test_prunefl_keeps_a_low_weight_whose_gradient_is_large() -> None:
    weight = torch.tensor([[0.1, 0.2, 5.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, True], [False] * 4])
    # Up for choice: the two lowest, 0 and 1, and all inactive ones; the largest squares there are at 1 and 6.
    squares = torch.tensor([1.0, 7.0, 0.0, 0.0, 2.0, 3.0, 8.0, 4.0])
    assert chosen_by_squares(weight, mask, squares, 2).flatten().nonzero().squeeze(1).tolist() == [1, 2, 3, 6]


def test_prunefl_averages_squares_by_samples() -> None:
    server = _server("prunefl", [1, 1, 1, 1, 0, 0, 0, 0], [0.1, 0.2, 5.0, 4.0])
    scores = [torch.tensor([0.0, 0, 0, 0, 8, 0, 0, 4]), torch.tensor([0.0, 0, 0, 0, 0, 3, 0, 4])]
    updates = {
        client: _update([0.1, 0.2, 5.0, 4.0], samples, scores={NAME: squares})
        for client, (samples, squares) in enumerate(zip((1, 3), scores, strict=True))
    }
    # Averages: 2 at position 4, 2.25 at 5, 4 at 7.
    assert server.finish_round(updates) == {NAME: 2}
    assert _positions(server) == [2, 3, 5, 7]


def test_feddst_averages_over_those_that_have_a_weight() -> None:
    own = [
        (torch.tensor([True, True, False, False]), torch.tensor([1.0, 2.0])),
        (torch.tensor([True, False, True, False]), torch.tensor([5.0, 7.0])),
    ]
    union, values = averaged_where_active(own, [1, 3])
    assert union.tolist() == [True, True, True, False]
    assert values.tolist() == [4.0, 2.0, 7.0]  # (1 + 3 * 5) / 4, and the others alone


def test_feddst_prunes_what_the_union_has_too_much() -> None:
    server = _server("feddst", [1, 1, 1, 1, 0, 0, 0, 0], [1.0, 1.0, 1.0, 1.0])
    masks = [[1, 1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0]]
    values = [[4.0, 3.0, 0.5, 2.0], [4.0, 3.0, 1.0, 0.2]]
    updates = {
        client: _update(v, masks={NAME: torch.tensor(m).bool().view(2, 4)})
        for client, (m, v) in enumerate(zip(masks, values, strict=True))
    }
    # The union: 4, 3, 1 (second alone), 0.5 and 2 (first alone), 0.2: the four largest stay, one of them is new.
    assert server.finish_round(updates) == {NAME: 1}
    assert _positions(server) == [0, 1, 2, 4]
    assert server.state.values[NAME].tolist() == [4.0, 3.0, 1.0, 2.0]


def test_feddst_clients_move_their_own_masks_and_train_what_they_grew(
    sparse: Callable[..., nn.Module], clients: list[TensorDataset]
) -> None:
    model = sparse(normalization="keep", activation_sparsity=0.0)
    before = fedmef_fx.masks(model)
    counts = dict.fromkeys(before, 2)
    task = RoundTask(2, 9, counts, "masks")
    update = train_locally(model, clients[0], LocalTraining(batch_size=6, learning_rate=0.1), task=task, client=0)
    for name, mask in update.masks.items():
        assert int(mask.count_nonzero()) == int(before[name].count_nonzero())
        grown = mask & ~before[name]
        assert 0 < int(grown.count_nonzero()) <= 2
        assert bool((update.values[name][grown[mask]] != 0).any())
    plain = train_locally(model, clients[0], FAST, task=RoundTask(3, 9, None, "masks"), client=0)
    assert not plain.masks


def _thompson(**options: float) -> Method:
    return baseline("rts", "random", ThompsonSampling(**options), exchange="")


def test_fedrts_posteriors_by_hand() -> None:
    server = _server(_thompson(scale=8.0), [1, 1, 1, 1, 0, 0, 0, 0], [4.0, 3.0, 2.0, 1.0])
    updates = {
        0: _update([4.0, 3.0, 0.2, 0.1], 1, votes={NAME: torch.tensor([4, 5])}),
        1: _update([0.1, 3.0, 0.2, 4.0], 3, votes={NAME: torch.tensor([5, 7])}),
    }
    server.finish_round(updates)
    # Averages 1.075, 3, 0.2, 3.025: the core of two is 1 and 3; the first client's is 0 and 1, the second's 1 and 3.
    # X = 1/2 X_agg + 1/2 (1/4 X_0 + 3/4 X_1), inactive ones 1/4 + 1/2 (...).
    outcomes = torch.tensor([0.125, 1.0, 0.0, 0.875, 0.375, 0.75, 0.25, 0.625])
    assert torch.equal(server.memory[f"alpha/{NAME}"], 1 + 8 * outcomes)
    assert torch.equal(server.memory[f"beta/{NAME}"], 1 + 8 * (1 - outcomes))
    assert len(_positions(server)) == 4


def test_fedrts_follows_the_posteriors_where_they_are_sharp() -> None:
    server = _server(_thompson(scale=1e6), [1, 1, 1, 1, 0, 0, 0, 0], [4.0, 3.0, 2.0, 1.0])
    votes = {NAME: torch.tensor([5, 7])}
    # X: 1, 1, 0, 0, then 1/4, 3/4, 1/4, 3/4.
    assert server.finish_round({0: _update([4.0, 3.0, 0.2, 0.1], votes=votes)}) == {NAME: 2}
    assert _positions(server) == [0, 1, 5, 7]
    assert server.state.values[NAME].tolist() == [4.0, 3.0, 0.0, 0.0]


def test_fedrts_learns_of_active_weights_alone_in_other_rounds() -> None:
    server = _server(_thompson(), [1, 1, 1, 1, 0, 0, 0, 0], [4.0, 3.0, 2.0, 1.0])
    server._advance(0)  # round 0 adjusts nothing; its k is 4 of 4: no core
    assert server.task().counts is None
    assert server.finish_round({0: _update([4.0, 3.0, 2.0, 1.0])}) == {}
    assert server.memory[f"alpha/{NAME}"].tolist() == [1.0] * 8
    assert server.memory[f"beta/{NAME}"].tolist() == [11.0] * 4 + [1.0] * 4


def test_fedfit_prunes_lowest_scores_and_grows_largest() -> None:
    server = _server("fedfit", [1, 1, 1, 1, 0, 0, 0, 0], [9.0, 9.0, 9.0, 9.0])
    found = [([-1.0, 3.0, 2.0, 0.0], [4, 5], [1.0, 2.0]), ([3.0, -1.0, 2.0, 8.0], [5, 6], [0.2, 0.9])]
    updates = {
        client: _update(
            [9.0] * 4,
            samples,
            scores={NAME: torch.tensor(scores)},
            gradients={NAME: SparseGradient(torch.tensor(places), torch.tensor(gains), 8)},
        )
        for client, (samples, (scores, places, gains)) in enumerate(zip((1, 3), found, strict=True))
    }
    # Averages: 2, 0, 2, 6: 1 goes, then 0 (the earlier of two equal ones). Gains: 0.25, 0.65, 0.675: 5 and 6 come.
    assert server.finish_round(updates) == {NAME: 2}
    assert _positions(server) == [2, 3, 5, 6]


def test_votes_count_clients_by_their_samples() -> None:
    method = Method(name="positions", adjustment=TopGradients(sends="positions"), extrudes=False)
    server = _server(method, [1, 1, 1, 1, 0, 0, 0, 0], [4.0, 3.0, 2.0, 1.0])
    votes = [torch.tensor([4, 6]), torch.tensor([5, 6])]
    updates = {c: _update([4.0, 3.0, 2.0, 1.0], 1 + c, votes={NAME: v}) for c, v in enumerate(votes)}
    assert server.finish_round(updates) == {NAME: 2}
    assert _positions(server) == [0, 1, 5, 6]


def _extra_up(method: str | Method, network: nn.Module, clients: list[TensorDataset]) -> tuple[int, int, list[int]]:
    """Bytes that one client uploads more in an adjustment round than in the one before; weights, active and in all."""
    history = run(network, clients[:1], CONFIG, rounds=3, training=FAST, method=method)
    assert history.model is not None
    parameters = masked_parameters(history.model).values()
    up = [record.bytes_up for record in history.rounds]
    return up[2] - up[1], sum(p.active for p in parameters), [p.numel for p in parameters]


def test_what_travels_up_beside_weights_in_an_adjustment_round(
    network: nn.Module, clients: list[TensorDataset]
) -> None:
    positions = baseline("positions", "random", TopGradients(sends="positions"), exchange="2 O_s + 0.5 O_xi")
    extra = {m: _extra_up(m, network, clients) for m in ("fedtiny", "feddst", "prunefl", "fedrts", "fedfit", positions)}
    up = {m if isinstance(m, str) else m.name: bytes_ for m, (bytes_, _, _) in extra.items()}
    _, active, sizes = extra["fedtiny"]
    header = 3 * 130  # per tensor of the header: name, type, shape and offsets
    assert 0 < up["fedrts"] < up["fedtiny"]
    assert up["positions"] == up["fedrts"]
    assert 4 * sum(sizes) <= up["prunefl"] <= 4 * sum(sizes) + header
    bitmaps = sum(-(-size // 8) for size in sizes)
    assert bitmaps <= up["feddst"] <= bitmaps + header
    assert up["fedtiny"] + 4 * active <= up["fedfit"] <= up["fedtiny"] + 4 * active + header


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.policy.granularities or m.opening])
def test_what_chooses_single_weights_refuses_other_granularities(method: str) -> None:
    with pytest.raises(ConfigError, match=f"Method '{method}': got granularity='channel'"):
        METHODS[method].configure(Config(granularity="channel", weight_storage="dense"))
