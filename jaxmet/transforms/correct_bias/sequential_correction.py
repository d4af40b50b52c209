"""The mean error of one layer after the other, each after corrected predecessors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxmet.layers.leaf_math import shifted
from jaxmet.layers.lockstep import Copy, Positions
from jaxmet.numerics.precision import wide
from jaxmet.transforms.correct_bias.bias_parameters import BiasParameter, fits
from jaxmet.tree.batches import Batches
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.leaves import dense
from jaxmet.tree.names import named_leaves, replace_leaves


class Found(NamedTuple):
    """What was seen at a layer: the mean error of each channel, and its own variance."""

    shift: Any = None
    variance: Any = None
    why: str | None = None
    lost: str | None = None


def correct_in_lockstep(
    params: Any,
    places: dict[str, BiasParameter],
    reference: Copy,
    noisy: Copy,
    batches: Batches,
    positions: Positions,
    *,
    spread: bool,
    progress: bool,
) -> tuple[Any, dict[str, Found]]:
    """The tree with every bias corrected, and by layer what was found there.

    `places` are keyed by the node at which a layer's mean is kept. With `spread` the channels'
    variances are found too.
    """
    for batch in batches:
        reference.read(batch)
        noisy.read(batch)
        positions.read(batch)
    noisy.order = reference.order
    compare = jax.jit(_seen, static_argnums=(4, 5))
    correct = jax.jit(_corrected, static_argnums=(2, 3))
    found: dict[str, Found] = {}
    for i, name in enumerate(
        tqdm(reference.order, desc="correct_bias", disable=not progress)
    ):
        features, seen, shape = tuple(sorted(noisy.graph[name].features)), None, ()
        for k in range(len(noisy.lives)):
            results = reference.advance(k, i), noisy.advance(k, i)
            own = positions.batches[k].get(name)
            where = None if own is None else own.result
            seen = compare(*results, where, seen, features, spread)
            shape = results[1].shape
        assert seen is not None
        kept = tuple(n if axis in features else 1 for axis, n in enumerate(shape))
        place = places[name]
        leaf, why = named_leaves(params)[place.into], None
        if not fits(leaf.shape, kept):
            why = f"{place.into!r} has not one number per channel"
        new, noisy.shift, reference.shift = correct(leaf, seen.error, kept, why is None)
        params = replace_leaves(params, {place.into: new})
        noisy.params = replace_leaves(noisy.params, {place.into: new})
        found[place.layer.name] = Found(
            seen.error, seen.variance, why, positions.lost.get(name)
        )
    return params, found


class ResultMeans(NamedTuple):
    """Of a layer's channels the mean error, and mean and square of the exact values."""

    number: jax.Array
    error: jax.Array
    mean: jax.Array | None = None
    square: jax.Array | None = None

    @property
    def variance(self) -> np.ndarray | None:
        """That of the exact values, if they were looked at."""
        if self.mean is None or not is_concrete(self.mean):
            return None
        mean, square = (np.asarray(v, np.float64) for v in (self.mean, self.square))
        return np.maximum(square - mean * mean, 0.0)


def _seen(
    exact: jax.Array,
    noisy: jax.Array,
    where: jax.Array | None,
    before: ResultMeans | None,
    features: tuple[int, ...],
    spread: bool,
) -> ResultMeans:
    """What was seen of the batches before, and of this one."""
    dtype = wide(exact.dtype)
    exact, noisy = exact.astype(dtype), noisy.astype(dtype)
    rest = tuple(i for i in range(exact.ndim) if i not in features)
    values = [noisy - exact] + ([exact, jnp.square(exact)] if spread else [])
    if where is None:
        means = [_mean(v, rest).reshape(-1) for v in values]
        number = jnp.asarray(exact.size / max(1, means[0].size), dtype)
    else:
        sizes = [n if i in rest else 1 for i, n in enumerate(exact.shape)]
        where = jnp.any(where, axis=features, keepdims=True)
        number = jnp.sum(jnp.broadcast_to(where, sizes)).astype(dtype)
        means = [_mean_where(v, where, number, rest).reshape(-1) for v in values]
    if before is None:
        return ResultMeans(number, *means)
    total = before.number + number
    old = [v for v in before[1:] if v is not None]
    share = number / jnp.maximum(total, 1.0)
    pairs = zip(old, means, strict=True)
    return ResultMeans(total, *(one + (two - one) * share for one, two in pairs))


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean, of each example first: a sum over all at once rounds too often."""
    return jnp.mean(jnp.mean(x, axes[1:], keepdims=True), axes[:1], keepdims=True)


def _mean_where(
    x: jax.Array, where: jax.Array, number: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """The mean over what counts."""
    x = jnp.where(where, x, jnp.zeros((), x.dtype))
    total = jnp.sum(jnp.sum(x, axes[1:], keepdims=True), axes[:1], keepdims=True)
    return total / jnp.maximum(number, 1.0)


def _corrected(
    leaf: Any, error: jax.Array, kept: tuple[int, ...], fit: bool
) -> tuple[Any, jax.Array, jax.Array]:
    """The new bias, and what it takes from the quantized and from the float result.

    What a narrow bias cannot hold stays in the network, where later layers see it.
    """
    bias = jnp.asarray(dense(leaf))
    dtype = wide(bias.dtype)
    none = jnp.zeros(kept, dtype)
    if not fit:
        return leaf, none, none
    new = shifted(leaf, -error)
    taken = (bias.astype(dtype) - dense(new).astype(dtype)).reshape(kept)
    return new, taken, none
