"""Values of channels along the axes of parameters, and back.

An axis may be several axes flattened, a concatenation, or a mixture of both, so a position of
it belongs to one channel, to several or to none. Which ones follows from shapes alone: the
index arrays are NumPy's, and the values that they select may be traced.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmet.engine.graph.channel_groups import (
    Joined,
    Layout,
    Member,
    Span,
    indices_of,
    layout_size,
)
from jaxmet.numerics import xp
from jaxmet.numerics.moments import Moments
from jaxmet.numerics.xp import Array

Tensor = dict[int, Moments]  # by channel group


@dataclasses.dataclass(frozen=True)
class ChannelIndex:
    """For each position of an axis, the places of its channels in one vector of values."""

    index: np.ndarray  # (factors, positions)
    none: int  # what `index` has where a position belongs to fewer channels

    @staticmethod
    def of(layout: Layout, sizes: Mapping[int, int]) -> "ChannelIndex":
        """Of a vector with the values of groups of these sizes, one group after the other."""
        starts = itertools.accumulate(sizes.values(), initial=0)
        none = sum(sizes.values())
        places = dict(zip(sizes, starts, strict=False))
        return ChannelIndex(_places(layout, places, none), none)

    @staticmethod
    def within(layout: Layout, groups: set[int]) -> "ChannelIndex":
        """Of one vector whose values all of these groups share."""
        none = layout_size(layout)  # no group on the axis has more channels
        return ChannelIndex(_places(layout, dict.fromkeys(groups, 0), none), none)

    @property
    def counts(self) -> np.ndarray:
        """How many channels each position belongs to, (positions,)."""
        return np.sum(self.index != self.none, axis=0)

    @property
    def single(self) -> np.ndarray:
        """The place of each position's only channel, `none` if it has no or several ones."""
        return np.where(self.counts > 1, self.none, np.min(self.index, axis=0))

    def select(self, values: Array) -> Array:
        """The value of each position's only channel, `values[none]` if there is none."""
        return _taken(values, self.single)

    def product(self, values: Array) -> Array:
        """The product of the values of each position's channels; `values[none]` is one."""
        if len(self.index) == 1:
            return _taken(values, self.index[0])
        return xp.prod(values[self.index], axis=0)


def _taken(values: Array, places: np.ndarray) -> Array:
    start = places[0] if places.size else 0
    if np.array_equal(places, np.arange(start, start + places.size)):
        return values[start : start + places.size]  # most axes: compiles no gather
    return values[places]


def _places(layout: Layout, starts: Mapping[int, int], none: int) -> np.ndarray:
    """The places (factors, positions) of channels, given the first of each group.

    Each item of the layout that runs along one of these groups gives its own factors.
    """
    total, before, rows = layout_size(layout), 1, []
    for item in layout:
        own = _item_places(item, starts, none)
        after = total // (before * own.shape[1])
        if np.any(own < none):
            rows.append(np.tile(np.repeat(own, after, axis=1), before))
        before *= own.shape[1]
    return np.concatenate(rows) if rows else np.full((1, total), none)


def _item_places(
    item: Span | Joined, starts: Mapping[int, int], none: int
) -> np.ndarray:
    if isinstance(item, Span):
        if item.group is not None and item.group in starts:
            return starts[item.group] + np.arange(item.size)[None]
        return np.full((1, item.size), none)
    parts = [_places(part, starts, none) for part in item.parts]
    depth = max(len(part) for part in parts)
    short = [((0, depth - len(part)), (0, 0)) for part in parts]
    padded = [
        np.pad(p, w, constant_values=none) for p, w in zip(parts, short, strict=True)
    ]
    return np.concatenate(padded, axis=1)


