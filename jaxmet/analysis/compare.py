"""Float against simulated, node by node: where the error enters, and by which quantizer."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program import compat
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.programs import program, split_keywords
from jaxmet.engine.run.replay import Counted, Run, counted_only, evaluate
from jaxmet.layers.arguments import accepting, check_keywords
from jaxmet.layers.fake_quantized import (
    fake_quantize_operands,
    fake_quantize_output,
    quantizer_at,
)
from jaxmet.layers.matching import check_quantizers
from jaxmet.layers.observed_ranges import extremes
from jaxmet.layers.placement.transformed_inputs import transformed_inputs
from jaxmet.layers.reference import float_model
from jaxmet.numerics.precision import wide
from jaxmet.transforms.simulate import round_weights
from jaxmet.tree.batches import ONE, one_batch
from jaxmet.tree.checks import check_concrete
from jaxmet.tree.host_rounding import grid_of
from jaxmet.tree.leaves import dense
from jaxmet.tree.named_leaves import named_leaves
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table

CALLER = "compare"
FEW = 0.25  # a grid of which less is used wastes two bits
MUCH = 0.01  # of the values clipped


def compare(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    batch: Any,
    *,
    reference: Any = None,
    mask: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> Table:
    """How far every quantized node is from float, and how much of that it adds itself.

    One row per node that the graph selects and that is quantized or whose weight is:

    - `SQNR (dB)`: 10·log10(Σ y² / Σ (y − ŷ)²) of the simulated result ŷ against the float
      one y, with all error that comes from the nodes before.
    - `own SQNR (dB)` and `own share`: the same for the error that the node adds by itself,
      ŷ against what its float weights would make of the same simulated operands, and that
      error's power in the node's whole error. Errors that cancel make a share above 1.
    - `weight SQNR (dB)`: of the rounded weight.
    - `levels used`: the part of the grid between the lowest and the highest integer that
      occurs. `clipped`: the share of values beyond its ends.
    - `note`: the quantizers that are badly used, of activations or of weights: too wide (less
      than a quarter of the levels used) or too narrow (more than 1 % clipped).

    The title names the nodes where most noise enters, relative to their signal. `batch` is
    one batch, a tuple being the inputs of the model. Float is `params` without quantizers, or
    `reference`: a tree of the same model, or `(apply, params)`. A tree whose weights are
    rounded already needs the tree from before as reference, or its weights show no error.
    `mask`, a function of the batch, says where its values count, as in `jm.calibrate`.
    Two programs are compiled. Nodes inside `while_loop` are left out.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        batch: one batch of inputs; a tuple is several inputs.
        reference: what counts as float: a tree of this model or `(apply, params)`; default
            None: `params` without quantizers.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        **kwargs: keyword arguments for the model.

    Returns:
        A table with one row per quantized node.

    Raises:
        ValueError: for quantizers of another model, a batch on which the model does not run,
            and a reference without the nodes of the graph.

    >>> print(jm.compare(params, graph, quantizers, images))
    """
    graph, _ = fitted(params, graph, CALLER)
    check_concrete(params, CALLER)
    check_quantizers(quantizers, graph, CALLER, params)
    check_keywords(kwargs, graph, params, CALLER)
    inputs = one_batch(batch, CALLER, mask)
    apply, tree = float_model(reference, params, graph, quantizers, CALLER)
    wanted = {
        n.name
        for n in graph.nodes
        if n.name in graph.selected and _is_quantized(n, quantizers)
    }
    arrays, static = split_keywords(kwargs)
    own = CALLER, frozenset(wanted), static
    keeping = program(
        apply,
        (*own, "float"),
        partial(_keeping, wanted, static),
        compiler_options=compat.QUICK,
    )
    cure, traced = f"{ONE}.", graph.called[0]
    with accepting(inputs, CALLER, apply, tree, kwargs, traced=traced, cure=cure):
        exact, floats = keeping(tree, arrays, *inputs)
    if missing := sorted(wanted - set(floats)):
        raise ValueError(
            f"jaxmet.{CALLER}: the float model does not run {missing[0]!r}. Give a "
            "reference with the same node names, and inputs like those of the trace."
        )
    # On the host where NumPy can: each weight would make the program larger.
    leaves = named_leaves(params)
    names = [name for name in quantizers.weights if name in leaves]
    rounded = all(quantizers.on_host(name, leaves) is not None for name in names)
    given = round_weights(params, quantizers) if rounded else params
    # Their grids are of what enters layers, not of what the nodes make.
    scaled = frozenset(transformed_inputs(graph, leaves))
    measuring = program(
        graph.apply,
        (*own, "quantized", rounded, scaled),
        partial(_measuring, static, rounded, scaled),
        compiler_options=compat.QUICK,
    )
    noisy, seen, weights = jax.device_get(
        measuring(given, quantizers, floats, arrays, *inputs)
    )
    if rounded:
        weights = _weight_use(leaves, quantizers, np)
    rows = [_row(n, seen[n.name], weights) for n in graph.nodes if n.name in seen]
    columns = {k: [row[k] for row in rows] for k in rows[0]} if rows else {}
    return Table(columns, title=_title(rows, _outputs(exact, noisy)))


def _is_quantized(node: Node, quantizers: Quantizers) -> bool:
    weight = node.weight
    rounded = weight and quantizers.weights.get(weight.name or node.name)
    grid = quantizers.activation(node.name)
    active = any(q is not None and q.active for q in (rounded, grid))
    return active and "while" not in node.region


# What both programs observe


class Sums(NamedTuple):
    """Powers of signal, error and own error of a node, and of its weight; its grid's use."""

    signal: Any
    noise: Any
    own: Any
    weight: Any = None
    weight_noise: Any = None
    use: Any = None


