"""Which way weights happen to round: what is foreseen of it, and the draw that is taken.

The formula is written out again by loops in float64, and what equalization says of rounded
weights is measured by rounding them by hand.
"""

import itertools
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import relu

from jaxmet.engine.graph.graph import trace
from jaxmet.numerics.chance import (
    Rounded,
    added_noise,
    least_of_draws,
    rounding_errors,
)
from jaxmet.transforms.equalize import equalize
from jaxmet.transforms.equalize.equalize import TRIED
from jaxmet.tree.batches import as_batches, batched
from jaxmet.tree.config import QuantConfig
from jaxmet.tree.examples import some_examples
from test_equalize import difference, model

NOISE: dict[str, Any] = {"objective": "noise", "progress": False}
MODULE = sys.modules["jaxmet.transforms.equalize.equalize"]


# The formula


def layer(seed: int, shape: tuple[int, ...], bits: int, per_channel: bool) -> Rounded:
    rng = np.random.default_rng(seed)
    layers, groups, ins, outs, _ = shape
    weight = rng.normal(size=shape)
    weight[0, 0, :, 0] = 0  # an output that nothing reaches
    mean, variance = (
        rng.normal(size=(layers, groups, ins)),
        rng.uniform(size=(layers, groups, ins)),
    )
    worth = rng.uniform(size=(layers, groups, outs))
    arrays = [jnp.asarray(v, jnp.float32) for v in (weight, mean, variance, worth)]
    levels = np.full(layers, 2.0 ** (bits - 1) - 1)
    return Rounded(*arrays, levels, np.full(layers, per_channel))


def by_hand(one: Rounded, ins: np.ndarray, outs: np.ndarray) -> float:
    """The error of every output for every layer, one after the other."""
    w, mean, variance, worth = (np.asarray(v, np.float64) for v in one[:4])
    layers, groups, ni, no, _ = w.shape
    total = 0.0
    for k in range(layers):
        scale = np.exp(ins[k, :, :, None] - outs[k, :, None, :])[
            ..., None
        ]  # (g, i, o, 1)
        scaled = w[k] * scale
        for g, o in itertools.product(range(groups), range(no)):
            largest = np.abs(scaled[g, :, o] if one.per_channel[k] else scaled).max()
            step = largest / one.levels[k] if largest else 1.0
            rounded = np.round(scaled[g, :, o] / step) * step / scale[g, :, o]
            error = [(rounded[i] - w[k, g, i, o]).sum() for i in range(ni)]
            shift = sum(mean[k, g, i] * error[i] for i in range(ni))
            spread = sum(variance[k, g, i] * error[i] ** 2 for i in range(ni))
            total += worth[k, g, o] * (shift**2 + spread)
    return total


@pytest.mark.one_in(2)
@pytest.mark.parametrize("per_channel", [False, True])
def test_added_noise_is_what_the_formula_says(per_channel: bool) -> None:
    every = [
        layer(1, (2, 1, 5, 4, 9), 8, per_channel),
        layer(2, (1, 6, 1, 2, 3), 4, per_channel),
    ]
    rng = np.random.default_rng(3)
    ins, outs = rng.normal(size=2 * 5 + 6), rng.normal(size=2 * 4 + 12)
    found = added_noise(every, *(jnp.asarray(v, jnp.float32) for v in (ins, outs)))
    one = by_hand(every[0], ins[:10].reshape(2, 1, 5), outs[:8].reshape(2, 1, 4))
    two = by_hand(every[1], ins[10:].reshape(1, 6, 1), outs[8:].reshape(1, 6, 2))
    np.testing.assert_allclose(found, one + two, rtol=1e-3)


def test_weights_on_their_grid_have_no_error() -> None:
    """Their largest is 7 steps of 4 bits, in original units of any size."""
    steps = np.random.default_rng(0).integers(-7, 8, size=(1, 1, 6, 3, 4))
    steps[0, 0, 0, 0, 0] = 7
    zero = jnp.zeros((1, 1, 6)), jnp.zeros((1, 1, 3))
    error = partial(
        rounding_errors, levels=np.array([7.0]), per_channel=np.array([False])
    )
    weight = jnp.asarray(steps * 0.3, jnp.float32)
    np.testing.assert_allclose(error(weight, *zero), 0.0, atol=1e-6)
    assert np.abs(error(weight * 1.0, zero[0] + 0.1, zero[1])).max() < 1e-6
    off = weight.at[0, 0, 0, 0, 0].mul(1.1)
    assert np.abs(error(off, *zero)).max() > 0.03


# The draws


def test_the_best_draw_is_near_and_the_same_again() -> None:
    start, free = jnp.zeros(6), jnp.asarray([True] * 4 + [False] * 2)
    far = jnp.asarray([0.02, -0.02, 0.02, 0.02, 9.0, 9.0])
    value = lambda x: jnp.sum(jnp.square(x - far))
    ends = {
        "lowest": jnp.full_like(start, -0.015),
        "highest": jnp.full_like(start, 0.015),
    }
    draw = partial(least_of_draws, value, start, free, jax.random.key(0), **ends)
    found = draw()
    np.testing.assert_array_equal(found.x, draw().x)
    np.testing.assert_allclose(found.x, jax.jit(draw)().x, rtol=1e-6)
    assert found.value < found.first == value(start)
    np.testing.assert_allclose(found.value, value(found.x), rtol=1e-6)
    assert np.all(found.x[4:] == 0) and np.all(found.x[:4] != 0)
    assert np.abs(found.x).max() <= np.float32(0.015)
    assert draw(draws=400).value < found.value
    other = least_of_draws(value, start, free, jax.random.key(1), **ends)
    assert np.any(other.x != found.x)


