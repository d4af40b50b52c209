"""The simulated device, against models whose quantizers were put in by hand in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState

import by_hand
import jaxmet as jm
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from zoo import CASES, model, traced

DEFAULT = jm.QuantConfig()
INT32 = jm.QuantConfig(bias="int32")
COARSE = jm.QuantConfig(
    weight_bits=4,
    activation_bits=5,
    per_channel=False,
    symmetric_activations=True,
    placement="products",
)
NARROW = ("lstm",)  # flax starts its state in float32


def double(name):
    """Float64 for a model that can: then no rounding is a matter of the last bit."""
    return by_hand.x64(name not in NARROW)


def precise(name, tree):
    return tree if name in NARROW else by_hand.wide(tree)


def largest(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@functools.cache
def quantized(name, config=DEFAULT):
    apply, params, inputs = model(name)
    graph = traced(name)
    return jm.calibrate(params, graph, [inputs], config, progress=False)


# The oracle.


def check_grids(quantizers, ranges, config):
    """Scales and zero points are those that numpy finds in ranges collected by hand."""
    for name, q in quantizers.activations.items():
        users = [name, *(n for n, owner in quantizers.shared if owner == name)]
        low = np.min([ranges[n][0] for n in users], axis=0)
        high = np.max([ranges[n][1] for n in users], axis=0)
        bits, symmetric = config.activation_bits, config.symmetric_activations
        scale, zero_point, *ends = by_hand.grid(low, high, bits, symmetric)
        np.testing.assert_allclose(q.scale, scale, rtol=1e-6, err_msg=name)
        assert tuple(q.ends) == tuple(ends)
        if not symmetric:
            np.testing.assert_array_equal(q.zero_point, zero_point, err_msg=name)


def with_grids(name, params, quantizers, config):
    """The model by hand, with weights, biases and activations quantized."""
    leaves, owners = by_hand.numbers(params), dict(quantizers.shared)
    bits = config.weight_bits

    def scale_of_weight(parameter):
        w, axes = leaves[parameter], quantizers.weights[parameter].axis or ()
        others = tuple(i for i in range(w.ndim) if i not in axes)
        return np.max(np.abs(w), others, keepdims=False) / (2.0 ** (bits - 1) - 1)

    def get(parameter):
        q = quantizers.weights.get(parameter)
        if q is None:
            return leaves.get(parameter)
        if q.product is None:
            return by_hand.weight_on_grid(leaves[parameter], q.axis or (), bits)
        weight, node = q.product
        activation = quantizers.activations[owners.get(node, node)]
        scale = scale_of_weight(weight) * np.asarray(activation.scale)
        return scale * np.rint(leaves[parameter] / scale)

    def tap(node, value, layer=None, taken=None, weight=False):
        del taken
        if weight:
            axes = quantizers.weights[node].axis or ()
            return by_hand.weight_on_grid(value, axes, bits).astype(value.dtype)
        q = quantizers.activations.get(owners.get(node, node))
        if q is None:
            return value
        z = np.zeros_like(q.scale) if q.zero_point is None else np.asarray(q.zero_point)
        at = layer if np.ndim(q.scale) else ()
        return by_hand.rounded(value, np.asarray(q.scale)[at], z[at], *q.ends)

    return jax.jit(lambda *inputs: by_hand.MODELS[name](get, tap, *inputs))


BIASED = ("conv_bn_relu", "concatenation", "pooling", "embedding", "cond")
RUNS = {f"{n}-default": (n, DEFAULT) for n in by_hand.MODELS if n not in BIASED}
RUNS |= {f"{name}-int32": (name, INT32) for name in BIASED}
RUNS |= {f"{n}-coarse": (n, COARSE) for n in ("inverted_residual", "scan", "lstm")}
del RUNS["inverted_residual-default"]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("run", RUNS)
def test_it_is_the_model_with_grids_put_in_by_hand(run):
    name, config = RUNS[run]
    # flax's layer norm mixes float32 into float64
    promotion = "standard" if name == "transformer" else "strict"
    with double(name), jax.numpy_dtype_promotion(promotion):
        apply, *arrays = model(name)
        params, inputs = precise(name, arrays)
        graph = jm.trace(apply, params, *inputs)
        quantizers = jm.calibrate(params, graph, [inputs], config, progress=False)
        check_grids(quantizers, by_hand.ranges(name, params, [inputs]), config)
        found = jax.jit(jm.simulate(apply, quantizers))(params, *inputs)
        expected = with_grids(name, params, quantizers, config)(*inputs)
        assert found.dtype == expected.dtype
        assert largest(found, expected) < 1e-5
        plain = jax.jit(apply)(params, *inputs)
        assert largest(found, plain) > 1e-3  # and not the model as it was


def test_int32_biases_are_multiples_of_the_product_of_scales():
    _, params, _ = model("concatenation")
    quantizers = quantized("concatenation", INT32)
    rounded = named_leaves(jm.round_weights(params, quantizers))
    leaves = named_leaves(params)
    inputs = {"stem": "input", "left": "stem/relu", "right": "stem/relu"}
    for node, source in {**inputs, "merge": "right/concat"}.items():
        w = np.asarray(leaves[f"{node}/kernel"], np.float64)
        s = np.abs(w).max((0, 1, 2)) / 127
        s = s * np.float64(quantizers.activations[source].scale)
        level = np.asarray(rounded[f"{node}/bias"], np.float64) / s
        np.testing.assert_allclose(level, np.rint(level), atol=2e-3)
        assert np.max(np.abs(level)) > 50
        error = rounded[f"{node}/bias"] - leaves[f"{node}/bias"]
        assert 0 < np.max(np.abs(error)) and np.all(np.abs(error) <= 0.51 * s)


# Identity, data as quantizers, pinning.


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("conv_bn_relu", "config"),
        ("concatenation", "set"),
        ("lstm", "set"),
        ("conv_bn_relu", "grids"),
        ("scan", "grids"),
    ],
)
def test_32_bits_are_the_float_model_to_the_bit(name, how):
    apply, params, inputs = model(name)
    if how == "config":
        quantizers = quantized(name, jm.QuantConfig(weight_bits=32, activation_bits=32))
        assert not quantizers.weights and not quantizers.activations
    else:
        quantizers = quantized(name, INT32 if name == "concatenation" else DEFAULT)
    grids = None
    if how == "set":
        quantizers = quantizers.set("*", bits=32)
    if how == "grids":
        off = jnp.asarray(False)
        grids = jm.grids(quantizers)
        grids = jax.tree.map(
            lambda g: g._replace(enabled=off),
            grids,
            is_leaf=lambda g: hasattr(g, "low"),
        )
    replay = jm.evaluate(apply, lambda node, run, operands: (run(*operands), None))
    expected = jax.jit(lambda p, *x: replay(p, *x)[0])(params, *inputs)
    found = jax.jit(jm.simulate(apply, quantizers, grids=grids))(params, *inputs)
    same_bits(found, expected)
    coarser = jax.jit(jm.simulate(apply, quantized(name)))(params, *inputs)
    assert largest(coarser, expected) > 1e-4


def test_a_sweep_over_bits_compiles_once_and_equals_setting_them():
    apply, params, inputs = model("concatenation")
    quantizers = quantized("concatenation", INT32)
    traces = []

    def counted(params, *inputs):
        traces.append(1)
        return apply(params, *inputs)

    @jax.jit
    def at(grids):
        return jm.simulate(counted, quantizers, grids=grids)(params, *inputs)

    outputs = []
    for bits in (8, 6, 4, 2):
        narrower = quantizers.set("*", bits=bits)
        outputs.append(at(jm.grids(narrower)))
        expected = jax.jit(jm.simulate(apply, narrower))(params, *inputs)
        np.testing.assert_allclose(outputs[-1], expected, rtol=0, atol=1e-5)
    assert len(traces) == 1
    for a, b in zip(outputs, outputs[1:], strict=False):
        assert largest(a, b) > 1e-3


def test_editing_switches_off_what_the_glob_means():
    apply, params, inputs = model("conv_bn_relu")
    quantizers = quantized("conv_bn_relu")
    run = lambda q: jax.jit(jm.simulate(apply, q))(params, *inputs)
    only_head = quantizers.set("*", enabled=False).set("head/kernel", enabled=True)
    w = np.asarray(params["params"]["head"]["kernel"])
    rounded = by_hand.weight_on_grid(w, (3,), 8)
    edited = replace_leaves(
        params, {"head/kernel": jax.device_put(np.float32(rounded))}
    )
    np.testing.assert_allclose(run(only_head), apply(edited, *inputs), atol=1e-5)
    assert largest(run(quantizers), run(only_head)) > 1e-3


@pytest.mark.parametrize(
    ("name", "config"), [("concatenation", INT32), ("scan", DEFAULT)]
)
def test_rounding_the_weights_once_is_the_same_to_the_bit(name, config):
    apply, params, inputs = model(name)
    quantizers = quantized(name, config)
    rounded = jm.round_weights(params, quantizers)
    assert jax.tree.structure(rounded) == jax.tree.structure(params)
    assert largest(rounded, params) > 1e-3
    fast = jax.jit(jm.simulate(apply, quantizers, weights=False))
    whole = jax.jit(jm.simulate(apply, quantizers))
    same_bits(fast(rounded, *inputs), whole(params, *inputs))
    assert largest(fast(params, *inputs), fast(rounded, *inputs)) > 1e-3


def test_derived_weights_are_no_leaf_and_are_rounded_where_they_are_used():
    """What is rounded in the tree is the head; the gates' two kernels are in the run."""
    apply, params, inputs = model("lstm")
    quantizers = quantized("lstm")
    rounded = jm.round_weights(params, quantizers)
    leaves, after = named_leaves(params), named_leaves(rounded)
    moved = {n for n in leaves if not np.array_equal(leaves[n], after[n])}
    assert moved == {"head/kernel"} and quantizers.derived == ("rnn/cell", "rnn/cell:1")
    fast = jax.jit(jm.simulate(apply, quantizers, weights=False))
    whole = jax.jit(jm.simulate(apply, quantizers))
    same_bits(fast(rounded, *inputs), whole(params, *inputs))
    narrow = quantizers.set("rnn/*", bits=4)
    coarse = jax.jit(jm.simulate(apply, narrow, weights=False))(rounded, *inputs)
    assert largest(coarse, whole(params, *inputs)) > 1e-3


