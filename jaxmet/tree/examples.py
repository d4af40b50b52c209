"""Single examples out of batches: a few, spread evenly over the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.tree.batched_data import Batched
from jaxmet.tree.batches import Batches


def some_examples(batches: Batches, number: int) -> Any:
    """At most so many, one by one on a new leading axis, all of one shape.

    From the first batch alone where batches are taken whole, having no axis of examples.
    """
    source, count, at = batches.source, 0, None
    alike = len({x.shape[:1] for x in jax.tree.leaves(batches.first)}) == 1
    if isinstance(source, Batched) and source.full is not None:
        count = jax.tree.leaves(source.full)[0].shape[0]
        at = lambda i: jax.tree.map(lambda x: x[i], source.full)
    elif isinstance(source, list):
        count, at = len(source), source.__getitem__
    if alike and at is not None:
        parts = min(count, number)
        some = [batches.arguments(at(i * count // parts)) for i in range(parts)]
    elif alike:
        some = _thinned(batches, number)
    else:
        some = [batches.first]
    rows = [chosen(batch, -(-number // len(some)))[0] for batch in some]
    shapes = [[x.shape[1:] for x in jax.tree.leaves(one)] for one in rows]
    same = [one for one, s in zip(rows, shapes, strict=True) if s == shapes[0]]
    count = sum(jax.tree.leaves(one)[0].shape[0] for one in same)
    index = np.arange(min(count, number)) * count // min(count, number)
    return jax.tree.map(lambda *x: _np_of(*x).concatenate(x)[index], *same)


def _thinned(batches: Batches, number: int) -> list[tuple[Any, ...]]:
    """Every k-th example as a batch of one; never more than twice the number are held."""
    kept: list[tuple[Any, ...]] = []
    stride, before = 1, 0
    for batch in batches:
        size = jax.tree.leaves(batch)[0].shape[0]
        for i in range(-before % stride, size, stride):
            # A copy: a view would hold the whole batch.
            kept.append(
                jax.tree.map(lambda x, i=i: _np_of(x).array(x[i : i + 1]), batch)
            )
        while len(kept) >= 2 * number:
            kept, stride = kept[::2], 2 * stride
        before += size
    return kept


def chosen(batch: tuple[Any, ...], number: int) -> tuple[Any, float]:
    """Some of a batch on a new leading axis, one row each, and the share of one in the batch.

    What has no common leading axis is taken whole.
    """
    rows = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(batch)}
    size = rows.pop()
    if rows or size == 0:
        return jax.tree.map(lambda x: x[None], batch), 1.0
    number = min(number, size)
    index = np.arange(number) * size // number
    return jax.tree.map(lambda x: x[index][:, None], batch), 1 / size


def _np_of(*arrays: Any) -> Any:
    """NumPy for what is on the host: it compiles nothing."""
    return np if all(isinstance(x, np.ndarray) for x in arrays) else jnp