def test_nothing_moves_where_the_start_is_best_or_no_draw_is_finite() -> None:
    start, free = jnp.full(3, 0.5), jnp.ones(3, bool)
    for value in (
        lambda x: jnp.sum(jnp.square(x - start)),
        lambda x: jnp.where(jnp.all(x == start), 1.0, jnp.nan),
        lambda x: jnp.sum(x) * jnp.nan,
    ):
        found = least_of_draws(
            value,
            start,
            free,
            jax.random.key(0),
            lowest=jnp.full_like(start, -1.0),
            highest=jnp.full_like(start, 1.0),
        )
        np.testing.assert_array_equal(found.x, start)


# Networks


def small(p: Any, x: jax.Array) -> jax.Array:
    return relu(relu(x @ p["a"]) @ p["b"]) @ p["c"]


def small_params(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 8), "b": (8, 8), "c": (8, 5)}
    return {
        name: jnp.asarray(
            rng.normal(size=s) * np.exp(rng.normal(size=s[1])), jnp.float32
        )
        for name, s in shapes.items()
    }


def inputs(rows: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(1, 1, (rows, 4)), jnp.float32)


def error_share(
    params: Any, new: Any, x: jax.Array, bits: int, per_channel: bool = False
) -> float:
    """Of the outputs, with weights on symmetric grids from the largest magnitude."""

    def run(p: Any) -> np.ndarray:
        y = np.maximum(np.asarray(x, np.float64) @ p["a"], 0)
        return np.maximum(y @ p["b"], 0) @ p["c"]

    def rounded(w: np.ndarray) -> np.ndarray:
        step = np.abs(w).max(axis=0 if per_channel else None) / (2.0 ** (bits - 1) - 1)
        return np.round(w / step) * step

    exact = run({k: np.asarray(w, np.float64) for k, w in params.items()})
    found = run({k: rounded(np.asarray(w, np.float64)) for k, w in new.items()})
    return float(np.sum((found - exact) ** 2) / np.sum(exact**2))


def told(report: Any) -> tuple[float, float]:
    """What weights as they round add now, and at the minimum."""
    words = report.title.split("weights as they round add ")[1].replace(",", "").split()
    return float(words[0]), float(words[1])


def only_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "least_of_draws", partial(least_of_draws, draws=1))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.slow
def test_the_draw_rounds_better_on_inputs_it_has_not_seen(
    per_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, x = small_params(1), inputs(TRIED)
    graph = trace(small, params, x)
    config = QuantConfig(per_channel=per_channel)
    key = jax.random.key(1)  # of some keys no draw is better than the minimum
    run = partial(equalize, params, graph, **NOISE, config=config, batches=[x], key=key)
    out, report = run(with_report=True)
    only_the_minimum(monkeypatch)
    minimum = run()
    share = partial(error_share, params, bits=8, per_channel=per_channel)
    assert told(report) == pytest.approx((share(out, x=x), share(minimum, x=x)), 1e-2)
    fresh = inputs(200, seed=1)
    assert difference(small(params, fresh), small(out, fresh)) < 1e-5
    assert share(out, x=fresh) < 0.85 * share(minimum, x=fresh)
    for name, w in out.items():
        np.testing.assert_allclose(w, minimum[name], rtol=0.15)


@pytest.mark.parametrize("how", ["batches", "norms"])
@pytest.mark.slow
def test_weights_in_float_leave_the_minimum_alone(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantConfig(weight_bits=32)
    if how == "batches":
        params, batches = small_params(2), [inputs(8)]
        graph = trace(small, params, batches[0])
    else:
        (_, params, _, graph), batches = model("conv_bn_relu"), None
    run = partial(equalize, params, graph, **NOISE, config=config, batches=batches)
    out, report = run(with_report=True)
    assert "round" not in report.title
    only_the_minimum(monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, out, run())


@pytest.mark.slow
def test_norms_foresee_a_draw_too() -> None:
    _, params, _, graph = model("conv_bn_relu")
    config = QuantConfig(per_channel=False)
    _, report = equalize(params, graph, **NOISE, config=config, with_report=True)
    now, first = told(report)
    assert 0 < now < first


# The images that draws are tried on


def test_images_come_from_all_over_the_data() -> None:
    x = np.arange(100, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    for data in (
        batched(x, batch_size=8),
        [(x[i : i + 10],) for i in range(0, 100, 10)],
    ):
        (found,) = some_examples(as_batches(data, "equalize"), TRIED)
        assert found.shape == (TRIED, 1, 3)
        values = np.asarray(found[:, 0, 0])
        assert np.unique(values).size == TRIED and np.ptp(values) > 80


def test_images_of_data_that_cannot_be_picked_are_of_the_first_batch() -> None:
    x = np.arange(10, dtype=np.float32)[:, None]
    (found,) = some_examples(
        as_batches(iter([x, x + 10]), "equalize"), TRIED, read=False
    )
    np.testing.assert_array_equal(np.sort(found.ravel()), x.ravel())
    whole = [(x, np.float32(3)), (x + 10, np.float32(3))]
    found, scalar = some_examples(as_batches(whole, "equalize"), TRIED)
    assert found.shape == (1, 10, 1) and scalar.shape == (1,)
    short = [x[:4], x[:4], x[:4].repeat(2, axis=1)]
    (found,) = some_examples(as_batches(short, "equalize"), TRIED)
    assert found.shape == (8, 1, 1)
