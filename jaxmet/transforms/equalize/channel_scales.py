"""From a graph's channel groups to places in one vector of log scales, and back."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.channels import Group, Layout, Member
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.layer import by_channel
from jaxmet.layers.layouts import places_of
from jaxmet.layers.leaf_math import scaled
from jaxmet.layers.norm_parameters import statistics_weight
from jaxmet.numerics.precision import wide
from jaxmet.numerics.scaling import Layers, log_ranges
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

    def index(self, layout: Layout) -> np.ndarray:
        """The places (factors, size) that an axis follows; their log scales are summed."""
        return places_of(layout, self.starts, self.size)

    def touched(self, member: Member) -> bool:
        """Whether any channel of this axis is rescaled."""
        return bool(np.any(self.index(member.layout) < self.size))


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
        inputs = _outer([channels.index(m.layout) for m in ins], channels.size)
        outputs = _outer([channels.index(m.layout) for m in outs], channels.size)
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

    def matrix(self, leaf: Any) -> jax.Array:
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


def _outer(indices: list[np.ndarray], fixed: int) -> np.ndarray:
    """The index of several axes taken as one, the last running fastest."""
    joined = np.full((1, 1), fixed)
    for index in indices:
        one = np.repeat(joined, index.shape[1], axis=1)
        two = np.tile(index, joined.shape[1])
        both = np.concatenate([one, two])
        alive = np.any(both < fixed, axis=1)
        joined = both[alive] if np.any(alive) else both[:1]
    return joined


@dataclasses.dataclass(frozen=True)
class Stack:
    """Weights of one shape, whose axes can be reduced in the same way."""

    weights: tuple[ScaledWeight, ...]
    ins: tuple["Same", ...]
    outs: tuple["Same", ...]

    def matrix(self, leaves: Mapping[str, Any]) -> jax.Array:
        """All of them, with axes (layers, groups, ins, outs, window)."""
        each = [w.matrix(leaves[w.parameter]) for w in self.weights]
        dtype = wide(*(m.dtype for m in each))
        # Made once: many things are read off it, and compiled apart from it.
        return jax.lax.optimization_barrier(jnp.stack([m.astype(dtype) for m in each]))


def stacks(
    weights: Sequence[ScaledWeight],
    leaves: Mapping[str, Any],
    whole: Sequence[str] = (),
) -> list[Stack]:
    """Weights by shape, which is quicker to compile; `whole` keep all their outputs."""
    found: dict[Any, list[tuple[ScaledWeight, Same, Same]]] = {}
    for weight in weights:
        ins, outs = same_scale(weight.inputs), same_scale(weight.outputs)
        if weight.node.name in whole:
            outs = Same(weight.outputs, None)
        of = [None if s.of is None else s.of.tobytes() for s in (ins, outs)]
        shape = jax.eval_shape(weight.matrix, leaves[weight.parameter]).shape
        found.setdefault((shape, *of), []).append((weight, ins, outs))
    return [Stack(*zip(*same, strict=True)) for same in found.values()]


def layers_of(
    every: Sequence[Stack], matrices: Sequence[jax.Array], fixed: int
) -> Layers:
    """Log ranges of all weights and where their inputs and outputs stand."""
    dtype = wide(*(m.dtype for m in matrices))
    ranges = []
    for stack, matrix in zip(every, matrices, strict=True):
        log_range = stack.outs[0].largest(log_ranges(matrix), 3)
        ranges.append(stack.ins[0].largest(log_range, 2).astype(dtype))
    ins = [same.index for stack in every for same in stack.ins]
    outs = [same.index for stack in every for same in stack.outs]
    return Layers(tuple(ranges), in_a_row(ins, fixed), in_a_row(outs, fixed))


def in_a_row(indices: Sequence[np.ndarray], fixed: int) -> np.ndarray:
    """Indices (factors, …) one after the other, in row-major order."""
    depth = max(len(index) for index in indices)
    flat = [index.reshape(len(index), -1) for index in indices]
    short = [((0, depth - len(index)), (0, 0)) for index in indices]
    padded = [
        np.pad(i, width, constant_values=fixed)
        for i, width in zip(flat, short, strict=True)
    ]
    return np.concatenate(padded, axis=1)


@dataclasses.dataclass(frozen=True)
class Same:
    """Places along an axis that follow the same channels, taken as one."""

    index: np.ndarray  # (factors, groups, places left)
    of: np.ndarray | None  # for each old place the new one; None: all stay apart

    def largest(self, x: jax.Array, axis: int) -> jax.Array:
        """The largest value at each place."""
        return self._reduced(x, axis, jax.ops.segment_max, jnp.max)

    def total(self, x: jax.Array, axis: int) -> jax.Array:
        """The sum of the values at each place."""
        return self._reduced(x, axis, jax.ops.segment_sum, jnp.sum)

    def _reduced(self, x: jax.Array, axis: int, some: Any, every: Any) -> jax.Array:
        if self.of is None:
            return x
        if self.index.shape[2] == 1:
            return every(x, axis=axis, keepdims=True)
        reduced = some(jnp.moveaxis(x, axis, 0), self.of, self.index.shape[2])
        return jnp.moveaxis(reduced, 0, axis)


def same_scale(index: np.ndarray) -> Same:
    """What of an axis (factors, groups, places) can be taken as one."""
    if index.shape[1] != 1:
        return Same(index, None)
    unique, of = np.unique(index[:, 0], axis=1, return_inverse=True)
    if unique.shape[1] == index.shape[2]:
        return Same(index, None)
    return Same(unique[:, None], of.reshape(-1))


def rescaled(
    channels: Channels, leaves: Mapping[str, Any], x: jax.Array
) -> dict[str, Any]:
    """The leaves that change when channel i is divided by exp(x_i)."""
    scale = jnp.exp(x)
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
        factor = _factor(channels, member, scale, leaf)
        leaf = scaled(leaf, factor, POWERS[member.role])
        if member.role == "in" and is_compressed(leaf):
            leaf = _offset_kept(leaf, scales_along(channels, member.layout, scale))
        found[member.parameter] = leaf
    for member in channels.graph.members:
        if member.role == "scale" and channels.touched(member):
            found[member.parameter] = _gain_kept(channels, member, leaves, found)
    return found


def _offset_kept(leaf: Compressed, scales: jax.Array) -> Compressed:
    """A leaf whose inputs were divided by scales, as what pads them has to be."""
    if leaf.input_offset is None:
        return leaf
    offset = jnp.asarray(leaf.input_offset)
    return leaf.replace(input_offset=offset / scales.astype(offset.dtype))


def scales_along(channels: Channels, layout: Layout, scale: jax.Array) -> jax.Array:
    """The scale of everything on an axis."""
    index = channels.index(layout)
    first = index[0, 0]
    if np.array_equal(index, np.arange(first, first + index.size)[None]):
        return jax.lax.slice(scale, (first,), (first + index.size,))  # quick to compile
    return jnp.prod(scale[index], axis=0)


def _factor(
    channels: Channels, member: Member, scale: jax.Array, leaf: Any
) -> jax.Array:
    """The scales along a member's axis, in the rank of its leaf."""
    along = scales_along(channels, member.layout, scale)
    shape = [1] * leaf.ndim
    if member.groups == 1:
        shape[member.axis] = along.size
        return along.reshape(shape)
    outs = leaf.shape[member.out_axis]
    each = along.reshape(member.groups, -1)
    along = jnp.repeat(each, outs // member.groups, axis=0)  # (outs, inputs of a group)
    shape[member.out_axis] = outs
    if member.axis < 0:
        return along.reshape(shape)
    shape[member.axis] = along.shape[1]
    along = along if member.out_axis < member.axis else along.T
    return along.reshape(shape)


def _gain_kept(
    channels: Channels,
    member: Member,
    leaves: Mapping[str, Any],
    new: Mapping[str, Any],
) -> jax.Array:
    """The scale that gives a norm its old gain with the new variance."""
    norm = channels.graph[member.node].norm
    assert norm is not None and norm.variance is not None
    scale, old = jnp.asarray(leaves[member.parameter]), leaves[norm.variance]
    dtype = wide(scale.dtype)
    weight = statistics_weight(norm, leaves, dtype)
    before, after = (
        jnp.sqrt(jnp.asarray(v).astype(dtype) * weight + norm.epsilon)
        for v in (old, new.get(norm.variance, old))
    )
    shape = scale.shape
    gain = scale.astype(dtype) / before.reshape(shape)
    return (gain * after.reshape(shape)).astype(scale.dtype)


def with_bounds(
    clip: Node, leaf: Any, factor: jax.Array, upper: float | None = None
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
        return jnp.asarray(given, factor.dtype) / factor

    low, high = clip.bounds
    new = stated.replace(
        lower=bound(stated.lower, low), upper=bound(stated.upper, high)
    )
    if upper is not None:
        new = new.replace(upper=jnp.full_like(factor, upper))
    return new
