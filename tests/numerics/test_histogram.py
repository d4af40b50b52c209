"""Histograms of streams against numpy's of everything at once, to the last count."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxmet.numerics.histogram import (
    BINS,
    SMALLEST_WIDTH,
    bin_width,
    histogram,
    histograms,
    merge,
    merge_all,
    stride_of,
    tally,
)

BINNED = 16
count = jax.jit(functools.partial(histogram, bins=BINNED))
whole = jax.jit(histogram)
join, join_all = jax.jit(merge), jax.jit(merge_all)
edges_of = jax.jit(lambda h: h.edges)
parts = st.lists(
    st.tuples(
        st.integers(0, 2**31),  # seed
        st.integers(-30, 30),  # exponent of the range
        st.sampled_from(["both", "above", "below", "zeros", "constant"]),
    ),
    min_size=3,
    max_size=5,
)


def draw(seed, exponent, kind):
    x = np.random.default_rng(seed).normal(size=24) * 2.0**exponent
    x = {"above": np.abs(x), "below": -np.abs(x)}.get(kind, x)
    x = {"zeros": 0 * x, "constant": np.full_like(x, x[0])}.get(kind, x)
    x[::7] = 0.0 if kind != "constant" else x[0]
    return x.astype(np.float32)


def expected(x, bins=BINNED):
    """Counts, and edges at multiples of the smallest power of two that covers the range."""
    x = np.asarray(x, np.float64).reshape(-1)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    width = SMALLEST_WIDTH
    while np.floor(high / width) - np.floor(low / width) >= bins:
        width *= 2
    edges = (np.floor(low / width) + np.arange(bins + 1)) * width
    return np.histogram(x, edges)[0], edges  # no value is on the last edge


def row(h, i=0):
    return jax.tree.map(lambda v: v[i], h)


def check(h, x, bins=BINNED):
    h, (counts, edges) = jax.device_get(h), expected(x, bins)
    np.testing.assert_array_equal(h.counts, counts)
    np.testing.assert_array_equal(edges_of(h), edges.astype(np.float32))
    assert (h.low, h.high) == (x.min(), x.max())
    assert h.zeros == (x == 0).sum() and 0.0 in edges
    assert h.counts.sum() == x.size


def same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@hypothesis.settings(max_examples=12)
@hypothesis.given(parts, st.randoms(use_true_random=False))
def test_merges_are_the_histogram_of_all(specs, shuffle):
    xs = [draw(*spec) for spec in specs]
    hs = [count(x) for x in xs]
    total = count(np.concatenate([*xs, np.zeros(24 * (5 - len(xs)), "f4")]))
    hs += [count(np.zeros(24, "f4"))] * (5 - len(xs))
    check(hs[0], xs[0])
    left = functools.reduce(join, hs)
    same(left, total)
    order = [*range(5)]
    shuffle.shuffle(order)
    a, b, c, d, e = (hs[i] for i in order)
    same(join(join(a, join(b, c)), join(d, e)), total)  # any order, any grouping
    same(join_all(jax.tree.map(lambda *v: jnp.stack(v), *hs)), total)


def test_the_range_grows_by_doubling_without_losing_a_count():
    x = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    h, seen, widths = whole(x), [x], []
    for factor in (3.0, 100.0, 1e4):
        more = factor * x
        h = join(h, whole(more))
        seen.append(more)
        check(h, np.concatenate(seen), BINS)
        widths.append(float(h.width))
    assert np.all(np.log2(widths) % 1 == 0) and widths[0] < widths[1] < widths[2]
    used = (float(h.high) - float(h.low)) / (float(h.width) * BINS)
    assert 0.5 - 2 / BINS <= used <= 1  # never coarser than it must be


def test_layers_side_by_side():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 50)).astype(np.float32) * [[[1]], [[1e3]]]
    x = x.astype(np.float32)
    one, two = (jax.vmap(count)(part) for part in x)
    both = join(one, two)
    for i in range(3):
        check(row(both, i), x[:, i].reshape(-1))
    check(join_all(both), x.reshape(-1))


@pytest.mark.parametrize(
    "x",
    [[0.0, 0.0], [7.0], [-3.0, -3.0], [1e-38, 0.0], [3e38, -3e38], [1e30, 1.0, 0.0]],
)
def test_degenerate_data_is_counted(x):
    x = np.asarray(x, np.float32)
    h = count(x)
    assert h.counts.sum() == x.size and not np.isnan(h.edges).any()
    assert (h.low, h.high) == (x.min(), x.max())
    assert h.edges[0] <= x.min() and h.edges[-1] > x.max()
    grown = join(h, count(np.asarray([1.0, -1.0], np.float32)))
    assert grown.counts.sum() == x.size + 2


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_show_in_the_ends(bad):
    h = count(np.asarray([1.0, bad], np.float32))
    grown = join(h, count(np.asarray([1.0, 2.0], np.float32)))
    for found in (h, grown):
        assert not (np.isfinite(found.low) and np.isfinite(found.high))


def test_width_is_the_smallest_that_covers_the_range():
    assert bin_width(jnp.float32(0), jnp.float32(1023.5)) == 0.5
    assert bin_width(jnp.float32(0), jnp.float32(1024)) == 1.0
    assert bin_width(jnp.float32(-1), jnp.float32(1022.5)) == 0.5
    assert bin_width(jnp.float32(-0.25), jnp.float32(1023.5)) == 1.0
    assert bin_width(jnp.float32(5), jnp.float32(6)) == 2.0**-8


# Samples.


def test_samples_spread_over_all_axes_and_keep_the_ends():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(8, 16, 16, 64)).astype(np.float32)  # powers of two alias
    x *= np.where(np.arange(64) % 32 == 5, 100.0, 1.0).astype(np.float32)
    x[3, 2, 1, 0] = 1e4
    h = jax.jit(lambda x: row(histograms([tally(x, 2048)])))(x)
    assert (h.low, h.high) == (x.min(), x.max())
    stride = stride_of(x.size, 2048)
    assert stride % 2 == 1 and x.size / stride <= 2048
    np.testing.assert_allclose(h.counts.sum(), x.size, rtol=1e-3)
    counts, edges = expected(x, BINS)
    found = np.cumsum(np.asarray(h.counts)) / h.counts.sum()
    np.testing.assert_allclose(found, np.cumsum(counts) / x.size, atol=0.03)
    far = np.abs(edges[:-1]) > 50  # the two channels of 64 that a plain stride may miss
    share = np.asarray(h.counts)[far].sum() / x.size
    assert share == pytest.approx((np.abs(x) > 50).mean(), rel=0.35)
    assert np.asarray(h.counts)[edges[:-1] <= 1e4][-1] == 1  # the end, for itself alone


def test_samples_weigh_what_they_stand_for_in_unequal_batches():
    rng = np.random.default_rng(3)
    big, small = rng.normal(5, 1, 40_000), rng.normal(-5, 1, 5_000)
    parts = [tally(jax.device_put(np.float32(v)), 1000) for v in (big, small)]
    h = join_all(jax.jit(histograms)(parts))
    below = np.asarray(h.counts)[np.asarray(h.edges)[:-1] < 0].sum() / h.counts.sum()
    assert below == pytest.approx(1 / 9, rel=0.02)
    zeros = row(jax.jit(histograms)([tally(jnp.zeros(10_000), 100)]))
    assert zeros.zeros == zeros.counts.sum()


def test_many_samples_in_one_go_are_each_their_own():
    rng = np.random.default_rng(4)
    xs = [rng.normal(size=s).astype(np.float32) for s in ((50,), (3, 40), (2, 2, 30))]
    xs[1][1] = 0.0
    inner = jax.jit(jax.vmap(tally))
    samples = [inner(jnp.asarray(xs[1])), tally(jnp.asarray(xs[0]))]
    found = jax.jit(histograms)([*samples, jax.vmap(inner)(jnp.asarray(xs[2]))])
    rows = [*xs[1], xs[0], *xs[2].reshape(4, 30)]
    assert found.counts.shape == (len(rows), BINS)
    for i, x in enumerate(rows):
        check(row(found, i), x, BINS)


def test_nothing_merged_changes_nothing():
    h = count(draw(0, 3, "both"))
    none = h._replace(
        counts=jnp.zeros(BINNED),
        zeros=jnp.zeros(()),
        low=jnp.float32(np.inf),
        high=jnp.float32(-np.inf),
    )
    same(join(none, join(h, none)), h)
    both = join(none, none)
    assert both.low > both.high and not both.counts.any()


@hypothesis.given(st.integers(1, 10**7), st.integers(1, 10**5))
def test_strides_share_no_factor_with_the_size(size, samples):
    stride = stride_of(size, samples)
    assert np.gcd(stride, size) == 1 and -(-size // stride) <= max(samples, 1)
    assert stride == 1 or size > samples
    assert stride_of(size, None) == 1
