"""Each calibrator against the optimum over raw samples in float64, and in `calibrate`."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import by_hand
import jaxmet as jm
import zoo
from jaxmet.numerics.calibrators import (
    CALIBRATORS,
    RangeName,
    RangeTarget,
    best_range,
    noise,
    percentile_range,
    range_of,
    sqnr_candidates,
    values_in,
    values_of,
)
from jaxmet.numerics.grid import grid_ends
from jaxmet.numerics.histogram import Histogram, histogram

SEARCHED = ("mse", "sqnr", "entropy")
METHODS = ("percentile", *SEARCHED)
SIZE = 12_000


@functools.cache
def data(name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=SIZE)
    x = {
        "normal": x,
        "laplace": rng.laplace(size=SIZE),
        "relu": np.maximum(rng.laplace(size=SIZE), 0),
        "relu6": np.clip(4 * x, 0, 6),
        "skewed": rng.gamma(2, size=SIZE) - 1,
        "below": -np.abs(rng.laplace(size=SIZE)),
        "outlier": np.append(x[1:], 60.0),
        "positive": 3 + np.abs(x),
    }[name]
    return x.astype(np.float32)


tallied = jax.jit(histogram)  # one program for all values of a shape


def ends_of(bits, symmetric, x):
    return grid_ends(bits, signed=symmetric and bool(x.min() < 0))


def chosen(x, method, bits, symmetric, tail=1e-3):
    values = values_of(tallied(x))
    given = [jnp.float32(v) for v in (*ends_of(bits, symmetric, x), tail)]
    low, high = best_range(values, *given, method=method, symmetric=symmetric)
    return float(low), float(high)


# Oracles: raw samples, float64, numpy.


def on_grid(low, high, ends, symmetric):
    """Scale and zero point of a range, the textbook way."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(high / ends[1], low / ends[0] if ends[0] else 0.0), 0.0
    scale = (high - low) / (ends[1] - ends[0])
    return scale, np.rint(-low / scale)


def error(x, low, high, ends, symmetric, gamma=1.0):
    scale, zero = on_grid(low, high, ends, symmetric)
    x = x.astype(np.float64)
    least, most = scale * (ends[0] - zero), scale * (ends[1] - zero)
    y = scale * (np.clip(np.rint(x / scale) + zero, *ends) - zero)
    outside = (x < least) | (x > most)
    return np.mean(np.square(x - y) * np.where(outside, gamma, 1.0))


def least_error(x, ends, symmetric, gamma=1.0):
    """The least error of any range in a dense net of shares of either end."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    if symmetric:
        pairs = [(s, s) for s in np.geomspace(1, 0.02, 100)]
    else:
        shares = np.geomspace(1, 0.05, 20)
        pairs = [(a, b) for a in (shares if low else [1]) for b in shares]
    costs = [error(x, a * low, b * high, ends, symmetric, gamma) for a, b in pairs]
    return min(costs)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "skewed", "outlier"])
def test_mse_is_the_optimum_over_raw_samples(name, bits, symmetric):
    x, ends = data(name), ends_of(bits, symmetric, data(name))
    best = least_error(x, ends, symmetric)
    low, high = chosen(x, "mse", bits, symmetric)
    found = error(x, low, high, ends, symmetric)
    assert found <= 1.02 * best
    whole = error(x, x.min(), x.max(), ends, symmetric)
    if bits < 8:
        assert found < 0.9 * whole  # what min–max would be


def aimet_candidates(x, bits, symmetric):
    """AIMET's list, written out: 101 steps, or 17 steps at 21 offsets and the observed."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    if symmetric:
        return [(k / 100 * low, k / 100 * high) for k in range(1, 102)]
    steps = 2**bits - 1
    delta = (high - low) / steps
    found = [(low, high)]
    for k in range(1, 18):
        for i in range(21):
            step, offset = k / 16 * delta, -steps + np.rint(i * steps / 20)
            least, most = step * offset, step * (offset + steps)
            if least < low and most > high:
                continue
            least, most = max(least, low), min(most, high)
            if most > least:
                found.append((least, most))
    return found


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "skewed", "outlier"])
def test_sqnr_is_the_best_of_aimets_candidates(name, bits, symmetric):
    x, ends = data(name), ends_of(bits, symmetric, data(name))
    low, high = chosen(x, "sqnr", bits, symmetric)
    ranges = aimet_candidates(x, bits, symmetric)
    nearest = min(abs(low - a) + abs(high - b) for a, b in ranges)
    assert nearest < 1e-2 * (high - low)  # it is one of them
    costs = [error(x, a, b, ends, symmetric, gamma=3.0) for a, b in ranges]
    found = error(x, low, high, ends, symmetric, gamma=3.0)
    assert found <= 1.02 * min(costs)
    if bits == 4:
        assert found < 0.95 * error(x, x.min(), x.max(), ends, symmetric, gamma=3.0)


