"""Grids that train: gradients against finite differences, and what no step may break."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import by_hand
import jaxmet as jm
from jaxmet import Quantizer
from jaxmet.numerics.learned_ranges import SCALE_CEILING
from jaxmet.numerics.ranges import SCALE_FLOOR

BITS = 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 5)) * np.array([0.3, 1.0, 2.0, 0.7, 1.5])
COTANGENT = RNG.normal(size=X.shape)


def quantizer(symmetric, learn, axis=None):
    q = Quantizer(bits=BITS, symmetric=symmetric, axis=axis)
    shape = (1, 5) if axis else (1, 1)
    low, high = np.full(shape, -1.1), np.full(shape, 1.3)  # so that a part is clipped
    scale = high / 7 if symmetric else (high - low) / 15
    zero_point = None if symmetric else np.round(-low / scale)
    arrays = [None if a is None else jnp.asarray(a) for a in (scale, zero_point)]
    return q.set(learn=learn).holding(*arrays)


def surrogate(q, x):
    """x̂ as a function of the leaves, the rounding residuals held where they are now."""
    low, high = q.ends
    stated = {n: np.asarray(a) for n, a in vars(q).items() if hasattr(a, "shape")}

    def grid(leaves):
        """Scale, zero point before and after rounding; in numpy, from the formulas."""
        if q.learn == "minmax":
            least = leaves.get("minimum")
            if least is None:
                return leaves["maximum"] / high, 0.0 * leaves["maximum"]
            scale = (leaves["maximum"] - least) / (high - low)
            return scale, low - least / scale
        return leaves["scale"], leaves.get("zero_point", 0.0 * leaves["scale"])

    scale, zero_point = grid(stated)
    z_residual = np.round(zero_point) - zero_point
    ratio = x / scale
    residual = np.round(ratio) - ratio
    level = np.round(ratio) + np.round(zero_point)
    inside = (level >= low) & (level <= high)
    end = np.clip(level, low, high)

    def value(leaves):
        s, z = grid(leaves)
        return np.where(inside, s * (x / s + residual), s * (end - (z + z_residual)))

    return value, stated


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("symmetric", "learn", "axis"),
    list(itertools.product([True, False], ["lsq", "minmax"], [None, (1,)])),
)
def test_gradients_are_finite_differences_of_the_surrogate(symmetric, learn, axis):
    with by_hand.x64(True):
        q = quantizer(symmetric, learn, axis)
        value, stated = surrogate(q, X)
        np.testing.assert_allclose(q(jnp.asarray(X)), value(stated), atol=1e-12)
        found = jax.grad(lambda q: jnp.sum(q(jnp.asarray(X)) * COTANGENT))(q)
        sharing = X.size // (5 if axis else 1)
        factor = 1 / np.sqrt(sharing * q.ends[1]) if learn == "lsq" else 1.0
        assert {*stated} == (
            {"scale", "zero_point"} if learn == "lsq" else {"minimum", "maximum"}
        ) - ({"zero_point", "minimum"} if symmetric else set())
        for name, leaf in stated.items():
            gradient = np.asarray(getattr(found, name))
            assert np.any(gradient != 0)
            for at in np.ndindex(leaf.shape):
                ends = []
                for h in (1e-6, -1e-6):
                    moved = {n: a.copy() for n, a in stated.items()}
                    moved[name][at] += h
                    ends.append(np.sum(value(moved) * COTANGENT))
                expected = (ends[0] - ends[1]) / 2e-6 * factor
                np.testing.assert_allclose(gradient[at], expected, rtol=2e-5, atol=1e-6)


def test_range_learning_is_that_of_aimet():
    """The gradient of minimum and maximum as AIMET's first version states it."""
    with by_hand.x64(True):
        q = quantizer(False, "minmax")
        gradient = jax.grad(lambda q: jnp.sum(q(jnp.asarray(X)) * COTANGENT))(q)
        low, high, steps = float(q.minimum[0, 0]), float(q.maximum[0, 0]), 15
        delta = (high - low) / steps
        offset = np.round(low / delta)
        level = np.round(X / delta) - offset
        mask = (level >= 0) & (level <= steps)
        quantized = np.clip(level, 0, steps)
        t1 = np.sum((quantized + offset - X * mask / delta) * COTANGENT) / steps
        t2 = steps / (high - low) ** 2 * np.sum(delta * COTANGENT * ~mask)
        np.testing.assert_allclose(gradient.minimum[0, 0], -t1 + high * t2, rtol=1e-9)
        np.testing.assert_allclose(gradient.maximum[0, 0], t1 - low * t2, rtol=1e-9)


def test_nothing_trains_where_learn_is_none():
    for symmetric in (True, False):
        q = quantizer(symmetric, None)
        gradient = jax.grad(lambda q: jnp.sum(q(jax.device_put(np.float32(X)))))(q)
        assert jax.tree.leaves(gradient)
        assert all(not np.any(g) for g in jax.tree.leaves(gradient))


HOSTILE = (-1.0, 0.0, 1e-30, -1e-30, 1e30, -1e30, np.inf, -np.inf, 7.5)


