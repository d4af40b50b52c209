"""Rounding on the host against what JAX computes for the same."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.tree.host_rounding import (
    grid_in_numpy,
    grid_of,
    round_in_numpy,
    round_on_host,
)

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
    x = jax.device_put(np.float32(rng.normal(size=(3, 3, 12, 8)) + 0.3))
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
    x = jax.device_put(np.float32(rng.normal(size=(3, 3, 12, 8))))
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
    draw = lambda *n: jax.device_put(np.float32(rng.normal(size=n)))
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


# In dtypes and arrays that are at the edge

QUANTIZERS = {
    "channel": jm.Quantizer(bits=4, axis=(1,)),
    "tensor": jm.Quantizer(bits=8),
    "asymmetric": jm.Quantizer(bits=4, axis=(1,), symmetric=False),
    "wide": jm.Quantizer(bits=3, narrow=False, axis=(0,)),
    "unsigned": jm.Quantizer(bits=4, signed=False),
    "blocks": jm.Quantizer(bits=4, axis=(1,), block=20, block_axis=0),
    "percentile": jm.Quantizer(bits=4, calibrator="percentile", percentile=90.0),
    "stated": jm.Quantizer(scale=0.3, bits=4),
    "stated, with a zero point": jm.Quantizer(
        scale=jnp.full((1, 32), -0.25), zero_point=jnp.full((1, 32), 6.4), bits=4,
        symmetric=False, axis=(1,),
    ),
    "range": jm.Quantizer(maximum=jnp.full((1, 32), 1.5), learn="minmax", axis=(1,)),
    "at least": jm.Quantizer(bits=4, least=jnp.full((1, 1), 0.5)),
    "off": jm.Quantizer(bits=4, enabled=False),
    "float": jm.Quantizer(bits=32),
}  # fmt: skip
ARRAYS = {
    "normal": np.random.default_rng(0).normal(size=(48, 32)),
    "zero": np.zeros((48, 32)),
    "large": 1e30 * np.random.default_rng(1).normal(size=(48, 32)),
    "infinite": np.where(np.eye(48, 32) > 0, np.inf, 1.0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_same_as_the_quantizer(name, array, dtype):
    quantizer = QUANTIZERS[name]
    with np.errstate(over="ignore"):
        x = ARRAYS[array].astype(np.float32).astype(jnp.dtype(dtype))
    found, wanted = grid_in_numpy(quantizer, x), quantizer.grid(jnp.asarray(x))
    for one, two in zip(found, wanted, strict=True):
        assert isinstance(one, np.ndarray)
        assert one.shape == two.shape
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, rtol=3e-7)
    rounded = round_in_numpy(quantizer, x)
    assert rounded.dtype == x.dtype
    wanted = np.asarray(quantizer(jnp.asarray(x))).astype(np.float32)
    near = np.isclose(rounded.astype(np.float32), wanted, rtol=1e-5, equal_nan=True)
    assert np.mean(~near) < 0.005  # and those lie midway between two


def test_layers_of_many_sizes_share_a_program():
    found = []

    def listen(event, duration, **_):
        found.append(event == "/jax/core/compile/backend_compile_duration")

    rng, quantizer = np.random.default_rng(0), jm.Quantizer(bits=5, axis=(1,))
    jax.monitoring.register_event_duration_secs_listener(listen)
    for outs in (3, 17, 300, 999):
        grid_in_numpy(quantizer, rng.normal(size=(9, outs)).astype(np.float32))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert sum(found) <= 1
