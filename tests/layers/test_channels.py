"""Values of channels along axes that are flattened, joined, or both, and along parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmet.engine.graph.channel_groups import Joined, Member, Span, layout_size
from jaxmet.layers.channels import ChannelAxes, ChannelIndex, MergedAxis, join, spread
from jaxmet.numerics.moments import Moments
from jaxmet.transforms.prune.coupled_channels import channel_along, left_along


@st.composite
def layouts(draw, groups, depth=0):
    """A layout in which each group occurs once, and for each position its (group, channel)."""
    own = {g: np.array([(g, c) for c in range(n)]) for g, n in groups.items()}
    if len(groups) > 1 or (groups and depth < 2 and draw(st.booleans())):
        names = sorted(groups)
        cut = draw(st.integers(1, len(names)))
        halves = [names[:cut], names[cut:]]
        parts = [
            draw(layouts({g: groups[g] for g in half}, depth=depth + 1))
            for half in halves
        ]
        item = Joined(tuple(layout for layout, _ in parts))
        table = np.concatenate([t for _, t in parts])
    elif groups:
        [(group, size)] = groups.items()
        item, table = Span(group, size), own[group]
    else:
        size = draw(st.integers(1, 3))
        item, table = Span(None, size), np.full((size, 2), -1)
    before = draw(st.lists(st.integers(1, 3), max_size=1))
    after = draw(st.lists(st.integers(1, 3), max_size=1))
    layout = (
        *(Span(None, n) for n in before),
        item,
        *(Span(None, n) for n in after),
    )
    whole = np.broadcast_to(
        table[None, :, None], (int(np.prod(before)), len(table), int(np.prod(after)), 2)
    )
    return layout, whole.reshape(-1, 2)


@settings(max_examples=40)
@given(layouts({0: 2, 1: 3, 2: 1}))
def test_each_position_has_the_value_of_its_channel(drawn):
    layout, table = drawn
    assert layout_size(layout) == len(table)
    values = {0: [10.0, 11.0], 1: [20.0, 21.0, 22.0], 2: [30.0]}
    vectors = {g: np.asarray(v) for g, v in values.items() if g != 1}
    wanted = [values[g][c] if g in vectors else 0.0 for g, c in table]
    np.testing.assert_array_equal(spread(layout, vectors), wanted)
    tensor = {g: Moments(*[np.asarray(v)] * 4) for g, v in values.items()}
    found = join(layout, tensor)
    if np.all(table[:, 0] >= 0):
        wanted = [values[g][c] for g, c in table]
        np.testing.assert_array_equal(found.mean, wanted)
    else:
        assert found is None


@settings(max_examples=40)
@given(layouts({0: 2, 1: 3}), layouts({2: 2}))
def test_positions_of_two_axes_taken_as_one(first, second):
    """The last axis runs fastest; values are multiplied, and masks and channels follow."""
    (one, table), (two, other) = first, second
    layout, values = (*one, *two), {0: [2.0, 3.0], 1: [5.0, 7.0, 11.0], 2: [13.0, 17.0]}
    both = [(*a, *b) for a in table.tolist() for b in other.tolist()]
    of = lambda g, c: values[g][c] if g >= 0 else 1.0
    index = ChannelIndex.of(layout, {0: 2, 1: 3, 2: 2})
    flat = np.concatenate([*values.values(), [1.0]])
    wanted = [of(g, c) * of(h, d) for g, c, h, d in both]
    np.testing.assert_array_equal(index.product(flat), wanted)
    counts = [(g >= 0) + (h >= 0) for g, _, h, _ in both]
    np.testing.assert_array_equal(index.counts, counts)
    single = [of(g, c) * of(h, d) if (g < 0) != (h < 0) else 1 for g, c, h, d in both]
    np.testing.assert_array_equal(index.select(flat), single)

    masks = {1: np.array([True, False, True]), 2: np.array([False, True])}
    left = lambda g, c: g not in masks or masks[g][c]
    wanted = [left(g, c) and left(h, d) for g, c, h, d in both]
    np.testing.assert_array_equal(left_along(layout, masks), wanted)
    mine = lambda g, c: c if g in (0, 2) else -1
    wanted = [max(mine(g, c), mine(h, d)) for g, c, h, d in both]
    np.testing.assert_array_equal(channel_along(layout, {0, 2}), wanted)


def test_traced_values_are_laid_out_as_numbers_are():
    layout = (Span(None, 2), Joined(((Span(1, 3),), (Span(0, 2),))))
    vectors = {0: jnp.arange(2.0), 1: 5 + jnp.arange(3.0)}
    found = jax.jit(lambda v: spread(layout, v))(vectors)
    np.testing.assert_array_equal(found, 2 * [5.0, 6.0, 7.0, 0.0, 1.0])


def test_merged_positions_have_the_largest_value_and_the_sum_of_theirs():
    index = np.array([[0, 1, 0, 2, 1, 0], [3, 3, 3, 3, 3, 3]])
    merged = MergedAxis.of(index[:, None])
    x = np.arange(12.0).reshape(2, 6)
    same = [[0, 2, 5], [1, 4], [3]]
    order = [same[i] for i in merged.index[0, 0]]
    wanted = np.stack([x[:, i].sum(1) for i in order], 1)
    np.testing.assert_array_equal(merged.total(x, 1), wanted)
    wanted = np.stack([x[:, i].max(1) for i in order], 1)
    np.testing.assert_array_equal(merged.largest(x, 1), wanted)
    apart = MergedAxis.of(np.array([[[0, 1, 2]]]))
    assert apart.total(x, 1) is x


@pytest.mark.parametrize("xp", [np, jnp])
def test_values_along_the_axes_of_a_parameter(xp):
    values = xp.arange(6.0).reshape(2, 3)
    found = ChannelAxes("w", (3, 1)).spread(values, (4, 3, 5, 2))
    np.testing.assert_array_equal(found, np.arange(6.0).reshape(2, 3).T[None, :, None])
    part = ChannelAxes("w", (0,), part=(2, 5)).spread(values.reshape(-1), (3, 2))
    np.testing.assert_array_equal(part, [[2.0], [3.0], [4.0]])


@pytest.mark.parametrize("out_first", [True, False])
@pytest.mark.parametrize("depthwise", [True, False])
def test_inputs_of_groups_are_laid_along_their_outputs(out_first, depthwise):
    """By hand: output o of group o // 2 reads the inputs of that group alone."""
    groups, ins, outs = (6, 1, 12) if depthwise else (3, 2, 6)
    values = np.arange(6.0)
    axis, out_axis = (1, 0) if out_first else (0, 1)
    shape = (outs, ins) if out_first else (ins, outs)
    layout = (Span(0, 6),)
    member = Member("w", axis, "in", layout, "conv", groups, out_axis)
    found = ChannelAxes.of(member).spread(values, shape)
    wanted = [[values[o // 2 * ins + i] for i in range(ins)] for o in range(outs)]
    np.testing.assert_array_equal(found, wanted if out_first else np.transpose(wanted))
    if depthwise:  # a kernel without an axis for the inputs
        member = Member("w", -1, "in", layout, "conv", groups, 1)
        found = ChannelAxes.of(member).spread(values, (3, outs))
        np.testing.assert_array_equal(found, [[values[o // 2] for o in range(outs)]])