def weight_norm(p, x):
    """Two weights that are computed from parameters, v is read as it is, too."""
    w = p["v"] * (p["g"] / jnp.linalg.norm(p["v"], axis=0))[None]
    return jax.nn.relu(x @ w) @ p["u"][:5] + x @ p["v"]


def test_a_derived_weight_has_not_the_quantizer_of_a_parameter_of_the_tree():
    """Of flat trees the parameter has no module whose name the layer could have."""
    rng = np.random.default_rng(0)
    shapes = {"v": (4, 5), "g": (5,), "u": (6, 5)}
    params = {
        k: jax.device_put(np.float32(rng.normal(size=n))) for k, n in shapes.items()
    }
    x = jax.device_put(np.float32(rng.normal(size=(8, 4))))
    graph = jm.trace(weight_norm, params, x)
    layers = {n.name: n.weight.name for n in graph.layers}
    assert layers == {"v/product": None, "u/product": None, "v": "v"}
    config = jm.QuantConfig(weight_bits=3, activation_bits=32)
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    assert set(quantizers.derived) == {"v/product", "u/product"}
    assert set(quantizers.weights) == {"v/product", "u/product", "v"}

    def rounded(w):
        scale = np.abs(w).max(0, keepdims=True) / 3
        return np.rint(w / scale) * scale

    v, g, u, y = (np.asarray(a, np.float64) for a in (*params.values(), x))
    for tree, read in ((quantizers, rounded(v)), (quantizers.set("v", bits=32), v)):
        w = read * g / np.linalg.norm(read, axis=0)
        expected = np.maximum(y @ rounded(w), 0) @ rounded(u[:5]) + y @ read
        if tree is not quantizers:  # `set` means the node below it, too
            tree = tree.set("v/product", bits=3)
        found = jax.jit(jm.simulate(weight_norm, tree))(params, x)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        fast = jm.simulate(weight_norm, tree, weights=False)
        found = fast(jm.round_weights(params, tree), x)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_only_what_a_derived_weight_is_computed_from_stays_in_float():
    apply = lambda p, x: x @ (p["v"] * p["g"][None])
    params = {"v": jnp.asarray([[0.3, 1.0], [0.7, -0.2]]), "g": jnp.asarray([1.0, 2.0])}
    x = jnp.eye(2)
    graph = jm.trace(apply, params, x)
    config = jm.QuantConfig(weight_bits=3, activation_bits=32)
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    rounded = jm.round_weights(params, quantizers)
    np.testing.assert_array_equal(rounded["v"], params["v"])
    w = np.asarray(params["v"], np.float64) * [1.0, 2.0]
    scale = np.abs(w).max(0) / 3
    np.testing.assert_allclose(
        jax.jit(jm.simulate(apply, quantizers))(params, x),
        np.rint(w / scale) * scale,
        atol=1e-6,
    )


