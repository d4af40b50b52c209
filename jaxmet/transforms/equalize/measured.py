"""What data tell of the products: ranges of their inputs, and what errors do to the outputs."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.replay import counted_only, evaluate
from jaxmet.layers.collect import collect
from jaxmet.layers.gradients import by_channel, energies, projected_gradients, squared
from jaxmet.layers.observed_ranges import extremes
from jaxmet.numerics.precision import wide
from jaxmet.transforms.equalize.channel_scales import ScaledWeight
from jaxmet.tree.batches import Batches, BatchInfo, inputs_of
from jaxmet.tree.examples import chosen
from jaxmet.tree.leaves import dense

IMAGES = 64
"""How many images are differentiated, if there are as many, spread evenly over the data."""


class MeasuredInputs(NamedTuple):
    """What is known of a product.

    `low` and `high` are ends of the range of each input, (groups * ins,). `cost` is the squared
    error of the outputs for an error of variance one at an input, (groups * ins,), and `gain`
    that for such an error of every weight of a window, (groups, ins, outs).
    """

    low: jax.Array
    high: jax.Array
    cost: jax.Array
    gain: jax.Array


class _NoiseSums(NamedTuple):
    """Sums over batches."""

    number: jax.Array
    cost: dict[str, jax.Array]
    gain: dict[str, jax.Array]
    low: dict[str, jax.Array]
    high: dict[str, jax.Array]


def measured(
    graph: Graph,
    params: Any,
    weights: tuple[ScaledWeight, ...],
    batches: Batches,
    key: jax.Array,
    progress: bool,
) -> dict[str, MeasuredInputs]:
    """What a pass over data tells of products outside of loops, and a few backward passes.

    Errors count as a share of the energy of the output that they disturb.
    """
    wanted = {w.node.name: w for w in weights if not w.node.loops}
    leaves = graph.leaves(params, "equalize")
    wanted = {n: w for n, w in wanted.items() if _is_float(leaves[w.parameter])}
    sizes = {name: w.inputs[0].size for name, w in wanted.items()}
    taps = {name: by_channel(name, size) for name, size in sizes.items()}
    parameters = sorted({w.parameter for w in wanted.values()})

    def hook(node: Node, run: Any, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result = counted_only(node, run, run(*operands))
        if node.name not in sizes:
            return result, None
        where = run.reads[0] if run.reads else None
        return result, _extremes(operands[0], node.in_features, where)

    each = -(-IMAGES // batches.length) if batches.length else 8

    def observer(apply: Apply, hook: Any) -> Any:
        run = evaluate(apply, hook)
        gradients = projected_gradients(apply, taps, parameters)

        def squares(params: Any, units: Any, own: jax.Array, *one: Any) -> Any:
            cost, gain = gradients(params, units, own, *one)
            return cost, jax.tree.map(squared, gain)

        def observe(params: Any, *batch: Any) -> _NoiseSums:
            outputs, ranges = run(params, *batch)
            inputs, info = inputs_of(batch)
            some, share = chosen((*inputs, BatchInfo(info.mask)), each)
            units = [share * e for e in energies(outputs)]
            number = jax.tree.leaves(some)[0].shape[0]
            signs = jax.random.split(jax.random.fold_in(key, info.number), number)
            every = jax.lax.map(
                lambda one: squares(params, units, one[0], *one[1]), (signs, some)
            )
            cost, gain = jax.tree.map(lambda x: jnp.mean(x, axis=0), every)
            low, high = ({n: r[i] for n, r in ranges.items()} for i in (0, 1))
            return _NoiseSums(jnp.float32(1), cost, gain, low, high)

        return observe

    def merge(one: _NoiseSums, two: _NoiseSums) -> _NoiseSums:
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
        observer=lambda apply: partial(observer, apply),
        key=("measured", sizes, parameters, each, key),
    )
    sums = jax.device_get(sums)
    _check(sums)
    found = {}
    for name, weight in wanted.items():
        if name in sums.low and sums.low[name].size == weight.inputs[0].size:
            low, high = sums.low[name], sums.high[name]
            if not np.all(low <= high):  # none of its inputs counts
                continue
            gain = np.sum(weight.matrix(sums.gain[weight.parameter]), axis=3)
            cost = sums.cost[name] / sums.number
            found[name] = MeasuredInputs(low, high, cost, gain / sums.number)
    return found


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(dense(leaf)).dtype, jnp.floating)


def _extremes(
    x: jax.Array, kept: Any, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    rest = [i for i in range(x.ndim) if i not in kept]
    x = jnp.transpose(x, (*kept, *rest)).astype(wide(x.dtype))
    if where is not None:
        where = jnp.transpose(where, (*kept, *rest))
    found = extremes(x, where, tuple(range(len(kept), x.ndim)))
    return found.low.reshape(-1), found.high.reshape(-1)


def _check(sums: _NoiseSums) -> None:
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
            "indices, rounded, or constant for a single example?), and objective='noise' needs "
            "it. Trace the model to its logits, pass no batches=, or use objective='range'."
        )
