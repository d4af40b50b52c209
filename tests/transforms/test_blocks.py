"""Blocks whose last one is shorter, wherever a weight has blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.numerics.calibrators import CALIBRATORS, range_of

RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": RNG.normal(size=(10, 7)).astype(np.float32)},
    "second": {"kernel": RNG.normal(size=(7, 3)).astype(np.float32)},
}
X = jax.device_put(np.float32(RNG.normal(size=(64, 10)) @ RNG.normal(size=(10, 10))))


def apply(params, x):
    return jax.nn.relu(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


def blocks_of(weight, block):
    """The row numbers of each block, by hand."""
    rows = np.arange(weight.shape[0])
    return [rows[i : i + block] for i in range(0, len(rows), block)]


def rounded(weight, block, bits):
    """A weight on its grid in float64: the largest magnitude of each block and output."""
    out, scales, top = np.zeros(weight.shape), [], 2 ** (bits - 1) - 1
    for rows in blocks_of(weight, block):
        part = weight[rows].astype(np.float64)
        scale = np.abs(part).max(0, keepdims=True) / top
        out[rows] = scale * np.clip(np.rint(part / scale), -top, top)
        scales.append(scale)
    return out, np.concatenate(scales)


def calibrated(block, **config):
    graph = jm.trace(apply, PARAMS, X)
    config = jm.QuantConfig(block=block, activation_bits=32, **config)
    return graph, config, jm.calibrate(PARAMS, graph, [X], config, progress=False)


@pytest.mark.parametrize("block", [2, 4, 6, 7, 9, 10, 32])
def test_quantized_weights_are_those_of_a_loop_over_blocks(block):
    graph, config, q = calibrated(block, weight_bits=4)
    table = jm.plan(PARAMS, graph, config)
    new = jm.round_weights(PARAMS, q)
    pinned = q.pin(PARAMS)
    for name in ("first", "second"):
        weight = PARAMS[name]["kernel"]
        expected, scales = rounded(weight, block, 4)
        np.testing.assert_allclose(new[name]["kernel"], expected, atol=1e-6)
        found = pinned.weights[f"{name}/kernel"]
        assert found.scale.shape == (-(-len(weight) // block), weight.shape[1])
        np.testing.assert_allclose(found.scale, scales, rtol=1e-6)
        row = table.where(name=f"{name}/kernel")["one scale per"][0]
        rest = len(weight) % block
        assert row == f"block of {block}" + (f", the last of {rest}" if rest else "")
    by_hand = np.maximum(X @ new["first"]["kernel"], 0) @ new["second"]["kernel"]
    for which in (q, pinned, jm.dynamic(4, jm.QuantConfig(block=block))):
        simulated = jax.jit(jm.simulate(apply, which))(PARAMS, X)
        if isinstance(which, jm.Quantizers):
            np.testing.assert_allclose(simulated, by_hand, rtol=1e-5, atol=1e-5)
        assert np.isfinite(simulated).all()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("method", CALIBRATORS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_those_of_each_block_alone(method, symmetric):
    """What stands beside a short block cannot influence its range."""
    x = jax.device_put(np.float32(RNG.normal(size=(11, 3)) + 0.3))
    low, high = (-7, 7) if symmetric else (0, 15)
    options = {"method": method, "symmetric": symmetric, "percentile": 90}
    found = range_of(x, low, high, axis=(1,), block=4, block_axis=0, **options)
    for i, rows in enumerate(blocks_of(x, 4)):
        alone = range_of(x[rows], low, high, axis=(1,), **options)
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, rtol=1e-6)


def test_scales_train_pin_save_and_load(tmp_path):
    _, _, q = calibrated(4, weight_bits=3)
    q = q.pin(PARAMS)
    jm.save(tmp_path / "q.npz", params=PARAMS, quantizers=q)
    _, again = jm.load(tmp_path / "q.npz").values()
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    exact = apply(PARAMS, X)

    def loss(q):
        return jnp.mean((jm.simulate(apply, q)(PARAMS, X) - exact) ** 2)

    gradient = jax.jit(jax.grad(loss))(q)
    for name, one in gradient.weights.items():
        assert one.scale.shape == q.weights[name].scale.shape
        assert np.all(np.asarray(one.scale) != 0)  # of the short block too


@pytest.mark.parametrize("block", [4, 7, 9])
def test_searched_scales_are_the_best_of_all(block):
    """By brute force in float64: of each block and output, by its own inputs."""
    graph, _, q = calibrated(block, weight_bits=3)
    found = jm.search_scales(PARAMS, graph, q, [X], of="float", progress=False)
    inputs = {
        "first": np.float64(X),
        "second": np.maximum(X @ PARAMS["first"]["kernel"], 0),
    }
    for name, x in inputs.items():
        weight = np.asarray(PARAMS[name]["kernel"], np.float64)
        scale = np.asarray(found.weights[f"{name}/kernel"].scale)
        for i, rows in enumerate(blocks_of(weight, block)):
            top = np.abs(weight[rows]).max(0)
            scales = np.arange(1, 21)[:, None] / 20 * top / 3
            levels = np.clip(np.rint(weight[rows] / scales[:, None]), -3, 3)
            errors = scales[:, None] * levels - weight[rows]
            errors = (np.einsum("ni,kio->kno", x[:, rows], errors) ** 2).sum(1)
            nearest = np.abs(scales - scale[i]).argmin(0)
            np.testing.assert_allclose(
                np.take_along_axis(scales, nearest[None], 0)[0], scale[i], rtol=1e-5
            )
            chosen = np.take_along_axis(errors, nearest[None], 0)[0]
            assert np.all(chosen <= 1.001 * errors.min(0) + 1e-9)


@pytest.mark.parametrize("method", ["coordinate", "gram", "adam"])
@pytest.mark.slow
def test_rounding_is_better_than_nearest(method):
    graph, _, q = calibrated(4, weight_bits=3)
    new, found = jm.adaround(
        PARAMS, graph, q, [X], key=jax.random.key(0), method=method, progress=False
    )
    exact = apply(PARAMS, X)
    simulated = lambda p, q: jax.jit(jm.simulate(apply, q))(p, X)
    error = lambda p, q: float(jnp.mean((simulated(p, q) - exact) ** 2))
    assert error(new, found) < 0.9 * error(PARAMS, q)
    for name, one in found.weights.items():
        weight = new[name.split("/")[0]]["kernel"]
        assert one.scale.shape[0] == -(-weight.shape[0] // 4)
        scale = np.repeat(one.scale, 4, axis=0)[: weight.shape[0]]
        levels = np.asarray(weight) / scale
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)


def test_convolutions_and_grouped_layouts():
    """The input axis of a kernel, not the window."""
    kernel = jax.device_put(np.float32(RNG.normal(size=(3, 3, 5, 4))))
    x = jax.device_put(np.float32(RNG.normal(size=(2, 6, 6, 5))))
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    graph = jm.trace(conv, {"k": kernel}, x)
    q = jm.calibrate(
        {"k": kernel}, graph, [x], jm.QuantConfig(4, block=2), progress=False
    )
    assert q.pin({"k": kernel}).weights["k"].scale.shape == (1, 1, 3, 4)
    new = np.asarray(jm.round_weights({"k": kernel}, q)["k"])
    for rows in ([0, 1], [2, 3], [4]):
        part = np.asarray(kernel, np.float64)[:, :, rows]
        scale = np.abs(part).max((0, 1, 2), keepdims=True) / 7
        np.testing.assert_allclose(
            new[:, :, rows], scale * np.rint(part / scale), atol=1e-6
        )
    given = {"key": jax.random.key(0), "progress": False}
    rounded, found = jm.adaround({"k": kernel}, graph, q, [x], **given)
    np.testing.assert_allclose(
        found.weights["k"](rounded["k"]), rounded["k"], atol=1e-6
    )


def test_int32_biases_need_one_scale_an_output():
    params = {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}
    graph = jm.trace(lambda p, x: x @ p["w"] + p["b"][None], params, jnp.ones((2, 6)))
    config = jm.QuantConfig(block=4, bias="int32")
    (row,) = jm.plan(params, graph, config).where(name="b")
    assert row["kind"] == "float" and "blocks" in row["note"]
    found = jm.calibrate(params, graph, [jnp.ones((2, 6))], config, progress=False)
    assert dict(found.skipped)["b"] == row["note"]
