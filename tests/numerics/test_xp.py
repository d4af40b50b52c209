"""Functions of arrays that are NumPy's or JAX's: the same numbers, each in its own world."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmet.numerics import xp

X = np.array([[0.5, -2.0, 3.25], [1.0, 0.0, -0.125]], np.float32)
ROW = np.array([3.0, 1.0, 2.0], np.float32)
CASES: dict[str, tuple[tuple, dict[str, Any]]] = {
    "broadcast_to": ((ROW, (2, 3)), {}),
    "clip": ((X, -1.0, 1.0), {}),
    "concatenate": (([ROW, ROW],), {}),
    "einsum": (("ij,j->i", X, ROW), {"precision": "highest"}),
    "full_like": ((X, 2.0), {}),
    "matmul": ((X, X.T), {"precision": "highest"}),
    "max": ((X,), {"axis": 1, "initial": 0.0}),
    "maximum": ((X, 0.0), {}),
    "minimum": ((X, 0.0), {}),
    "moveaxis": ((X, 0, 1), {}),
    "pad": ((X, [(0, 1), (1, 0)]), {"constant_values": 4.0}),
    "repeat": ((ROW, 2), {"axis": 0}),
    "stack": (([ROW, ROW],), {}),
    "swapaxes": ((X, 0, 1), {}),
    "take": ((X, np.array([1, 0]), 1), {}),
    "transpose": ((X, (1, 0)), {}),
    "where": ((X > 0, X, 1.0), {}),
}
MADE = {"full": ((3,), 2.0), "ones": ((3,),), "zeros": ((3,),)}


@pytest.mark.parametrize("name", sorted(xp.SHARED - MADE.keys()))
def test_both_libraries_say_the_same(name: str) -> None:
    args, options = CASES.get(name, ((np.abs(X) + 0.25,), {}))
    function = getattr(xp, name)
    one = function(*args, **options)
    moved = jax.tree.map(
        lambda v: jnp.asarray(v) if isinstance(v, np.ndarray) else v, args
    )
    two = function(*moved, **options)
    three = jax.jit(lambda: function(*moved, **options))()
    assert not isinstance(one, jax.Array)
    assert isinstance(two, jax.Array)
    assert one.dtype == two.dtype and one.shape == two.shape
    np.testing.assert_allclose(one, two, rtol=1e-6)
    np.testing.assert_allclose(two, three, rtol=1e-6)


GROUPS = np.stack([X @ X.T, X[:, 1:], np.eye(2, dtype=np.float32)])
GROUPS[1] += GROUPS[1].T
DECOMPOSED = {
    "svd": lambda u, s, v: u * s[..., None, :] @ v,
    "qr": lambda q, r: q @ r,
    "eigh": lambda s, v: v * s[..., None, :] @ v.mT,
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_decompositions(name: str) -> None:
    """Of each matrix: one that has none gets NaN, and the others theirs."""
    bad = GROUPS.copy()
    bad[1, 0, 0] = np.nan
    for x in (GROUPS, GROUPS[0], bad, bad[1]):
        for v in (x, jnp.asarray(x)):
            parts = getattr(xp, name)(v)
            assert all(isinstance(part, type(v)) or xp.is_jax(v) for part in parts)
            assert {part.dtype for part in parts} == {np.dtype(np.float32)}
            good = np.isfinite(x).all((-1, -2))
            found = np.asarray(DECOMPOSED[name](*parts))
            np.testing.assert_allclose(found[good], x[good], atol=1e-5)
            assert np.isnan(found[~good]).all()


def test_a_decomposition_that_does_not_converge(monkeypatch: Any) -> None:
    svd = np.linalg.svd

    def stubborn(x: Any, **options: Any) -> Any:
        if x[..., 0, 0].max() > 5:
            raise np.linalg.LinAlgError("SVD did not converge")
        return svd(x, **options)

    monkeypatch.setattr(np.linalg, "svd", stubborn)
    first = xp.svd(GROUPS)[1]
    assert np.isnan(first[0]).all() and np.isfinite(first[1:]).all()


@pytest.mark.parametrize("name", MADE)
def test_new_arrays_are_numbers(name: str) -> None:
    found = getattr(xp, name)(*MADE[name], dtype=np.float32)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, getattr(jnp, name)(*MADE[name]))


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'arctan'"):
        xp.arctan  # noqa: B018


def test_a_python_number_is_of_the_default_dtype() -> None:
    assert xp.asarray(0.5).dtype == jnp.asarray(0.5).dtype
    assert isinstance(xp.asarray(0.5), np.ndarray)
    assert xp.asarray(jnp.float32(1), np.float16).dtype == np.float16


@pytest.mark.parametrize("how", ["set", "add", "max", "min"])
def test_put_leaves_its_argument_alone(how: str) -> None:
    before = ROW.copy()
    index = np.array([[0, 2], [0, 1]]) if how != "set" else np.array([0, 2])
    values = np.full(index.shape, 1.5, np.float32)
    one, two = (xp.put(v, index, values, how) for v in (ROW, jnp.asarray(ROW)))
    np.testing.assert_array_equal(ROW, before)
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, ROW)


@pytest.mark.parametrize("how", ["add", "max", "min"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_segments(how: str, dtype: Any) -> None:
    x, of = X.T.astype(dtype), np.array([1, 0, 1])
    one, two = (xp.reduce_segments(v, of, 2, how) for v in (x, jnp.asarray(x)))
    assert one.dtype == dtype
    np.testing.assert_array_equal(one, two)
    each = {"add": np.sum, "max": np.max, "min": np.min}[how]
    np.testing.assert_array_equal(one, [each(x[of == k], axis=0) for k in (0, 1)])


def test_the_normal_distribution() -> None:
    x = np.linspace(-9, 9, 37, dtype=np.float32)
    for v in (x, jnp.asarray(x)):
        cdf, pdf = scipy.stats.norm.cdf(x), scipy.stats.norm.pdf(x)
        np.testing.assert_allclose(xp.normal_cdf(v), cdf, rtol=1e-4, atol=1e-30)
        np.testing.assert_allclose(xp.normal_pdf(v), pdf, rtol=1e-4, atol=1e-30)


def test_compiled_returns_what_it_was_given() -> None:
    @xp.compiled
    def double(x: Any) -> Any:
        return 2 * x

    assert isinstance(double(ROW), np.ndarray)
    assert isinstance(double(jnp.asarray(ROW)), jax.Array)
    np.testing.assert_array_equal(jax.jit(lambda x: double(x))(ROW), 2 * ROW)
