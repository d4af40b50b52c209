"""Vectors by channel: between the axes of parameters and channel groups."""

import itertools
from collections import Counter
from collections.abc import Mapping

import numpy as np

from jaxmet.engine.graph.channels import Joined, Layout, Span, layout_size
from jaxmet.numerics import xp
from jaxmet.numerics.moments import Moments
from jaxmet.numerics.xp import Array

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


def places_of(layout: Layout, starts: Mapping[int, int], fixed: int) -> np.ndarray:
    """Where the channels that each position of an axis follows stand in one vector.

    Args:
        layout: the axis.
        starts: by group the place of its first channel in the vector.
        fixed: the place for what follows no channel of these groups.

    Returns:
        Places (factors, positions); a position that follows fewer channels has `fixed`.
    """
    total, before, rows = layout_size(layout), 1, []
    for item in layout:
        own = _item(item, starts, fixed)
        after = total // (before * own.shape[1])
        if np.any(own < fixed):
            rows.append(np.tile(np.repeat(own, after, axis=1), before))
        before *= own.shape[1]
    return np.concatenate(rows) if rows else np.full((1, total), fixed)


def _item(item: Span | Joined, starts: Mapping[int, int], fixed: int) -> np.ndarray:
    if isinstance(item, Span):
        if item.group is not None and item.group in starts:
            return starts[item.group] + np.arange(item.size)[None]
        return np.full((1, item.size), fixed)
    parts = [places_of(part, starts, fixed) for part in item.parts]
    depth = max(len(part) for part in parts)
    short = [((0, depth - len(part)), (0, 0)) for part in parts]
    padded = [
        np.pad(p, w, constant_values=fixed) for p, w in zip(parts, short, strict=True)
    ]
    return np.concatenate(padded, axis=1)


def _followed(layout: Layout, sizes: Mapping[int, int]) -> tuple[np.ndarray, int, int]:
    """Of each position the one place that it follows among groups of these sizes.

    Also the number of places, which stands for none, and the most that any follows.
    """
    ends = list(itertools.accumulate(sizes.values(), initial=0))
    places = places_of(layout, dict(zip(sizes, ends, strict=False)), ends[-1])
    most = np.sum(places < ends[-1], axis=0).max(initial=0)
    return places.min(axis=0), ends[-1], int(most)


def join(layout: Layout, tensor: Mapping[int, Moments]) -> Moments | None:
    """The moments along an axis; positions repeat those of the channel that they follow.

    None where a position follows no known channel, or several.
    """
    here = {g: tensor[g] for g in how_often(layout) if g in tensor}
    places, none, most = _followed(layout, {g: x.mean.size for g, x in here.items()})
    if most != 1 or np.any(places == none):
        return None
    every = zip(*here.values(), strict=True)
    return Moments(*(_taken(xp.concatenate(v), places) for v in every))


def spread(layout: Layout, vectors: Mapping[int, Array]) -> Array:
    """Vectors of some groups along an axis, zero for everything else on it.

    Raises ValueError where a position follows channels of two of the groups.
    """
    places, _, most = _followed(layout, {g: v.size for g, v in vectors.items()})
    if most > 1:
        raise ValueError(f"positions of {layout} follow several groups of channels")
    nothing = xp.zeros(1, next(iter(vectors.values())).dtype)
    return _taken(xp.concatenate([*vectors.values(), nothing]), places)


def _taken(values: Array, places: np.ndarray) -> Array:
    if np.array_equal(places, np.arange(values.size)):
        return values  # most axes: nothing to compile
    return values[places]


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
