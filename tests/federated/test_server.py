"""Averaging, adjustment rounds, and what the server remembers of its clients."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx.errors import ConfigError, WireError
from fedmef_fx.federated import METHODS, Server, Update
from fedmef_fx.federated.averaging import weighted_average
from fedmef_fx.federated.wire import encode_update
from fedmef_fx.sparsity.sparse_gradient import SparseGradient


def _server(model: nn.Module, *, rounds: int = 10, method: str = "fedmef") -> Server:
    return Server(model, method=METHODS[method], rounds=rounds)


def _update(
    server: Server, *, client: int = 0, samples: int = 1, shift: float = 0.0, grow_at_end: bool = False
) -> Update:
    """An update with all floating-point numbers shifted; candidates are the first or last inactive coordinates."""
    state, task = server.state, server.task()
    gradients = {}
    for name, count in (task.counts or {}).items():
        inactive = (~state.masks[name]).flatten().nonzero().squeeze(1)
        chosen = inactive[-count:] if grow_at_end and count else inactive[:count]
        gradients[name] = SparseGradient(chosen, torch.arange(1.0, 1 + count), state.masks[name].numel())
    return Update(
        round_index=task.round_index,
        samples=samples,
        loss=1.0,
        peak_saved_bytes=0,
        values={name: value + shift for name, value in state.values.items()},
        dense={name: t + shift if t.is_floating_point() else t for name, t in state.dense.items()},
        gradients=gradients,
        client=client,
    )


def _at_adjustment(server: Server) -> Server:
    while server.task().counts is None:
        server.finish_round({0: _update(server)})
    return server


def test_weighted_average_by_hand() -> None:
    average = weighted_average([torch.tensor([1.0, -2.0]), torch.tensor([5.0, 2.0])], [1, 3])
    assert torch.equal(average, torch.tensor([4.0, 1.0]))


def test_integers_are_rounded_and_booleans_follow_the_majority() -> None:
    assert torch.equal(weighted_average([torch.tensor([3]), torch.tensor([4])], [1, 3]), torch.tensor([4]))
    booleans = [torch.tensor([True, False]), torch.tensor([False, True])]
    assert torch.equal(weighted_average(booleans, [3, 1]), torch.tensor([True, False]))


def test_the_average_of_equal_tensors_is_that_tensor() -> None:
    value = torch.randn(1000)
    assert torch.equal(weighted_average([value] * 7, [0.1 * index for index in range(1, 8)]), value)


def test_sums_are_exact_where_single_precision_is_not() -> None:
    tensors = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    assert float(weighted_average(tensors, [1, 1, 1])) == pytest.approx(1 / 3, rel=1e-7)  # rounding of the result


@given(st.permutations(range(6)))
def test_the_order_of_clients_does_not_matter(order: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, generator=generator) * 10.0 ** (3 * index) for index in range(6)]
    weights = [0.3 + index for index in range(6)]
    expected = weighted_average(tensors, weights)
    permuted = weighted_average([tensors[index] for index in order], [weights[index] for index in order])
    assert torch.equal(permuted, expected)


@pytest.mark.parametrize(
    ("tensors", "weights"),
    [
        ([], []),
        ([torch.ones(1)], [1, 2]),
        ([torch.ones(1), torch.ones(2)], [1, 1]),
        ([torch.ones(1), torch.ones(1).double()], [1, 1]),
        ([torch.ones(1)], [0]),
        ([torch.ones(1)], [math.nan]),
    ],
)
def test_what_cannot_be_averaged(tensors: list[Tensor], weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weighted_average"):
        weighted_average(tensors, weights)


def test_weights_and_buffers_are_averaged_by_samples(sparse: Callable[..., nn.Module]) -> None:
    server = _server(sparse())
    before = server.state
    server.finish_round({0: _update(server, samples=1, shift=0.0), 1: _update(server, samples=3, shift=4.0)})
    assert server.state.version == 1
    for old, new in ((before.values, server.state.values), (before.dense, server.state.dense)):
        for name in old:
            if old[name].is_floating_point():
                torch.testing.assert_close(new[name], old[name] + 3.0)
    assert torch.equal(server.model.get_parameter("fc.bias"), server.state.dense["fc.bias"])


def test_counts_follow_the_schedule(sparse: Callable[..., nn.Module]) -> None:
    server = _server(sparse(adjustment_interval=2, adjustment_rate=0.4), rounds=6)
    asked = []
    for _ in range(6):
        asked.append(server.task().counts)
        server.finish_round({0: _update(server)})
    assert [counts is not None for counts in asked] == [False, False, True, False, True, False]
    active = {name: int(mask.sum()) for name, mask in server.state.masks.items()}
    for round_index in (2, 4):
        share = 0.2 * (1 + math.cos(math.pi * round_index / 6))  # alpha/2 * (1 + cos(pi t / R_stop))
        for name, count in asked[round_index].items():
            inactive = server.state.masks[name].numel() - active[name]
            assert count == min(math.floor(share * active[name]), inactive)


@pytest.mark.parametrize("method", ["static-random", "static-magnitude"])
def test_static_masks_never_ask(method: str, sparse: Callable[..., nn.Module]) -> None:
    server = _server(sparse(adjustment_interval=1), method=method)
    for _ in range(4):
        assert server.task().counts is None
        server.finish_round({0: _update(server)})


def test_an_adjustment_prunes_the_lowest_and_grows_the_candidates_at_zero(sparse: Callable[..., nn.Module]) -> None:
    server = _at_adjustment(_server(sparse(adjustment_interval=1, adjustment_space="parameter")))
    counts, before = server.task().counts, server.state
    assert counts is not None
    churn = server.finish_round({0: _update(server)})
    assert churn == counts
    for name, mask in before.masks.items():
        new = server.state.masks[name]
        assert int(new.sum()) == int(mask.sum())
        pruned, grown = mask & ~new, new & ~mask
        weight = torch.zeros(mask.shape).masked_scatter(mask, before.values[name])
        assert float(weight[pruned].abs().max()) <= float(weight[mask & new].abs().min())
        expected = (~mask).flatten().nonzero().squeeze(1)[: counts[name]]
        assert torch.equal(grown.flatten().nonzero().squeeze(1), expected)
        live = server.model.get_parameter(name).detach()
        assert bool((live[~mask] == 0).all())
        assert torch.equal(live[mask & new], weight[mask & new])


def test_a_round_does_not_depend_on_the_order_of_clients(sparse: Callable[..., nn.Module]) -> None:
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        server = _at_adjustment(_server(sparse(adjustment_interval=1)))
        updates = {c: _update(server, samples=c + 1, shift=0.1 * c, grow_at_end=c == 1) for c in order}
        server.finish_round(updates)
        results.append(server.state)
    for a, b in ((results[0].masks, results[1].masks), (results[0].values, results[1].values)):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_names_are_matched_whole() -> None:
    # Eleven layers, so that there is a "1" and a "10".
    layers = [nn.Linear(6, 6, bias=False) for _ in range(11)]
    server = _server(fedmef_fx.transform(nn.Sequential(*layers), fedmef_fx.Config(density=0.5, weight_storage="dense")))
    start = server.state
    update = _update(server)
    update.values["1.weight"].add_(1.0)  # type: ignore[index]  # a dict
    server.finish_round({0: update})
    changed = {name for name, value in server.state.values.items() if not torch.equal(value, start.values[name])}
    assert changed == {"1.weight"}


def test_a_client_is_known_to_have_a_broadcast_once_it_has_answered(sparse: Callable[..., nn.Module]) -> None:
    server = _server(sparse())
    first = server.broadcast(3)
    # It may have been lost: sent anew, it is complete again.
    assert server.broadcast(3) == first
    server.receive(3, encode_update(_update(server, client=3), received=server.state))
    server.finish_round({3: _update(server)})
    assert len(server.broadcast(3)) < len(server.broadcast(4))


def test_a_bad_answer_names_client_and_round(sparse: Callable[..., nn.Module]) -> None:
    server = _server(sparse())
    with pytest.raises(WireError, match="client 5, round 0: container"):
        server.receive(5, b"nonsense")
    assert 5 not in server.known


def test_a_round_without_updates_is_refused(sparse: Callable[..., nn.Module]) -> None:
    with pytest.raises(ConfigError, match="round 0: got no updates"):
        _server(sparse()).finish_round({})


def test_a_restored_server_continues_where_it_was(sparse: Callable[..., nn.Module]) -> None:
    server = _at_adjustment(_server(sparse(adjustment_interval=1)))
    server.finish_round({0: _update(server, shift=0.5)})
    other = _server(sparse(adjustment_interval=1))
    other.restore(server.state, changed=server.changed, known=server.known)
    assert other.broadcast(0) == server.broadcast(0)
    for name, value in server.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value)
