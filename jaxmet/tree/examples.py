"""Single examples out of batches: a few, spread evenly over the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.tree.batches import Batches, Stacked


def some_examples(batches: Batches, number: int) -> Any:
    """At most so many, one by one on a new leading axis, all of one shape.

    From the first batch alone where batches cannot be picked, or are taken whole.
    """
    source, count = batches.source, 0
    if len({x.shape[:1] for x in jax.tree.leaves(batches.first)}) == 1:
        if isinstance(source, Stacked) and source.full is not None:
            count = jax.tree.leaves(source.full)[0].shape[0]
        elif isinstance(source, list):
            count = len(source)

    def part(i: int) -> Any:
        if isinstance(source, Stacked):
            return jax.tree.map(lambda x: x[i], source.full)
        return source[i]

    parts = min(count, number)
    some = [batches.arguments(part(i * count // parts)) for i in range(parts)]
    some = some or [batches.first]
    rows = [chosen(batch, -(-number // len(some)))[0] for batch in some]
    shapes = [[x.shape[1:] for x in jax.tree.leaves(one)] for one in rows]
    same = [one for one, s in zip(rows, shapes, strict=True) if s == shapes[0]]
    count = sum(jax.tree.leaves(one)[0].shape[0] for one in same)
    index = np.arange(min(count, number)) * count // min(count, number)
    return jax.tree.map(lambda *x: jnp.concatenate(x)[index], *same)


def chosen(batch: tuple[Any, ...], number: int) -> tuple[Any, float]:
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
