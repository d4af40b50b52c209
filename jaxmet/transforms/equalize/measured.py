"""What data tell of the products: ranges of their inputs, and what errors do to the outputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.collect import collect
from jaxmet.engine.gradients import energies, squared_gradients
from jaxmet.engine.graph import Graph, leaves_of
from jaxmet.engine.node import Node
from jaxmet.engine.replay import evaluate
from jaxmet.transforms.equalize.channels import Weight
from jaxmet.tree.batches import Batches, Stacked
from jaxmet.tree.leaves import dense

IMAGES = 64
"""How many images are differentiated, if there are as many, spread evenly over the data."""

TRIED = 16
"""How many images rounded weights are tried on, likewise."""


class Seen(NamedTuple):
    """What is known of a product.

    `low` and `high` are ends of the range of each input, (groups * ins,). `cost` is the squared
    error of the outputs for an error of variance one at an input, (groups * ins,), and `gain`
    that for such an error of every weight of a window, (groups, ins, outs).
    """

    low: jax.Array
    high: jax.Array
    cost: jax.Array
    gain: jax.Array


class _Sums(NamedTuple):
    """Sums over batches."""

    number: jax.Array
    cost: dict[str, jax.Array]
    gain: dict[str, jax.Array]
    low: dict[str, jax.Array]
    high: dict[str, jax.Array]


def measured(
    graph: Graph,
    params: Any,
    weights: tuple[Weight, ...],
    batches: Batches,
    progress: bool,
) -> dict[str, Seen]:
    """What a pass over data tells of products outside of loops, and a few backward passes.

    Errors count as a share of the energy of the output that they disturb.
    """
    wanted = {w.node.name: w for w in weights if not w.node.loops}
    leaves = leaves_of(params, graph, "equalize")
    wanted = {n: w for n, w in wanted.items() if _is_float(leaves[w.parameter])}
    sites = {name: w.inputs[0].size for name, w in wanted.items()}
    parameters = {w.parameter for w in wanted.values()}

    def hook(node: Node, run: Any, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        if node.name not in wanted:
            return run(*operands), None
        return run(*operands), _extremes(operands[0], node.in_features)

    squares = squared_gradients(graph.apply, sites, parameters)
    each = -(-IMAGES // batches.length) if batches.length else 8

    def observer(hook: Any) -> Any:
        run = evaluate(graph.apply, hook)

        def observe(params: Any, *batch: Any) -> _Sums:
            outputs, ranges = run(params, *batch)
            chosen, share = _chosen(batch, each)
            units = [share * e for e in energies(outputs)]
            every = jax.lax.map(lambda one: squares(params, units, *one), chosen)
            cost, gain = jax.tree.map(lambda x: jnp.mean(x, axis=0), every)
            low, high = ({n: r[i] for n, r in ranges.items()} for i in (0, 1))
            return _Sums(jnp.float32(1), cost, gain, low, high)

        return observe

    def merge(one: _Sums, two: _Sums) -> _Sums:
        added = jax.tree.map(jnp.add, one, two)
        low = jax.tree.map(jnp.minimum, one.low, two.low)
        return added._replace(
            low=low, high=jax.tree.map(jnp.maximum, one.high, two.high)
        )

    sums = collect(
        graph,
        params,
        batches,
        hook,
        merge,
        caller="equalize",
        progress=progress,
        observer=observer,
    )
    _check(sums)
    found = {}
    for name, weight in wanted.items():
        if name in sums.low and sums.low[name].size == weight.inputs[0].size:
            gain = jnp.sum(weight.matrix(sums.gain[weight.parameter]), axis=3)
            cost = sums.cost[name] / sums.number
            found[name] = Seen(
                sums.low[name], sums.high[name], cost, gain / sums.number
            )
    return found


def some_images(batches: Batches) -> Any:
    """Images one by one on a new leading axis, all of one shape, from all over the data.

    From the first batch alone where batches cannot be picked, or are taken whole.
    """
    source, number = batches.source, 0
    if len({x.shape[:1] for x in jax.tree.leaves(batches.first)}) == 1:
        if isinstance(source, Stacked) and source.full is not None:
            number = jax.tree.leaves(source.full)[0].shape[0]
        elif isinstance(source, list):
            number = len(source)

    def part(i: int) -> Any:
        if isinstance(source, Stacked):
            return jax.tree.map(lambda x: x[i], source.full)
        return source[i]

    parts = min(number, TRIED)
    some = [batches.arguments(part(i * number // parts)) for i in range(parts)]
    some = some or [batches.first]
    rows = [_chosen(batch, -(-TRIED // len(some)))[0] for batch in some]
    shapes = [[x.shape[1:] for x in jax.tree.leaves(one)] for one in rows]
    same = [one for one, s in zip(rows, shapes, strict=True) if s == shapes[0]]
    number = sum(jax.tree.leaves(one)[0].shape[0] for one in same)
    index = np.arange(min(number, TRIED)) * number // min(number, TRIED)
    return jax.tree.map(lambda *x: jnp.concatenate(x)[index], *same)


def _chosen(batch: tuple[Any, ...], number: int) -> tuple[Any, float]:
    """Some of a batch on a new leading axis, one row each, and the share of one in the batch.

    What has no common leading axis is taken whole.
    """
    rows = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(batch)}
    size = rows.pop()
    if rows or size == 0:
        return jax.tree.map(lambda x: jnp.asarray(x)[None], batch), 1.0
    number = min(number, size)
    index = np.arange(number) * size // number
    return jax.tree.map(lambda x: jnp.asarray(x)[index][:, None], batch), 1 / size


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(dense(leaf)).dtype, jnp.floating)


def _extremes(x: jax.Array, kept: Any) -> tuple[jax.Array, jax.Array]:
    rest = [i for i in range(x.ndim) if i not in kept]
    x = jnp.transpose(x, (*kept, *rest)).astype(jnp.promote_types(x.dtype, jnp.float32))
    rest = tuple(range(len(kept), x.ndim))
    return jnp.min(x, axis=rest).reshape(-1), jnp.max(x, axis=rest).reshape(-1)


def _check(sums: _Sums) -> None:
    every = {**sums.gain, **sums.cost}
    for name, value in every.items():
        if not np.isfinite(value).all():
            raise ValueError(
                f"jaxmet.equalize: the gradient of the outputs with respect to {name!r} is "
                "NaN or infinite, and objective='noise' needs it. Equalize in float32, "
                "pass no batches=, or use objective='range'."
            )
    if not any(np.any(value > 0) for value in every.values()):
        raise ValueError(
            "jaxmet.equalize: no gradient reaches the products from the outputs (are they "
            "indices, or rounded?), and objective='noise' needs it. Trace the model to its "
            "logits, pass no batches=, or use objective='range'."
        )
