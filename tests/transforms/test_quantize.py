"""Integers in place of weights: the same outputs as rounded floats, and few bytes."""

import functools

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmet as jm
from jaxmet.tree.leaves import dense, is_quantized
from jaxmet.tree.named_leaves import named_leaves
from zoo import CASES, model, traced

quiet = {"progress": False}


class Net(nn.Module):
    """A convolution, its norm, a grouped one and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=True, name="bn")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x)
        return nn.Dense(5, name="head")(jnp.mean(nn.relu(x), axis=(1, 2)))


@functools.cache
def prepared(equalize):
    x = jax.device_put(np.float32(np.random.default_rng(0).normal(size=(4, 6, 6, 3))))
    model = Net()
    params = jax.jit(model.init)(jax.random.key(0), x)
    rng = np.random.default_rng(1)
    noise = lambda a: jnp.asarray(a + 0.3 * rng.random(size=a.shape), a.dtype)
    params = jax.tree.map(noise, jax.tree.map(np.asarray, params))
    graph = jm.trace(model.apply, params, x)
    params = jm.fold_batch_norm(params, graph)
    if equalize:
        params = jm.equalize(params, graph, batches=[x], **quiet)
    return model.apply, params, graph, x


def made(config=None, equalize=True):
    apply, params, graph, x = prepared(equalize)
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    return apply, params, graph, quantizers, x


@functools.cache
def lifted():
    """One program for all rounded trees."""
    return jax.jit(jm.lift(prepared(True)[0]))


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def alike(one, two):
    """Of programs that differ: equal to rounding, but for values at the edge of two steps."""

    def check(a, b):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        far = ~np.isclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max(initial=0))
        assert np.mean(far) <= 0.05 if far.size else True

    jax.tree.map(check, one, two)


CONFIGS = {
    "w8": {},
    "w8, per tensor": {"per_channel": False},
    "w4, asymmetric": {"weight_bits": 4, "symmetric_weights": False},
    "w3": {"weight_bits": 3},
    "w2": {"weight_bits": 2},
    "w5, asymmetric": {"weight_bits": 5, "symmetric_weights": False},
    "w12": {"weight_bits": 12},
    "w4, blocks": {"weight_bits": 4, "block": 3, "symmetric_weights": False},
    "w8, int32 biases": {"bias": "int32"},
    "mse": {"weight_bits": 4, "weight_range": "mse"},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CONFIGS)
def test_integers_run_as_rounded_floats_do(name):
    apply, params, graph, quantizers, x = made(jm.QuantConfig(**CONFIGS[name]))
    before = jax.tree.map(np.asarray, params)
    integers, report = jm.quantize(params, graph, quantizers, with_report=True)
    rounded = jm.round_weights(params, quantizers)
    same(before, params)
    assert len(report) == len(named_leaves(params))
    of = {row["parameter"]: row for row in report}
    for path, leaf in named_leaves(integers).items():
        np.testing.assert_array_equal(dense(leaf), dense(named_leaves(rounded)[path]))
        if not is_quantized(leaf):
            continue
        w, bits = leaf.weight, leaf.weight.bits
        q = quantizers.weights[path]
        values = np.asarray(w.values)
        assert values.shape == w.shape and of[path]["bits"] == bits
        if bits < 32:
            assert values.min() >= q.ends[0] and values.max() <= q.ends[1]
            assert len(np.unique(values)) > 2
        sizes = {2: 1 / 4, 3: 1 / 2, 4: 1 / 2, 5: 1, 8: 1, 12: 2, 32: 4}
        last = -(-w.shape[-1] * sizes[bits] // 1)
        assert w.integers.nbytes == last * np.prod(w.shape[:-1])
    alike(lifted()(integers, x), lifted()(rounded, x))
    device = jax.jit(jm.simulate(apply, quantizers, weights=False))
    alike(device(integers, x), device(rounded, x))
    stays = {n for n, leaf in named_leaves(integers).items() if not is_quantized(leaf)}
    kernels = {"conv/kernel", "grouped/kernel", "head/kernel"}
    biases = {"grouped/bias", "head/bias"} if "int32" in name else set()
    assert kernels | biases == set(named_leaves(params)) - stays


def test_grids_by_hand():
    """float64: the nearest multiple of the scale, and the integer that it is."""
    apply, params, graph, quantizers, x = made()
    w = np.asarray(dense(params["params"]["conv"]["kernel"]), np.float64)
    scale = np.abs(w).max((0, 1, 2)) / 127
    leaf = jm.quantize(params, graph, quantizers)["params"]["conv"]["kernel"]
    near = np.abs(w / scale % 1 - 0.5) < 1e-4  # ties of float32
    values = np.asarray(leaf.weight.values)
    assert near.mean() < 0.01
    np.testing.assert_array_equal(values[~near], np.rint(w / scale)[~near])
    np.testing.assert_allclose(np.ravel(leaf.weight.scale), scale, rtol=1e-6)
    assert leaf.weight.integers.dtype == jnp.int8
    assert leaf.upper is not None  # the bounds of the clip are still there


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_shape_is_packed_and_unpacked(data):
    from jaxmet.tree.quantized import Quantized, stored

    bits = data.draw(st.sampled_from([2, 3, 4, 8, 16]))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    low = data.draw(st.sampled_from([0, -(2 ** (bits - 1))]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = rng.integers(low, low + 2**bits, shape)
    kept = jnp.asarray(stored(np.asarray(values), bits, low))
    leaf = Quantized(kept, 1.0, bits=bits, low=low, shape=shape)
    np.testing.assert_array_equal(leaf.values, values)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("name", CASES)
def test_every_tree_of_the_zoo(name):
    _, params, inputs = model(name)
    graph = traced(name)
    quantizers = jm.calibrate(params, graph, [tuple(inputs)], **quiet)
    integers = jm.quantize(params, graph, quantizers)
    rounded = jm.round_weights(params, quantizers)
    device = jax.jit(jm.simulate(graph.apply, quantizers, weights=False))
    alike(device(integers, *inputs), device(rounded, *inputs))
    one, two = (map(dense, named_leaves(t).values()) for t in (integers, rounded))
    same(list(one), list(two))


def test_a_file_holds_the_integers(tmp_path):
    apply, params, graph, quantizers, x = made()
    integers = jm.quantize(params, graph, quantizers)
    jm.save(tmp_path / "small.npz", params=integers, quantizers=quantizers)
    jm.save(tmp_path / "large.npz", params=params)
    found = jm.load(tmp_path / "small.npz")
    same(integers, found.params)
    device = jax.jit(jm.simulate(apply, found.quantizers, weights=False))
    same(device(found.params, x), device(integers, x))
    with np.load(tmp_path / "small.npz") as arrays:
        assert arrays["params/params/conv/kernel/integers"].dtype == np.int8
    jm.save(tmp_path / "less.npz", params=integers, compress=True)
    same(integers, jm.load(tmp_path / "less.npz").params)
    sizes = [(tmp_path / f"{n}.npz").stat().st_size for n in ("less", "large")]
    assert sizes[0] < sizes[1]
    state = serialization.to_bytes(integers)
    same(integers, serialization.from_bytes(integers, state))


def test_what_was_pruned_and_factorized_becomes_integers_too():
    apply, params, graph, _, x = made()
    small = jm.factorize(params, graph.only("head"), ranks={"head": 2})
    quantizers = jm.calibrate(small, graph, [x], **quiet)
    integers = jm.quantize(small, graph, quantizers)
    rounded = jm.round_weights(small, quantizers)
    alike(lifted()(integers, x), lifted()(rounded, x))
    head = integers["params"]["head"]["kernel"].weight
    assert is_quantized(head.first) and is_quantized(head.second)


def test_an_nnx_tree():
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = (
                nnx.Linear(4, 6, rngs=rngs),
                nnx.Linear(6, 3, rngs=rngs),
            )

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    apply, params, _ = jm.functional(Small(nnx.Rngs(0)))
    x = jax.device_put(np.float32(np.random.default_rng(0).normal(size=(5, 4))))
    graph = jm.trace(apply, params, x)
    quantizers = jm.calibrate(params, graph, [x], **quiet)
    integers = jm.quantize(params, graph, quantizers)
    rounded = jm.round_weights(params, quantizers)
    device = jax.jit(jm.simulate(apply, quantizers, weights=False))
    alike(device(integers, x), device(rounded, x))
    assert all(
        map(
            is_quantized,
            (
                integers["one"]["kernel"].get_value(),
                integers["two"]["kernel"].get_value(),
            ),
        )
    )


def test_half_precision_and_left_out_layers():
    apply, params, graph, _, x = made(equalize=False)
    half, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (jm.densify(params), x))
    graph = jm.trace(apply, half, x)
    quantizers = jm.calibrate(half, graph, [x], **quiet)
    integers, report = jm.quantize(
        half, graph.without("head"), quantizers, with_report=True
    )
    assert not is_quantized(integers["params"]["head"]["kernel"])
    (row,) = report.where(parameter="head/kernel")
    assert row["note"] and row["bytes"] == row["bytes before"]
    rounded = jm.round_weights(half, quantizers)
    for name in ("conv", "grouped"):
        leaf = integers["params"][name]["kernel"]
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(dense(leaf), np.float32),
            np.asarray(dense(rounded["params"][name]["kernel"]), np.float32),
        )


def test_what_is_refused():
    apply, params, graph, quantizers, x = made()
    integers = jm.quantize(params, graph, quantizers)
    with pytest.raises(ValueError, match="quantize: 'conv/kernel' holds integers"):
        jm.quantize(integers, graph, quantizers)
    with pytest.raises(ValueError, match="conv/kernel' holds integers.*jm.quantize"):
        (
            jm.fold_batch_norm(integers, graph),
            jm.correct_bias(
                jm.equalize(integers, graph, objective="range"), graph, quantizers
            ),
        )
    with pytest.raises(ValueError, match=r"holds integers.*weights=False"):
        jm.simulate(apply, quantizers)(integers, x)
    with pytest.raises(ValueError, match="is traced"):
        jax.jit(lambda p: jm.quantize(p, graph, quantizers))(params)
    with pytest.raises(TypeError, match=r"jm\.lift"):
        apply(integers, x)
    with pytest.raises(ValueError, match="no parameter 'conv/kernel'"):
        jm.quantize({"params": params["params"]["head"]}, graph, quantizers)