def test_a_pinned_scale_stays_and_an_open_one_follows():
    apply, params, inputs = model("conv_bn_relu")
    quantizers = quantized("conv_bn_relu")
    pinned = quantizers.pin(params)
    run = lambda q, p: jax.jit(jm.simulate(apply, q))(p, *inputs)
    same_bits(run(pinned, params), run(quantizers, params))
    half = replace_leaves(
        params, {"head/kernel": params["params"]["head"]["kernel"] * 0.5}
    )
    w = np.asarray(half["params"]["head"]["kernel"])
    scale = 2 * np.abs(w).max((0, 1, 2), keepdims=True) / 127
    rounded = np.float32(scale * np.rint(w / scale))
    leaf = named_leaves(jm.round_weights(half, pinned))["head/kernel"]
    np.testing.assert_allclose(leaf, rounded, atol=1e-6)
    following = named_leaves(jm.round_weights(half, quantizers))["head/kernel"]
    np.testing.assert_allclose(following, by_hand.weight_on_grid(w, (3,), 8), atol=1e-6)
    assert largest(run(pinned, half), run(quantizers, half)) > 1e-3


# Gradients.


def test_gradients_are_those_of_a_straight_through_model_by_hand():
    name = "residual"
    with by_hand.x64(True):
        apply, *arrays = model(name)
        params, inputs = by_hand.wide(arrays)
        graph = jm.trace(apply, params, *inputs)
        half = [(0.5 * inputs[0],)]  # so that the full inputs leave the quantizers, too
        quantizers = jm.calibrate(params, graph, half, progress=False)

        def through(x, s, z, low, high):
            q = jnp.round(x / s) + z
            inside = (q >= low) & (q <= high)
            fixed = jax.lax.stop_gradient(s * (jnp.clip(q, low, high) - z) - x)
            return jnp.where(inside, x + fixed, jax.lax.stop_gradient(x + fixed))

        def tap(node, value, **_):
            q = quantizers.activation(node)
            if q is None:
                return value
            grid = (np.float64(q.scale), np.float64(q.zero_point), *map(float, q.ends))
            return through(value, *grid)

        def by_hand_loss(params):
            leaves = by_hand.named(params)

            def get(parameter):
                w = leaves.get(parameter)
                if not parameter.endswith("kernel"):
                    return w
                s = jnp.max(jnp.abs(w), (0, 1, 2), keepdims=True) / 127.0
                return through(w, jax.lax.stop_gradient(s), 0.0, -127.0, 127.0)

            return jnp.sum(jnp.sin(by_hand.MODELS[name](get, tap, *inputs)))

        def loss(params, quantizers):
            return jnp.sum(jnp.sin(jm.simulate(apply, quantizers)(params, *inputs)))

        found, of_grids = jax.jit(jax.grad(loss, (0, 1)))(params, quantizers)
        expected = jax.jit(jax.grad(by_hand_loss))(params)
        plain = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(apply(p, *inputs)))))(params)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
            assert np.any(np.asarray(a))
        assert largest(found, plain) > 1e-3
        scales = {n: q.scale for n, q in of_grids.activations.items()}
        assert {*scales} == {"input", "conv1/relu", "bn2", "conv2/relu"}
        assert all(abs(float(s)) > 1e-6 for s in scales.values())