def test_the_numbers_that_aimet_states():
    least, most = jnp.float32(-1), jnp.float32(2)
    ends = jnp.float32(0), jnp.float32(255)
    assert sqnr_candidates(least, most, ends, False)[0].size == 17 * 21 + 1
    assert sqnr_candidates(least, most, ends, True)[0].size == 101
    x = np.random.default_rng(1).normal(2, 2, SIZE).astype(np.float32)
    low, high = chosen(x, "sqnr", 8, False)
    assert 2 - 6 * 2 < low < 2 - 2 * 2 and 2 + 2 * 2 < high < 2 + 6 * 2
    low, high = chosen(x, "percentile", 8, False, tail=0.0)
    assert (low, high) == (x.min(), x.max())  # 100 is min–max
    low, high = chosen(x, "percentile", 8, False, tail=0.5)
    width = float(tallied(x).width)
    assert abs(low - np.median(x)) <= width and abs(high - np.median(x)) <= width


@pytest.mark.parametrize(("bits", "share"), [(4, 1.0), (4, 0.4), (8, 0.5), (16, 0.9)])
def test_the_noise_that_is_expected_is_the_noise_that_is(bits, share):
    ends = 0, 2**bits - 1
    for name in ("normal", "relu", "skewed"):
        x = data(name)
        range_ = share * min(x.min(), 0.0), share * x.max()
        scale, zero = on_grid(*range_, ends, False)
        values = values_of(tallied(x))
        given = [jnp.float32(v) for v in (scale, zero)]
        rounding, clipping = noise(values, *given, tuple(map(jnp.float32, ends)))
        assert float(rounding + clipping) == pytest.approx(
            error(x, *range_, ends, False), rel=0.01
        )


@pytest.mark.parametrize("tail", [1e-4, 1e-2, 0.2])
@pytest.mark.parametrize("name", ["normal", "skewed", "positive", "relu", "below"])
def test_percentile_is_that_of_the_raw_samples(name, tail):
    x = data(name)
    low, high = chosen(x, "percentile", 8, False, tail)
    width = float(tallied(x).width)
    expected = np.quantile(x, [tail, 1 - tail], method="inverted_cdf")
    np.testing.assert_allclose((low, high), expected, atol=1.01 * width)
    few = np.sort(x[:500])
    values = values_in(jnp.asarray(few), "percentile")
    low, high = percentile_range(values, jnp.float32(tail))
    beyond = int(tail * few.size)
    assert (low, high) == (few[beyond], few[-1 - beyond])  # values, not between them


