"""The scales of paths, from what products read and from their weights; the leaves that change."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.flow.scale_paths import ScalePath, ScaleSource, ScaleTarget
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Run
from jaxmet.layers.layer import WeightMatrix
from jaxmet.layers.leaf_math import replaced, scaled
from jaxmet.numerics import xp
from jaxmet.numerics.precision import wide
from jaxmet.numerics.smoothing import smoothing_noise, smoothing_scale
from jaxmet.numerics.xp import Array
from jaxmet.transforms.smooth.eligible_paths import vectors
from jaxmet.tree.leaves import Compressed, dense, is_compressed

ALPHAS = tuple(i / 20 for i in range(21))
"""Where a path whose alpha is searched looks."""

RESULT = -1
"""The key of a node's own result among its operands."""

Alpha = float | Literal["noise"]
Ends = dict[str, tuple[tuple[int, tuple[int, ...]], ...]]


class ChannelValues(NamedTuple):
    """Of each channel the range, zero included, the sum of squares and how many there were."""

    low: Any
    high: Any
    squares: Any
    number: Any

    @property
    def largest(self) -> Any:
        """The largest magnitude."""
        return xp.maximum(-self.low, self.high)

    def times(self, factor: Array) -> "ChannelValues":
        """Those of values times a positive number for each channel."""
        low, high, squares, number = self
        return ChannelValues(low * factor, high * factor, squares * factor**2, number)


Ranges = dict[str, dict[int, ChannelValues]]  # of each node by operand


def ends_of(paths: Sequence[ScalePath], graph: Graph, *, searched: bool) -> Ends:
    """By node the operands whose values are wanted, and along which axes.

    Where alpha is searched, also the results of products that are divided.
    """
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for path in paths:
        for target in path.targets:
            found.setdefault(target.node, {})[target.operand] = target.axes
        for source in _stored(path) if searched else ():
            found.setdefault(source.node, {})[RESULT] = graph[source.node].features
    return {name: tuple(sorted(some.items())) for name, some in found.items()}


def _stored(path: ScalePath) -> tuple[ScaleSource, ...]:
    """Products that are divided: their results have quantizers too."""
    if path.pairs or path.carried:
        return ()
    return tuple(s for s in path.sources if s.gain is None)


def observe(
    ends: Ends, node: Node, run: Run, operands: tuple[Any, ...]
) -> tuple[Any, dict[int, Any] | None]:
    result = run(*operands)
    if node.name not in ends:
        return result, None
    found = {}
    for operand, axes in ends[node.name]:
        if operand == RESULT:
            found[operand] = _by_channel(result, axes, run.counts)
        else:
            where = run.reads[operand] if run.reads else None
            found[operand] = _by_channel(operands[operand], axes, where)
    return result, found


def _by_channel(
    x: jax.Array, axes: tuple[int, ...], where: jax.Array | None
) -> ChannelValues:
    """What is known of the values along some axes, (entries,); zero where nothing counts."""
    rest = [i for i in range(x.ndim) if i not in axes]
    x = jnp.transpose(x, (*axes, *rest)).astype(wide(x.dtype))
    if where is not None:
        where = jnp.broadcast_to(jnp.transpose(where, (*axes, *rest)), x.shape)
    over = tuple(range(len(axes), x.ndim))
    number = jnp.ones(x.shape, x.dtype) if where is None else where.astype(x.dtype)
    found = ChannelValues(
        jnp.min(x, over, where=where, initial=0.0),
        jnp.max(x, over, where=where, initial=0.0),
        jnp.sum(x * x, over, where=where),
        jnp.sum(number, over),
    )
    return ChannelValues(*(v.reshape(-1) for v in found))


