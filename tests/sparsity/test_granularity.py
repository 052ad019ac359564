"""Layouts, channel budgets and N:M patterns: laws over weights of any layout."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity import (
    Layout,
    Pattern,
    SparseGradient,
    adjust_pattern,
    allocate_channels,
    best_in_groups,
    lowest_in_groups,
    parse_granularity,
    pattern_mask,
    random_pattern_mask,
    row_norms,
)

PATTERNS = st.sampled_from([Pattern(1, 2), Pattern(2, 4), Pattern(1, 4), Pattern(3, 8)])


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Layout, Pattern]:
    """A weight with ties, its layout and a pattern that fits it."""
    pattern, groups = draw(PATTERNS), draw(st.integers(1, 2))
    layout = draw(st.sampled_from([Layout(), Layout(groups, True)]))
    inputs, outputs = (
        pattern.of * draw(st.integers(1, 2)) * (groups if layout.transposed else 1),
        draw(st.integers(1, 3)),
    )
    kernel = draw(st.sampled_from([(), (3,), (2, 2)]))
    shape = (inputs, outputs, *kernel) if layout.transposed else (outputs, inputs, *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(-3, 4, shape, generator=generator).float(), layout, pattern


@given(weights())
def test_blocks_and_rows_are_the_weight_in_another_order(case: tuple[Tensor, Layout, Pattern]) -> None:
    weight, layout, pattern = case
    assert torch.equal(layout.unblocked(layout.blocks(weight, pattern.of), weight.shape), weight)
    rows = layout.rows(torch.arange(weight.numel()).reshape(weight.shape))
    assert torch.equal(rows[:, 0], layout.first_positions(weight.shape))
    assert rows.shape[0] == layout.channels(weight.shape)
    spread = layout.spread(torch.arange(rows.shape[0]), weight.shape)
    assert torch.equal(layout.rows(spread), torch.arange(rows.shape[0]).unsqueeze(1).expand_as(rows))


def test_groups_of_m_run_along_the_inputs_of_one_output_and_kernel_position() -> None:
    weight = torch.arange(2 * 4 * 3).reshape(2, 4, 3)  # [out, in, kernel]
    assert Layout().blocks(weight, 4)[0].tolist() == [0, 3, 6, 9]
    assert Layout(transposed=True).blocks(weight, 2)[0].tolist() == [0, 12]


@given(weights(), st.booleans())
def test_a_pattern_keeps_exactly_n_of_every_m(case: tuple[Tensor, Layout, Pattern], is_random: bool) -> None:
    weight, layout, pattern = case
    mask = (
        random_pattern_mask("w", weight.shape, pattern, layout, seed=3)
        if is_random
        else pattern_mask(weight.abs(), pattern, layout)
    )
    assert (layout.blocks(mask, pattern.of).sum(1) == pattern.kept).all()
    if not is_random:
        kept, rest = (torch.where(m, weight.abs(), v) for m, v in ((mask, torch.inf), (~mask, -torch.inf)))
        assert (layout.blocks(kept, pattern.of).amin(1) >= layout.blocks(rest, pattern.of).amax(1)).all()


@given(weights(), st.integers(0, 30), st.data())
def test_an_adjustment_keeps_every_groups_budget(
    case: tuple[Tensor, Layout, Pattern], k: int, data: st.DataObject
) -> None:
    weight, layout, pattern = case
    mask = random_pattern_mask("w", weight.shape, pattern, layout, seed=data.draw(st.integers(0, 9)))
    weight = weight * mask
    dense = torch.randint(-2, 3, weight.shape).float()
    positions = (~mask).flatten().nonzero().squeeze(1)
    gradient = SparseGradient(positions, torch.take(dense, positions), weight.numel())
    before = mask.clone()
    new = adjust_pattern(weight, mask, gradient, k, pattern=pattern, layout=layout)
    assert torch.equal(mask, before)
    assert torch.equal(layout.blocks(new, pattern.of).sum(1), layout.blocks(mask, pattern.of).sum(1))
    grown, pruned = new & ~mask, mask & ~new
    has_candidate = layout.blocks(~mask & (dense != 0), pattern.of).any(1)
    assert int(grown.sum()) == int(pruned.sum()) == min(k, int(has_candidate.sum()))
    assert (layout.blocks(grown, pattern.of).sum(1) <= 1).all()
    for block in layout.blocks(grown, pattern.of).any(1).nonzero().flatten().tolist():
        w, g, was = (layout.blocks(t, pattern.of)[block] for t in (weight.abs(), dense.abs(), mask))
        assert w[layout.blocks(pruned, pattern.of)[block]] == w[was].min()
        assert g[layout.blocks(grown, pattern.of)[block]] == g[~was].max()


def test_a_hand_computed_adjustment_of_two_of_four() -> None:
    weight = torch.tensor([[0.9, 0.0, -0.2, 0.0, 0.5, -0.1, 0.0, 0.0]])
    gradient = SparseGradient(torch.tensor([1, 3, 6]), torch.tensor([0.1, -0.7, 0.3]), 8)
    one = adjust_pattern(weight, weight != 0, gradient, 1, pattern=Pattern(2, 4), layout=Layout())
    assert one.long().tolist() == [[1, 0, 1, 0, 1, 0, 1, 0]]  # -0.1 is the lowest of the two groups' lowest
    both = adjust_pattern(weight, weight != 0, gradient, 9, pattern=Pattern(2, 4), layout=Layout())
    assert both.long().tolist() == [[1, 0, 0, 1, 1, 0, 1, 0]]
    marked = lowest_in_groups(weight, weight != 0, 1, pattern=Pattern(2, 4), layout=Layout())
    assert marked.tolist() == [5]
    best = best_in_groups(gradient, shape=weight.shape, pattern=Pattern(2, 4), layout=Layout())
    assert (best.positions.tolist(), best.values.tolist()) == ([3, 6], [pytest.approx(-0.7), pytest.approx(0.3)])


@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 5)), min_size=1, max_size=5),
    st.floats(0.01, 1.0),
    st.integers(1, 16),
    st.sampled_from(["erk", "uniform"]),
)
def test_channels_are_kept_in_multiples_near_the_budget(
    sizes: list[tuple[int, int]], density: float, multiple: int, method: str
) -> None:
    shapes = {f"w{i}": (out, fan_in) for i, (out, fan_in) in enumerate(sizes)}
    kept = allocate_channels(
        shapes,
        {name: [name] for name in shapes},
        dict.fromkeys(shapes, Layout()),
        density,
        method=method,
        multiple=multiple,
    )
    for name, (out, _) in shapes.items():
        assert kept[name] == out or kept[name] % multiple == 0
        assert min(multiple, out) <= kept[name] <= out
        if method == "uniform" and multiple < kept[name] < out:
            # Rounding the counts of weights moves the budget of one layer by at most one weight, so one channel.
            assert kept[name] <= math.ceil(density * out) + multiple / 2 + 1


def test_a_channels_norm_runs_over_all_layers_of_its_group() -> None:
    layers = [(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), Layout()), (torch.tensor([[4.0, 1.0]]), Layout(1, True))]
    assert row_norms(layers).tolist() == [5.0, 1.0]


@pytest.mark.parametrize("text", ["channels", "2:2", "4:2", "0:4", "-1:4", "2:4 ", "2/4", 4, None])
def test_other_granularities_are_refused(text: object) -> None:
    with pytest.raises(ConfigError, match=r"expected 'weight' \| 'channel' \| 'N:M'"):
        parse_granularity(text)


def test_inputs_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of M"):
        pattern_mask(torch.ones(2, 6), Pattern(2, 4), Layout())
