"""A small decoder with a key/value cache, for prefill and decoding by the same function.

RMS norms, rotary embeddings, grouped queries and a gated MLP, in plain JAX. `written_out` has a
tree for each block and a list of caches, `scanned` stacks both. `WRITES` are the ways in which
models put new keys and values into a cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

VOCABULARY, WIDTH, HEADS, GROUPS, HEAD, INNER, DEPTH = 23, 24, 4, 2, 6, 32, 2
FREQUENCIES = (10000.0 ** (-np.arange(HEAD // 2) / (HEAD // 2))).astype(np.float32)


def along(a: Any, ndim: int) -> Any:
    """A vector along the last of so many axes."""
    return a.reshape((1,) * (ndim - 1) + a.shape)


def drawn(seed: int = 0) -> Any:
    """The parameters of `written_out`."""
    rng = np.random.default_rng(seed)

    def dense(ins: int, outs: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(ins, outs)) / ins**0.5, jnp.float32)

    def scale() -> dict[str, jax.Array]:
        return {"scale": jnp.asarray(rng.uniform(0.5, 1.5, WIDTH), jnp.float32)}

    def block() -> dict[str, Any]:
        shapes = {"q": HEADS * HEAD, "k": GROUPS * HEAD, "v": GROUPS * HEAD}
        attention = {n: dense(WIDTH, outs) for n, outs in shapes.items()}
        attention |= {"norm": scale(), "o": dense(HEADS * HEAD, WIDTH)}
        mlp = {"norm": scale(), "gate": dense(WIDTH, INNER), "up": dense(WIDTH, INNER)}
        return {"attn": attention, "mlp": mlp | {"down": dense(INNER, WIDTH)}}

    table = jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)), jnp.float32)
    blocks = {f"block{i}": block() for i in range(DEPTH)}
    return blocks | {"embed": table, "norm": scale(), "head": dense(WIDTH, VOCABULARY)}


def stacked(params: Any) -> Any:
    """The parameters of `scanned`."""
    blocks = [params[f"block{i}"] for i in range(DEPTH)]
    rest = {n: params[n] for n in ("embed", "norm", "head")}
    return rest | {"blocks": in_one(blocks)}


def in_one(trees: Any) -> Any:
    """Trees of one structure as one, along a leading axis."""
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def empty(batch: int, length: int) -> list[dict[str, jax.Array]]:
    """The caches of `written_out` before any token."""
    one = jnp.zeros((batch, length, GROUPS, HEAD))
    return [{"k": one, "v": one} for _ in range(DEPTH)]


def rms_norm(p: Any, x: jax.Array) -> jax.Array:
    power = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(power + 1e-6) * along(p["scale"], x.ndim)


def rotated(x: jax.Array, at: jax.Array) -> jax.Array:
    """(batch, tokens, heads, features) turned by what `at` (1 or batch, tokens) says."""
    angles = at.astype(jnp.float32)[..., None] * along(FREQUENCIES, at.ndim + 1)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    one, two = jnp.split(x, 2, axis=-1)
    return x * jnp.cos(angles) + jnp.concatenate([-two, one], axis=-1) * jnp.sin(angles)


# (cache, new, position) -> the cache with what is new in it.


def by_slice(old: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(old, new, (0, position, 0, 0))


def by_index(old: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    return old.at[:, position + jnp.arange(new.shape[1])].set(new)


def by_example(old: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    each = lambda o, n: lax.dynamic_update_slice(o, n, (position, 0, 0))
    return jax.vmap(each)(old, new)


def by_select(old: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    here = jnp.arange(old.shape[1]) - position
    spread = new[:, jnp.clip(here, 0, new.shape[1] - 1)]
    inside = (here >= 0) & (here < new.shape[1])
    return jnp.where(inside[None, :, None, None], spread, old)


def by_joining(old: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """The last tokens at the end: the cache moves with each that is new."""
    del position
    return jnp.concatenate([old, new], axis=1)


WRITES = {f.__name__: f for f in (by_slice, by_index, by_example, by_select)}
WRITES["by_joining"] = by_joining


def attention(
    p: Any, x: jax.Array, cache: Any, position: jax.Array, write: Callable
) -> tuple[jax.Array, Any]:
    batch, tokens, _ = x.shape
    y = rms_norm(p["norm"], x)
    split = lambda y, heads: y.reshape(batch, tokens, heads, HEAD)
    q, k, v = split(y @ p["q"], HEADS), split(y @ p["k"], GROUPS), y @ p["v"]
    at = (position + jnp.arange(tokens))[None]
    q, new = rotated(q, at), {"k": rotated(k, at), "v": split(v, GROUPS)}
    cache = jax.tree.map(lambda old, new: write(old, new, position), cache, new)
    q = q.reshape(batch, tokens, GROUPS, HEADS // GROUPS, HEAD)
    scores = jnp.einsum("btghd,bsgd->bghts", q, cache["k"]) / HEAD**0.5
    length = cache["k"].shape[1]
    slot = jnp.arange(length)
    if write is by_joining:
        slot = slot + (position + tokens - length)
    seen = (slot[None] <= at[0][:, None]) & (slot >= 0)[None]
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -1e9))
    y = jnp.einsum("bghts,bsgd->btghd", weights, cache["v"])
    if write is by_joining:
        cache = jax.tree.map(lambda c: c[:, tokens:], cache)
    return x + y.reshape(batch, tokens, HEADS * HEAD) @ p["o"], cache


def mlp(p: Any, x: jax.Array) -> jax.Array:
    y = rms_norm(p["norm"], x)
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def written_out(
    params: Any, tokens: jax.Array, caches: Any, position: jax.Array, *, write: str
) -> tuple[jax.Array, Any]:
    """Logits (batch, tokens, vocabulary) and the caches with these tokens in them."""
    x, after = params["embed"][tokens], []
    for i, cache in enumerate(caches):
        p = params[f"block{i}"]
        x, cache = attention(p["attn"], x, cache, position, WRITES[write])
        x = mlp(p["mlp"], x)
        after.append(cache)
    return rms_norm(params["norm"], x) @ params["head"], after


def scanned(
    params: Any, tokens: jax.Array, caches: Any, position: jax.Array, *, write: str
) -> tuple[jax.Array, Any]:
    """The same with stacked blocks and caches."""

    def block(x: jax.Array, own: Any) -> tuple[jax.Array, Any]:
        p, cache = own
        x, cache = attention(p["attn"], x, cache, position, WRITES[write])
        return mlp(p["mlp"], x), cache

    x, after = lax.scan(block, params["embed"][tokens], (params["blocks"], caches))
    return rms_norm(params["norm"], x) @ params["head"], after


def carried(
    params: Any, tokens: jax.Array, caches: Any, position: jax.Array, *, write: str
) -> tuple[jax.Array, Any]:
    """The same with stacked caches that the loop carries."""

    def block(state: Any, own: Any) -> tuple[Any, None]:
        x, caches = state
        i, p = own
        cache = jax.tree.map(lambda c: lax.dynamic_index_in_dim(c, i, 0, False), caches)
        x, cache = attention(p["attn"], x, cache, position, WRITES[write])
        put = lambda c, new: lax.dynamic_update_index_in_dim(c, new, i, 0)
        return (mlp(p["mlp"], x), jax.tree.map(put, caches, cache)), None

    state = params["embed"][tokens], caches
    (x, after), _ = lax.scan(block, state, (jnp.arange(DEPTH), params["blocks"]))
    return rms_norm(params["norm"], x) @ params["head"], after


FORMS = {"written_out": written_out, "scanned": scanned, "carried": carried}


def decoder(form: str, write: str = "by_slice") -> tuple[Callable, Any, Callable]:
    """`apply`, its parameters, and a function (batch, length) -> empty caches."""
    params, apply = drawn(), partial(FORMS[form], write=write)
    if form == "written_out":
        return apply, params, empty
    return apply, stacked(params), lambda *sizes: in_one(empty(*sizes))


def token_by_token(apply: Callable, params: Any, tokens: jax.Array, caches: Any) -> Any:
    """The logits that decoding gives, one token at a time."""
    found, step = [], jax.jit(apply)
    for t in range(tokens.shape[1]):
        logits, caches = step(params, tokens[:, t : t + 1], caches, jnp.int32(t))
        found.append(logits)
    return jnp.concatenate(found, axis=1)
