"""Models in which each example of a batch is by itself, and models in which they meet."""

import jax
import jax.numpy as jnp
import pytest

from jaxmet.engine.graph.analyse import keeps_examples_apart
from jaxmet.engine.pruned.expand import call_of

W = jnp.eye(5) + 0.1
ROWS, SEQUENCES = jnp.ones((8, 5)), jnp.ones((8, 4, 5))
NHC = ("NHC", "HIO", "NHC")


def standardized(x, axis):
    mean, variance = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5)


def attention(x, *, over_batch):
    one, two = ("tbd,sbd->bts", "bts,sbd->tbd") if over_batch else (
        "btd,bsd->bts", "bts,bsd->btd",
    )  # fmt: skip
    weights = jax.nn.softmax(jnp.einsum(one, x @ W, x), axis=-1)
    return jnp.einsum(two, weights, x)


def recurrent(x):
    step = lambda h, y: ((h + y) @ W, h)
    return jax.lax.scan(step, x[:, 0], jnp.swapaxes(x, 0, 1))[1]


def along_the_batch(x):
    step = lambda h, y: (jnp.tanh((h + y) @ W), h)
    return jax.lax.scan(step, jnp.zeros(5), x)[1]


def convolved(x):
    kernel = jnp.ones((3, 1, 1)) * W[None]
    return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=NHC)


def over_time(x):
    return jnp.swapaxes(jax.nn.softmax(jnp.swapaxes(x @ W, 0, 1), axis=0), 0, 1)


def flat(x, axis):
    return jax.nn.softmax(x.reshape(-1, 5) @ W, axis).reshape(x.shape)


APART = {
    "gelu": (lambda x: jax.nn.gelu(x @ W), ROWS),
    "relu": (lambda x: jax.nn.relu(x @ W), ROWS),
    "layer norm": (lambda x: standardized(x, -1) @ W, ROWS),
    "attention": (lambda x: attention(x, over_batch=False), SEQUENCES),
    "recurrent": (recurrent, SEQUENCES),
    "convolved": (convolved, SEQUENCES),
    "over time": (over_time, SEQUENCES),
    "flat": (lambda x: flat(x, -1), SEQUENCES),
    "some channels": (lambda x: x[:, jnp.array([1, 2])] @ W[:2], ROWS),
    "table": (lambda x: x @ W + ROWS, ROWS),
}
MEET = {
    "centred": (lambda x: x @ W - (x @ W).mean(0, keepdims=True), ROWS),
    "batch norm": (lambda x: standardized(x, 0) @ W, ROWS),
    "largest": (lambda x: x @ W / jnp.abs(x).max(), ROWS),
    "similarities": (lambda x: (x @ W) @ x.T, ROWS),
    "softmax": (lambda x: jax.nn.softmax(x @ W, axis=0), ROWS),
    "flat": (lambda x: flat(x, 0), SEQUENCES),
    "attention": (lambda x: attention(x, over_batch=True), SEQUENCES),
    "back to front": (lambda x: x @ W + x[::-1], ROWS),
    "neighbours": (lambda x: x @ W + jnp.roll(x, 1, axis=0), ROWS),
    "sums so far": (lambda x: jnp.cumsum(x @ W, axis=0), ROWS),
    "pairs": (lambda x: (x @ W).reshape(-1, 2, 5).mean(1), ROWS),
    "along the batch": (along_the_batch, ROWS),
    "chosen": (lambda x: (x @ W)[jnp.array([1, 0, 3, 2, 5, 4, 7, 6])] + x, ROWS),
}


def apart(model, x):
    return keeps_examples_apart(call_of(lambda p, x: model(x) * p, W[0, 0], (x,), {}))


@pytest.mark.parametrize("name", APART)
def test_axes_prove_that_examples_are_apart(name):
    assert apart(*APART[name])


@pytest.mark.parametrize("name", MEET)
def test_examples_that_meet_are_never_called_apart(name):
    assert not apart(*MEET[name])