def test_gradients_reach_pinned_weight_scales_and_layers():
    apply, params, inputs = model("scan")
    quantizers = quantized("scan").pin(params)

    def loss(quantizers):
        return jnp.sum(jm.simulate(apply, quantizers)(params, *inputs) ** 2)

    grads = jax.jit(jax.grad(loss))(quantizers)
    scale = grads.weights["stack/dense/kernel"].scale
    assert scale.shape == (3, 1, 6) and np.all(np.any(scale != 0, axis=(1, 2)))
    assert np.all(np.asarray(grads.activations["stack/dense/relu"].scale) != 0)


# Front-ends, dtypes, outputs.


@pytest.mark.parametrize("name", ["conv_bn_relu", "embedding", "scan"])
def test_twins_have_equal_quantizers_and_outputs(name):
    found = {}
    for front in ("linen", "nnx"):
        apply, params, inputs = model(name, front)
        graph = jm.trace(apply, params, *inputs)
        q = jm.calibrate(params, graph, [inputs], progress=False)
        found[front] = q, jax.jit(jm.simulate(apply, q))(params, *inputs)
        assert largest(found[front][1], jax.jit(apply)(params, *inputs)) > 1e-4
    linen, nnx = found["linen"][0], found["nnx"][0]
    assert linen.weights.keys() == nnx.weights.keys()
    assert linen.activations.keys() == nnx.activations.keys()
    assert dict(linen.skipped) == dict(nnx.skipped) and linen.shared == nnx.shared
    for n, q in linen.activations.items():
        np.testing.assert_allclose(q.scale, nnx.activations[n].scale, rtol=1e-5)
    # one step of the last quantizer, should a twin's last bit fall on the other side of a tie
    step = max(float(np.max(q.scale)) for q in linen.activations.values())
    difference = np.abs(found["linen"][1] - found["nnx"][1])
    assert np.mean(difference > 1e-5) < 0.05 and np.max(difference) < 1.5 * step
    # and the linen quantizers run the nnx model
    apply, params, inputs = model(name, "nnx")
    mixed = jax.jit(jm.simulate(apply, linen))(params, *inputs)
    np.testing.assert_allclose(mixed, found["nnx"][1], atol=1.5 * step)


