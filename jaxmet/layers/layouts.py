"""Vectors by channel: between the axes of parameters and channel groups."""

from collections import Counter
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmet.engine.graph.channels import Joined, Layout, Span, layout_size
from jaxmet.numerics.moments import Moments

Tensor = dict[int, Moments]  # by channel group


def split(layout: Layout, x: Moments) -> Tensor | None:
    """By group what stands along an axis; None where several groups share a place."""
    found: Tensor = {}
    if len(layout) == 1 and isinstance(layout[0], Joined):
        start = 0
        for part in layout[0].parts:
            stop = start + layout_size(part)
            inner = split(part, Moments(*(v[start:stop] for v in x)))
            if inner is None:
                return None
            found |= inner
            start = stop
        return found
    if len(layout) == 1 and isinstance(layout[0], Span):
        group = layout[0].group
        return {} if group is None else {group: x}
    return None if layout else {}


def join(layout: Layout, tensor: Mapping[int, Moments]) -> Moments | None:
    """What stands along an axis; positions repeat what is known of their channel."""
    if len(layout) == 1 and isinstance(layout[0], Joined):
        parts = [join(part, tensor) for part in layout[0].parts]
        known = [p for p in parts if p is not None]
        if len(known) != len(parts):
            return None
        return Moments(*(jnp.concatenate(v) for v in zip(*known, strict=True)))
    if any(isinstance(item, Joined) for item in layout):
        return None
    places = [
        i
        for i, item in enumerate(layout)
        if isinstance(item, Span) and item.group in tensor
    ]
    if len(places) != 1:
        return None
    at, total = places[0], layout_size(layout)
    own = layout[at]
    assert isinstance(own, Span) and own.group is not None
    after = layout_size(layout[at + 1 :])

    def along(v: jax.Array) -> jax.Array:
        return jnp.tile(jnp.repeat(v, after), total // (own.size * after))

    return Moments(*(along(v) for v in tensor[own.group]))


def spread(layout: Layout, vectors: Mapping[int, jax.Array]) -> jax.Array:
    """Vectors of some groups along an axis, zero for everything else on it."""
    if len(layout) == 1 and isinstance(layout[0], Joined):
        return jnp.concatenate([spread(part, vectors) for part in layout[0].parts])
    tensor = {g: Moments(v, v, v, v) for g, v in vectors.items()}
    found = join(layout, tensor)
    if found is not None:
        return found.mean
    dtype = next(iter(vectors.values())).dtype
    return jnp.zeros(layout_size(layout), dtype)


def how_often(layout: Layout) -> Counter[int]:
    """The groups on an axis and how often each is there."""
    found: Counter[int] = Counter()
    for item in layout:
        if isinstance(item, Joined):
            for part in item.parts:
                found += how_often(part)
        elif item.group is not None:
            found[item.group] += 1
    return found
