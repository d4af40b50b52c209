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
    """The moments along an axis; positions repeat those of the channel that they follow.

    None where a position follows no known channel, or several.
    """
    found = []
    for i, item in enumerate(layout):
        known = _along_item(item, tensor)
        if known is not None:
            found.append((i, known))
    if len(found) != 1:
        return None
    [(at, known)] = found
    return Moments(*(_repeated(v, layout, at) for v in known))


def _along_item(item: Span | Joined, tensor: Mapping[int, Moments]) -> Moments | None:
    if isinstance(item, Span):
        return None if item.group is None else tensor.get(item.group)
    parts = [join(part, tensor) for part in item.parts]
    known = [p for p in parts if p is not None]
    if len(known) != len(parts):
        return None
    return Moments(*(jnp.concatenate(v) for v in zip(*known, strict=True)))


def _repeated(v: jax.Array, layout: Layout, at: int) -> jax.Array:
    """Values along one factor of an axis, repeated along all of the axis."""
    after = layout_size(layout[at + 1 :])
    return jnp.tile(jnp.repeat(v, after), layout_size(layout[:at]))


def spread(layout: Layout, vectors: Mapping[int, jax.Array]) -> jax.Array:
    """Vectors of some groups along an axis, zero for everything else on it.

    Raises ValueError where a position follows channels of two of the groups.
    """
    dtype = next(iter(vectors.values())).dtype
    found = [
        (i, _spread_item(item, vectors))
        for i, item in enumerate(layout)
        if how_often((item,)).keys() & vectors.keys()
    ]
    if len(found) > 1:
        raise ValueError(f"positions of {layout} follow several groups of channels")
    if not found:
        return jnp.zeros(layout_size(layout), dtype)
    [(at, along)] = found
    return _repeated(along, layout, at)


def _spread_item(item: Span | Joined, vectors: Mapping[int, jax.Array]) -> jax.Array:
    if isinstance(item, Span):
        assert item.group is not None
        return vectors[item.group]
    return jnp.concatenate([spread(part, vectors) for part in item.parts])


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