def test_parameters_with_and_without_their_collection_share_quantizers():
    apply, variables, inputs = model("concatenation")
    state = TrainState(
        0, lambda p, x: apply({"params": p}, x), variables["params"], None, None
    )
    graph = jm.trace(state.apply_fn, state.params, *inputs)
    own = jm.calibrate(state.params, graph, [inputs], progress=False)
    whole = quantized("concatenation")
    assert own.weights.keys() == whole.weights.keys()
    same_bits(own, whole)
    a = jax.jit(jm.simulate(state.apply_fn, whole))(state.params, *inputs)
    b = jax.jit(jm.simulate(apply, own))(variables, *inputs)
    same_bits(a, b)
    assert largest(a, jax.jit(apply)(variables, *inputs)) > 1e-3


@pytest.mark.parametrize("name", ["conv_bn_relu", "dropout"])
def test_training_and_inference_share_quantizers(name):
    case, (apply, params, inputs) = CASES[name], model(name)
    kwargs = case.train_kwargs()
    training = jm.trace(apply, params, *inputs, **kwargs)
    q = quantized(name)
    rngs = {"rngs": kwargs["rngs"]} if kwargs["rngs"] else {}
    other = jm.calibrate(params, training, [inputs], progress=False, **rngs)
    assert q.weights.keys() == other.weights.keys()
    assert q.activations.keys() == other.activations.keys()
    trained = lambda apply: jax.jit(lambda p, *x: apply(p, *x, **kwargs))(
        params, *inputs
    )
    found, plain = trained(jm.simulate(apply, q)), trained(apply)
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    # dropout scales values beyond the calibrated range, where they clip
    assert 1e-4 < largest(found[0], plain[0]) < 1.0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    apply, *arrays = model("clip_after_add")
    params, inputs = jax.tree.map(lambda x: x.astype(dtype), arrays)
    graph = jm.trace(apply, params, *inputs)
    q = jm.calibrate(params, graph, [inputs], INT32, progress=False)
    assert all(a.scale.dtype == jnp.float32 for a in q.activations.values())

    def hook(node, run, operands):
        result = run(*operands)
        return result, result

    _, seen = jax.jit(jm.evaluate(apply, hook))(params, *inputs)
    for name, a in q.activations.items():
        x = np.asarray(seen[name].astype(jnp.float32), np.float64)
        scale = (max(x.max(), 0) - min(x.min(), 0)) / 255
        np.testing.assert_allclose(
            a.scale, scale, rtol=0.01
        )  # compiled code rounds less
    y = jax.jit(jm.simulate(apply, q))(params, *inputs)
    assert y.dtype == dtype
    plain = apply(params, *inputs)
    assert 0 < largest(y.astype(jnp.float32), plain.astype(jnp.float32)) < 0.3
    rounded = jm.round_weights(params, q)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(rounded))


