"""Positions in a random order that is quick to compile.

`jax.random.permutation` takes XLA a third of a second to compile in every program that draws.
Here positions are sorted by a hash, the finalizer of MurmurHash3 (Appleby, 2011), whose bits
pass for random where rows are only to be spread.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

Seed = UInt32[Array, ""]
GOLDEN = 0x9E3779B9  # 2³² over the golden ratio: neighbours come far apart


def seed_of(key: Any, *numbers: Any) -> Seed:
    """A seed of its own for a `jax.random.key` and numbers, such as those of batch and layer.

    Args:
        key: the key, of whatever generator.
        *numbers: integers, which may be traced.

    Returns:
        An unsigned integer.
    """
    words = [*jax.random.key_data(key).astype(jnp.uint32).reshape(-1), *numbers]
    seed = jnp.asarray(0, jnp.uint32)
    for word in words:
        seed = (seed + jnp.uint32(GOLDEN)) * jnp.uint32(31)  # zeros differ by number
        seed = _mixed(seed + jnp.asarray(word).astype(jnp.uint32))
    return seed


def drawn_order(
    seed: Seed, total: int, first: Bool[Array, " total"] | None = None
) -> Int[Array, " total"]:
    """All positions in a random order, those among the `first` before the others.

    Args:
        seed: what `seed_of` gave.
        total: how many positions there are.
        first: True for those that come first; default None: no distinction.

    Returns:
        The positions.
    """
    places = jax.lax.iota(jnp.uint32, total) * jnp.uint32(GOLDEN)
    rank = _mixed(_mixed(places + seed) ^ seed)
    if first is not None:
        rank = (rank >> 1) | ((~first).astype(jnp.uint32) << 31)
    return jnp.argsort(rank).astype(jnp.int32)


def _mixed(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