class Use(NamedTuple):
    """The lowest and highest part of a grid that is used, and the share of clipped values."""

    levels: Any
    clipped: Any


def _keeping(wanted: set[str], static: Mapping[str, Any], apply: Apply) -> Callable:
    """The outputs, and of these nodes results and what they were given of parameters."""

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result = run(*operands)
        kept = (result, operands[_data(node) :]) if node.name in wanted else None
        return counted_only(node, run, result), kept

    def keeping(params: Any, arrays: Mapping[str, Any], *inputs: Any) -> Any:
        return evaluate(apply, hook)(params, *inputs, **static, **arrays)

    return keeping


def _data(node: Node) -> int:
    """How many of a node's operands are activations; an input has nothing else."""
    return 1 if node.kind == "input" else len({e.operand for e in node.inputs})


def _measuring(
    static: Mapping[str, Any], rounded: bool, scaled: Collection[str], apply: Apply
) -> Callable:
    """The simulated outputs, what nodes lose, and how the grids of weights are used."""

    def measuring(
        params: Any, quantizers: Quantizers, floats: Any, arrays: Any, *inputs: Any
    ) -> Any:
        weights = {}
        if not rounded:
            weights = _weight_use(named_leaves(params), quantizers, jnp)
            params = round_weights(params, quantizers)
        run = evaluate(apply, _against(quantizers, floats, scaled))
        return *run(params, *inputs, **static, **arrays), weights

    return measuring


