"""The model in integers: against integer arithmetic by hand, and against the simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network
from zoo import CASES, model, traced

quiet = {"progress": False}


def prepared(apply, params, x, **options):
    graph = jm.trace(apply, params, x)
    params = jm.fold_batch_norm(params, graph)
    config = jm.QuantConfig(bias="int32", **options)
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    return params, graph, quantizers


def steps_apart(one, two, quantizers):
    last = list(quantizers.activations.values())[-1]
    step = float(np.ravel(last.scale)[0])
    return np.rint(np.abs(np.asarray(one) - np.asarray(two)) / step)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_the_demo_is_within_one_step_of_its_simulation(bits):
    x = jnp.asarray(data.load()[0][:128])
    apply = Network().apply
    params, graph, quantizers = prepared(apply, data.weights(), x, weight_bits=bits)
    before = jax.tree.map(np.array, params)
    integers = jm.quantize(params, graph, quantizers)
    program = jax.jit(jm.lift(apply, quantizers))
    found = program(integers, x)
    simulated = jax.jit(jm.simulate(apply, quantizers))(params, x)
    apart = steps_apart(found, simulated, quantizers)
    # Sums of floats differ in their last bits, and a value between two steps moves others.
    assert np.mean(apart == 0) >= 0.95 and np.max(apart) <= 1
    # floats are rounded on the way, to the same bits
    np.testing.assert_array_equal(found[:16], program(params, x[:16]))
    jax.tree.map(np.testing.assert_array_equal, before, params)


SIZES = st.integers(1, 3)


@st.composite
def convolutions(draw):
    """Parameters of a convolution over two axes, and shapes."""
    taps = draw(st.tuples(SIZES, SIZES))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    layout = draw(st.sampled_from([("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")]))
    sides = st.tuples(st.integers(0, 2), st.integers(0, 2))
    return {
        "taps": taps,
        "inputs": inputs,
        "outputs": outputs,
        "kwargs": {
            "window_strides": draw(st.tuples(SIZES, SIZES)),
            "padding": (draw(sides), draw(sides)),
            "lhs_dilation": draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)])),
            "rhs_dilation": draw(st.sampled_from([(1, 1), (2, 1)])),
            "feature_group_count": groups,
            "dimension_numbers": layout,
        },
    }


@settings(deadline=None, max_examples=10)
@given(case=convolutions(), seed=st.integers(0, 2**16), symmetric=st.booleans())
def test_convolutions_are_sums_of_integers(case, seed, symmetric):
    """In any layout, against sums in float64 of the same integers."""
    rng = np.random.default_rng(seed)
    layout, kwargs = case["kwargs"]["dimension_numbers"], case["kwargs"]
    groups = kwargs["feature_group_count"]
    sizes = {"N": 2, "C": case["inputs"], "H": 7, "W": 8}
    x = rng.normal(0.4, 1, [sizes[a] for a in layout[0]]).astype(np.float32)
    sizes = {"O": case["outputs"], "I": case["inputs"] // groups}
    sizes |= dict(zip("HW", case["taps"], strict=True))
    w = rng.normal(size=[sizes[a] for a in layout[1]]).astype(np.float32)
    params = {"layer": {"kernel": jnp.asarray(w)}}

    def apply(params, x):
        return lax.conv_general_dilated(x, params["layer"]["kernel"], **kwargs)

    graph = jm.trace(apply, params, jnp.asarray(x))
    config = jm.QuantConfig(symmetric_activations=symmetric)
    quantizers = jm.calibrate(params, graph, [jnp.asarray(x)], config, **quiet)
    found = jax.jit(jm.lift(apply, quantizers))(params, jnp.asarray(x))
    with jax.enable_x64(True):
        q = {n: quantizers.activations[n] for n in ("input", "layer")}
        (s_x, z_x), (s_y, z_y) = (
            (np.float64(np.ravel(v)[0]) for v in q[n].grid(None)) for n in q
        )
        low, high = q["input"].ends
        of_x = np.clip(np.rint(x / np.float32(s_x)) + z_x, low, high) - z_x
        s_w = np.asarray(quantizers.weights["layer/kernel"].grid(jnp.asarray(w))[0])
        of_w = np.clip(np.rint(w / s_w), -127, 127)
        sums = lax.conv_general_dilated(of_x, of_w.astype(np.float64), **kwargs)
        channel = layout[2].index("C")
        along = np.moveaxis(s_w.reshape(1, 1, 1, -1).astype(np.float64), 3, channel)
        steps = np.asarray(sums) * along * s_x / s_y
    low, high = q["layer"].ends
    wanted = np.clip(np.rint(steps) + z_y, low, high)
    made = np.rint(np.asarray(found, np.float64) / s_y) + z_y
    tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-4
    np.testing.assert_array_equal(made[~tie], wanted[~tie])
    assert np.max(np.abs(made - wanted), initial=0) <= 1


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**16), flip=st.booleans(), batched=st.booleans())
def test_dots_of_two_activations_are_sums_of_integers(seed, flip, batched):
    """Both have zero points; a weight on the left as well as on the right."""
    rng = np.random.default_rng(seed)
    x = jax.device_put(np.float32(rng.normal(0.5, 1, (2, 5, 6))))
    params = {"w": jax.device_put(np.float32(rng.normal(size=(6, 6))))}

    def apply(params, x):
        y = jnp.einsum("ij,bkj->bki" if flip else "ji,bkj->bki", params["w"], x)
        return jnp.einsum("bki,bli->bkl" if batched else "bki,ali->bkal", y, x)

    graph = jm.trace(apply, params, x)
    quantizers = jm.calibrate(params, graph, [x], **quiet)
    found = jax.jit(jm.lift(apply, quantizers))(params, x)
    simulated = jax.jit(jm.simulate(apply, quantizers))(params, x)
    apart = steps_apart(found, simulated, quantizers)
    # Sums of floats differ in their last bits, and a value between two steps moves others.
    assert np.mean(apart == 0) >= 0.95 and np.max(apart) <= 1


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", CASES)
def test_models_of_the_zoo(name):
    """Whatever the model and however much of it is in float, it is the simulation."""
    apply, params, inputs = model(name)
    graph = traced(name)
    params = jm.fold_batch_norm(params, graph)
    quantizers = jm.calibrate(params, graph, [tuple(inputs)], **quiet)
    made = jax.jit(jm.lift(apply, quantizers))(
        jm.quantize(params, graph, quantizers), *inputs
    )
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, *inputs)
    assert jax.tree.structure(made) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
        one, two = (np.asarray(a, np.float64) for a in (one, two))
        scale = np.abs(two).max(initial=1e-6)
        assert np.mean(np.abs(one - two) > 0.05 * scale) <= 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"block": 4},
        {"activation_bits": 16},
        {"activation_bits": 32},
        {"symmetric_weights": False},
        {"per_channel": False, "weight_bits": 2},
    ],
    ids=str,
)
def test_what_products_do_not_take_is_dequantized(options):
    x = jax.device_put(np.float32(np.random.default_rng(0).normal(0.3, 1, (8, 12))))
    rng = np.random.default_rng(1)
    params = {
        "w": jax.device_put(np.float32(rng.normal(size=(12, 6)))),
        "b": jnp.ones(6),
    }

    def apply(params, x):
        return jax.nn.relu(x @ params["w"] + params["b"][None])

    graph = jm.trace(apply, params, x)
    quantizers = jm.calibrate(params, graph, [x], jm.QuantConfig(**options), **quiet)
    integers = jm.quantize(params, graph, quantizers)
    found = jax.jit(jm.lift(apply, quantizers))(integers, x)
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, x)
    if options.get("activation_bits", 8) == 8:
        assert np.max(steps_apart(found, wanted, quantizers)) <= 1
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("many", "symmetric"), [(70_000, True), (40_000, False)])
def test_sums_that_int32_may_not_hold_are_floats(many, symmetric):
    """255 · 127 · 70,000 is above 2³¹, and so is 255 · 255 · 40,000."""
    x = jnp.ones((2, many)) * jnp.array([[1.0], [0.5]])
    params = {"w": jnp.ones((many, 2))}
    apply = lambda p, x: x @ p["w"]
    graph = jm.trace(apply, params, x)
    config = jm.QuantConfig(symmetric_weights=symmetric)
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    found = jax.jit(jm.lift(apply, quantizers))(params, x)
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, x)
    np.testing.assert_allclose(found, wanted, rtol=0.01)


def test_what_an_index_does_not_find_is_nan_as_in_float():
    params = {
        "w": jax.device_put(np.float32(np.random.default_rng(0).normal(size=(5, 3))))
    }
    apply = lambda p, i: p["w"].at[i].get(mode="fill") * 2.0
    index = jnp.array([0, 4, 9])
    graph = jm.trace(apply, params, index)
    config = jm.QuantConfig(activation_bits=32)  # a grid has no NaN
    quantizers = jm.calibrate(params, graph, [index[:2]], config, **quiet)
    found = jax.jit(jm.lift(apply, quantizers))(params, index)
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, index)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_what_the_simulation_says(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6)), dtype)
    params = {"w": jnp.asarray(rng.normal(size=(6, 3)), dtype)}
    apply = lambda p, x: jax.nn.relu(x @ p["w"])
    graph = jm.trace(apply, params, x)
    quantizers = jm.calibrate(params, graph, [x], **quiet)
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, x)
    for tree in (params, jm.quantize(params, graph, quantizers)):
        found = jax.jit(jm.lift(apply, quantizers))(tree, x)
        assert found.dtype == dtype
        wide = lambda a: np.asarray(a, np.float32)
        np.testing.assert_allclose(wide(found), wide(wanted), rtol=0.02, atol=0.05)


def test_quantizers_of_another_tree_are_refused():
    x = jnp.ones((2, 3))
    apply = lambda p, x: x @ p["w"]
    params = {"w": jnp.ones((3, 3))}
    quantizers = jm.calibrate(params, jm.trace(apply, params, x), [x], **quiet)
    with pytest.raises(ValueError, match="no parameter 'w'"):
        jm.lift(apply, quantizers)({"v": jnp.ones((3, 3))}, x)
    with pytest.raises(ValueError, match="quantizers is of type dict"):
        jm.lift(apply, {})
