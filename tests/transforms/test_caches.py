"""Decoders with a key/value cache: one quantizer for what is written and what is read."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoders as d
import jaxmet as jm

ROWS, TOKENS, LENGTH = 24, 10, 14
OTHERS = (
    6,
    12,
    20,
)  # another batch, more tokens and a longer cache than those of the trace
START = jnp.int32(0)
NEW = ("k/add", "v")


def sqnr(right, wrong):
    right, wrong = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    return 10 * np.log10(np.sum(right**2) / np.sum((right - wrong) ** 2))


def drawn_tokens(rows, tokens, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, d.VOCABULARY, (rows, tokens)), jnp.int32)


def prefills(empty, length=LENGTH):
    tokens = drawn_tokens(ROWS, TOKENS)
    return [(tokens[i : i + 8], empty(8, length), START) for i in range(0, ROWS, 8)]


@functools.cache
def traced(form, write="by_slice"):
    apply, params, empty = d.decoder(form, write)
    tokens = drawn_tokens(2, TOKENS)
    return jm.trace(apply, params, tokens, empty(2, LENGTH), START)


@functools.cache
def calibrated(form, write="by_slice"):
    return quantizers_of(form, write)


def quantizers_of(form, write="by_slice", length=LENGTH, batches=None, **config):
    _, params, empty = d.decoder(form, write)
    given, config = batches or prefills(empty, length), jm.QuantConfig(**config)
    kwargs = {"samples": None, "progress": False}
    return jm.calibrate(params, traced(form, write), given, config, **kwargs)


def losses(form, write, quantizers):
    """The SQNR of prefill and of decoding, on other sizes than those of calibration."""
    apply, params, empty = d.decoder(form, write)
    rows, number, length = OTHERS
    tokens = drawn_tokens(rows, number, seed=2)
    exact, _ = jax.jit(apply)(params, tokens, empty(rows, length), START)
    device = jm.simulate(apply, quantizers)
    prefill, _ = jax.jit(device)(params, tokens, empty(rows, length), START)
    decoded = d.token_by_token(device, params, tokens, empty(rows, length))
    return sqnr(exact, prefill), sqnr(exact, decoded)


CASES = [(form, "by_slice") for form in d.FORMS]
CASES += [("written_out", w) for w in d.WRITES if w != "by_slice"]
CASES += [("scanned", "by_index")]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("form", "write"), CASES)
def test_decoding_is_prefill_in_float(form, write):
    apply, params, empty = d.decoder(form, write)
    tokens = drawn_tokens(3, 5)
    whole, _ = apply(params, tokens, empty(3, 7), START)
    apart = d.token_by_token(apply, params, tokens, empty(3, 7))
    np.testing.assert_allclose(apart, whole, rtol=0, atol=2e-5)
    plain, own, lists = d.decoder("written_out")
    given, _ = plain(own, tokens, lists(3, 7), START)
    np.testing.assert_allclose(whole, given, rtol=0, atol=2e-5)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("form", "write"), CASES)
def test_prefill_and_decoding_lose_as_little(form, write):
    prefill, decoded = losses(form, write, calibrated(form, write))
    assert prefill > 25 and abs(prefill - decoded) < 1, (prefill, decoded)


@pytest.mark.parametrize("placement", ["operations", "products"])
def test_keys_and_values_of_a_cache_are_quantized(placement):
    quantizers = quantizers_of("written_out", placement=placement)
    shared = dict(quantizers.shared)
    for i, block in enumerate(("block0", "block1")):
        for j, name in enumerate(NEW):
            assert shared[f"input:{2 * i + j + 1}"] == f"{block}/attn/{name}"
    assert not [n for n, _ in quantizers.skipped if "input" in n]
    assert not [n for n in quantizers.activations if n.startswith("input")]


def step_between(values, levels=255):
    """The scale of a range with zero in it, from values alone."""
    return (max(np.max(values), 0) - min(np.min(values), 0)) / levels


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", ["written_out", "scanned"])
def test_scales_are_those_of_what_is_written(form):
    apply, params, empty = d.decoder(form)
    full = [jax.jit(apply)(params, *batch)[1] for batch in prefills(empty)]
    if form == "written_out":
        full = [d.in_one(caches) for caches in full]
    quantizers = calibrated(form)
    for key, name in zip("kv", NEW, strict=True):
        kept = np.stack([np.asarray(caches[key]) for caches in full], axis=1)
        wanted = [step_between(layer) for layer in kept]
        if form == "scanned":
            found = quantizers.activations[f"blocks/attn/{name}"].scale
            assert found.shape == (d.DEPTH,)
        else:
            blocks = (f"block{i}/attn/{name}" for i in range(d.DEPTH))
            found = [quantizers.activations[block].scale for block in blocks]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", ["written_out", "scanned"])
def test_a_cache_of_another_model_is_put_on_the_grids(form):
    """A float prefill, and a quantized model that goes on from its caches."""
    apply, params, empty = d.decoder(form)
    tokens = drawn_tokens(4, 6, seed=3)
    _, caches = jax.jit(apply)(params, tokens, empty(4, 9), START)
    quantizers = calibrated(form)
    one = (params, tokens[:, :1], caches, jnp.int32(6))
    _, after = jax.jit(jm.simulate(apply, quantizers))(*one)
    if form == "written_out":
        after = d.in_one(after)
    for key, name in zip("kv", NEW, strict=True):
        for i in range(d.DEPTH):
            block = "blocks" if form == "scanned" else f"block{i}"
            scale = np.asarray(quantizers.activations[f"{block}/attn/{name}"].scale)
            scale = scale[i] if form == "scanned" else scale
            steps = np.asarray(after[key][i]) / scale
            np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
            assert len(np.unique(np.round(steps[:, :6]))) > 20


@pytest.mark.one_in(3)
@pytest.mark.parametrize("write", ["by_slice", "by_joining"])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_places_that_were_never_written_count_in_no_range(write, method):
    options = {"activation_range": method, "percentile": 99.0}
    short, long = (
        quantizers_of("written_out", write, length=n, **options) for n in (LENGTH, 90)
    )
    owners = {owner for _, owner in short.shared}
    for name in sorted(owners | {"block0/attn/v"} & {*short.activations}):
        one, two = short.activations[name], long.activations[name]
        np.testing.assert_allclose(two.scale, one.scale, rtol=1e-5)


def test_what_a_cache_holds_counts_in_its_range():
    """Batches of decoding alone show most keys in the cache."""
    apply, params, empty = d.decoder("written_out")
    tokens = drawn_tokens(8, 6)
    _, caches = jax.jit(apply)(params, tokens, empty(8, 9), START)
    caches[0]["k"] = 3 * caches[0]["k"]
    batch = (tokens[:, :1], caches, jnp.int32(6))
    (scale, new) = (
        quantizers_of("written_out", batches=[b]).activations["block0/attn/k/add"].scale
        for b in (batch, (tokens[:, :1], empty(8, 9), jnp.int32(6)))
    )
    held = step_between(np.asarray(caches[0]["k"]))
    np.testing.assert_allclose(scale, held, rtol=0.1)
    assert float(new) < 0.6 * held


def test_four_bits_for_keys_and_values():
    rules = [jm.Rule(f"*/attn/{n}", activation_bits=4) for n in NEW]
    quantizers = quantizers_of("written_out", rules=rules)
    prefill, decoded = losses("written_out", "by_slice", quantizers)
    whole, _ = losses("written_out", "by_slice", calibrated("written_out"))
    assert 15 < prefill < whole - 3 and abs(prefill - decoded) < 1
    apply, params, empty = d.decoder("written_out")
    device = jm.simulate(apply, quantizers)
    _, caches = device(params, drawn_tokens(4, 6), empty(4, 9), START)
    for cache in caches:
        assert all(4 < len(np.unique(cache[key])) <= 16 for key in "kv")


def test_rules_for_caches():
    rule = jm.Rule("input:1", activation_bits=4)
    with pytest.raises(ValueError, match="reaches nothing.*'block0/attn/k/add'"):
        quantizers_of("written_out", rules=[rule])
    written = "block0/attn/k/add"
    for rule in (
        jm.Rule(written, quantize_activations=False),
        jm.Rule(written, dynamic="token"),
    ):
        quantizers = quantizers_of("written_out", rules=[rule])
        why = dict(quantizers.skipped)["input:1"]
        assert "'block0/attn/k/add' is written into it" in why
        assert quantizers.owner("input:1") is None
        assert quantizers.owner("input:2") == "block0/attn/v"
        prefill, decoded = losses("written_out", "by_slice", quantizers)
        assert min(prefill, decoded) > 25


@pytest.mark.slow
def test_padded_tokens_count_in_no_range():
    apply, params, empty = d.decoder("written_out")
    batches = prefills(empty)
    mask = jnp.broadcast_to(jnp.arange(TOKENS)[None] < 5, (8, TOKENS))
    graph = traced("written_out")
    padded = jm.calibrate(
        params, graph, batches, mask=lambda batch: mask, progress=False
    )
    cut = [(tokens[:, :5], caches, at) for tokens, caches, at in batches]
    plain = jm.calibrate(params, graph, cut, progress=False)
    for name in ("block0/attn/k/add", "block0/attn/v", "block1/attn/v"):
        one, two = padded.activations[name].scale, plain.activations[name].scale
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_empty_caches_are_no_badly_used_quantizers():
    _, params, empty = d.decoder("written_out")
    batch = prefills(empty)[0]
    table = jm.compare(params, traced("written_out"), calibrated("written_out"), batch)
    (row,) = table.where(node="input:1")
    assert row["note"] is None and row["levels used"] is None
    used = [r["levels used"] for r in table.where(node="block0/attn/k/add")]
    assert used[0] > 0.5


@pytest.mark.one_in(2)
@pytest.mark.parametrize("write", ["by_slice", "by_index"])
def test_integers_compute_what_is_simulated(write):
    apply, params, empty = d.decoder("written_out", write)
    case = "written_out", write
    quantizers, graph = calibrated(*case), traced(*case)
    tokens = drawn_tokens(4, 6, seed=3)
    run = jax.jit(jm.lift(apply, quantizers))
    integers = jm.quantize(params, graph, quantizers)
    found, caches = run(integers, tokens, empty(4, 9), START)
    device = jax.jit(jm.simulate(apply, quantizers))
    wanted, others = device(params, tokens, empty(4, 9), START)
    step = float(quantizers.activations["head"].scale)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1.01 * step)
    assert np.mean(np.abs(found - wanted) > 0.01 * step) < 0.02
    np.testing.assert_array_equal(caches[1]["v"], others[1]["v"])
    arguments = integers, tokens, empty(4, 9), START
    stored = str(jax.make_jaxpr(run)(*arguments))
    kind = {"by_slice": "dynamic_update_slice", "by_index": "scatter"}[write]
    lines = [line for line in stored.splitlines() if f"= {kind}[" in line]
    lines = lines or [line for line in stored.splitlines() if f"= {kind}" in line]
    assert len(lines) == 4 and all("i8[4,9,2,6]" in line for line in lines), lines


class Attention(nn.Module):
    """Flax keeps the caches of its attention among the variables."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="ln")(x)
        y = nn.MultiHeadDotProductAttention(2, name="attn", decode=True)(y, y, y)
        return nn.Dense(5, name="head")(x + y)


@pytest.mark.slow
def test_caches_among_the_variables():
    net, x = Attention(), jax.random.normal(jax.random.key(1), (4, 6, 8))
    variables = net.init(jax.random.key(0), x)
    apply = lambda v, x: net.apply(v, x, mutable=["cache"])
    graph = jm.trace(apply, variables, x[:, :1])
    batches = [(x[:, t : t + 1],) for t in range(6)]
    quantizers = jm.calibrate(variables, graph, batches, progress=False)
    assert {"attn/key", "attn/value"} <= {*quantizers.activations}
    assert not [n for n, _ in quantizers.skipped if n.startswith("input of")]

    def decoded(apply):
        now, found = variables, []
        for t in range(6):
            y, new = apply(now, x[:, t : t + 1])
            now = {**now, **new}
            found.append(y)
        return jnp.concatenate(found, axis=1)

    assert sqnr(decoded(apply), decoded(jm.simulate(apply, quantizers))) > 20
