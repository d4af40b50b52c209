"""Rotary embeddings, as models write them: the sum has a quantizer, its parts have none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm

TOKENS, HEADS, HEAD, WIDTH = 7, 2, 6, 12
FREQUENCIES = (10000.0 ** (-np.arange(HEAD // 2) / (HEAD // 2))).astype(np.float32)
TABLE = (np.arange(64)[:, None] * FREQUENCIES[None]).astype(np.float32)
WIDE = np.concatenate([TABLE, TABLE], axis=-1)


def angles(at):
    return (at.astype(jnp.float32)[..., None] * FREQUENCIES[None, None])[:, :, None]


def turned(x, cos, sin):
    one, two = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-two, one], axis=-1) * sin


def halves(x, at):
    a = jnp.concatenate([angles(at)] * 2, axis=-1)
    return turned(x, jnp.cos(a), jnp.sin(a))


def halves_apart(x, at):
    cos, sin = jnp.cos(angles(at)), jnp.sin(angles(at))
    one, two = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def pairs(x, at):
    cos, sin = jnp.cos(angles(at)), jnp.sin(angles(at))
    one, two = x[..., 0::2], x[..., 1::2]
    both = jnp.stack([one * cos - two * sin, one * sin + two * cos], axis=-1)
    return both.reshape(x.shape)


def looked_up(x, at):
    cos, sin = jnp.asarray(np.cos(WIDE))[at], jnp.asarray(np.sin(WIDE))[at]
    return turned(x, cos[:, :, None], sin[:, :, None])


def sliced(x, at):
    slice_of = lambda a: lax.dynamic_slice_in_dim(jnp.asarray(a), at[0, 0], x.shape[1])
    return turned(
        x, slice_of(np.cos(WIDE))[None, :, None], slice_of(np.sin(WIDE))[None, :, None]
    )


def constants(x, at):
    table = WIDE[None, : x.shape[1], None]
    return turned(x, np.cos(table), np.sin(table))


FORMS = [halves, halves_apart, pairs, looked_up, sliced, constants]


def model(p, x, at, *, rotate):
    split = lambda y: y.reshape(*y.shape[:2], HEADS, HEAD)
    q, k, v = (split(x @ p[name]) for name in "qkv")
    scores = jnp.einsum("bthd,bshd->bhts", rotate(q, at), rotate(k, at))
    y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return y.reshape(x.shape) @ p["o"]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {name: draw(WIDTH, WIDTH) / WIDTH**0.5 for name in "qkvo"}
    at = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32)[None], (32, TOKENS))
    return params, draw(32, TOKENS, WIDTH), at


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("rotate", "dtype"),
    [(f, jnp.int32) for f in FORMS] + [(f, jnp.float32) for f in FORMS[:3]],
)
def test_only_the_sum_has_a_quantizer(rotate, dtype, case):
    params, x, at = case
    at = at.astype(dtype)
    apply = partial(model, rotate=rotate)
    graph = jm.trace(apply, params, x[:2], at[:2])
    quantized = {r["name"] for r in jm.plan(params, graph).where(kind="activation")}
    inside = ("multiply", "cos", "sin")
    assert not [n for n in quantized if n.split("/")[-1].split(":")[0] in inside]
    ends = "concat" if rotate in (pairs, halves_apart) else "add"
    assert {f"q/{ends}", f"k/{ends}", "v", "k/softmax"} <= quantized
    assert not quantized & {"input:1", "input/concat"}
    batches = jm.batched((x, at), batch_size=8)
    quantizers = jm.calibrate(params, graph, batches, progress=False)
    found = jm.simulate(apply, quantizers)(params, x, at)
    error = np.asarray(found - apply(params, x, at))
    assert 10 * np.log10(np.var(apply(params, x, at)) / np.var(error)) > 28


def test_sines_that_enter_a_product_keep_theirs(case):
    """The embedding of a time step: the same functions, and no rotation."""
    params, x, at = case

    def timed(p, x, at):
        a = angles(at)[:, :, 0]
        waves = jnp.concatenate([jnp.sin(a), jnp.cos(a)] * 2, axis=-1)
        return jnp.tanh(x @ p["q"] + waves @ p["k"]) @ p["o"]

    def gated(p, x, at):
        a = jnp.concatenate([angles(at)[:, :, 0]] * 4, axis=-1)
        return ((x @ p["q"]) * jnp.cos(a) + (x @ p["k"]) * jnp.sin(a)) @ p["o"]

    graph = jm.trace(timed, params, x[:2], at[:2])
    quantized = jm.plan(params, graph).where(kind="activation")["name"]
    assert {"input/sin", "input/cos", "input/concat"} <= {*quantized}
    # two values that are mixed by positions are no rotation of one
    graph = jm.trace(gated, params, x[:2], at[:2])
    quantized = jm.plan(params, graph).where(kind="activation")["name"]
    assert {"q/multiply", "k/multiply", "input/cos", "input/sin"} <= {*quantized}
