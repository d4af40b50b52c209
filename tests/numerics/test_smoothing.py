"""The scales of SmoothQuant, beside the paper's formula in float64."""

import numpy as np

from jaxmet.numerics.smoothing import MAX_SCALE, smoothing_noise, smoothing_scale


def test_the_formula_of_the_paper_with_a_geometric_mean_of_one():
    rng = np.random.default_rng(0)
    inputs, weights = rng.lognormal(0.0, 2.0, (2, 3, 50))
    for alpha in (0.0, 0.3, 0.5, 1.0):
        found = smoothing_scale(inputs, weights, alpha)
        expected = inputs**alpha / weights ** (1 - alpha)
        expected /= np.prod(expected ** (1 / 50), axis=-1, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_with_one_half_both_sides_get_the_same_ranges():
    rng = np.random.default_rng(1)
    inputs, weights = rng.lognormal(0.0, 2.0, (2, 50))
    s = smoothing_scale(inputs, weights, 0.5)
    ratio = (inputs / s) / (weights * s)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)


def test_dead_channels_keep_their_scale_and_none_is_extreme():
    inputs = np.asarray([0.0, 1.0, 1.0, 1e30, 2.0])
    weights = np.asarray([1.0, 0.0, 1.0, 1e-30, 2.0])
    s = smoothing_scale(inputs, weights, 0.5)
    np.testing.assert_array_equal(s[:2], 1.0)
    assert np.isclose(s[3], MAX_SCALE) and s[2:].min() >= 1 / MAX_SCALE
    np.testing.assert_array_equal(smoothing_scale(inputs[:1], weights[:1], 0.5), 1.0)


def test_predicted_noise_is_that_of_uniform_errors_entry_by_entry():
    rng = np.random.default_rng(2)
    weight, squares = rng.normal(size=(2, 5, 3)), rng.uniform(size=(2, 5))
    s, ranges = rng.lognormal(size=(2, 5)), [rng.uniform(size=2), rng.uniform(size=2)]
    for bits in (4, 8):
        found = smoothing_noise(s, ranges, squares, weight, bits)
        for layer in range(2):
            total = 0.0
            for o in range(3):
                w = weight[layer, :, o] * s[layer]
                step = np.abs(w).max() / (2 ** (bits - 1) - 1)
                for i in range(5):
                    total += step**2 / 12 * squares[layer, i] / s[layer, i] ** 2
                    for r in ranges:
                        total += (r[layer] / (2**bits - 1)) ** 2 / 12 * w[i] ** 2
            np.testing.assert_allclose(found[layer], total, rtol=1e-12)
