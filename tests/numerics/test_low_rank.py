"""Thin factors, against what float64 and full-size linear algebra say of the optimum."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmet.layers.once import run_once
from jaxmet.numerics import low_rank as traced
from jaxmet.numerics.low_rank import largest_rank

SHAPES = ((7, 5), (5, 7), (4, 1))
POOR = ("dead", "few rows", "copies", "nothing", "tiny", "huge")


def on_numbers(function):
    """As transforms call it: in NumPy."""
    return lambda *args, **options: run_once(partial(function, **options), *args)


low_rank, masked, refit, spectrum = map(
    on_numbers, (traced.low_rank, traced.masked, traced.refit, traced.spectrum)
)


def narrow(x):
    return jax.device_put(np.float32(x))


def wide(x):
    return np.asarray(x, np.float64)


def product(pair):
    left, right = map(wide, pair)
    return left @ right


def rows(rng, groups, number, ins):
    """Inputs of which some directions are loud and others hardly there."""
    mix = rng.normal(size=(groups, ins, ins)) * 10.0 ** -rng.uniform(0, 2, size=ins)
    return rng.normal(size=(groups, number, ins)) @ mix


def gram_of(x):
    return np.swapaxes(x, 1, 2) @ x / x.shape[1]


def energy(error, gram):
    return np.einsum("gio,gij,gjo->g", error, gram, error)


def ranks(shape):
    return sorted({1, 1 + min(shape) // 2, min(shape)})


def layer(shape, seed=0, groups=2):
    rng = np.random.default_rng(seed)
    matrix = wide(narrow(rng.normal(size=(groups, *shape))))
    return matrix, rows(rng, groups, 50, shape[0])


def poor(kind, ins):
    x = rows(np.random.default_rng(1), 2, 40, ins)
    if kind == "dead":
        x[:, :, ::2] = 0
    if kind == "few rows":
        x = x[:, :2]
    if kind == "copies":
        x[:, :, ins // 2 :] = x[:, :, : ins - ins // 2]
    return x * {"nothing": 0.0, "tiny": 1e-12, "huge": 1e12}.get(kind, 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_factors_are_the_svd_cut_off(shape):
    matrix, _ = layer(shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    for rank in ranks(shape):
        left, right = low_rank(narrow(matrix), rank)
        assert left.shape == (2, shape[0], rank) and right.shape == (2, rank, shape[1])
        error = ((matrix - product((left, right))) ** 2).sum((1, 2))
        assert np.allclose(error, (values[:, rank:] ** 2).sum(1), atol=1e-4)
        for norm in (wide(left) ** 2).sum(1), (wide(right) ** 2).sum(2):
            assert np.allclose(norm, values[:, :rank], rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_factors_leave_the_least_error_of_the_outputs(shape):
    """No matrix of the rank does better than cutting off x M itself, and none is as good."""
    matrix, x = layer(shape)
    gram = gram_of(x)
    least = np.linalg.svd(x @ matrix, compute_uv=False) ** 2 / x.shape[1]
    values = wide(spectrum(narrow(matrix), narrow(gram)).values)
    for rank in ranks(shape):
        left, right = low_rank(narrow(matrix), rank, narrow(gram))
        error = energy(matrix - product((left, right)), gram)
        floor = least[:, rank : min(shape)].sum(1)
        assert np.allclose(error, floor, rtol=1e-2, atol=1e-5 * least.sum())
        assert np.allclose(
            (wide(left) ** 2).sum(1), (wide(right) ** 2).sum(2), rtol=1e-3
        )
        assert np.allclose(
            (values[:, rank:] ** 2).sum(1), floor, rtol=1e-2, atol=1e-5 * least.sum()
        )


def test_inputs_make_a_difference():
    matrix, x = layer((7, 5))
    gram = gram_of(x)
    plain, fitted = (low_rank(narrow(matrix), 2, g) for g in (None, narrow(gram)))
    errors = [energy(matrix - product(pair), gram) for pair in (plain, fitted)]
    assert (errors[1] < 0.5 * errors[0]).all()


@pytest.mark.parametrize("kind", POOR)
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_full_rank_is_the_matrix_whatever_the_inputs(kind, shape):
    matrix, _ = layer(shape)
    x = poor(kind, shape[0])
    gram = gram_of(x)
    exact = low_rank(narrow(matrix), min(shape), narrow(gram))
    size = np.linalg.norm(matrix, axis=(1, 2))
    apart = np.linalg.norm(matrix - product(exact), axis=(1, 2))
    assert (apart < 1e-5 * size).all()
    # What the rows do see needs no more rank than they have.
    live = np.linalg.matrix_rank(x @ matrix).max() if kind != "nothing" else 1
    left, right = low_rank(narrow(matrix), int(live), narrow(gram))
    assert np.isfinite(left).all() and np.isfinite(right).all()
    lost = energy(matrix - product((left, right)), gram)
    assert (lost <= 1e-4 * energy(matrix, gram)).all()


def test_deficient_matrices_stay_finite():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(2, 6, 2)) @ rng.normal(size=(2, 2, 5))
    matrix[1] = 0
    for rank in (2, 5):
        left, right = low_rank(narrow(matrix), rank, narrow(gram_of(layer((6, 5))[1])))
        assert np.isfinite(left).all() and np.isfinite(right).all()
        assert np.allclose(product((left, right)), matrix, atol=1e-5)


def test_one_program_holds_all_ranks():
    matrix, x = layer((6, 9))
    for gram in (None, narrow(gram_of(x))):
        parts = spectrum(narrow(matrix), gram)
        for rank in (1, 4, 6):
            found = masked(parts, jnp.int32(rank))
            expected = product(low_rank(narrow(matrix), rank, gram))
            assert np.allclose(found, expected, atol=2e-6)
    alone = masked(spectrum(narrow(matrix[0])), 3)  # without groups
    assert np.allclose(alone, masked(spectrum(narrow(matrix)), 3)[0], atol=2e-6)


def test_refit_is_least_squares():
    matrix, x = layer((9, 4), groups=3)
    basis = wide(narrow(np.random.default_rng(2).normal(size=(3, 9, 3))))
    basis[:, :, 1] *= 1e-3  # columns of any size
    start = np.zeros((3, 3, 4))
    found = wide(refit(*map(narrow, (gram_of(x), matrix, basis, start)), damping=0.0))
    expected = [np.linalg.lstsq(r @ b, r @ m)[0] for r, b, m in zip(x, basis, matrix)]
    assert np.allclose(basis @ found, basis @ expected, rtol=2e-2, atol=2e-2)
    best = energy(matrix - basis @ expected, gram_of(x))
    error = energy(matrix - basis @ found, gram_of(x))
    assert np.allclose(error, best, rtol=1e-3)
    ones = refit(*(narrow(v[0]) for v in (gram_of(x), matrix, basis, start)))
    assert np.allclose(ones, found[0], rtol=2e-2, atol=2e-2 * np.abs(found).max())


@pytest.mark.parametrize("kind", POOR)
def test_refit_is_never_worse_than_its_start(kind):
    matrix, _ = layer((8, 5))
    gram = gram_of(poor(kind, 8))
    for damping, rank in itertools.product((0.0, 1e-6, 1e-2), (1, 5)):
        left, right = low_rank(narrow(matrix), rank)
        given = narrow(gram), narrow(matrix), left
        found = refit(*given, right, damping=damping)
        assert np.isfinite(found).all()
        before, after = (
            np.einsum("gio,gij,gjo->go", e, gram, e)
            for e in (matrix - product((left, h)) for h in (right, found))
        )
        slack = 1e-9 * np.einsum("gio,gij,gjo->go", matrix, gram, matrix)
        assert (after <= before * (1 + 1e-4) + slack).all()
        if kind == "copies" and rank == 1:
            assert after.sum() < 0.99 * before.sum()


def test_refit_keeps_its_start_where_nothing_can_be_solved():
    matrix, x = layer((9, 4))
    left, right = low_rank(narrow(matrix), 2)
    endless = narrow(gram_of(x)).at[1].set(jnp.inf)
    found = refit(endless, narrow(matrix), left, right)
    assert np.array_equal(found[1], right[1]) and (found[0] != right[0]).all()


DEFICIENT = ("full", "deficient", "zero")


@pytest.mark.parametrize("inputs", [None, "any", *POOR])
@pytest.mark.parametrize("kind", DEFICIENT)
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 1)])
def test_traced_arrays_give_what_numbers_give(shape, kind, inputs):
    matrix, x = layer(shape)
    if kind != "full":
        matrix[0] = matrix[0][:, :1] @ matrix[0][:1] if kind == "deficient" else 0
    x = poor(inputs, shape[0]) if inputs in POOR else x
    matrix, gram = narrow(matrix), None if inputs is None else narrow(gram_of(x))
    parts = spectrum(matrix, gram)
    assert all(isinstance(part, np.ndarray) for part in parts)
    assert {part.dtype for part in parts} == {np.dtype(np.float32)}
    compiled = jax.jit(traced.spectrum)(matrix, gram)
    least = 2e-3 if inputs in POOR else 1e-4  # square roots of rounding errors
    size = compiled.values.max() + 1e-30
    np.testing.assert_allclose(parts.values / size, compiled.values / size, atol=least)
    for rank in {1, min(shape)}:
        one = low_rank(matrix, rank, gram)
        two = jax.jit(traced.low_rank, static_argnums=1)(matrix, rank, gram)
        assert [v.shape for v in one] == [v.shape for v in two]
        cut = jax.jit(traced.masked)(parts, jnp.int32(rank))
        np.testing.assert_allclose(product(one), cut, atol=1e-5)
        if inputs is None or rank == min(shape):
            np.testing.assert_allclose(product(one), product(two), atol=1e-5)
        else:
            errors = [energy(matrix - product(v), wide(gram)) for v in (one, two)]
            scale = energy(wide(matrix), wide(gram)).max() + 1e-30
            np.testing.assert_allclose(*(e / scale for e in errors), atol=1e-5)
        if gram is not None:
            given = gram, matrix, *map(narrow, one)
            both = refit(*given), jax.jit(traced.refit)(*given)
            errors = [energy(matrix - one[0] @ h, wide(gram)) for h in both]
            scale = energy(wide(matrix), wide(gram)).max() + 1e-30
            np.testing.assert_allclose(*(e / scale for e in errors), atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_has_no_factors_and_others_have(value):
    matrix, x = layer((6, 8))
    plain = low_rank(narrow(matrix), 3, narrow(gram_of(x)))
    matrix[0, 2, 3] = value
    matrix, gram = narrow(matrix), narrow(gram_of(x))
    for found in (
        low_rank(matrix, 3, gram),
        jax.jit(traced.low_rank, static_argnums=1)(matrix, 3, gram),
    ):
        assert np.isnan(found[0][0]).all() and np.isnan(found[1][0]).all()
        np.testing.assert_allclose(
            found[0][1] @ found[1][1], plain[0][1] @ plain[1][1], atol=1e-4
        )


@pytest.mark.parametrize(
    ("ratio", "one", "cost", "most", "multiple", "rank"),
    [
        (0.5, 64 + 64 * 9, 64 * 64 * 9, 64, 1, 28),  # the reference numbers of AIMET
        (0.4, 1512, 512 * 1000, 512, 1, 135),
        (0.4, 1512, 512 * 1000, 512, 8, 136),
        (0.29, 1, 100, 100, 1, 29),
        (0.001, 1512, 512 * 1000, 512, 1, 1),
        (1.0, 1, 100, 60, 1, 60),
        (1.0, 1512, 512 * 1000, 512, 1, 338),
        (0.99, 10, 100, 16, 8, 8),  # 16 would cost more than the whole
        (0.5, 10, 100, 6, 4, 4),  # there is no rank 8
        (0.5, 30, 100, 6, 4, 1),  # nor any multiple that costs less
        (0.5, 10, 80, 64, 8, 4),  # 8 would cost the whole: nothing gained
    ],
)
def test_largest_rank(ratio, one, cost, most, multiple, rank):
    assert largest_rank(ratio, one, cost, most, multiple) == rank
