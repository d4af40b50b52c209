"""The range of activations moved into weights: SmoothQuant, and the same across attention."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.flow.scale_paths import ScalePath, ScaleSource, ScaleTarget
from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Run
from jaxmet.layers.arguments import check_examples
from jaxmet.layers.collect import collect
from jaxmet.layers.eligibility import (
    skipped,
)
from jaxmet.layers.grams import unmasked
from jaxmet.layers.layer import WeightMatrix
from jaxmet.layers.leaf_math import replaced, scaled
from jaxmet.layers.once import run_once
from jaxmet.numerics import xp
from jaxmet.numerics.precision import wide
from jaxmet.numerics.smoothing import smoothing_scale
from jaxmet.numerics.xp import Array
from jaxmet.transforms.smooth.carried_scales import with_carried
from jaxmet.transforms.smooth.eligible_paths import check_paths, judged, vectors
from jaxmet.tree.batches import as_batches, check_batch_functions
from jaxmet.tree.checks import check_flags, is_concrete, shown
from jaxmet.tree.leaves import Compressed, dense, is_compressed
from jaxmet.tree.names import replace_leaves
from jaxmet.tree.table import Table
from jaxmet.tree.types import P

CALLER = "smooth"
COLUMNS = ("producer", "consumers", "channels", "scale min", "scale max", "note")
Ranges = dict[str, dict[int, Any]]  # of each node by operand


@overload
def smooth(
    params: P,
    graph: Graph,
    batches: Any,
    *,
    alpha: float = ...,
    input_scales: bool = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[False] = ...,
) -> P: ...
@overload
def smooth(
    params: P,
    graph: Graph,
    batches: Any,
    *,
    alpha: float = ...,
    input_scales: bool = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[True],
) -> tuple[P, Table]: ...
def smooth(
    params: Any,
    graph: Graph,
    batches: Any,
    *,
    alpha: float = 0.5,
    input_scales: bool = False,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
    with_report: bool = False,
) -> Any:
    r"""Move the range of a transformer's activations into the weights that read them.

    Channel i of what products read is divided by $s_i = \max|x_i|^\alpha / \max_o |W_{io}|^{1 -
    \alpha}$, with a geometric mean of 1, and row i of their weights multiplied by it. The maximum
    of x is over all batches, that of W over all products that read x. The division costs nothing
    where something upstream takes it, and the function stays, in these four places:

    - A norm over the data (layer norm, RMS norm) that products alone read: its gain and bias,
      where the gain is stored as a vector $\gamma$ or as $\gamma$ of $1 + \gamma$.
    - The values of attention: the outputs of `value` and the inputs of `out`. Attention weights mix
      positions, not channels. Query heads that share a value head share its scales.
    - Queries and keys: the outputs of `query` are divided, those of `key` multiplied, with the
      range of the keys in place of that of weights. Not with rotary embeddings between; of norms
      there the gains are scaled instead.
    - A gated layer, or one with a ReLU: the outputs of `up` and the inputs of `down`, where what is
      between them is a product with a gate, or ReLU.

    Layers in a loop (`nn.scan`) have scales of their own. All else is skipped: a norm that is also
    a residual stream (post-norm), GELU between two layers, weights that are shared. Ranges of
    activations change: calibrate afterwards.

    With `with_report` also a Table: the producer and the consumers of each set of channels, the
    scales, or why it was skipped. Norms and layers on both sides must be selected in `graph`.

    Xiao et al., [SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models](https://arxiv.org/abs/2211.10438), ICML 2023.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        batches: `jm.batched(tokens)`, or any iterable of batches.
        alpha: how much of the range of activations moves into weights: 0 divides by the range of
            weights alone, 1 by that of activations alone; default 0.5.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        progress: whether a progress bar is shown; default True.
        with_report: whether a `Table` is returned as well; default False.

    Returns:
        The new tree, of the same structure; with `with_report` also the table.

    Raises:
        ValueError: unless `alpha` is a number from 0 to 1, and where `graph.only` named a norm or
            layer none of whose channels can be smoothed.

    >>> params = jm.smooth(params, graph, jm.batched(tokens))
    """
    _check_alpha(alpha)
    flags = {"progress": progress, "with_report": with_report}
    check_flags(CALLER, input_scales=input_scales, **flags)
    check_batch_functions(CALLER, inputs, mask)
    graph, leaves = fitted(params, graph, CALLER)
    paths = [judged(graph, path, leaves) for path in graph.scale_paths]
    if input_scales:
        paths = with_carried(graph, leaves, paths)
    free = [path for path in paths if path.why is None]
    check_paths(graph, paths, leaves, CALLER)
    new, found, lost = {}, [], {}
    read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
    if free:
        check_examples(graph, params, read.first, {}, CALLER)
        ends = _ends(free)
        ranges = collect(
            graph,
            params,
            read,
            partial(_observe, ends),
            _merge,
            caller=CALLER,
            progress=progress,
            lost=lost,
            key=(CALLER, tuple(ends.items())),
        )
        arrays = {name: leaf for name, leaf in leaves.items() if hasattr(leaf, "dtype")}
        solve = partial(_solve, graph, free, alpha)
        new, found = run_once(solve, arrays, ranges)
    result = replace_leaves(params, new, caller=CALLER)
    return (result, _table(paths, found, lost)) if with_report else result


def _check_alpha(alpha: Any) -> None:
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 <= alpha <= 1:
        raise ValueError(
            f"jaxmet.{CALLER}: alpha is {shown(alpha)}. Give a number from 0 to 1: how much of "
            "the range of activations moves into weights, 0.5 by default."
        )


# Ranges


Ends = dict[str, tuple[tuple[int, tuple[int, ...]], ...]]


def _ends(paths: Sequence[ScalePath]) -> Ends:
    """By node the operands whose ranges are wanted, and along which axes."""
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for path in paths:
        for target in path.targets:
            found.setdefault(target.node, {})[target.operand] = target.axes
    return {name: tuple(sorted(some.items())) for name, some in found.items()}


def _observe(
    ends: Ends, node: Node, run: Run, operands: tuple[Any, ...]
) -> tuple[Any, dict[int, Any] | None]:
    result = run(*operands)
    if node.name not in ends:
        return result, None
    found = {}
    for operand, axes in ends[node.name]:
        where = run.reads[operand] if run.reads else None
        found[operand] = _largest(operands[operand], axes, where)
    return result, found


def _largest(x: jax.Array, axes: tuple[int, ...], where: jax.Array | None) -> jax.Array:
    """The largest magnitude along some axes, (entries,); zero where nothing counts."""
    rest = [i for i in range(x.ndim) if i not in axes]
    x = jnp.transpose(x, (*axes, *rest)).astype(wide(x.dtype))
    if where is not None:
        where = jnp.transpose(where, (*axes, *rest))
    over = tuple(range(len(axes), x.ndim))
    return jnp.max(jnp.abs(x), over, where=where, initial=0.0).reshape(-1)


def _merge(one: Any, two: Any) -> Any:
    return jax.tree.map(jnp.maximum, one, two)


# Scales


def _solve(
    graph: Graph,
    paths: Sequence[ScalePath],
    alpha: float,
    leaves: Mapping[str, Any],
    ranges: Ranges,
) -> tuple[dict[str, Any], list[Array]]:
    """The leaves that change, and the scales of each path, (layers, channels)."""
    work, found = dict(leaves), []
    read = {n: {k: xp.asarray(v) for k, v in r.items()} for n, r in ranges.items()}
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
            new = old.reshape(factor.shape) * factor.astype(old.dtype) ** power
            read[target.node][target.operand] = new.reshape(old.shape)
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
    alpha: float,
    leaves: Mapping[str, Any],
    ranges: Ranges,
) -> Array:
    layers = graph[path.targets[0].node].layers or 1
    read = [
        _by_place(ranges[t.node][t.operand].reshape(layers, -1), t, path)
        for t in path.targets
    ]
    if path.pairs:
        return smoothing_scale(read[0], read[1].astype(read[0].dtype), alpha)
    weights = []
    for target in path.targets:
        node = graph[target.node]
        matrix = _matrix(node, leaves)[1]
        largest = xp.max(xp.abs(matrix), axis=2)
        weights.append(_by_place(largest, target, path))
    inputs, weights = (xp.max(xp.stack(v), axis=0) for v in (read, weights))
    return smoothing_scale(inputs.astype(weights.dtype), weights, alpha)


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


# The report


def _table(
    paths: Sequence[ScalePath], found: Sequence[Array], lost: Mapping[str, str]
) -> Table:
    """One row per path; parts of a layer that are skipped for one reason are one row."""
    rows: dict[Any, dict[str, Any]] = {}
    scales = iter(found)
    for number, path in enumerate(paths):
        row: dict[str, Any] = {
            "producer": ", ".join(dict.fromkeys(s.node for s in path.sources)),
            "channels": path.size,
        }
        if path.why is not None:
            key = row["producer"], path.why
            size = path.size + rows.get(key, {}).get("channels", 0)
            rows[key] = row | {"channels": size, "note": skipped(path.why)}
            continue
        consumers = dict.fromkeys(t.node for t in path.targets)
        masks = [unmasked(lost[n]) for n in consumers if n in lost]
        notes = ["carried by the weight"] if path.carried else []
        notes += masks[:1]
        row |= {"consumers": ", ".join(consumers), "note": "; ".join(notes) or None}
        s = next(scales)
        if is_concrete(s):
            row |= {"scale min": float(xp.min(s)), "scale max": float(xp.max(s))}
        rows[number] = row
    columns = {c: [row.get(c) for row in rows.values()] for c in COLUMNS}
    return Table(columns, f"Smoothed: {len(found)} sets of channels")
