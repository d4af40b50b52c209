"""Hadamard transforms beside the matrices of SciPy and their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxmet.numerics.hadamard import (
    ORDERS,
    hadamard,
    hadamard_size,
    random_signs,
    rotated,
)

SIZES = {1: 1, 2: 2, 6: 2, 7: 1, 12: 12, 24: 24, 36: 36, 48: 48, 100: 20, 128: 128}
SIZES |= {384: 384, 768: 768, 1536: 1536, 4096: 4096, 11008: 256, 14336: 14336, 18: 2}


def matrix_of(n: int, inverse: bool = False) -> np.ndarray:
    return hadamard(np.eye(n), inverse=inverse)


@pytest.mark.parametrize(("channels", "size"), SIZES.items())
def test_blocks_are_of_the_largest_known_size(channels, size):
    assert hadamard_size(channels) == size


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64, 512, 1024])
def test_powers_of_two_are_sylvesters_matrices(n):
    expected = scipy.linalg.hadamard(n) / np.sqrt(n)
    np.testing.assert_allclose(matrix_of(n), expected, atol=1e-14)


@pytest.mark.parametrize("n", [*ORDERS, 24, 40, 56, 384])
def test_other_sizes_have_entries_of_one_magnitude_and_are_orthogonal(n):
    found = matrix_of(n)
    np.testing.assert_allclose(np.abs(found) * np.sqrt(n), 1, rtol=1e-13)
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=1e-13)
    np.testing.assert_allclose(matrix_of(n, inverse=True), found.T, atol=1e-14)


def test_a_size_with_a_table_entry_is_a_kronecker_product():
    expected = np.kron(matrix_of(12), scipy.linalg.hadamard(32) / np.sqrt(32))
    np.testing.assert_allclose(matrix_of(384), expected, atol=1e-14)


def test_other_lengths_are_transformed_in_blocks():
    x = np.random.default_rng(0).normal(size=(3, 24 * 13))
    blocks = x.reshape(3, 13, 24) @ matrix_of(24)
    np.testing.assert_allclose(hadamard(x), blocks.reshape(x.shape), atol=1e-14)
    x = np.arange(7.0)
    np.testing.assert_array_equal(hadamard(x), x)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_axis_in_numpy_and_in_jax(axis):
    x = np.random.default_rng(0).normal(size=(12, 8, 40)).astype(np.float32)
    moved = np.moveaxis(x, axis, -1)
    expected = moved.astype(np.float64) @ matrix_of(moved.shape[-1])
    expected = np.moveaxis(expected, -1, axis)
    found = jax.jit(hadamard, static_argnums=1)(x, axis)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(hadamard(x, axis), expected, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 12, 1), (6, 1, 8), (1, 12, 8)])
def test_a_rotation_is_over_all_axes_of_its_signs_and_can_be_undone(shape):
    x = np.random.default_rng(0).normal(size=(6, 12, 8))
    signs = np.asarray(random_signs(jax.random.key(1), shape), np.float64)
    assert set(np.unique(signs)) == {-1, 1}
    found = rotated(x, signs)
    axes = [i for i, n in enumerate(shape) if n > 1]
    n = int(np.prod(shape))
    flat = np.moveaxis(x * signs, axes, range(-len(axes), 0))
    lead = flat.shape[: 3 - len(axes)]
    expected = (flat.reshape(*lead, n) @ matrix_of(n)).reshape(flat.shape)
    expected = np.moveaxis(expected, range(-len(axes), 0), axes)
    np.testing.assert_allclose(found, expected, atol=1e-13)
    np.testing.assert_allclose(rotated(found, signs, inverse=True), x, atol=1e-13)


def test_one_outlier_becomes_values_of_one_size():
    x = np.zeros(384)
    x[5] = 100
    np.testing.assert_allclose(np.abs(hadamard(x)), 100 / np.sqrt(384), rtol=1e-12)


def test_the_program_is_of_logarithmic_depth():
    text = str(jax.make_jaxpr(hadamard)(jnp.ones(1 << 12)))
    assert text.count("dot_general") == 3