@pytest.mark.parametrize("learn", ["lsq", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_numbers_in_the_leaves_are_a_valid_grid(symmetric, learn):
    q = quantizer(symmetric, learn)
    x = jax.device_put(np.float32(X))
    leaves, tree = jax.tree.flatten(q)
    low, high = q.ends

    @jax.jit
    def run(leaves):
        q = tree.unflatten([jnp.full((1, 1), a, jnp.float32) for a in leaves])
        value, gradient = jax.value_and_grad(lambda q: jnp.sum(jnp.sin(q(x))))(q)
        return *q.grid(None), q(x), value, gradient

    for values in itertools.product(HOSTILE, repeat=len(leaves)):
        scale, zero_point, y, value, gradient = run([jnp.float32(v) for v in values])
        assert SCALE_FLOOR <= float(scale[0, 0]) <= SCALE_CEILING
        z = float(zero_point[0, 0])
        assert low <= z <= high and z == np.round(z)
        assert np.all(np.isfinite(y)) and np.isfinite(value)
        if all(abs(v) < 1e20 for v in values):
            assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_a_collapsed_scale_grows_back():
    """Gradient descent from a scale of nearly zero, of either sign, finds a grid again."""
    x = jax.device_put(np.float32(X))
    for start in (1e-12, -1e-12):
        q = Quantizer(jnp.float32(start), bits=BITS)
        loss = jax.jit(jax.value_and_grad(lambda q: jnp.mean((q(x) - x) ** 2)))
        first = float(loss(q)[0])
        for _ in range(200):
            _, gradient = loss(q)
            q = jax.tree.map(lambda a, g: a - 0.5 * g, q, gradient)
        assert float(loss(q)[0]) < 0.05 * first


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_form_changes_and_the_grid_stays(symmetric):
    q = quantizer(symmetric, "lsq")
    other = q.set(learn="minmax")
    assert other.scale is None and other.maximum is not None and not other.follows
    for a, b in zip(q.grid(None), other.grid(None), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    back = other.set(learn="lsq")
    assert back.maximum is None
    np.testing.assert_allclose(back.scale, q.scale, rtol=1e-6)
    coarse, expected = other.set(bits=3).grid(None), q.set(bits=3).grid(None)
    for a, b in zip(coarse, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert Quantizer(learn="minmax").follows


@pytest.mark.parametrize("learn", ["lsq", "minmax"])
def test_a_scale_alone_keeps_the_zero_point(learn):
    q = quantizer(False, learn)
    scale, zero_point = q.set(scale=2 * q.grid(None)[0]).grid(None)
    np.testing.assert_allclose(scale, 2 * q.grid(None)[0], rtol=1e-6)
    np.testing.assert_array_equal(zero_point, q.grid(None)[1])
    assert float(zero_point[0, 0]) == 7


def test_bad_forms_are_refused():
    quantizers = jm.Quantizers({"w": Quantizer()})
    with pytest.raises(ValueError, match="learn is 'min'"):
        quantizers.set("w", learn="min")


def test_switches_and_widths_are_data():
    q = quantizer(True, "lsq"), quantizer(False, "lsq")
    quantizers = jm.Quantizers({"w": q[0]}, {"a": q[1]})
    x = jax.device_put(np.float32(X))
    count = []

    @jax.jit
    def run(step):
        count.append(1)
        bits = 8.0 - step  # as optax.linear_schedule would give
        grids = jm.grids(
            quantizers, activations=step >= 2, weight_bits=bits, activation_bits=bits
        )
        return q[0](x, grids.weights["w"]), q[1](x, grids.activations["a"])

    for step in (0.0, 2.0, 2.5, 4.0):
        weight, activation = run(step)
        bits = int(np.ceil(8 - step))
        np.testing.assert_allclose(weight, q[0].set(bits=bits)(x), atol=1e-5)
        expected = q[1].set(bits=bits)(x) if step >= 2 else x
        np.testing.assert_allclose(activation, expected, atol=1e-5)
    assert len(count) == 1
    off = jm.grids(quantizers, weights=False, activation_bits=32)
    assert not off.weights["w"].enabled and not off.activations["a"].enabled
    with pytest.raises(ValueError, match=r"jaxmet\.grids: bits is 1"):
        jm.grids(quantizers, weight_bits=1)
    with pytest.raises(ValueError, match=r"jaxmet\.grids: the bits of 'a' are nan"):
        jm.grids(quantizers, activation_bits=jnp.nan)


@pytest.mark.parametrize(
    "fields, low, high",
    [
        ({}, lambda n: 1 - 2 ** (n - 1), lambda n: 2 ** (n - 1) - 1),
        ({"narrow": False}, lambda n: -(2 ** (n - 1)), lambda n: 2 ** (n - 1) - 1),
        ({"symmetric": False}, lambda n: 0, lambda n: 2**n - 1),
    ],
)
def test_ends_of_a_width_that_is_data_are_exact_integers(fields, low, high):
    quantizers = jm.Quantizers(weights={"w": jm.Quantizer(**fields)})
    ends = jax.jit(lambda n: jm.grids(quantizers, weight_bits=n).weights["w"][:2])
    for n in range(2, 17):
        assert tuple(map(float, ends(jnp.int32(n)))) == (low(n), high(n))