def kl(x, low, high, ends, symmetric, width):
    """P against Q from the raw samples, cell by cell, as the method was published."""
    scale, zero = on_grid(low, high, ends, symmetric)
    x = x[x != 0].astype(np.float64)
    first = int(np.floor(min(x.min(), 0) / width))
    place = np.floor(x / width).astype(int) - first
    counts = np.bincount(place).astype(np.float64)
    centres = (first + np.arange(counts.size) + 0.5) * width
    centres = (
        np.clip(centres - width / 2, x.min(), x.max())
        + np.clip(centres + width / 2, x.min(), x.max())
    ) / 2
    level = np.rint(centres / scale) + zero
    inside = (level >= ends[0]) & (level <= ends[1])
    if scale < width:
        return np.inf
    p = counts[inside].copy()
    q = np.zeros_like(p)
    for cell in np.unique(level[inside]):
        mine = (level[inside] == cell) & (p > 0)
        if mine.any():
            q[mine] = p[mine].mean()
    p[0] += counts[level < ends[0]].sum()
    p[-1] += counts[level > ends[1]].sum()
    p, q = p / p.sum(), q / q.sum()
    q = np.maximum(q, 1e-4 * p)
    return np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["laplace", "relu", "outlier"])
def test_entropy_is_near_the_least_divergence_of_raw_histograms(name, bits, symmetric):
    x, ends = data(name), ends_of(bits, symmetric, data(name))
    width = float(tallied(x).width)
    whole = min(x.min(), 0.0), x.max()
    shares = np.linspace(1, 0.02, 50)
    pairs = [(s, s) for s in shares]
    if not symmetric and whole[0] < 0:
        pairs = [(a, b) for a in shares[::5] for b in shares[::3]]
    costs = [
        kl(x, a * whole[0], b * whole[1], ends, symmetric, width) for a, b in pairs
    ]
    found = kl(x, *chosen(x, "entropy", bits, symmetric), ends, symmetric, width)
    assert found <= 1.15 * min(costs)  # the divergence is jagged
    if name == "outlier":
        assert found < 0.5 * kl(x, *whole, ends, symmetric, width)


# What never happens.


@pytest.mark.one_in(2)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_side_of_zero_is_never_given_up(method, symmetric):
    for name in ("relu", "relu6", "positive"):
        low, high = chosen(data(name), method, 4, symmetric)
        assert min(low, 0.0) == 0 and high > 0.2 * data(name).max()
        below = chosen(-data(name), method, 4, False)
        assert max(below[1], 0.0) == 0 and below[0] < 0
    low, high = chosen(data("relu6"), method, 8, symmetric)
    assert high == pytest.approx(6.0, rel=1e-2)  # a fifth of all values lie at six


@pytest.mark.one_in(4)
@pytest.mark.parametrize("bits", [2, 16])
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_data_has_finite_grids_that_hold_it(method, bits):
    cases = [
        [0.0] * 2,
        [2.5] * 2,
        [-2.5] * 2,
        [1e-30, 0.0],
        [1e38, -1e38],
        [1e20, 1e-20],
    ]
    for symmetric in (False, True):
        for x in cases:
            x = np.asarray(x, np.float32)
            low, high = chosen(x, method, bits, symmetric, tail=1e-4)
            q = quantizer(method, bits=bits, symmetric=symmetric)
            assert np.isfinite(q(jnp.asarray(x))).all() and not q(jnp.zeros(2)).any()
            assert np.isfinite([low, high]).all()
            assert min(x.min(), 0) <= low <= high <= max(x.max(), 0) or low == high
            if x.min() == x.max():  # a constant is on its own grid
                assert (low, high) in ((x[0], x[0]), (min(x[0], 0), max(x[0], 0)))


@pytest.mark.parametrize("method", METHODS)
def test_ranges_scale_with_the_data(method):
    x = data("skewed")
    for symmetric in (False, True):
        one = chosen(x, method, 4, symmetric)
        for factor in (2.0**-60, 2.0**80):
            two = chosen(x * np.float32(factor), method, 4, symmetric)
            np.testing.assert_allclose(np.divide(two, factor), one, rtol=1e-6)


# Weights.


def quantizer(method, **fields):
    return jm.Quantizer(**({"bits": 4, "calibrator": method} | fields))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(3, 3, 5), (2500, 2)])  # values, and a histogram
