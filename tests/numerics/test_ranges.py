"""Scales and zero points of ranges against the formulas in float64."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxmet.numerics.grid import grid_ends
from jaxmet.numerics.ranges import (
    SCALE_FLOOR,
    grid_between,
    grid_of_range,
    minmax,
    regrid,
)

ends = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
widths = st.sampled_from([2, 3, 4, 8, 16])


def settings(**options):
    return {"bits": 8, "symmetric": True} | options


@hypothesis.given(ends, ends, widths)
def test_asymmetric_formula(a, b, bits):
    low, high = sorted((a, b))
    hypothesis.assume(high - low > 1e-3)
    scale, zero_point = grid_of_range(low, high, bits=bits, symmetric=False)
    steps = 2**bits - 1
    expected = (max(high, 0) - min(low, 0)) / steps
    np.testing.assert_allclose(scale, expected, rtol=1e-5)
    assert 0 <= zero_point <= steps and float(zero_point).is_integer()
    assert abs(zero_point - -min(low, 0) / expected) <= 0.5 + 0.01
    reached = float(scale) * (np.array([0, steps]) - float(zero_point))
    slack = 0.51 * float(scale)
    assert reached[0] <= min(low, 0) + slack and reached[1] >= max(high, 0) - slack


@hypothesis.given(ends, ends, widths)
def test_symmetric_formulas(a, b, bits):
    low, high = sorted((a, b))
    hypothesis.assume(max(-low, high) > 1e-3)
    half = 2 ** (bits - 1)
    for options, expected in [
        ({}, max(abs(low), abs(high)) / (half - 1)),
        ({"narrow": False}, max(max(high, 0) / (half - 1), max(-low, 0) / half)),
        ({"signed": False}, max(high, 0) / (2 * half - 1)),
    ]:
        scale, zero_point = grid_of_range(
            low, high, bits=bits, symmetric=True, **options
        )
        assert zero_point == 0
        np.testing.assert_allclose(scale, max(expected, SCALE_FLOOR), rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"signed": False}], ids=str
)
def test_degenerate_ranges_stay_finite(options):
    for low, high in [(0.0, 0.0), (-0.0, 0.0), (3e38, 3.2e38), (-3e38, 3e38)]:
        scale, zero_point = grid_of_range(low, high, **settings(**options))
        assert np.isfinite(scale) and np.isfinite(zero_point)
        assert scale >= SCALE_FLOOR > 0
    assert np.float32(SCALE_FLOOR) ** 2 >= np.finfo(np.float32).tiny


def test_constant_ranges_include_zero():
    scale, zero_point = grid_of_range(2.0, 2.0, **settings(symmetric=False))
    np.testing.assert_allclose([scale, zero_point], [2 / 255, 0], rtol=1e-6)
    scale, zero_point = grid_of_range(-2.0, -2.0, **settings(symmetric=False))
    np.testing.assert_allclose([scale, zero_point], [2 / 255, 255], rtol=1e-6)


def test_ends_may_be_data():
    low, high = jnp.float32(-1.5), jnp.float32(4.0)
    traces = []

    @jax.jit
    def between(a, b):
        traces.append(a)
        return grid_between(low, high, a, b, symmetric=False)

    for bits in (2, 4, 8):
        got = between(*map(jnp.float32, grid_ends(bits, signed=False)))
        np.testing.assert_allclose(
            got, grid_of_range(low, high, bits=bits, symmetric=False), rtol=1e-6
        )
    assert len(traces) == 1


@hypothesis.given(st.floats(1e-3, 1e3), st.integers(0, 255), widths)
def test_regrid_covers_the_same_range(step, zero_point, bits):
    scale, point = jnp.float32(step), jnp.float32(zero_point)
    same = regrid(scale, point, (0, 255), (0, 255), symmetric=False)
    assert same == (scale, point)
    top = 2**bits - 1
    new_scale, new_point = regrid(scale, point, (0, 255), (0, top), symmetric=False)
    assert float(new_point).is_integer() and 0 <= new_point <= top
    np.testing.assert_allclose(new_scale * top, scale * 255, rtol=1e-5)
    shift = float(new_scale) * float(new_point) - float(scale) * zero_point
    assert abs(shift) <= 0.501 * float(new_scale)
    half = 2 ** (bits - 1) - 1
    new_scale, point = regrid(
        scale, jnp.float32(0), (-127, 127), (-half, half), symmetric=True
    )
    np.testing.assert_allclose(new_scale * half, scale * 127, rtol=1e-5)
    assert point == 0


def test_the_zero_point_keeps_its_gradient():
    def moved(zero_point):
        return regrid(jnp.float32(1), zero_point, (0, 255), (0, 15), symmetric=False)[1]

    np.testing.assert_allclose(jax.grad(moved)(jnp.float32(77.0)), 15 / 255, rtol=1e-6)


@pytest.mark.parametrize("axis", [None, (3,), (0, 3), (-1,), (0, 1, 2, 3)], ids=str)
def test_minmax_is_numpys(axis):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    kept = {a % 4 for a in axis or ()}
    others = tuple(a for a in range(4) if a not in kept)
    low, high = minmax(x, axis)
    np.testing.assert_array_equal(low, x.min(others, keepdims=True))
    np.testing.assert_array_equal(high, x.max(others, keepdims=True))


@pytest.mark.parametrize(
    ("axis", "block", "block_axis"),
    [
        ((3,), 2, 2),
        (None, 2, 2),
        ((2, 3), 2, 2),
        ((0,), 5, 3),
        ((3,), 3, -3),
        ((3,), 1, 0),
        ((3,), 2, 1),
        ((0,), 3, 3),
        (None, 4, -1),
        ((2,), 7, 3),
    ],
)
def test_minmax_of_blocks(axis, block, block_axis):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    low, high = minmax(x, axis, block=block, block_axis=block_axis)
    kept = {a % 4 for a in axis or ()} - {block_axis % 4}
    others = tuple(a for a in range(4) if a not in kept)
    parts = np.split(x, range(block, x.shape[block_axis], block), block_axis)
    for got, reduce in ((low, np.min), (high, np.max)):
        pieces = [reduce(part, others, keepdims=True) for part in parts]
        np.testing.assert_array_equal(got, np.concatenate(pieces, block_axis))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_reduces_in_float32(dtype):
    x = jnp.asarray([[-1.5, 3.0]], dtype)
    low, high = minmax(x)
    assert low.dtype == high.dtype == jnp.float32
    assert (low.tolist(), high.tolist()) == ([[-1.5]], [[3.0]])
    scale, zero_point = grid_of_range(x[0, 0], x[0, 1], **settings(symmetric=False))
    assert scale.dtype == zero_point.dtype == jnp.float32