def merge(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the values of both."""

    def both(a: ChannelValues, b: ChannelValues) -> ChannelValues:
        return ChannelValues(
            jnp.minimum(a.low, b.low),
            jnp.maximum(a.high, b.high),
            a.squares + b.squares,
            a.number + b.number,
        )

    return {
        n: {k: both(v, two[n][k]) for k, v in some.items()} for n, some in one.items()
    }


def solved(
    graph: Graph,
    paths: Sequence[ScalePath],
    alpha: Alpha,
    leaves: Mapping[str, Any],
    ranges: Ranges,
) -> tuple[dict[str, Any], list[Array]]:
    """The leaves that change, and the scales of each path, (layers, channels)."""
    work, found = dict(leaves), []
    read = {n: dict(r) for n, r in ranges.items()}
    for path in paths:
        s = _scale(graph, path, alpha, work, read)
        found.append(s)
        shared: dict[Any, Any] = {}
        every = xp.concatenate([s, xp.ones_like(s[:, :1])], axis=1)
        divided = () if path.carried else path.sources
        for source, power in zip(divided, (-1, 1), strict=False):
            _rescale_source(graph[source.node], source, every, power, work)
        for target, power in zip(path.targets, _powers(path), strict=True):
            factor = _taken(every, target.places)
            # Both factors of a product may have a scale, which one weight undoes.
            old = read[target.node][target.operand]
            change = (factor.astype(old.low.dtype) ** power).reshape(old.low.shape)
            read[target.node][target.operand] = old.times(change)
            if not path.pairs:
                _rescale(graph[target.node], factor[:, :, None], 1, work)
            if path.carried:
                _carry(graph[target.node], factor[:, :, None], work, shared)
    new = {name: leaf for name, leaf in work.items() if leaf is not leaves[name]}
    return new, found


def _powers(path: ScalePath) -> Sequence[int]:
    """The power of the scale in what each target reads."""
    return (-1, 1) if path.pairs else [-1] * len(path.targets)


def _scale(
    graph: Graph,
    path: ScalePath,
    alpha: Alpha,
    leaves: Mapping[str, Any],
    ranges: Ranges,
) -> Array:
    layers = graph[path.targets[0].node].layers or 1
    values = [_in_layers(ranges[t.node][t.operand], layers) for t in path.targets]
    read = [
        _by_place(v.largest, t, path) for v, t in zip(values, path.targets, strict=True)
    ]
    if path.pairs:
        alpha = 0.5 if alpha == "noise" else alpha
        return smoothing_scale(read[0], read[1].astype(read[0].dtype), alpha)
    matrices = [_matrix(graph[t.node], leaves)[1] for t in path.targets]
    largest = [
        _by_place(xp.max(xp.abs(m), axis=2), t, path)
        for m, t in zip(matrices, path.targets, strict=True)
    ]
    inputs, weights = (xp.max(xp.stack(v), axis=0) for v in (read, largest))
    inputs = inputs.astype(weights.dtype)
    if alpha != "noise":
        return smoothing_scale(inputs, weights, alpha)
    stored = [
        (_in_layers(ranges[s.node][RESULT], layers), s.outputs) for s in _stored(path)
    ]
    best, least = xp.ones_like(inputs), xp.full_like(inputs[:, 0], xp.inf)
    for one in ALPHAS:
        s = smoothing_scale(inputs, weights, one)
        every = xp.concatenate([s, xp.ones_like(s[:, :1])], axis=1)
        noise = sum(
            _noise(every, v, m, t.places, stored)
            for v, m, t in zip(values, matrices, path.targets, strict=True)
        )
        better = noise < least
        best, least = xp.where(better[:, None], s, best), xp.where(better, noise, least)
    return best


def _noise(
    every: Array,
    values: ChannelValues,
    matrix: Array,
    places: tuple[int, ...],
    stored: Sequence[tuple[ChannelValues, tuple[int, ...]]],
) -> Array:
    """What quantizers add to the results of a product, (layers,), with these scales."""
    s, dtype = _taken(every, places), every.dtype
    divided = [(values, s), *((v, _taken(every, p)) for v, p in stored)]
    ranges = [
        xp.max(v.high / t, axis=1) - xp.min(v.low / t, axis=1) for v, t in divided
    ]
    squares = values.squares / xp.maximum(values.number, 1.0)
    return smoothing_noise(
        s, [r.astype(dtype) for r in ranges], squares.astype(dtype), matrix
    )


def _in_layers(values: ChannelValues, layers: int) -> ChannelValues:
    return ChannelValues(*(xp.asarray(v).reshape(layers, -1) for v in values))


def _taken(every: Array, places: tuple[int, ...]) -> Array:
    return every[:, np.asarray(places)]


def _by_place(values: Array, target: ScaleTarget, path: ScalePath) -> Array:
    """The largest of values (layers, entries) at each place, (layers, channels)."""
    number = path.size + 1
    found = xp.reduce_segments(values.T, np.asarray(target.places), number, "max")
    return found[: path.size].T


def _matrix(node: Node, leaves: Mapping[str, Any]) -> tuple[WeightMatrix, Array]:
    leaf = leaves[node.kernel]
    matrix, array = WeightMatrix.of(node, leaf), xp.asarray(dense(leaf))
    assert matrix is not None
    return matrix, matrix.matrix(array.astype(wide(array.dtype)))


def _rescale(node: Node, factor: Array, power: int, leaves: dict[str, Any]) -> None:
    """Multiply a weight as (layers, inputs, outputs), or divide it."""
    matrix, array = _matrix(node, leaves)
    factor = factor.astype(array.dtype)
    new = array * factor if power > 0 else array / factor
    leaves[node.kernel] = replaced(leaves[node.kernel], matrix.leaf(new))


def _carry(
    node: Node, factor: Array, leaves: dict[str, Any], shared: dict[Any, Any]
) -> None:
    """Let a weight state what its inputs are divided by, beside what it stated before.

    Weights of the same layout that read one value hold the same array, by which it is divided
    once.
    """
    leaf = leaves[node.kernel]
    leaf = leaf if is_compressed(leaf) else Compressed(leaf)
    matrix = _matrix(node, leaves)[0]
    assert matrix.axes is not None
    whole = matrix.leaf(xp.broadcast_to(factor, matrix.sizes))
    outs = [i for i in matrix.axes[1] if not (node.layers and i == 0)]
    scale = whole[
        tuple(slice(1) if i in outs else slice(None) for i in range(whole.ndim))
    ]
    if leaf.input_scale is not None:
        scale = scale * xp.asarray(leaf.input_scale).astype(scale.dtype)
    scale = shared.setdefault((scale.shape, id(leaf.input_scale)), scale)
    leaves[node.kernel] = leaf.replace(input_scale=scale)


def _rescale_source(
    node: Node, source: ScaleSource, every: Array, power: int, leaves: dict[str, Any]
) -> None:
    if source.gain is None:
        _rescale(node, _taken(every, source.outputs)[:, None, :], power, leaves)
    for name, places in vectors(node, source):
        leaf = leaves[name]
        factor = _taken(every, places).reshape(dense(leaf).shape)
        if name == source.gain and source.offset:
            array = xp.asarray(dense(leaf))
            gain = array.astype(wide(array.dtype, factor.dtype)) + source.offset
            leaves[name] = replaced(leaf, gain * factor**power - source.offset)
        else:
            leaves[name] = scaled(leaf, factor, power)