@dataclasses.dataclass(frozen=True)
class ChannelAxes:
    """A parameter and the axes of it that channels run along.

    With `groups`, the axis holds the inputs of one group; see `channel_groups.Member`. `part`
    are the first and last of the channels that run there, where others run elsewhere.
    """

    parameter: str
    axes: tuple[int, ...]
    groups: int = 1
    out_axis: int = -1
    part: tuple[int, int] | None = None

    @staticmethod
    def of(member: Member) -> "ChannelAxes":
        """The one axis of a member."""
        return ChannelAxes(
            member.parameter, (member.axis,), member.groups, member.out_axis
        )

    def spread(self, values: Array, shape: tuple[int, ...]) -> Array:
        """One value per channel, with the rank of a parameter of this shape.

        Args:
            values: an axis for each of `axes`; with `groups` one, the channels of all groups.
            shape: that of the parameter.

        Returns:
            The values along their axes; the other axes have size one.
        """
        sizes = [1] * len(shape)
        if self.part is not None:
            values = values[slice(*self.part)]
        if self.groups == 1:
            for axis, n in zip(self.axes, values.shape, strict=True):
                sizes[axis] = n
            order = sorted(range(values.ndim), key=lambda i: self.axes[i])
            return xp.transpose(values, order).reshape(sizes)
        # The outputs of a group follow each other and read the same inputs.
        (axis,), outputs = self.axes, shape[self.out_axis]
        each = values.reshape(self.groups, -1)
        each = xp.repeat(each, outputs // self.groups, axis=0)  # (outputs, inputs)
        sizes[self.out_axis] = outputs
        if axis < 0:
            return each.reshape(sizes)
        sizes[axis] = each.shape[1]
        return (each if self.out_axis < axis else each.T).reshape(sizes)


@dataclasses.dataclass(frozen=True)
class MergedAxis:
    """An axis whose positions with the same channels are taken as one."""

    index: np.ndarray  # (factors, groups, merged positions)
    segments: np.ndarray | None  # the merged position of each; None: none are merged

    @staticmethod
    def of(index: np.ndarray) -> "MergedAxis":
        """Of the places (factors, groups, positions) of an axis; those of groups stay apart."""
        if index.shape[1] != 1:
            return MergedAxis(index, None)
        unique, segments = np.unique(index[:, 0], axis=1, return_inverse=True)
        if unique.shape[1] == index.shape[2]:
            return MergedAxis(index, None)
        return MergedAxis(unique[:, None], segments.reshape(-1))

    def largest(self, x: Array, axis: int) -> Array:
        """The largest value at each merged position."""
        return self._reduced(x, axis, "max", xp.max)

    def total(self, x: Array, axis: int) -> Array:
        """The sum of the values at each merged position."""
        return self._reduced(x, axis, "add", xp.sum)

    def _reduced(self, x: Array, axis: int, how: str, every: Any) -> Array:
        if self.segments is None:
            return x
        if self.index.shape[2] == 1:
            return every(x, axis=axis, keepdims=True)
        x, number = xp.moveaxis(x, axis, 0), self.index.shape[2]
        reduced = xp.reduce_segments(x, self.segments, number, how)
        return xp.moveaxis(reduced, 0, axis)


def split(layout: Layout, x: Moments) -> Tensor | None:
    """By group the moments along an axis; None where several groups share a position."""
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
    """The moments along an axis; positions repeat those of their channel.

    None where a position belongs to no known channel, or to several.
    """
    here = {g: tensor[g] for g in indices_of(layout) if g in tensor}
    index = ChannelIndex.of(layout, {g: x.mean.size for g, x in here.items()})
    if np.any(index.counts != 1):
        return None
    every = zip(*here.values(), strict=True)
    return Moments(*(index.select(xp.concatenate(v)) for v in every))


def spread(layout: Layout, vectors: Mapping[int, Array]) -> Array:
    """Vectors of some groups along an axis, zero for everything else on it.

    Raises ValueError where a position belongs to channels of two of the groups.
    """
    index = ChannelIndex.of(layout, {g: v.size for g, v in vectors.items()})
    if np.any(index.counts > 1):
        raise ValueError(f"positions of {layout} follow several groups of channels")
    nothing = xp.zeros(1, next(iter(vectors.values())).dtype)
    return index.select(xp.concatenate([*vectors.values(), nothing]))


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
