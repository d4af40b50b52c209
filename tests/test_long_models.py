"""Analysis is linear: a model of twice as many layers takes twice as many steps."""

import cProfile
import pstats
import random

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxmet as jm

D = 4


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def chain(p, x):
    for w, b in zip(p["w"], p["b"], strict=True):
        x = jax.nn.relu(x @ w + b[None])
    return x


def residual(p, x):
    for w, b in zip(p["w"], p["b"], strict=True):
        x = x + jax.nn.relu(x @ w + b[None])
    return x


def shared(p, x):
    for _ in p["w"]:
        x = jax.nn.relu(x @ p["w"][0] + p["b"][0][None])
    return x


def skips(p, x):
    """A directed graph with additions from anywhere among the ten values before."""
    drawn, values = random.Random(0), [x]
    for w in p["w"]:
        new = jax.nn.relu(values[-1] @ w)
        for _ in range(drawn.randint(0, 2)):
            new = new + drawn.choice(values[-10:])
        values.append(new)
    return values[-1]


def reads(p, x):
    """Values of the input's own making that read each other twice."""
    x = x @ p["w"][0]
    for _ in p["w"]:
        x = jnp.where(x[::-1] > 0, x, x[:, ::-1])
    return x @ p["w"][1]


def pointwise(p, x):
    x = x @ p["w"][0]
    for _ in p["w"]:
        x = jnp.tanh(x) * 2.0 + jnp.sin(x)
    return x @ p["w"][1]


def read_on_the_way(p, x):
    x, total = x @ p["w"][0], 0.0
    for w in p["w"]:
        x = jnp.tanh(x) + jnp.sin(x)
        total = total + x @ w
    return total


def diamonds(p, x):
    """What a normalized activation is split into and joined from again."""
    x = x @ p["w"][0]
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3) * p["b"][0][None]
    x = jax.nn.relu(x)
    for _ in p["w"]:
        one, two = jnp.split(x, 2, -1)
        x = jnp.concatenate([two, one], -1)
    return x @ p["w"][1]


def branches(p, x):
    for w in p["w"]:
        x = lax.cond(x.sum() > 0, lambda v: v * 2.0, lambda v: v[::-1], x)
        x = lax.cond(x.sum() < 0, lambda v, w=w: v @ w, lambda v: v, x)
    return x


MODELS = (
    chain, residual, shared, skips, reads, pointwise, read_on_the_way, diamonds, branches
)  # fmt: skip


def steps(apply, count):
    params = {"w": [spec(D, D)] * count, "b": [spec(D)] * count}
    profile = cProfile.Profile()
    profile.runcall(jm.trace, apply, params, spec(2, D))
    return pstats.Stats(profile).total_calls  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("apply", MODELS)
def test_twice_the_layers_take_twice_the_steps(apply):
    steps(apply, 8)  # fills JAX's own caches
    assert steps(apply, 60) < 2.5 * steps(apply, 30)


def test_a_concatenation_of_all_before():
    def dense(p, x):
        for w in p:
            x = jnp.concatenate([x, jax.nn.relu(x @ w)], -1)
        return x

    graph = jm.trace(dense, [spec(D + 2 * i, 2) for i in range(100)], spec(1, D))
    assert len(graph.sites) == 100


def test_a_long_formula():
    graph = jm.trace(
        pointwise, {"w": [spec(D, D)] * 500, "b": [spec(D)] * 500}, spec(1, D)
    )
    assert [n.kind for n in graph.nodes].count("activation") >= 1
