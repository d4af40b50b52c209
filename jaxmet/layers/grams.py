"""Products of what layers read, over all data, in one pass."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Run
from jaxmet.layers.collect import collect
from jaxmet.layers.inputs import counted_rows, most_rows
from jaxmet.layers.layer import matrix_sizes
from jaxmet.numerics import xp
from jaxmet.numerics.drawn_order import seed_of
from jaxmet.numerics.precision import wide
from jaxmet.tree.batches import Batches

PER_INPUT = 64
"""How many rows of a batch are looked at for each input of a layer, by default."""


class GramSums(NamedTuple):
    """Sums over rows x of a layer's inputs: how many, of them and of their products xᵀx."""

    number: jax.Array
    sums: jax.Array  # (groups, ins)
    products: jax.Array  # (groups, ins, ins)

    @property
    def mean(self) -> jax.Array:
        """E xᵀx."""
        return self.products / xp.maximum(self.number, 1.0)

    @property
    def center(self) -> jax.Array:
        """E x."""
        return self.sums / xp.maximum(self.number, 1.0)


def grams(
    graph: Graph,
    params: Any,
    batches: Batches,
    layers: Collection[str],
    *,
    caller: str,
    key: jax.Array,
    rows: int | None = None,
    progress: bool = True,
    lost: dict[str, str] | None = None,
) -> dict[str, GramSums]:
    """The Gram matrix of the inputs of each of these layers, (groups, ins, ins).

    Layers with one weight have one, over the inputs of all of them.

    `ins` is in the order of `matrix_of`. At most `rows` rows of a batch are taken (by default
    as many as `most_rows` says), drawn from all positions of each example that count: by a key
    of its own for each batch, node and round of a loop. `lost` gets the layers of which it
    is not known which rows count.
    """
    wanted = set(layers)
    numbers = {name: i for i, name in enumerate(n.name for n in graph.nodes)}

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result = run(*operands)
        if node.name not in wanted or node.weight is None:
            return result, None
        x, kernel = operands[0], operands[node.weight.operand]
        ins = matrix_sizes(node, kernel.shape)[1]
        most = most_rows(rows, ins, PER_INPUT)
        # of its own for batch, node and loop step: later batches add new positions
        seed = seed_of(key, run.batch, numbers[node.name], *run.iteration)
        where = run.reads[0] if run.reads else None
        found, counts = counted_rows(
            node, x, kernel.shape, where=where, most=most, seed=seed
        )
        found = found.astype(wide(found.dtype))
        products = jnp.einsum("gri,grj->gij", found, found, precision="highest")
        number = jnp.asarray(found.shape[1], found.dtype)
        if counts is not None:
            number = jnp.sum(counts).astype(found.dtype)
        # a product too: XLA:CPU would copy all rows once more for a sum along them
        ones = jnp.ones((*found.shape[:2], 1), found.dtype)
        sums = jnp.einsum("gri,grj->gij", found, ones, precision="highest")
        return result, GramSums(number, sums[..., 0], products)

    if not wanted:
        return {}
    merge = lambda a, b: jax.tree.map(jnp.add, a, b)
    places = {name: numbers[name] for name in wanted}
    found = collect(
        graph,
        params,
        batches,
        hook,
        merge,
        caller=caller,
        progress=progress,
        lost=lost,
        key=("grams", rows, key, places),
    )
    for name, gram in found.items():
        if not np.all(np.isfinite(gram.sums)):
            raise ValueError(
                f"jaxmet.{caller}: what {name!r} reads holds NaN or infinity in some batch. "
                "Look at the batches, and at the model's outputs for them."
            )
    # a weight that several layers use is judged by what all of them read
    total: dict[str, GramSums] = {}
    for name, gram in found.items():
        kernel = graph[name].kernel
        both = total.get(kernel)
        total[kernel] = gram if both is None else GramSums(*map(jnp.add, both, gram))
    return {name: total[graph[name].kernel] for name in found}


def unmasked(why: str | None) -> str | None:
    """What a report says of a layer of which it is not known which rows count."""
    return None if why is None else f"all rows count, padded ones too: {why} moves them"