def _against(
    quantizers: Quantizers, floats: Mapping[str, Any], scaled: Collection[str]
) -> Callable:
    """A hook that simulates, and compares with what was kept."""

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        operands = fake_quantize_operands(node, run, operands, quantizers)
        raw = run(*operands)
        result = fake_quantize_output(node, run, raw, quantizers)
        result = counted_only(node, run, result)
        if node.name not in floats:
            return result, None
        where = run.counts
        exact, given = _here(floats[node.name], run.iteration)
        data = _data(node)
        own = None
        if [p.shape for p in given] == [p.shape for p in operands[data:]]:
            own = _power(result, run(*operands[:data], *given), where)
        power, noise = _power(exact, None, where), _power(result, exact, where)
        sums = Sums(power, noise, own)
        weight = node.weight
        if own is not None and weight is not None and weight.operand >= data:
            one, two = given[weight.operand - data], operands[weight.operand]
            sums = sums._replace(weight=_power(one), weight_noise=_power(one, two))
        quantizer = quantizer_at(node, run, quantizers, raw.ndim)
        if quantizer is not None and quantizer.active and node.name not in scaled:
            sums = sums._replace(use=_use(raw, quantizer, where))
        return result, sums

    return hook


def _here(kept: Any, iteration: tuple[Any, ...]) -> Any:
    """What was kept at this iteration of the loops around; zeros of a branch not taken."""
    while isinstance(kept, Counted):
        kept = kept.value
    return jax.tree.map(lambda x: x[iteration], kept) if iteration else kept


def _power(x: Any, y: Any = None, where: Any = None) -> jax.Array:
    x = _real(x)
    error = x if y is None else x - y.astype(x.dtype)
    return jnp.sum(jnp.square(error), where=where)


def _real(x: jax.Array) -> jax.Array:
    """In a type that holds sums; inputs may be integers."""
    real = jnp.issubdtype(x.dtype, jnp.inexact)
    return x.astype(wide(x.dtype) if real else jnp.float32)


def _use(x: jax.Array, quantizer: Quantizer, where: Any = None) -> Use:
    """How much of its grid a tensor uses: the mean over its channels or blocks."""
    x = _real(x)
    scale, zero_point = (a.astype(x.dtype) for a in quantizer.grid(x))
    if where is None:
        return _used(jnp, x, scale, zero_point, quantizer.ends)
    low, high = quantizer.ends
    q, axes = _on_grid(jnp, x, scale, zero_point)
    clipped = ((q < low) | (q > high)).astype(x.dtype)
    where = jnp.broadcast_to(where, q.shape)
    number = jnp.maximum(jnp.sum(where).astype(x.dtype), 1.0)
    ends = extremes(jnp.clip(q, low, high), where, axes)
    levels = jnp.maximum(ends.high - ends.low + 1, 0.0)
    clipped = jnp.sum(clipped, where=where) / number
    return Use(jnp.mean(levels) / (high - low + 1), clipped)


def _used(np_: Any, x: Any, scale: Any, zero_point: Any, ends: tuple[int, int]) -> Use:
    """The same where all values count, by `numpy` or `jax.numpy`."""
    low, high = ends
    q, axes = _on_grid(np_, x, scale, zero_point)
    clipped = ((q < low) | (q > high)).astype(x.dtype)
    q = np_.clip(q, low, high)
    levels = np_.max(q, axes) - np_.min(q, axes) + 1
    return Use(np_.mean(levels) / (high - low + 1), np_.mean(clipped))


def _on_grid(
    np_: Any, x: Any, scale: Any, zero_point: Any
) -> tuple[Any, tuple[int, ...]]:
    """The integers that stand for values, before clipping, and the axes of one scale."""
    axes = tuple(i for i in range(x.ndim) if scale.ndim == 0 or scale.shape[i] == 1)
    shape = scale.shape if scale.ndim else (1,) * x.ndim
    return np_.round(x / scale.reshape(shape)) + zero_point.reshape(shape), axes


def _weight_use(
    leaves: Mapping[str, Any], quantizers: Quantizers, np_: Any
) -> dict[str, Use]:
    """How the grids of weights are used; blocks follow the weight, as do scales of None."""
    found = {}
    for name, quantizer in quantizers.weights.items():
        fixed = not quantizer.follows and quantizer.block is None
        if not (name in leaves and fixed and quantizer.active):
            continue
        if quantizer.product is not None:
            continue
        weight = dense(leaves[name])
        if np_ is jnp:
            found[name] = _use(weight, quantizer)
            continue
        weight = np.asarray(weight)
        grid = grid_of(quantizer, weight)
        assert grid is not None
        scale, zero_point = (a.astype(weight.dtype) for a in grid)
        found[name] = _used(np, weight, scale, zero_point, quantizer.ends)
    return found


