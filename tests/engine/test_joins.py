"""A channel is rescaled only where everything that joins it follows, position for position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm

BATCH, TOKENS, INPUTS, CHANNELS = 4, 2, 3, 5
relu = jax.nn.relu


@pytest.fixture(scope="module")
def params():
    keys = iter(jax.random.split(jax.random.key(0), 20))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    return {
        "a": normal(INPUTS, CHANNELS) * jnp.asarray([[1.0, 100.0, 0.01, 10.0, 0.1]]),
        "b": normal(CHANNELS, 2),
        "wide": normal(2 * CHANNELS, 2),
        "pairs": normal(CHANNELS * CHANNELS, 2),
        "token": normal(CHANNELS),
        "other": normal(INPUTS, CHANNELS),
        "column": normal(INPUTS, 1),
        "one": normal(1),
        "row": normal(2),
        "down": normal(CHANNELS, 3),
        "up": normal(3, CHANNELS),
        "per token": normal(TOKENS, CHANNELS),
        "mean": normal(CHANNELS),
        "variance": jnp.square(normal(CHANNELS)) + 0.1,
    }


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (BATCH, TOKENS, INPUTS))


FIRST = np.array([[[True], [False]]])
token = lambda p: jnp.broadcast_to(p["token"], (BATCH, 1, CHANNELS))
ones = lambda n=1: jnp.ones((BATCH, n, CHANNELS))
at = lambda p, name: p[name][None, None]
normed = lambda p, y: (y - at(p, "mean")) / jnp.sqrt(at(p, "variance") + 1e-3)
start = lambda y, n, f: lax.reduce_window(y, n, f, (1, 2, 1), (1, 1, 1), "VALID")
squeezed = lambda p, y: relu(jnp.mean(y, axis=1, keepdims=True) @ p["down"])

# Of y = relu(x @ a): what is made of it before `@ b`, with the parameters and the input.
KEPT = {  # where nothing can follow the scale, or what follows is not written for it
    "ones": lambda p, y, x: jnp.concatenate([y, ones()], axis=1),
    "noise beside": lambda p, y, x: jnp.concatenate(
        [y, jax.random.normal(jax.random.key(2), (BATCH, 1, CHANNELS))], axis=1
    ),
    "noise": lambda p, y, x: y + jax.random.normal(jax.random.key(2), y.shape),
    "take": lambda p, y, x: jnp.take(
        y, jnp.array([0, 5]), axis=1, mode="fill", fill_value=1.0
    ),
    "largest from 0.4": lambda p, y, x: start(y, 0.4, lax.max),
    "sum from 0.4": lambda p, y, x: start(y, 0.4, lax.add),
    "one bias": lambda p, y, x: relu(y + at(p, "one")),
    "one column": lambda p, y, x: y + relu(x @ p["column"]),
    "larger column": lambda p, y, x: jnp.maximum(y, x[..., :1]),
    "larger parameter": lambda p, y, x: jnp.maximum(y, at(p, "token")),
    "select constant": lambda p, y, x: jnp.where(FIRST, y, 2.0),
    "select parameter": lambda p, y, x: jnp.where(FIRST, y, at(p, "token")),
    "select by data": lambda p, y, x: jnp.where(x[..., :1] > 0, y, 2.0),
    "select column": lambda p, y, x: jnp.where(FIRST, y, x[..., :1]),
    "update": lambda p, y, x: lax.dynamic_update_slice(y, ones(), (0, 0, 0)),
    "set": lambda p, y, x: y.at[:, 0].set(1.0),
    "pad": lambda p, y, x: jnp.pad(y, ((0, 0), (1, 0), (0, 0)), constant_values=1.0),
    "stack": lambda p, y, x: jnp.sum(
        jnp.stack([y, jnp.ones((BATCH, y.shape[1], CHANNELS))], axis=1), axis=1
    ),
    "square": lambda p, y, x: y * y,
    "centred": lambda p, y, x: y - jnp.mean(y, axis=-1, keepdims=True),
    "clip by parameter": lambda p, y, x: jnp.clip(y, -(p["one"][0] ** 2), p["one"][0]),
    "one bias of a norm": lambda p, y, x: relu(normed(p, y) + at(p, "one")),
    "largest two": lambda p, y, x: lax.top_k(y, CHANNELS)[0],
    "threshold": lambda p, y, x: jnp.where(y > 1, y, 0.0),
    "named like a rectifier": lambda p, y, x: jax.jit(lambda relu: relu**2 + 1)(y),
}
MOVED = {  # where everything follows
    "zeros": lambda p, y, x: jnp.concatenate(
        [y, jnp.zeros((BATCH, 1, CHANNELS))], axis=1
    ),
    "token": lambda p, y, x: jnp.concatenate([y, token(p)], axis=1),
    "take zeros": lambda p, y, x: jnp.take(
        y, jnp.array([0, 5]), axis=1, mode="fill", fill_value=0.0
    ),
    "select zero": lambda p, y, x: jnp.where(FIRST, y, 0.0),
    "select by data": lambda p, y, x: jnp.where(x[..., :1] > 0, y, 0.0),
    "hide": lambda p, y, x: jnp.max(
        jnp.where(x[..., :1] > -9, y, -jnp.inf), axis=1, keepdims=True
    ),
    "gate": lambda p, y, x: y * jax.nn.sigmoid(squeezed(p, y) @ p["up"]),
    "gate of the input": lambda p, y, x: jax.nn.silu(x @ p["other"]) * y,
    "gate a token": lambda p, y, x: y * jax.nn.sigmoid(x @ p["column"]),
    "division by token": lambda p, y, x: y / (1 + jnp.abs(x @ p["column"])),
    "stack": lambda p, y, x: jnp.sum(jnp.stack([y, y[:, ::-1]], axis=1), axis=1),
    "stack of a token": lambda p, y, x: jnp.sum(
        jnp.stack([y[:, 0], token(p)[:, 0]], axis=1), axis=1
    ),
    "norm": lambda p, y, x: relu(normed(p, y) + at(p, "token")),
    "roll": lambda p, y, x: jnp.roll(y, 1, axis=2),
}
HEADS = {
    "matrix": lambda p, y: y @ p["b"],
    "one row for all": lambda p, y: y @ jnp.broadcast_to(p["row"], (CHANNELS, 2)),
    "a vector": lambda p, y: y @ p["token"],
    "a vector a token": lambda p, y: jnp.einsum("btc,tc->bt", y, p["per token"]),
    "summed": lambda p, y: jnp.einsum("btc,co->bo", y, p["b"]),
    "pairs": lambda p, y: (
        jnp.reshape(y[..., :, None] + y[..., None, :], (BATCH, TOKENS, -1)) @ p["pairs"]
    ),
    "both signs": lambda p, y: jnp.concatenate([y, -y], axis=-1) @ p["wide"],
    "twice": lambda p, y: jnp.repeat(y, 2, axis=-1) @ p["wide"],
    "constants": lambda p, y: (y @ jnp.ones((CHANNELS, CHANNELS))) @ p["b"],
}


def equalized(apply, params, x):
    graph = jm.trace(apply, params, x)
    new = jm.equalize(params, graph, objective="range", clip="skip", progress=False)
    wanted, got = apply(params, x), apply(new, x)
    scale = np.max(np.abs(wanted))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * scale)
    return not np.array_equal(new["a"], params["a"])


def model(join, head=HEADS["matrix"]):
    return lambda p, x: head(p, join(p, relu(x @ p["a"]), x))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", KEPT)
def test_what_cannot_follow_keeps_the_channels_as_they_are(form, params, x):
    assert not equalized(model(KEPT[form]), params, x)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", MOVED)
def test_what_follows_is_equalized_and_the_function_kept(form, params, x):
    assert equalized(model(MOVED[form]), params, x)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("head", HEADS)
def test_whatever_reads_the_channels_the_function_is_kept(head, params, x):
    equalized(model(lambda p, y, x: y, HEADS[head]), params, x)


SAME = [*KEPT.values(), *MOVED.values()]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("seed", range(24))
def test_random_chains_of_joins_keep_the_function(seed, params, x):
    random = np.random.default_rng(seed)
    chosen = [SAME[i] for i in random.integers(len(SAME), size=3)]

    def join(p, y, x):
        shapes = {y.shape}
        for step in chosen:
            z = step(p, y, x[:, : y.shape[1]])
            if z.shape in shapes:  # steps that change the tokens do so at the end alone
                y = z
        return y

    heads = itertools.islice(HEADS.values(), 2)
    equalized(model(join, list(heads)[seed % 2]), params, x)


def test_a_gate_and_what_it_scales_lose_the_same_channels(params, x):
    """Channels that nothing reads go from both, and nothing changes."""
    dead = np.array([False, True, False, True, False])
    unread = {n: jnp.where(dead[:, None], 0.0, params[n]) for n in ("b", "down")}
    p = params | unread
    apply = model(MOVED["gate"])
    graph = jm.trace(apply, p, x)
    pruned = jm.prune(p, graph, {"b": 0.6}, progress=False)
    wanted, got = apply(p, x), jax.jit(jm.lift(apply))(pruned, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert {"a", "up", "b", "down"} <= set(jm.widths(pruned)["parameter"])
