"""Masked attention quantizes as unmasked attention does; masks and indices stay exact."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn as jnn

import jaxmet as jm

WIDTH, HEADS, TOKENS = 16, 2, 6
CAUSAL = np.tril(np.ones((TOKENS, TOKENS), bool))
LOWEST = float(np.finfo(np.float32).min)


def sqnr(right, wrong):
    right, wrong = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    return 10 * np.log10(np.sum(right**2) / np.sum((right - wrong) ** 2))


@pytest.fixture(scope="module")
def params():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    kernel = lambda: jax.random.normal(next(keys), (WIDTH, WIDTH)) / WIDTH**0.5
    return {
        **{name: kernel() for name in "qkvo"},
        "bias": jax.random.normal(next(keys), (HEADS, TOKENS, TOKENS)),
        "table": jax.random.normal(next(keys), (2 * TOKENS, HEADS)),
        "sink": jnp.ones((1,)),
    }


@pytest.fixture(scope="module")
def data():
    x = jax.random.normal(jax.random.key(1), (48, TOKENS, WIDTH))
    lengths = jax.random.randint(jax.random.key(2), (48, 1), 2, TOKENS + 1)
    return x, (jnp.arange(TOKENS)[None] < lengths).astype(jnp.float32)


def attention(p, x, weigh):
    split = lambda y: jnp.reshape(y, (*y.shape[:2], HEADS, WIDTH // HEADS))
    q, k, v = (split(x @ p[name]) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
    y = jnp.einsum("bhqk,bkhd->bqhd", weigh(scores), v)
    return x + jnp.reshape(y, x.shape) @ p["o"]


def by_hand(s):
    e = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def relative(p):
    steps = np.arange(TOKENS)[:, None] - np.arange(TOKENS)[None] + TOKENS
    return jnp.transpose(p["table"][steps], (2, 0, 1))[None]


def log_weights(s):
    return s - jnn.logsumexp(s, axis=-1, keepdims=True)


def batched(mask):
    return jnp.broadcast_to(mask, (1, 1, TOKENS, TOKENS))


ADDED = np.where(batched(CAUSAL), 0, -1e9).astype(np.float32)
HIDE = lambda s, fill=-1e9: jnp.where(batched(CAUSAL), s, fill)
CAUSAL_MASKS = {
    "select": lambda p, s: jnn.softmax(HIDE(s)),
    "select lowest": lambda p, s: jnn.softmax(HIDE(s, LOWEST)),
    "select infinity": lambda p, s: jnn.softmax(HIDE(s, -jnp.inf)),
    "add": lambda p, s: jnn.softmax(s + ADDED),
    "learned bias": lambda p, s: jnn.softmax(s + (p["bias"][None] + ADDED)),
    "relative bias": lambda p, s: jnn.softmax(s + (relative(p) + ADDED)),
    "small": lambda p, s: jnn.softmax(s + (p["bias"][None] + np.maximum(ADDED, -100))),
    "where=": lambda p, s: jnn.softmax(s, where=jnp.broadcast_to(CAUSAL, s.shape)),
    "by hand": lambda p, s: by_hand(HIDE(s)),
    "twice": lambda p, s: HIDE(jnn.softmax(HIDE(s)), 0.0),
    "log": lambda p, s: jnp.exp(jnn.log_softmax(HIDE(s))),
    "capped": lambda p, s: jnn.softmax(HIDE(20 * jnp.tanh(s / 20))),
    "finite again": lambda p, s: jnn.softmax(jnp.nan_to_num(HIDE(s, -jnp.inf))),
    "clipped": lambda p, s: jnn.softmax(jnp.clip(HIDE(s), -5e4, 5e4)),
    "sink": lambda p, s: jnn.softmax(
        jnp.concatenate(
            [HIDE(s), jnp.broadcast_to(p["sink"], (*s.shape[:-1], 1))], axis=-1
        )
    )[..., :-1],
}
SEEN = batched(CAUSAL).astype(jnp.float32)
AFTER = {
    "factor": lambda p, s: (
        jnp.exp(s - jnn.logsumexp(s, axis=-1, keepdims=True, b=SEEN)) * SEEN
    ),
    "select": lambda p, s: HIDE(
        jnp.exp(s - jnn.logsumexp(HIDE(s, -jnp.inf), axis=-1, keepdims=True)), 0.0
    ),
}

over = lambda m: m[:, None, None, :]
PADDING_MASKS = {
    "select": lambda p, s, m: jnn.softmax(jnp.where(over(m) > 0, s, -1e9)),
    "select equal": lambda p, s, m: jnn.softmax(jnp.where(over(m) == 1, s, -1e9)),
    "select index": lambda p, s, m: jnn.softmax(
        jnp.where(over(m).astype(jnp.int32) == 1, s, -1e9)
    ),
    "add": lambda p, s, m: jnn.softmax(s + (1 - over(m)) * -1e9),
    "add lowest": lambda p, s, m: jnn.softmax(s + (1 - over(m)) * LOWEST),
    "add cases": lambda p, s, m: jnn.softmax(s + jnp.where(over(m) > 0, 0.0, -jnp.inf)),
    "add log": lambda p, s, m: jnn.softmax(s + jnp.log(over(m))),
    "pairs": lambda p, s, m: jnn.softmax(
        s + (1 - m[:, None, None, :] * m[:, None, :, None]) * -1e9
    ),
    "scaled": lambda p, s, m: jnn.softmax(s * over(m) - 1e9 * (1 - over(m))),
    "smaller": lambda p, s, m: jnn.softmax(jnp.minimum(s, (over(m) - 1) * 1e9 + 50)),
    "two": lambda p, s, m: jnn.softmax(jnp.where(over(m) > 0, HIDE(s), -1e9)),
}


def measured(apply, params, inputs, config=None):
    """SQNR of the simulated model on the second half, calibrated on the first."""
    first, second = ([x[i] for x in inputs] for i in (slice(0, 24), slice(24, 48)))
    graph = jm.trace(apply, params, *(x[:2] for x in first))
    batches = jm.batched(tuple(first), batch_size=12)
    quantizers = jm.calibrate(params, graph, batches, config, progress=False)
    for name, q in quantizers.activations.items():
        scale = float(np.max(np.asarray(q.grid(None)[0])))
        assert scale < 1, f"{name} has a scale of {scale}"
    simulated = jax.jit(jm.simulate(apply, quantizers))(params, *second)
    return sqnr(apply(params, *second), simulated)


@pytest.fixture(scope="module")
def unmasked(params, data):
    apply = lambda p, x: attention(p, x, jnn.softmax)
    return {
        kind: measured(apply, params, data[:1], jm.QuantConfig(placement=kind))
        for kind in ("operations", "products")
    }


@pytest.fixture(scope="module")
def padded(params, data):
    """The same function without a large number: exponentials times the mask."""

    def weigh(s, m):
        e = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)) * over(m)
        return e / jnp.sum(e, axis=-1, keepdims=True)

    apply = lambda p, x, m: attention(p, x, lambda s: weigh(s, m))
    return measured(apply, params, data)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", CAUSAL_MASKS)
def test_causal_attention_loses_what_unmasked_attention_loses(
    form, params, data, unmasked
):
    mask = CAUSAL_MASKS[form]
    apply = lambda p, x: attention(p, x, lambda s: mask(p, s))
    assert measured(apply, params, data[:1]) > unmasked["operations"] - 1


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", PADDING_MASKS)
def test_a_padding_mask_among_the_inputs_is_as_good_as_none(form, params, data, padded):
    mask = PADDING_MASKS[form]
    apply = lambda p, x, m: attention(p, x, lambda s: mask(p, s, m))
    assert measured(apply, params, data) > padded - 1


@pytest.mark.parametrize("form", ("select infinity", "relative bias"))
def test_placement_at_products_and_ranges_on_the_fly_hold_too(
    form, params, data, unmasked
):
    mask, (x, _) = CAUSAL_MASKS[form], data
    apply = lambda p, x: attention(p, x, lambda s: mask(p, s))
    config = jm.QuantConfig(placement="products")
    assert measured(apply, params, data[:1], config) > unmasked["products"] - 1
    on_the_fly = jax.jit(jm.simulate(apply, jm.dynamic(8)))
    assert sqnr(apply(params, x), on_the_fly(params, x)) > unmasked["operations"] - 1
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(on_the_fly(p, x))))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_what_shows_the_error_stays_finite_after_an_infinite_mask(params, data):
    inputs = tuple(x[:8] for x in data)
    mask = PADDING_MASKS["add log"]
    apply = lambda p, x, m: attention(p, x, lambda s: mask(p, s, m))
    graph = jm.trace(apply, params, *(x[:2] for x in inputs))
    batches = jm.batched(inputs, batch_size=8)
    quantizers = jm.calibrate(params, graph, batches, progress=False)
    tables = (
        jm.compare(params, graph, quantizers, inputs),
        jm.noise(params, graph, quantizers, batches, progress=False),
    )
    for table in tables:
        for column in table.columns:
            numbers = [n for n in table[column] if isinstance(n, float)]
            assert np.isfinite(numbers).all(), column
    assert "input:1" in dict(quantizers.skipped)


class Flax(nn.Module):
    masked: bool

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0]) if self.masked else None
        layer = nn.MultiHeadDotProductAttention(HEADS, deterministic=True)
        return x + layer(x, mask=mask)


def flax_block(masked):
    model = Flax(masked)
    return model.apply, jax.jit(model.init)(
        jax.random.key(3), jnp.ones((1, TOKENS, WIDTH))
    )


def haiku_block(masked):
    def call(x):
        layer = hk.MultiHeadAttention(
            HEADS, 8, w_init=hk.initializers.VarianceScaling(1.0)
        )
        mask = jnp.asarray(batched(CAUSAL)) if masked else None
        return x + layer(x, x, x, mask=mask)

    model = hk.without_apply_rng(hk.transform(call))
    return model.apply, jax.jit(model.init)(
        jax.random.key(4), jnp.ones((1, TOKENS, WIDTH))
    )


def equinox_block(masked):
    layer = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=jax.random.key(5))
    params, static = eqx.partition(layer, eqx.is_array)
    mask = jnp.asarray(CAUSAL) if masked else None
    one = lambda layer, x: x + layer(x, x, x, mask=mask)
    batch = jax.vmap(one, (None, 0))
    return lambda p, x: batch(eqx.combine(p, static), x), params


def plain_block(masked):
    def apply(p, x):
        split = lambda y: jnp.reshape(y, (*y.shape[:2], HEADS, WIDTH // HEADS))
        heads = (split(x @ p[name]) for name in "qkv")
        y = jnn.dot_product_attention(*heads, is_causal=masked)
        return x + jnp.reshape(y, x.shape) @ p["o"]

    keys = jax.random.split(jax.random.key(6), 4)
    kernels = [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in keys]
    return apply, dict(zip("qkvo", kernels, strict=True))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("block", (flax_block, haiku_block, equinox_block, plain_block))
def test_attention_of_libraries_is_as_good_masked(block, data):
    masked, bare = (measured(*block(m), data[:1]) for m in (True, False))
    assert masked > bare - 1


def test_masked_pools_gates_and_outputs_keep_their_resolution(params, data):
    """The relatives: a maximum, a sigmoid and the outputs themselves after a mask."""

    def apply(p, x, m):
        hidden = (1 - m[..., None]) * -1e9
        y = x @ p["q"]
        pooled = jnp.max(y + hidden, axis=1)
        gated = jnp.sum(jnn.sigmoid(x @ p["k"] + hidden), axis=1)
        chosen = jnp.where(p["v"][0] > 0, pooled @ p["v"] + gated, -jnp.inf)
        return jnp.maximum(chosen, -5.0), (y + hidden)

    _, m = data
    first = tuple(x[:24] for x in data)
    graph = jm.trace(apply, params, *(x[:2] for x in data))
    quantizers = jm.calibrate(
        params, graph, jm.batched(first, batch_size=12), progress=False
    )
    wanted, logits = apply(params, *data)
    got, some = jax.jit(jm.simulate(apply, quantizers))(params, *data)
    assert sqnr(wanted, got) > 25
    kept = np.broadcast_to(np.asarray(m)[..., None] > 0, logits.shape)
    assert sqnr(logits[kept], some[kept]) > 30


@pytest.mark.parametrize("form", AFTER)
def test_what_is_masked_after_its_exponential_fills_no_range(form, params, data):
    mask = AFTER[form]
    apply = lambda p, x: attention(p, x, lambda s: mask(p, s))
    assert measured(apply, params, data[:1]) > 25


@pytest.mark.parametrize("bits", (8, 16))
@pytest.mark.parametrize("low", (-1e9, -1000.0))
def test_a_maximum_sees_no_mask_however_small(low, bits, params, data):
    x, m = data
    apply = lambda p, x, m: jnp.max(x @ p["q"] + (1 - m[..., None]) * low, axis=1)
    config = jm.QuantConfig(weight_bits=bits, activation_bits=bits)
    assert measured(apply, params, (x, m), config) > {8: 30, 16: 30}[bits]


def test_values_without_a_mask_keep_their_quantizers():
    """Wide clips and functions by cases of ordinary values, maxima of ordinary sums."""

    def apply(p, x):
        y = jnp.nan_to_num(jnp.clip(x @ p["w"], -1e6, 1e6))
        z = jnp.max(y[:, None] + (x @ p["v"])[:, :, None], axis=1)
        return z @ p["u"]

    p = {"w": jnp.ones((4, 3)), "v": jnp.ones((4, 2)), "u": jnp.ones((3, 3))}
    plan = jm.plan(p, jm.trace(apply, p, jnp.ones((2, 4))))
    what = dict(zip(plan["name"], plan["kind"], strict=True))
    assert [what[n] for n in ("w/nan_to_num", "v/add", "u")] == ["activation"] * 3


@pytest.mark.parametrize("bits", (8, 16))
def test_categories_among_the_inputs_keep_their_meaning(bits):
    """Spins of ±1 become indices: on a grid −1 and 1 would be cast to the wrong ones."""

    def apply(p, spins):
        index = ((spins + 1) / 2).astype(jnp.int32)
        y = p["table"][index] * spins[..., None]
        return jnp.reshape(y, (len(spins), -1)) @ p["w"]

    keys = jax.random.split(jax.random.key(7), 4)
    p = {"table": jax.random.normal(keys[0], (2, 5))}
    p["w"] = jax.random.normal(keys[1], (20, 7))
    spins = 2.0 * jax.random.bernoulli(keys[2], 0.5, (64, 4)).astype(jnp.float32) - 1
    graph = jm.trace(apply, p, spins[:2])
    config = jm.QuantConfig(weight_bits=bits, activation_bits=bits)
    batches = jm.batched(spins, batch_size=32)
    quantizers = jm.calibrate(p, graph, batches, config, progress=False)
    simulated = jax.jit(jm.simulate(apply, quantizers))(p, spins)
    assert sqnr(apply(p, spins), simulated) > {8: 35, 16: 80}[bits]


def test_an_ordinary_input_that_some_function_compares_keeps_its_quantizer():
    """A rectifier told by cases, a threshold beside a product: these are no masks."""

    def apply(p, x):
        y = jnp.where(x > 0, x, 0.1 * (jnp.exp(x) - 1))
        return y @ p["w"] + jnp.where(x > 0.5, 1.0, 0.0) @ p["w"]

    graph = jm.trace(apply, {"w": jnp.ones((4, 3))}, jnp.ones((2, 4)))
    plan = jm.plan({"w": jnp.ones((4, 3))}, graph)
    rows = dict(zip(plan["name"], plan["kind"], strict=True))
    assert rows["input"] == "activation"


def test_a_mask_of_minus_infinity_among_the_inputs_is_no_dirty_data(params, data):
    x, m = data
    low = jnp.where(m > 0, 0.0, -jnp.inf)

    def apply(p, x, low):
        scores = jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"]) + low[:, None]
        return jnn.softmax(scores) @ (x @ p["v"])

    config = jm.QuantConfig()
    assert measured(apply, params, (x, low), config) > 25
    dirty = lambda x: x.at[3, 1].set(-jnp.inf)
    graph = jm.trace(apply, params, x[:2], low[:2])
    with pytest.raises(ValueError, match="hold NaN or infinity|NaN or infinite"):
        jm.calibrate(params, graph, [(dirty(x), low)], progress=False)
