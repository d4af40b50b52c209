"""From a graph's channel groups to places in one vector of log scales, and back."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmet.engine.graph.channel_groups import Group, Layout, Member
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.channels import ChannelAxes, ChannelIndex, MergedAxis
from jaxmet.layers.folds.norm_parameters import statistics_weight
from jaxmet.layers.layer import by_channel, channel_sizes
from jaxmet.layers.leaf_math import scaled
from jaxmet.numerics import xp
from jaxmet.numerics.precision import wide
from jaxmet.numerics.scaling import Layers, layers_of, log_ranges
from jaxmet.numerics.xp import Array
from jaxmet.tree.leaves import Compressed, is_compressed

POWERS = {"in": 1, "out": -1, "shift": -1, "variance": -2}


@dataclasses.dataclass(frozen=True)
class Channels:
    """Where each group that is rescaled stands in the vector; the last entry is fixed."""

    graph: Graph
    free: tuple[Group, ...]

    @property
    def starts(self) -> dict[int, int]:
        """The first place of each group, by the group's index."""
        before = itertools.accumulate((g.size for g in self.free), initial=0)
        return {g.index: start for g, start in zip(self.free, before, strict=False)}

    @property
    def size(self) -> int:
        """The number of channels that are rescaled."""
        return sum(g.size for g in self.free)

    def along(self, layout: Layout) -> ChannelIndex:
        """The channels of an axis; its log scales are the sums of theirs."""
        return ChannelIndex.of(layout, {g.index: g.size for g in self.free})

    def touched(self, member: Member) -> bool:
        """Whether any channel of this axis is rescaled."""
        return bool(np.any(self.along(member.layout).counts))


@dataclasses.dataclass(frozen=True)
class ScaledWeight:
    """How a product's weight follows the channels: where its inputs and outputs stand."""

    node: Node
    ins: tuple[Member, ...]
    outs: tuple[Member, ...]
    inputs: np.ndarray  # (factors, groups, ins)
    outputs: np.ndarray  # (factors, groups, outs)

    @staticmethod
    def of(node: Node, members: Sequence[Member], channels: Channels) -> "ScaledWeight":
        """The weight of a product, from the members of its node."""
        ins = tuple(m for m in members if m.role == "in")
        outs = tuple(m for m in members if m.role == "out")
        groups = ins[0].groups if ins else 1
        inputs, outputs = (_along(channels, side) for side in (ins, outs))
        return ScaledWeight(
            node,
            ins,
            outs,
            inputs.reshape(len(inputs), groups, -1),
            outputs.reshape(len(outputs), groups, -1),
        )

    @property
    def parameter(self) -> str:
        """The name of the weight."""
        return (self.outs or self.ins)[0].parameter

    def sizes(self, leaf: Any) -> tuple[int, int, int, int]:
        """The shape of its matrix."""
        return channel_sizes(self.node, leaf.shape)

    def matrix(self, leaf: Any) -> Array:
        """The weight with axes (groups, ins, outs, window)."""
        return by_channel(self.node, leaf)


def find_weights(channels: Channels) -> tuple[ScaledWeight, ...]:
    """The weights along which any channel is rescaled, in the order of the run."""
    mine: dict[str, list[Member]] = {}
    for member in channels.graph.members:
        mine.setdefault(member.node, []).append(member)
    every = [
        ScaledWeight.of(node, mine[node.name], channels)
        for node in channels.graph.nodes
        if node.kind == "product" and node.name in mine
    ]
    fixed = channels.size
    return tuple(
        w for w in every if np.any(w.inputs < fixed) or np.any(w.outputs < fixed)
    )


def _along(channels: Channels, members: Sequence[Member]) -> np.ndarray:
    """The places of several axes taken as one, the last running fastest."""
    layout = tuple(item for m in members for item in m.layout)
    return channels.along(layout).index


@dataclasses.dataclass(frozen=True)
class MergedWeight:
    """A weight whose inputs that follow the same channels are taken as one, and outputs."""

    ins: MergedAxis
    outs: MergedAxis

    @staticmethod
    def of(weight: ScaledWeight, *, whole: bool = False) -> "MergedWeight":
        """With `whole` all outputs stay apart."""
        outputs = weight.outputs
        outs = MergedAxis(outputs, None) if whole else MergedAxis.of(outputs)
        return MergedWeight(MergedAxis.of(weight.inputs), outs)

    def largest(self, x: Array) -> Array:
        """The largest of values (groups, ins, outs) at each place."""
        return self.ins.largest(self.outs.largest(x, 2), 1)

    def total(self, x: Array) -> Array:
        """Their sum at each place."""
        return self.ins.total(self.outs.total(x, 2), 1)


