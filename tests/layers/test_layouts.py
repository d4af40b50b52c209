"""Vectors of channel groups along axes that are flattened, joined, or both."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmet.engine.graph.channels import Joined, Span, layout_size
from jaxmet.layers.layouts import join, spread
from jaxmet.numerics.moments import Moments


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
    before = draw(st.lists(st.integers(1, 3), max_size=2))
    after = draw(st.lists(st.integers(1, 3), max_size=2))
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
    vectors = {g: jnp.asarray(v) for g, v in values.items() if g != 1}
    wanted = [values[g][c] if g in vectors else 0.0 for g, c in table]
    np.testing.assert_array_equal(spread(layout, vectors), wanted)
    tensor = {g: Moments(*[jnp.asarray(v)] * 4) for g, v in values.items()}
    found = join(layout, tensor)
    if np.all(table[:, 0] >= 0):
        wanted = [values[g][c] for g, c in table]
        np.testing.assert_array_equal(found.mean, wanted)
    else:
        assert found is None
