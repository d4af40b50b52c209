"""A small Llama-like decoder in flax linen, scanned over its layers, and text to train it on.

RMS norms, rotary embeddings, grouped queries, a gated MLP and a key/value cache. The text is
Python's own language reference, which every Python carries (`pydoc_data.topics`), letter by
letter: the last tenth is for measuring, the tenth before it for calibration.
"""

import pydoc_data.topics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

WIDTH, HEADS, GROUPS, HEAD, INNER, DEPTH, TOKENS = 128, 4, 2, 32, 256, 4, 128
LETTERS = 128
Caches = dict[str, jax.Array]  # 'k' and 'v': (layers, batch, length, groups, head)


class Attention(nn.Module):
    """Queries in groups that share keys and values; returns what is added, and the cache."""

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Caches, position: jax.Array
    ) -> tuple[jax.Array, Caches]:
        batch, tokens, _ = x.shape
        at = (position + jnp.arange(tokens)).astype(x.dtype)
        q = self.heads("q", HEADS, x)
        k, v = (self.heads(name, GROUPS, x) for name in ("k", "v"))
        new = {"k": rotated(k, at), "v": v}
        put = lambda old, n: lax.dynamic_update_slice(old, n, (0, position, 0, 0))
        cache = jax.tree.map(put, cache, new)
        q = rotated(q, at).reshape(batch, tokens, GROUPS, HEADS // GROUPS, HEAD)
        scores = jnp.einsum("btghd,bsgd->bghts", q, cache["k"]) / HEAD**0.5
        seen = jnp.arange(cache["k"].shape[1])[None] <= at[:, None]
        scores = jnp.where(seen[None, None, None], scores, -1e9)
        mixed = jnp.einsum("bghts,bsgd->btghd", jax.nn.softmax(scores), cache["v"])
        mixed = mixed.reshape(batch, tokens, HEADS * HEAD)
        return nn.Dense(WIDTH, use_bias=False, name="o")(mixed), cache

    def heads(self, name: str, number: int, x: jax.Array) -> jax.Array:
        y = nn.Dense(number * HEAD, use_bias=False, name=name)(x)
        return y.reshape(*x.shape[:2], number, HEAD)


def rotated(x: jax.Array, at: jax.Array) -> jax.Array:
    """Values (batch, tokens, heads, head) turned by the positions of their tokens."""
    half = HEAD // 2
    angles = at[:, None] * (1e4 ** (-jnp.arange(half) / half)).astype(x.dtype)[None]
    cos, sin = (
        jnp.concatenate([f(angles)] * 2, -1)[None, :, None] for f in (jnp.cos, jnp.sin)
    )
    one, two = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-two, one], axis=-1) * sin


class Layer(nn.Module):
    """One layer of the decoder: `(x, position), cache` to the same."""

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], cache: Caches
    ) -> tuple[tuple[jax.Array, jax.Array], Caches]:
        x, position = carry
        y = nn.RMSNorm(name="attention_norm")(x)
        added, cache = Attention(name="attention")(y, cache, position)
        x = x + added
        y = nn.RMSNorm(name="norm")(x)
        dense = lambda name, n: nn.Dense(n, use_bias=False, name=name)
        h = nn.silu(dense("gate", INNER)(y)) * dense("up", INNER)(y)
        return (x + dense("down", WIDTH)(h), position), cache


class Decoder(nn.Module):
    """Letters (batch, tokens) to logits, `position` being that of the first in the cache."""

    @nn.compact
    def __call__(
        self, letters: jax.Array, caches: Caches, position: jax.Array
    ) -> tuple[jax.Array, Caches]:
        x = nn.Embed(LETTERS, WIDTH, name="embed")(letters)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=0,
            length=DEPTH,
        )
        (x, _), caches = layers(name="layers")((x, position), caches)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(LETTERS, use_bias=False, name="head")(x), caches


def empty(batch: int, length: int = TOKENS) -> Caches:
    """Caches before the first letter."""
    one = np.zeros((DEPTH, batch, length, GROUPS, HEAD), np.float32)
    return {"k": one, "v": one}


START = np.int32(0)


class Text(NamedTuple):
    """Windows of letters, (windows, TOKENS + 1)."""

    training: np.ndarray
    calibration: np.ndarray
    measured: np.ndarray


def text() -> Text:
    """The language reference in windows that do not overlap, its three parts."""
    topics = pydoc_data.topics.topics
    written = "\n".join(topics[name] for name in sorted(topics))
    letters = np.frombuffer(written.encode("ascii", "replace"), np.uint8)
    count = len(letters) // (TOKENS + 1)
    windows = letters[: count * (TOKENS + 1)].reshape(count, -1).astype(np.int32)
    tenth = count // 10
    return Text(windows[: -2 * tenth], windows[-2 * tenth : -tenth], windows[-tenth:])


def batches_of(windows: np.ndarray, batch: int) -> Iterator[tuple[Any, ...]]:
    """What the decoder takes, for whole batches of windows."""
    for i in range(0, len(windows) - batch + 1, batch):
        yield windows[i : i + batch, :-1], empty(batch), START


def surprise(run: Callable[..., Any], params: Any, windows: np.ndarray) -> np.ndarray:
    """The mean surprise of each window's letters in nats; e to its mean is the perplexity."""
    loss = jax.jit(lambda p, w, *rest: of_letters(run(p, w[:, :-1], *rest)[0], w))
    batch = 32
    found = [
        loss(params, windows[i : i + batch], empty(batch), START)
        for i in range(0, len(windows) - batch + 1, batch)
    ]
    return np.concatenate(found)


def of_letters(logits: jax.Array, windows: jax.Array) -> jax.Array:
    """The mean cross-entropy of each window, in nats a letter."""
    right = windows[:, 1:, None]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), right, axis=-1)
    return -jnp.mean(picked[..., 0], axis=-1)


def trained(steps: int, windows: np.ndarray, batch: int = 16) -> Any:
    """The parameters after so many steps of AdamW with a cosine schedule."""
    model, key = Decoder(), jax.random.key(0)
    first = next(batches_of(windows, batch))
    params = jax.jit(model.init)(key, *first)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    @jax.jit
    def step(params: Any, state: Any, chosen: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            given = chosen[:, :-1], empty(batch), START
            return jnp.mean(of_letters(model.apply(params, *given)[0], chosen))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        params, state = step(
            params, state, windows[rng.integers(0, len(windows), batch)]
        )
    return params


def decoded(run: Callable[..., Any], params: Any, windows: np.ndarray) -> np.ndarray:
    """As `surprise`, letter by letter through the cache."""
    loss = jax.jit(of_letters)
    one, batch, found = jax.jit(run), 32, []
    for i in range(0, len(windows) - batch + 1, batch):
        chosen, caches, logits = windows[i : i + batch], empty(batch), []
        for t in range(TOKENS):
            out, caches = one(params, chosen[:, t : t + 1], caches, np.int32(t))
            logits.append(out)
        found.append(loss(jnp.concatenate(logits, axis=1), chosen))
    return np.concatenate(found)