# The table


def _row(node: Node, seen: Any, weights: Mapping[str, Use]) -> dict[str, Any]:
    sums = _summed(seen)
    empty = node.kind == "input" and not sums.signal  # a cache, before it is written
    use = None if empty else sums.use
    weight = weights.get(node.weight.name or "") if node.weight is not None else None
    notes = [_blame("", use), _blame("weight: ", weight)]
    return {
        "node": node.name,
        "SQNR (dB)": _decibel(sums.signal, sums.noise),
        "own SQNR (dB)": _decibel(sums.signal, sums.own),
        "own share": None
        if not sums.noise or sums.own is None
        else sums.own / sums.noise,
        "weight SQNR (dB)": _decibel(sums.weight, sums.weight_noise),
        "levels used": None if use is None else use.levels,
        "clipped": None if use is None else use.clipped,
        "note": "; ".join(filter(None, notes)) or None,
    }


def _summed(seen: Any) -> Sums:
    """One number for each sum, over the iterations of loops and where a branch ran."""
    ran: Any = np.True_
    while isinstance(seen, Counted):
        ran, seen = ran & (np.asarray(seen.count) > 0), seen.value
    use, rest = seen.use, seen._replace(use=None)
    sums = jax.tree.map(lambda x: float(np.sum(np.asarray(x, np.float64))), rest)
    if use is not None:
        taken = np.broadcast_to(ran, np.shape(use.levels))
        use = (
            Use(*(float(np.mean(np.asarray(x)[taken])) for x in use))
            if taken.any()
            else None
        )
    return sums._replace(use=use)


def _decibel(signal: float | None, noise: float | None) -> float | None:
    if not signal or noise is None:
        return None
    return 10 * math.log10(signal / noise) if noise else math.inf


def _blame(what: str, use: Use | None) -> str | None:
    if use is None:
        return None
    if use.clipped > MUCH:
        return f"{what}too narrow: {100 * float(use.clipped):.0f} % clipped"
    if use.levels < FEW:
        return f"{what}too wide: {100 * float(use.levels):.0f} % of the levels used"
    return None


def _outputs(exact: Any, noisy: Any) -> float | None:
    """The signal-to-noise ratio of all inexact outputs together."""
    signal, noise = 0.0, 0.0
    for y, z in zip(jax.tree.leaves(exact), jax.tree.leaves(noisy), strict=True):
        if jnp.issubdtype(y.dtype, jnp.inexact):
            y, z = np.asarray(y, np.float64), np.asarray(z, np.float64)
            signal += float(np.sum(y * y))
            noise += float(np.sum((y - z) ** 2))
    return _decibel(signal, noise)


def worst_nodes(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """The three nodes that add most error relative to their signal, and their own SQNR in dB."""
    found = [(r["node"], r["own SQNR (dB)"]) for r in rows]
    noisy = [(n, ratio) for n, ratio in found if ratio not in (None, math.inf)]
    return sorted(noisy, key=lambda one: one[1])[:3]


def _title(rows: list[dict[str, Any]], outputs: float | None) -> str:
    parts = [] if outputs is None else [f"outputs {outputs:.1f} dB"]
    worst = [f"{node} ({ratio:.1f} dB)" for node, ratio in worst_nodes(rows)]
    parts += [f"most noise enters at {', '.join(worst)}"] if worst else []
    flagged = [r["node"] for r in rows if r["note"]]
    parts += [f"badly used quantizers: {', '.join(flagged)}"] if flagged else []
    return f"compare: {'; '.join(parts)}"