def test_any_tree_may_come_out():
    apply, params, inputs = model("outputs_in_a_tree")
    found = jax.jit(jm.simulate(apply, quantized("outputs_in_a_tree")))(params, *inputs)
    plain = apply(params, *inputs)
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    assert [a.dtype for a in jax.tree.leaves(found)] == [
        a.dtype for a in jax.tree.leaves(plain)
    ]
    assert 1e-4 < largest(found["logits"], plain["logits"]) < 0.2


def test_leaves_that_state_bounds_keep_them():
    """A ReLU6 equalized by s: weights divided, bounds divided, consumers multiplied."""
    apply, params, inputs = model("inverted_residual")
    quantizers = quantized("inverted_residual").set("*", enabled=False)
    leaves = named_leaves(params)
    s = np.float32(2.0 ** np.arange(-4, 4))  # powers of two, so nothing is rounded
    norm = {n: leaves[f"expand_bn/{n}"] / s for n in ("scale", "bias")}
    upper = jm.Compressed(leaves["expand/kernel"], lower=0.0 * s, upper=6.0 / s)
    kernel = leaves["depthwise/kernel"] * s[None, None, None]
    changed = {f"expand_bn/{n}": v for n, v in norm.items()}
    changed |= {"expand/kernel": upper, "depthwise/kernel": kernel}
    equal = replace_leaves(params, changed)
    found = jax.jit(jm.simulate(apply, quantizers))(equal, *inputs)
    np.testing.assert_allclose(found, apply(params, *inputs), atol=1e-5)


def test_arguments_are_left_alone():
    apply, params, inputs = model("conv_bn_relu")
    before = jax.tree.map(np.asarray, params)
    quantizers = quantized("conv_bn_relu")
    found = jax.jit(jm.simulate(apply, quantizers))(params, *inputs)
    assert largest(found, jax.jit(apply)(params, *inputs)) > 1e-3
    assert largest(jm.round_weights(params, quantizers), params) > 1e-3
    same_bits(params, before)
    assert quantizers.weights["stem/kernel"].scale is None


# Refusals.


def test_quantizers_of_another_model_are_refused():
    apply, params, inputs = model("conv_bn_relu")
    for name in ("residual", "concatenation"):
        with pytest.raises(
            ValueError, match=r"jaxmet\.simulate: .*does not run.*Calibrate"
        ):
            jm.simulate(apply, quantized(name))(params, *inputs)
    stray = jm.Quantizers(weights={"trunk/kernel": jm.Quantizer()})
    with pytest.raises(ValueError, match=r"jaxmet\.simulate: .*'trunk/kernel'"):
        jm.simulate(apply, stray)(params, *inputs)
    with pytest.raises(ValueError, match=r"jaxmet\.round_weights: .*'trunk/kernel'"):
        jm.round_weights(params, stray)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda q: q.set("bottleneck", bits=4), r"nothing is called 'bottleneck'"),
        (lambda q: q.set("stem", bits=1), r"bits is 1\. Give 2 to 16, or 32"),
        (lambda q: q.set("stem", width=4), r"no field 'width'"),
        (lambda q: q.set("left/relu", bits=4), r"uses the quantizer of 'right/concat'"),
        (lambda q: q.set("stem/bias", bits=8), r"product of those of 'stem/kernel'"),
    ],
)
def test_bad_edits_are_refused(edit, message):
    with pytest.raises(ValueError, match=r"jaxmet\.Quantizers\.set.*" + message):
        edit(quantized("concatenation", INT32))


def test_convolutions_may_stay_as_the_model_says_them():
    apply, params, inputs = model("inverted_residual")
    graph = jm.trace(apply, params, *inputs)
    quantizers = jm.calibrate(params, graph, [inputs], progress=False)
    texts = {}
    for flag in (True, False):
        device = jm.simulate(apply, quantizers, cpu_formulations=flag)
        texts[flag] = str(jax.make_jaxpr(device)(params, *inputs))
    assert "platform_index" in texts[True] and "platform_index" not in texts[False]
    with pytest.raises(ValueError, match="simulate: cpu_formulations is 1"):
        jm.simulate(apply, quantizers, cpu_formulations=1)  # type: ignore[arg-type]
