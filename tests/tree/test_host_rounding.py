"""Rounding on the host against what JAX computes for the same."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.tree.host_rounding import grid_of, round_on_host

FORMS = [
    {},
    {"axis": (3,)},
    {"axis": (0, 3)},
    {"axis": (3,), "block": 4, "block_axis": 2},
    {"axis": (-1,), "block": 5, "block_axis": 2},
]
KINDS = [
    {"symmetric": True},
    {"symmetric": True, "narrow": False},
    {"symmetric": True, "signed": False},
    {"symmetric": False},
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("form", "kind"), [*itertools.product(FORMS, KINDS)])
def test_a_weight_as_jax_rounds_it(form, kind) -> None:
    rng = np.random.default_rng(len(form))
    x = jnp.asarray(rng.normal(size=(3, 3, 12, 8)) + 0.3, jnp.float32)
    follows = jm.Quantizer(bits=4, **form, **kind)
    stated = follows.holding(*follows.grid(x))
    raised = dataclasses.replace(stated, least=0.3 * jnp.ones_like(stated.scale))
    every = (follows, stated, raised, dataclasses.replace(follows, bits=8))
    for q in every:
        theirs = q.grid(x)
        mine = grid_of(q, np.asarray(x))
        assert mine is not None
        for one, two in zip(mine, theirs, strict=True):
            assert one.shape == two.shape and one.dtype == two.dtype
            np.testing.assert_allclose(one, two, rtol=2e-7)
        same = dataclasses.replace(q, scale=theirs[0], zero_point=theirs[1], least=None)
        np.testing.assert_array_equal(round_on_host(same, x), same(x))
        found = round_on_host(q, x)
        assert found.dtype == x.dtype
        apart = np.abs(found - q(x)) > 1e-6 * np.abs(found)
        assert np.mean(apart) < 0.01  # and those lie midway between two


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("form", "kind"), [*itertools.product(FORMS, KINDS)])
@pytest.mark.parametrize("bits", [2, 7, 16])
def test_other_widths_cover_the_same_range(form, kind, bits) -> None:
    rng = np.random.default_rng(bits)
    x = jnp.asarray(rng.normal(size=(3, 3, 12, 8)), jnp.float32)
    follows = jm.Quantizer(bits=5, **form, **kind)
    held = follows.holding(*follows.grid(x))
    roomy = dataclasses.replace(held, headroom=2)
    for q in (follows, held, roomy):
        q = jm.Quantizers({"w": q})
        ends = jm.grids(q, weight_bits=bits)
        theirs = q.quantize_weights({"w": x}, ends)
        mine = round_on_host(q.weights["w"], x, bits)
        apart = np.abs(mine - theirs["w"]) > 1e-6 * np.abs(mine)
        assert np.mean(apart) < 0.01
        step = q.weights["w"].grid(x, ends.weights["w"])[0]
        assert np.max(np.abs(mine - theirs["w"])) < 1.01 * np.max(step)


def test_what_only_jax_can_do_is_left_to_it() -> None:
    x = jnp.ones((4, 4))
    none = [
        jm.Quantizer(calibrator="mse"),
        jm.Quantizer(maximum=jnp.ones(()), learn="minmax"),
        jm.Quantizer(bits=32, product=("w", "x")),
        jm.Quantizer(scale=0.5),
    ]
    assert all(round_on_host(q, x) is None for q in none)
    for dtype in ("int32", "bfloat16", "float16"):
        assert round_on_host(jm.Quantizer(), jnp.ones((2, 2), dtype)) is None
    jax.jit(lambda x: [x, round_on_host(jm.Quantizer(), x)][0])(x)
    off = jm.Quantizer(enabled=False)
    np.testing.assert_array_equal(round_on_host(off, x), x)


def test_int32_biases_as_jax_rounds_them() -> None:
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n), jnp.float32)
    params = {"w": draw(6, 4), "b": draw(4), "mean": draw(4), "own": draw(4)}
    for axis, beside in itertools.product(
        (None, (1,)), ((), (("mean", -1.0), ("own", 1.0)))
    ):
        weights = {
            "w": jm.Quantizer(axis=axis),
            "b": jm.Quantizer(bits=32, product=("w", "x"), beside=beside),
        }
        of_x = jm.Quantizer(scale=jnp.float32(0.02), symmetric=False)
        q = jm.Quantizers(weights, {"x": of_x})
        mine = q.quantize_weights(params)
        theirs = jax.jit(lambda q, p: q.quantize_weights(p))(q, params)
        for name in params:
            one, two = (np.float64(a[name]) for a in (mine, theirs))
            np.testing.assert_allclose(one, two, rtol=3e-7)


def test_a_rounded_weight_stays_on_its_device() -> None:
    device = jax.devices()[-1]
    x = jax.device_put(jnp.ones((4, 4)), device)
    q = jm.Quantizers({"w": jm.Quantizer()})
    assert q.quantize_weights({"w": x})["w"].sharding.device_set == {device}
    assert isinstance(
        q.quantize_weights({"w": np.ones((4, 4), np.float32)})["w"], jax.Array
    )