def test_weights_have_the_best_range_of_each_channel(shape):
    rng = np.random.default_rng(4)
    w = rng.laplace(size=shape).astype(np.float32) * np.geomspace(1, 100, shape[-1])
    w = w.astype(np.float32)
    axis, ends = (w.ndim - 1,), grid_ends(3, signed=True, narrow=True)
    for method, gamma in (("mse", 1.0), ("sqnr", 3.0)):
        q = quantizer(method, bits=3, axis=axis)
        scale, _ = jax.jit(q.grid)(w)
        assert scale.shape == (1,) * axis[0] + shape[-1:]
        for channel, s in zip(w.reshape(-1, shape[-1]).T, scale.ravel(), strict=True):
            top = float(s) * ends[1]
            found = error(channel, -top, top, ends, True, gamma)
            best = least_error(channel, ends, True, gamma)
            assert found <= (1.03 if method == "mse" else 1.1) * best
    widest = np.abs(w).reshape(-1, shape[-1]).max(0) / ends[1]
    assert np.all(scale.ravel() <= 1.02 * widest) and np.any(scale.ravel() < widest)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", METHODS)
def test_channels_and_blocks_are_searched_one_by_one(method):
    w = np.random.default_rng(5).laplace(size=(2, 12, 3)).astype(np.float32)
    given = {"method": method, "symmetric": True, "percentile": 90.0}
    whole = range_of(w, -7, 7, axis=(2,), block=4, block_axis=1, **given)
    assert whole[0].shape == whole[1].shape == (1, 3, 3)
    for b in range(3):
        for c in range(3):
            part = range_of(w[:, 4 * b : 4 * b + 4, c], -7, 7, **given)
            for one, every in zip(part, whole, strict=True):
                assert one.shape == (1, 1)
                np.testing.assert_allclose(one[0, 0], every[0, b, c], rtol=1e-5)
    assert np.any(whole[1] < w.max())


@pytest.mark.slow
def test_weight_scales_follow_the_weight_under_every_transformation():
    apply, params, graph = model("conv_bn_relu")
    x = jax.device_put(np.float32(np.random.default_rng(0).normal(size=(2, 8, 8, 3))))
    config = jm.QuantConfig(weight_range="mse", weight_bits=3)
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    q = quantizers.weights["head/kernel"]
    assert q.scale is None and q.calibrator == "mse"
    run = jax.jit(lambda p: jm.simulate(apply, quantizers)(p, x))
    pinned = jax.jit(lambda p: jm.simulate(apply, quantizers.pin(params))(p, x))
    np.testing.assert_allclose(run(params), pinned(params), atol=1e-5)
    doubled = jax.tree.map(lambda v: 2 * v, params)
    rounded = jm.round_weights(doubled, quantizers)["params"]["head"]["kernel"]
    np.testing.assert_allclose(
        rounded, 2 * q(params["params"]["head"]["kernel"]), rtol=1e-6
    )
    slope = jax.jit(jax.grad(lambda p: jnp.sum(run(p))))(params)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(slope))
    w = params["params"]["head"]["kernel"]
    best, rough = (
        float(jnp.sum(jnp.square(w - found(w))))
        for found in (q, q.set(calibrator="minmax"))
    )
    assert best < 0.97 * rough


# In calibrate.


def model(name):
    apply, params, _ = zoo.model(name)
    return apply, params, zoo.traced(name)


def raw(name, batches):
    """Every value of every node, a list a layer."""
    found = {}
    leaves = by_hand.numbers(model(name)[1])

    def tap(node, value, layer=0, taken=True, weight=False):
        if not weight and taken:
            found.setdefault(node, {}).setdefault(layer, []).append(np.ravel(value))
        return value

    for batch in batches:
        by_hand.MODELS[name](leaves.get, tap, batch)
    return {
        n: [np.concatenate(layers[i]) for i in sorted(layers)]
        for n, layers in found.items()
    }


SHAPES = {"conv_bn_relu": (8, 8, 3), "concatenation": (8, 8, 3), "scan": (6,)}


