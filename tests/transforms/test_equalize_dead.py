"""Channels that carry nearly nothing, or only a constant: no scale blows them up.

Chains are run by hand in float64, in full precision and on 8-bit quantizers of whole tensors.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.nn import relu

from jaxmet import Graph, QuantConfig, batched, equalize, fold_batch_norm, trace

SIZES = (8, 12, 12, 4)
TINY = (1.0, 1e-3, 1e-8, 1e-12, 1e-40, 0.0)
Chain = list[tuple[np.ndarray, np.ndarray]]


def chain(rng: np.random.Generator) -> Chain:
    return [
        (rng.normal(size=(i, o)) / np.sqrt(i), 0.3 * rng.normal(size=o))
        for i, o in zip(SIZES, SIZES[1:], strict=False)
    ]


def model(p: Any, x: jax.Array) -> jax.Array:
    for w, b in p[:-1]:
        x = relu(x @ w + b[None])
    return x @ p[-1][0] + p[-1][1][None]


@cache
def graph() -> Graph:
    p = [(jax.device_put(np.float32(w)), jax.device_put(np.float32(b))) for w, b in chain(
        np.random.default_rng(0)
    )]  # fmt: skip
    return trace(model, p, jnp.ones((2, SIZES[0])))


@cache
def by_ranges() -> Any:
    return jax.jit(partial(equalize, graph=graph(), objective="range"))


def as_leaves(p: Chain, dtype: Any = jnp.float32) -> Any:
    return [(jnp.asarray(w, dtype), jnp.asarray(b, dtype)) for w, b in p]


def as_arrays(p: Any) -> Chain:
    return [(np.asarray(w, np.float64), np.asarray(b, np.float64)) for w, b in p]


def run(p: Chain, x: np.ndarray, quantized: bool = False) -> np.ndarray:
    """The chain in float64; with `quantized` weights and inputs of layers rounded to 8 bits."""
    for k, (w, b) in enumerate(p):
        if quantized:
            step = np.abs(w).max() / 127 or 1.0
            w = np.round(w / step) * step
            low, high = min(x.min(), 0.0), max(x.max(), 0.0)
            step = (high - low) / 255 or 1.0
            x = np.round(x / step) * step
        x = x @ w + b
        x = np.maximum(x, 0) if k < len(p) - 1 else x
    return x


def sqnr(wanted: np.ndarray, found: np.ndarray) -> float:
    noise = np.sum(np.square(wanted - found)) / np.sum(np.square(wanted))
    return float(-10 * np.log10(max(noise, 1e-20)))


def around(p: Chain, x: np.ndarray) -> tuple[float, float, float]:
    """SQNR on 8-bit quantizers before and after equalizing, and that of the function kept."""
    p = as_arrays(as_leaves(p))
    found = as_arrays(by_ranges()(as_leaves(p)))
    assert all(np.isfinite(leaf).all() for layer in found for leaf in layer)
    wanted = run(p, x)
    before, after = (run(tree, x, quantized=True) for tree in (p, found))
    return sqnr(wanted, before), sqnr(wanted, after), sqnr(wanted, run(found, x))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("bias", [0.0, 0.5, -0.5, 10.0, -10.0])
@pytest.mark.parametrize("column", TINY[1:])
def test_nearly_dead_column(column: float, bias: float, layer: int) -> None:
    rng = np.random.default_rng(1)
    p = chain(rng)
    p[layer][0][:, 3] *= column
    p[layer][1][3] = bias
    before, after, same = around(p, rng.normal(size=(200, SIZES[0])))
    assert after > before - 1.5
    assert same > 110
    out = by_ranges()(as_leaves(p))
    largest = max(np.abs(b).max() for _, b in p)
    assert max(np.abs(b).max() for _, b in as_arrays(out)) < 30 * largest


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_random_chains_keep_function_and_precision(seed: int) -> None:
    """Columns, rows and biases of any size, some of them zero."""
    rng = np.random.default_rng(seed)
    p = chain(rng)
    for (w, b), (after, _) in zip(p, p[1:], strict=False):
        for size, axis, share in ((w, 1, 0.25), (after, 0, 0.15)):
            some = rng.random(size.shape[axis]) < share
            factor = np.where(some, rng.choice(TINY, some.size), 1.0)
            size *= factor if axis == 1 else factor[:, None]
        b *= rng.choice((1.0, 1.0, 1.0, 0.0, 10.0, -30.0), b.size)
    before, after, same = around(p, rng.normal(size=(200, SIZES[0])))
    assert same > 100
    # Constants on the ends of a range have no rounding error: more than 36 dB is luck.
    assert after > min(before, 36) - 7


def test_scrambled_channels_do_not_change_the_result() -> None:
    """A constant is measured in units of its layer, whatever the scales at the start."""
    rng = np.random.default_rng(2)
    p = chain(rng)
    p[1][0][:, 3] *= 1e-8
    wanted = as_arrays(by_ranges()(as_leaves(p)))
    for (w, b), (after, _) in zip(p, p[1:], strict=False):
        s = np.exp(rng.uniform(-5, 5, b.size))
        w /= s
        b /= s
        after *= s[:, None]
    found = as_arrays(by_ranges()(as_leaves(p)))
    for one, two in zip(wanted, found, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-9)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_leaves_stay_finite(dtype: Any) -> None:
    """A scale stops where a leaf would leave what its dtype can represent."""
    rng = np.random.default_rng(3)
    p = chain(rng)
    p[0][0][:, 2] *= 1e-3
    p[1][0][2] *= 3e4
    p[0][0][:, 3] *= 3e4
    p[1][0][3] *= 1e-3
    p[1][0][:, 4] *= 1e-7
    old = as_leaves(p, dtype)
    found = as_arrays(by_ranges()(old))
    assert all(np.isfinite(leaf).all() for layer in found for leaf in layer)
    x = rng.normal(size=(50, SIZES[0]))
    assert sqnr(run(as_arrays(old), x), run(found, x)) > (
        45 if dtype == jnp.float16 else 30
    )


def convolutions(p: Any, x: jax.Array) -> jax.Array:
    """Point, depthwise and point convolutions with norms."""
    for name, groups in (("a", 1), ("b", 6), ("c", 1)):
        x = jax.lax.conv_general_dilated(
            x,
            p[name]["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        if name != "c":
            n = {k: v[None, None, None] for k, v in p[name].items() if k != "w"}
            gain = n["scale"] / jnp.sqrt(n["var"] + 1e-5)
            x = relu((x - n["mean"]) * gain + n["bias"])
    return x


@pytest.mark.one_in(4)
@pytest.mark.parametrize("objective", ["range", "noise"])
@pytest.mark.parametrize("dead", ["a", "b"])
def test_norm_with_a_gain_of_nearly_zero(dead: str, objective: str) -> None:
    """After folding the weights are nearly zero and the channel is what its norm adds."""
    rng = np.random.default_rng(4)
    shapes = {"a": (1, 1, 3, 6), "b": (3, 3, 1, 6), "c": (1, 1, 6, 4)}
    p: Any = {k: {"w": rng.normal(size=s) / 2} for k, s in shapes.items()}
    for name in "ab":
        p[name] |= {
            "scale": np.exp(rng.normal(size=6)),
            "bias": 0.3 * rng.normal(size=6),
            "mean": 0.3 * rng.normal(size=6),
            "var": np.exp(rng.normal(size=6)),
        }
    p[dead]["scale"][1], p[dead]["bias"][1] = 1e-8, 0.7
    p = jax.tree.map(lambda a: jax.device_put(np.float32(a)), p)
    x = jax.device_put(np.float32(rng.normal(size=(8, 5, 5, 3))))
    g = trace(convolutions, p, x[:2])
    folded = fold_batch_norm(p, g)
    out = equalize(folded, g, objective=objective)
    leaves = jax.tree.leaves(out)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert max(float(np.abs(leaf).max()) for leaf in leaves) < 1e3
    wanted = np.asarray(convolutions(p, x), np.float64)
    assert sqnr(wanted, np.asarray(convolutions(out, x), np.float64)) > 100


def test_measured_noise_keeps_precision() -> None:
    """The other objective, on data, beside a constant channel and a dead one."""
    rng = np.random.default_rng(5)
    p = chain(rng)
    p[0][0][:, 3] *= 1e-8
    p[0][1][3] = 0.5
    p[1][0][:, 2] *= 1e-8
    p[1][1][2] = -10.0
    x = rng.normal(size=(64, SIZES[0]))
    batches = batched(jax.device_put(np.float32(x)), batch_size=32)
    config = QuantConfig(per_channel=False)
    out = equalize(
        as_leaves(p), graph(), batches=batches, config=config, progress=False
    )
    found, p = as_arrays(out), as_arrays(as_leaves(p))
    assert all(np.isfinite(leaf).all() for layer in found for leaf in layer)
    wanted = run(p, x)
    assert sqnr(wanted, run(found, x, True)) > sqnr(wanted, run(p, x, True)) - 1
    assert sqnr(wanted, run(found, x)) > 100
