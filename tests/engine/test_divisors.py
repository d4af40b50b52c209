"""What is divided by keeps its precision: nothing becomes infinite, little is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

RNG = np.random.default_rng(0)
X = jax.device_put(np.float32(RNG.normal(size=(160, 8, 16))))
P = {k: jax.device_put(np.float32(RNG.normal(size=(16, 16)) / 3)) for k in "qkvo"}
CAUSAL = jnp.tril(jnp.ones((8, 8), bool))[None]


def hidden(s):
    top = jnp.max(s, axis=-1, keepdims=True)
    return jnp.where(CAUSAL, jnp.exp(s - top), 0.0)


def total(e):
    return jnp.sum(e, axis=-1, keepdims=True)


SOFTMAX = lambda s: jax.nn.softmax(jnp.where(CAUSAL, s, -jnp.inf))
# What becomes of the scores, and of it and the values.
ATTENTION = {
    "softmax": (SOFTMAX, lambda e, v: e @ v),
    "before": (hidden, lambda e, v: (e / total(e)) @ v),
    "after": (hidden, lambda e, v: (e @ v) / total(e)),
    "no largest": (
        lambda s: jnp.where(CAUSAL, jnp.exp(s), 0.0),
        lambda e, v: (e @ v) / total(e),
    ),
    "powers of two": (
        lambda s: jnp.where(CAUSAL, jnp.exp2(s * np.log2(np.e)), 0.0),
        lambda e, v: (e @ v) / total(e),
    ),
    "by one over": (hidden, lambda e, v: (e @ v) * (1 / total(e))),
    "with epsilon": (hidden, lambda e, v: (e @ v) / (total(e) + 1e-9)),
    "at least": (hidden, lambda e, v: (e @ v) / jnp.maximum(total(e), 1e-9)),
}


def measured(apply, params, x, placement="operations"):
    """SQNR of W8A8 on inputs that calibration has not seen."""
    graph = jm.trace(apply, params, x[:1])
    config = jm.QuantConfig(placement=placement)
    quantizers = jm.calibrate(params, graph, [x[:128]], config, progress=False)
    wanted = np.asarray(apply(params, x[128:]), np.float64)
    found = np.asarray(
        jax.jit(jm.simulate(apply, quantizers))(params, x[128:]), np.float64
    )
    assert np.isfinite(found).all()
    return 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - found) ** 2))


def attention(form):
    def apply(p, x):
        keys = jnp.swapaxes(x @ p["k"], 1, 2)
        weigh, read = ATTENTION[form]
        return read(weigh(x @ p["q"] @ keys / 4), x @ p["v"]) @ p["o"]

    return apply


@functools.cache
def of_attention(form, placement):
    return measured(attention(form), P, X, placement)


@pytest.mark.parametrize("placement", ["operations", "products"])
@pytest.mark.parametrize("form", ATTENTION)
def test_a_softmax_may_divide_where_it_will(form, placement):
    whole = of_attention("softmax", placement)
    assert whole > 20
    assert of_attention(form, placement) > whole - 1


DIVIDED = {
    "length": lambda y: y / jnp.sqrt(jnp.sum(y**2, axis=-1, keepdims=True)),
    "length by rsqrt": lambda y: y * jax.lax.rsqrt(jnp.sum(y**2, -1, keepdims=True)),
    "largest": lambda y: y / jnp.max(jnp.abs(y), axis=-1, keepdims=True),
    "spread over tokens": lambda y: y / jnp.std(y, axis=1, keepdims=True),
    "log of a sum": lambda y: jnp.log(jnp.sum(jnp.exp2(y), -1, keepdims=True)) + y,
}


@pytest.mark.parametrize("form", DIVIDED)
def test_small_divisors_are_not_rounded_to_zero(form):
    scale = np.exp(RNG.normal(size=(160, 8, 1)) / 2)
    x = X * jax.device_put(np.float32(scale))
    assert measured(lambda p, x: DIVIDED[form](x @ p["q"]) @ p["o"], P, x) > 15


def test_means_and_functions_keep_their_grids():
    """Divided by a number, or one over something within a function of one number."""

    def apply(p, x):
        y = jnp.sum(x @ p["q"], axis=1) / 8
        return (1 / (1 + (y @ p["k"]) ** 2)) @ p["o"]

    quantizers = jm.calibrate(P, jm.trace(apply, P, X[:1]), [X], progress=False)
    assert not [name for name, why in quantizers.skipped if "divisor" in why]