def packed(
    merged: Sequence[MergedWeight], matrices: Sequence[Array], fixed: int
) -> Layers:
    """Log ranges of all weights and where their inputs and outputs stand."""
    dtype = wide(*(m.dtype for m in matrices))
    ranges = [
        one.largest(log_ranges(matrix)).astype(dtype)
        for one, matrix in zip(merged, matrices, strict=True)
    ]
    ins, outs = [m.ins.index for m in merged], [m.outs.index for m in merged]
    return layers_of(ranges, ins, outs, fixed)


def rescaled(channels: Channels, leaves: Mapping[str, Any], x: Array) -> dict[str, Any]:
    """The leaves that change when channel i is divided by exp(x_i)."""
    scale = xp.exp(x)
    found: dict[str, Any] = {}
    done: set[tuple[str, int, str]] = set()
    for member in channels.graph.members:
        if member.role == "scale" or not channels.touched(member):
            continue
        place = member.parameter, member.axis, member.role
        if place in done:
            continue  # of a weight that several layers use
        done.add(place)
        leaf = found.get(member.parameter, leaves[member.parameter])
        if member.role == "variance":
            norm = channels.graph[member.node].norm
            if norm is None or norm.scale is None:
                continue  # its gain has to stay, and is made of the variance alone
        along = scales_along(channels, member.layout, scale)
        factor = ChannelAxes.of(member).spread(along, leaf.shape)
        leaf = scaled(leaf, factor, POWERS[member.role])
        if member.role == "in" and is_compressed(leaf):
            leaf = _offset_kept(leaf, along)
        found[member.parameter] = leaf
    for member in channels.graph.members:
        if member.role == "scale" and channels.touched(member):
            found[member.parameter] = _gain_kept(channels, member, leaves, found)
    return found


def _offset_kept(leaf: Compressed, scales: Array) -> Compressed:
    """A leaf whose inputs were divided by scales, as what pads them has to be."""
    if leaf.input_offset is None:
        return leaf
    offset = xp.asarray(leaf.input_offset)
    return leaf.replace(input_offset=offset / scales.astype(offset.dtype))


def scales_along(channels: Channels, layout: Layout, scale: Array) -> Array:
    """The scale of everything on an axis."""
    return channels.along(layout).product(scale)


def _gain_kept(
    channels: Channels,
    member: Member,
    leaves: Mapping[str, Any],
    new: Mapping[str, Any],
) -> Array:
    """The scale that gives a norm its old gain with the new variance."""
    norm = channels.graph[member.node].norm
    assert norm is not None and norm.variance is not None
    scale, old = xp.asarray(leaves[member.parameter]), leaves[norm.variance]
    dtype = wide(scale.dtype)
    weight = statistics_weight(norm, leaves, dtype)
    before, after = (
        xp.sqrt(xp.asarray(v).astype(dtype) * weight + norm.epsilon)
        for v in (old, new.get(norm.variance, old))
    )
    shape = scale.shape
    gain = scale.astype(dtype) / before.reshape(shape)
    return (gain * after.reshape(shape)).astype(scale.dtype)


def with_bounds(
    clip: Node, leaf: Any, factor: Array, upper: float | None = None
) -> Compressed:
    """The leaf of a clip's carrier with the clip's bounds divided channel by channel.

    `upper` replaces the clip's own. A side that does not bound, or bounds at zero, says
    nothing.
    """
    stated = leaf if is_compressed(leaf) else Compressed(leaf)
    assert clip.bounds is not None

    def bound(given: Any, own: float) -> Any:
        if given is None and (own == 0 or np.isinf(own)):
            return None
        given = own if given is None else given
        return xp.asarray(given, factor.dtype) / factor

    low, high = clip.bounds
    new = stated.replace(
        lower=bound(stated.lower, low), upper=bound(stated.upper, high)
    )
    if upper is not None:
        new = new.replace(upper=xp.full_like(factor, upper))
    return new