def rows(name, number):
    rng = np.random.default_rng(6)
    grow = np.linspace(0.3, 2.0, number).reshape(-1, *(1 for _ in SHAPES[name]))
    return jax.device_put(np.float32(grow * rng.laplace(size=(number, *SHAPES[name]))))


def calibrated(name, batches, method, **options):
    _, params, graph = model(name)
    fields = {"activation_range": method, "percentile": 98.0}
    config = jm.QuantConfig(**fields, **options.pop("config", {}))
    return jm.calibrate(params, graph, batches, config, progress=False, **options)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.slow
def test_percentiles_of_every_node_over_all_batches(name):
    x = rows(name, 7)
    batches = [x[:3], x[3:6], x[6:]]
    values = raw(name, batches)
    quantizers = calibrated(name, batches, "percentile")
    shared = {"right/concat": ("left/relu", "right/relu")}
    for node, q in quantizers.activations.items():
        assert (q.calibrator, q.percentile) == ("percentile", 98.0)
        layers = values[node]
        for other in shared.get(node, ()):
            layers = [np.concatenate([layers[0], values[other][0]])]
        ends = []
        for v in layers:
            low, high = np.quantile(v, [0.02, 0.98], method="inverted_cdf")
            ends.append((min(low, 0.0), max(high, 0.0)))
        low, high = np.asarray(ends).T.reshape(2, *np.shape(q.scale))
        width = [float(tallied(v).width) for v in layers]
        expected = (high - low) / 255
        within = 2.5 * np.reshape(width, np.shape(q.scale)) / 255
        np.testing.assert_allclose(q.scale, expected, atol=np.max(within))
    plain = calibrated(name, batches, "minmax")
    assert all(
        np.all(q.scale < plain.activations[n].scale)
        for n, q in quantizers.activations.items()
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_and_form_of_batches_do_not_matter(method):
    x = rows("conv_bn_relu", 18)
    x = x.at[::2].set(1e-3 * x[::2])  # the range grows late, or at once
    parts = [x[i : i + 2] for i in range(0, 18, 2)]
    options = {"config": {"activation_bits": 4}}
    one = calibrated("conv_bn_relu", parts, method, **dict(options))
    for batches in (parts[::-1], jm.batched(x, batch_size=2)):
        two = calibrated("conv_bn_relu", batches, method, **dict(options))
        for node, q in one.activations.items():
            np.testing.assert_allclose(q.scale, two.activations[node].scale, rtol=1e-5)
    plain = calibrated("conv_bn_relu", parts, "minmax", **dict(options))
    assert any(
        q.scale < 0.99 * plain.activations[n].scale for n, q in one.activations.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_mixed_rules_and_one_image(symmetric):
    """Every node gets what the numerics give for its own values, bits and method."""
    x = rows("conv_bn_relu", 1)
    rules = [
        jm.Rule("input", activation_range="mse", activation_bits=4),
        jm.Rule("head", activation_range="sqnr", activation_bits=3),
    ]
    options = {"rules": rules, "symmetric_activations": symmetric}
    found = calibrated("conv_bn_relu", [x], "percentile", config=options)
    plain = calibrated("conv_bn_relu", [x], "minmax", config={**options, "rules": []})
    values = {n: v[0] for n, v in raw("conv_bn_relu", [x]).items()}
    cases = {"input": ("mse", 4), "head": ("sqnr", 3), "stem/relu": ("percentile", 8)}
    assert {*cases} == {*found.activations}
    for node, (method, bits) in cases.items():
        v, q = values[node], found.activations[node]
        ends = ends_of(bits, symmetric, v)
        scale, zero = on_grid(
            *chosen(v, method, bits, symmetric, 0.02), ends, symmetric
        )
        np.testing.assert_allclose(q.scale, scale, rtol=1e-3)
        assert (q.bits, q.calibrator, q.ends) == (bits, method, ends)
        assert q.zero_point is None if symmetric else q.zero_point == zero
        whole = plain.activations[node].set(bits=bits).scale
        assert q.scale < 0.97 * whole


def test_a_branch_never_taken_and_one_taken_sometimes():
    apply, params, graph = model("cond")
    x = jnp.abs(jax.random.normal(jax.random.key(0), (4, 6)))
    config = jm.QuantConfig(activation_range="mse")
    once = jm.calibrate(params, graph, [x], config, progress=False)
    assert dict(once.skipped)["low/relu"] == "its branch was never taken"
    both = jm.calibrate(params, graph, [x, -x, x], config, progress=False)
    assert {*both.activations} - {*once.activations} == {"low/relu"}
    taken = {n for n in once.activations if n.startswith("high")}
    assert taken
    for n in taken:  # the other branch's batch says nothing here
        np.testing.assert_allclose(
            both.activations[n].scale, once.activations[n].scale, rtol=0.05
        )


def test_samples_are_a_choice():
    x = jax.device_put(np.float32(np.random.default_rng(8).normal(size=(4, 64, 64, 3))))
    x = x.at[1, 2, 3, 0].set(50.0)

    def apply(params, x):
        return x @ params["w"]["kernel"]

    params = {"w": {"kernel": jnp.eye(3)}}
    graph = jm.trace(apply, params, x)
    config = jm.QuantConfig(activation_range="percentile", percentile=99.0)

    def scale(samples):
        found = jm.calibrate(
            params, graph, [x], config, samples=samples, progress=False
        )
        return float(found.activations["w"].scale)

    every, some, few = scale(None), scale(4096), scale(64)
    exact = np.ptp(np.quantile(np.asarray(x), [0.01, 0.99])) / 255
    assert every == pytest.approx(exact, rel=0.02)
    # 41 of 4,096 lie above: known to about 1/√41 of the tail, 6 % of this range
    assert some == pytest.approx(exact, rel=0.15) and some != every
    assert few != some and few < 2 * exact  # the outlier is one value of 49,152
    for bad in (0, -1, True):
        with pytest.raises(ValueError, match=r"jaxmet\.calibrate: samples is.*None"):
            scale(bad)


@pytest.mark.parametrize("method", METHODS)
def test_channels_without_variance_and_infinities(method):
    x = jnp.zeros((2, 8, 8, 3))
    for batch in (x, x + 1.0):
        quantizers = calibrated("conv_bn_relu", [batch], method)
        for q in quantizers.activations.values():
            assert np.isfinite(q.scale) and q.scale > 0
            assert float(jnp.abs(q(jnp.float32(0)))) == 0
    bad = x.at[0, 0, 0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match=r"'input' hold NaN or infinity"):
        calibrated("conv_bn_relu", [x, bad], method)


def test_percentiles_and_methods_are_checked():
    for bad in (50, 101, 0.9999, float("nan")):
        with pytest.raises(ValueError, match="QuantConfig: percentile is .*above 50"):
            jm.QuantConfig(percentile=bad)
        with pytest.raises(ValueError, match="Rule: percentile is"):
            jm.Rule("a", percentile=bad)
        with pytest.raises(ValueError, match=r"Quantizers\.set: percentile is"):
            jm.Quantizer().set(percentile=bad)
    with pytest.raises(ValueError, match="calibrator is 'best'.*'entropy'"):
        jm.Quantizer().set(calibrator="best")
    config = jm.QuantConfig(rules=[jm.Rule("a", percentile=99)])
    assert config.resolve("a", "activation").percentile == 99.0
    assert config.resolve("b", "weight").percentile == 99.99


def test_histograms_are_trees():
    h = histogram(jnp.ones(3))
    assert isinstance(jax.tree.map(jnp.negative, h), Histogram)


# Calibrators of the user's own


def three_sigma(values, target):
    """Mean ± 3 standard deviations."""
    del target
    middle, weight = (values.left + values.right) / 2, values.number
    mean = jnp.sum(weight * middle) / jnp.sum(weight)
    square = jnp.sum(weight * (middle - mean) ** 2) / jnp.sum(weight)
    return mean - 3 * jnp.sqrt(square), mean + 3 * jnp.sqrt(square)


def half(values, target):
    """Half of the observed range: known exactly, from the ends alone."""
    del target
    return values.left[0] / 2, values.right[-1] / 2


def fixed(values, target):
    """The same range whatever the values are."""
    del values
    return -1.5 if target.symmetric else -0.5, 1.5


def scale_between(low, high, bits, symmetric):
    """The textbook scale of a range, which includes zero."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        return np.maximum(-low, high) / (2 ** (bits - 1) - 1)
    return (high - low) / (2**bits - 1)


RNG = np.random.default_rng(11)
NET = {
    "w": jax.device_put(np.float32(RNG.standard_t(3, size=(12, 5)))),
    "v": jax.device_put(np.float32(RNG.normal(size=(5, 7)))),
}
BATCH = jax.device_put(np.float32(RNG.normal(size=(200, 12)) + 0.3))


def net(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_follow_a_calibrator_of_the_users_own(symmetric, per_channel):
    """Recomputed at each call, under jit too, from the weight as it is then."""
    graph = jm.trace(net, NET, BATCH)
    config = jm.QuantConfig(
        4, 32, per_channel, symmetric_weights=symmetric, weight_range=three_sigma
    )
    q = jm.calibrate(NET, graph, [BATCH], config, progress=False)
    assert all(w.follows for w in q.weights.values())
    for name in ("w", "v"):
        axis = 0 if per_channel else (0, 1)
        for times in (1.0, 3.0):  # the weight changes, and its range with it
            tree = NET | {name: NET[name] * times}
            w = np.asarray(tree[name], np.float64)
            mean, std = (f(w, axis=axis, keepdims=True) for f in (np.mean, np.std))
            scale = scale_between(mean - 3 * std, mean + 3 * std, 4, symmetric)
            found = q.pin(tree).weights[name].scale
            np.testing.assert_allclose(found, np.broadcast_to(scale, found.shape), 1e-5)
            rounded = jax.jit(lambda p: jm.round_weights(p, q))(tree)[name]
            pinned = jm.round_weights(tree, q.pin(tree))[name]
            np.testing.assert_allclose(rounded, pinned, rtol=1e-6)
            levels = np.asarray(rounded, np.float64) / scale
            np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    exact = net(jm.round_weights(NET, q.pin(NET)), BATCH)
    device = jax.jit(jm.simulate(net, q))
    np.testing.assert_allclose(device(NET, BATCH), exact, rtol=1e-5, atol=1e-4)
    jax.jit(jax.grad(lambda p: jnp.sum(jm.simulate(net, q)(p, BATCH))))(NET)


def test_activations_have_the_range_of_a_calibrator_of_the_users_own():
    graph = jm.trace(net, NET, BATCH)
    values = {
        "input": np.asarray(BATCH, np.float64),
        "w/relu": np.maximum(np.asarray(BATCH @ NET["w"], np.float64), 0),
    }

    def scales(calibrator, **more):
        config = jm.QuantConfig(activation_range=calibrator, **more)
        halves = [BATCH[:100], BATCH[100:]]
        q = jm.calibrate(NET, graph, halves, config, samples=None, progress=False)
        return {name: float(q.activations[name].scale) for name in values}

    for name, x in values.items():
        ends = x.min() / 2, x.max() / 2
        np.testing.assert_allclose(
            scales(half)[name], scale_between(*ends, 8, False), rtol=1e-5
        )
        ends = x.mean() - 3 * x.std(), x.mean() + 3 * x.std()
        np.testing.assert_allclose(
            scales(three_sigma)[name], scale_between(*ends, 8, False), rtol=5e-3
        )
        assert scales(fixed)[name] == pytest.approx(2 / 255)
    signed = scales(fixed, symmetric_activations=True)["input"]
    assert signed == pytest.approx(1.5 / 127)


def test_a_rule_may_bring_a_calibrator_and_prints_its_name():
    rule = jm.Rule("v", weight_range=half, weight_bits=4)
    assert repr(rule) == "Rule('v', weight_bits=4, weight_range=half)"
    graph = jm.trace(net, NET, BATCH)
    q = jm.calibrate(NET, graph, [BATCH], jm.QuantConfig(rules=[rule]), progress=False)
    w = np.abs(np.asarray(NET["w"])).max(0, keepdims=True)
    pinned = q.pin(NET).weights
    low, high = (f(np.asarray(NET["v"]), axis=0) / 2 for f in (np.min, np.max))
    scale = scale_between(low, high, 4, True)[None]
    np.testing.assert_allclose(pinned["v"].scale, scale, rtol=1e-5)
    np.testing.assert_allclose(pinned["w"].scale, w / 127, rtol=1e-5)
    again = q.set("w", calibrator=half).pin(NET).weights["w"].scale
    low, high = (f(np.asarray(NET["w"]), axis=0) / 2 for f in (np.min, np.max))
    np.testing.assert_allclose(again, scale_between(low, high, 8, True)[None], 1e-5)


def test_the_same_function_compiles_once():
    """It is static, hashable metadata: what was compiled for it serves a second call."""
    graph = jm.trace(net, NET, BATCH)
    config = jm.QuantConfig(weight_range=functools.partial(fixed))
    one, two = (
        jm.calibrate(NET, graph, [BATCH], config, progress=False) for _ in range(2)
    )
    assert jax.tree.structure(one) == jax.tree.structure(two)
    count = 0

    @jax.jit
    def run(params, quantizers):
        nonlocal count
        count += 1
        return jm.round_weights(params, quantizers)

    run(NET, one), run(NET, two)
    assert count == 1


def test_a_file_holds_no_function(tmp_path):
    graph = jm.trace(net, NET, BATCH)
    config = jm.QuantConfig(activation_range=half, weight_range=half)
    q = jm.calibrate(NET, graph, [BATCH], config, progress=False)
    path = tmp_path / "model.npz"
    with pytest.raises(ValueError, match=r"jaxmet\.save: .*'w'.*half.*pin\(params\)"):
        jm.save(path, quantizers=q)
    assert not path.exists()
    pinned = q.pin(NET)
    jm.save(path, quantizers=pinned)
    found = jm.load(path).quantizers
    one, two = (jax.jit(jm.simulate(net, z))(NET, BATCH) for z in (pinned, found))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "wrong,stated",
    [
        ("mze", "'mze'.*'minmax', 'percentile'.*or a function"),
        (3, "is 3"),
        (lambda values: values, "<lambda>.*takes 1 positional"),
        (lambda values, target: values.left, "no pair"),
        (lambda values, target: (values.left, 1.0), r"shapes \(8,\) and \(\)"),
        (lambda values, target: (0.0, float(values.right[-1])), "does not run"),
        (lambda values, target: (0.0, np.sort(values.right)[-1]), "does not run"),
    ],
)
def test_what_is_no_calibrator_is_refused_when_it_is_named(wrong, stated):
    for field in ("weight_range", "activation_range"):
        for make in (jm.QuantConfig, functools.partial(jm.Rule, "w")):
            with pytest.raises(ValueError, match=rf"jaxmet\.\w+: {field}.*{stated}"):
                make(**{field: wrong})
    q = jm.calibrate(NET, jm.trace(net, NET, BATCH), [BATCH], progress=False)
    with pytest.raises(ValueError, match=f"Quantizers.set: calibrator.*{stated}"):
        q.set("w", calibrator=wrong)


def test_every_named_calibrator_is_an_entry_of_one_table():
    assert tuple(CALIBRATORS) == get_args(RangeName)
    values = values_in(jnp.asarray(data("skewed")[:100]), "mse")
    target = RangeTarget(*map(jnp.float32, (0, 255, 1e-3)), symmetric=False)
    low, high = CALIBRATORS["minmax"](values, target)
    few = data("skewed")[:100]
    assert (float(low), float(high)) == (min(few.min(), 0), few.max())
