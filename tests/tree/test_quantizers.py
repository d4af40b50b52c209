"""The tree of quantizers: what each computes, editing, pinning, quantizers as data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmet as jm
from jaxmet import Compressed, Quantizer, Quantizers, grids
from jaxmet.tree.quantizer import Grid


def f32(*values):
    return jax.device_put(np.float32(values))


def rounded(x, scale, zero_point, low, high):
    """The definition, in float64."""
    x, scale, zero_point = (np.asarray(a, np.float64) for a in (x, scale, zero_point))
    return scale * (np.clip(np.rint(x / scale) + zero_point, low, high) - zero_point)


def kernel(seed=0, shape=(3, 3, 4, 5)):
    return jax.device_put(np.float32(np.random.default_rng(seed).normal(size=shape)))


def tree():
    return {
        "params": {
            "stem": {"kernel": kernel(), "bias": f32(0.3, -0.2, 0.1, 0.0, 2.0)},
            "head": {"kernel": Compressed(kernel(1, (5, 2)), upper=f32(6, 6))},
        }
    }


def named():
    params = tree()["params"]
    return {f"{m}/{n}": leaf for m, sub in params.items() for n, leaf in sub.items()}


def quantizers():
    return Quantizers(
        weights={
            "stem/kernel": Quantizer(axis=(3,)),
            "head/kernel": Quantizer(bits=4),
            "stem/bias": Quantizer(bits=32, product=("stem/kernel", "input")),
        },
        activations={
            "input": Quantizer(jnp.float32(0.01), jnp.float32(100), symmetric=False),
            "stem/relu": Quantizer(jnp.float32(0.5), jnp.float32(0), symmetric=False),
        },
        shared=(("stem/concat", "stem/relu"), ("stem/more", "stem/concat")),
        skipped=(("head/softmax", "its output is the model's"),),
    )


def test_a_scale_of_none_follows_the_tensor():
    w = np.asarray(kernel())
    scale = np.abs(w).max((0, 1, 2), keepdims=True) / 127
    expected = rounded(w, scale, 0, -127, 127)
    np.testing.assert_allclose(Quantizer(axis=(3,))(w), expected, atol=1e-6)
    twice = Quantizer(axis=(3,))(2 * kernel())
    np.testing.assert_array_equal(twice, 2 * Quantizer(axis=(3,))(kernel()))
    low, high = w.min(), w.max()
    step = (high - low) / 255
    expected = rounded(w, step, np.rint(-low / step), 0, 255)
    np.testing.assert_allclose(Quantizer(symmetric=False)(w), expected, atol=1e-6)


def test_blocks():
    w = np.asarray(kernel(2, (8, 3)))
    q = Quantizer(bits=4, axis=(1,), block=4, block_axis=0)
    expected = np.concatenate(
        [Quantizer(bits=4, axis=(1,))(w[i : i + 4]) for i in (0, 4)]
    )
    np.testing.assert_allclose(q(w), expected, atol=1e-6)
    assert q.grid(w)[0].shape == (2, 3)


def test_no_gradient_goes_through_a_scale_that_follows():
    gradient = jax.grad(lambda w: Quantizer(axis=(3,))(w).sum())(kernel())
    np.testing.assert_array_equal(gradient, np.ones((3, 3, 4, 5)))


def test_32_bits_and_switched_off_return_the_same_object():
    w = kernel()
    assert Quantizer(bits=32)(w) is w
    assert Quantizer(enabled=False)(w) is w


def test_a_trained_zero_point_counts_as_an_integer_and_gets_its_gradient():
    x = f32(-5, 0, 0.3, 9)
    q = Quantizer(jnp.float32(0.25), jnp.float32(7.4), bits=4, symmetric=False)
    np.testing.assert_allclose(q(x), rounded(x, 0.25, 7, 0, 15), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda q: q(x).sum()))(q)
    # Two values lie outside, each −s; LSQ divides by √(values · highest integer).
    np.testing.assert_allclose(gradient.zero_point, -0.5 / np.sqrt(4 * 15), rtol=1e-6)
    same = jax.jit(jax.grad(lambda q: q(x, grids_of(q)).sum()))(q)
    np.testing.assert_array_equal(gradient.zero_point, same.zero_point)
    np.testing.assert_array_equal(gradient.scale, same.scale)


def grids_of(q):
    return grids(Quantizers(activations={"a": q})).activations["a"]


@pytest.mark.parametrize(
    "q",
    [
        Quantizer(),
        Quantizer(axis=(3,), bits=4),
        Quantizer(symmetric=False),
        Quantizer(jnp.float32(0.02)),
        Quantizer(jnp.float32(0.02), jnp.float32(120), symmetric=False),
        Quantizer(jnp.float32(0.02), narrow=False, bits=6),
        Quantizer(jnp.float32(0.02), signed=False),
    ],
    ids=str,
)
def test_its_own_grid_as_data_changes_nothing_and_other_ends_act_as_bits(q):
    w = kernel()
    # XLA may divide by a constant otherwise than by a value it is given: one ulp.
    np.testing.assert_allclose(jax.jit(q)(w), jax.jit(q)(w, grids_of(q)), rtol=3e-7)
    other = q.set(bits=5)
    expected = other(w)
    assert all(np.unique(c).size <= 32 for c in np.moveaxis(np.asarray(expected), 3, 0))
    result = jax.jit(lambda w, g: q(w, g))(w, grids_of(other))
    np.testing.assert_allclose(result, expected, atol=1e-6)
    off = grids_of(q)._replace(enabled=jnp.asarray(False))
    np.testing.assert_array_equal(q(w, off), w)
    assert np.isfinite(jax.grad(lambda w: q(w, off).sum())(w)).all()


def test_data_may_switch_on_what_is_static_off_and_sweeps_need_one_program():
    w, q, traces = kernel(), Quantizer(bits=32), []

    @jax.jit
    def error(g):
        traces.append(g)
        return jnp.sum((q(w, g) - w) ** 2)

    errors = [error(grids_of(Quantizer(bits=b))) for b in (2, 4, 8)]
    assert len(traces) == 1 and errors[0] > errors[1] > errors[2] > 0
    assert error(grids_of(q)) == 0.0
    sweep = [grids_of(Quantizer(bits=b)) for b in (2, 4, 8)]
    stacked = Grid(*(jnp.stack(parts) for parts in zip(*sweep, strict=True)))
    np.testing.assert_allclose(jax.vmap(error)(stacked), errors, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 16, 32])
def test_changing_bits_keeps_the_real_range(symmetric, bits):
    zero_point = None if symmetric else jnp.float32(51)
    q = Quantizer(jnp.float32(0.5), zero_point, symmetric=symmetric)

    def span(q):
        scale, zero_point = q.grid(None)
        return np.asarray([float(scale) * (end - float(zero_point)) for end in q.ends])

    new = q.set(bits=bits)
    assert new.bits == bits
    step = float(new.grid(None)[0])
    np.testing.assert_allclose(span(new), span(q), atol=step / 2 + 1e-5, rtol=1e-6)
    back = new.set(bits=8) if bits > 8 else q
    np.testing.assert_allclose(back.scale, 0.5, rtol=1e-6)
    if not symmetric:
        assert back.zero_point == 51
        assert float(new.zero_point).is_integer()


def test_changing_symmetry_keeps_the_largest_magnitude():
    q = Quantizer(jnp.float32(0.1), jnp.float32(55), symmetric=False)  # -5.5 .. 20
    new = q.set(symmetric=True)
    assert new.zero_point is None
    np.testing.assert_allclose(new.scale, 20 / 127, rtol=1e-6)
    back = q.set(symmetric=True, signed=False)
    np.testing.assert_allclose(back.scale, 20 / 255, rtol=1e-6)


def test_set_edits_by_glob_and_leaves_the_rest():
    q = quantizers()
    new = q.set("*/kernel", bits=6, axis=None)
    assert [w.bits for w in new.weights.values()] == [6, 6, 32]
    assert new.weights["stem/kernel"].axis is None
    assert q.weights["stem/kernel"].bits == 8
    new = q.set("stem", bits=16)  # the weight and what follows, not the int32 bias
    assert new.weights["stem/kernel"].bits == new.activations["stem/relu"].bits == 16
    assert new.weights["stem/bias"].bits == 32 and new.activations["input"].bits == 8
    np.testing.assert_allclose(new.activations["stem/relu"].scale, 0.5 * 255 / 65535)
    new = q.set("input", scale=0.25, zero_point=3, bits=4)
    assert new.activations["input"].grid(None) == (0.25, 3.0)
    assert jax.tree.leaves(q.set("input", scale=None).activations["input"]) == []
    assert not q.set("stem/bias", enabled=False).weights["stem/bias"].enabled
    assert q.set("*", enabled=False).weights["stem/bias"].active is False


@pytest.mark.parametrize(
    ("glob", "fields", "message"),
    [
        ("stm", {"bits": 4}, "nothing is called 'stm'.*'stem"),
        ("stem", {"bitz": 4}, "no field 'bitz'.*'bits'"),
        ("stem", {"bits": 1}, "bits is 1"),
        ("stem", {"bits": 17}, "bits is 17"),
        ("stem", {"bits": 8.0}, "bits is 8.0"),
        ("input", {"axis": (3,)}, "calibrate again"),
        ("stem/bias", {"bits": 16}, "'stem/kernel' and 'input'"),
        ("stem/more", {"bits": 16}, "the quantizer of 'stem/relu'"),
    ],
)
def test_set_refuses(glob, fields, message):
    with pytest.raises(ValueError, match=rf"jaxmet\.Quantizers\.set.*{message}"):
        quantizers().set(glob, **fields)


def test_shared_nodes_use_the_owners_quantizer():
    q = quantizers()
    assert q.activation("stem/more") is q.activations["stem/relu"]
    assert q.owner("stem/concat") == "stem/relu"
    assert q.activation("head") is None and q.owner("head") is None
    circle = Quantizers(shared=(("a", "b"), ("b", "a")))
    assert circle.activation("a") is None


def test_pin_makes_leaves_once():
    q = quantizers()
    params = tree()
    pinned = q.pin(params)
    scale = np.abs(named()["stem/kernel"]).max((0, 1, 2), keepdims=True) / 127
    np.testing.assert_allclose(pinned.weights["stem/kernel"].scale, scale, rtol=1e-6)
    assert pinned.weights["head/kernel"].scale.shape == (1, 1)
    assert pinned.weights["stem/bias"].scale is None
    assert pinned.weights["stem/kernel"].zero_point is None
    doubled = jax.tree.map(lambda x: 2 * x, params)
    again = pinned.pin(doubled).weights["stem/kernel"].scale
    np.testing.assert_array_equal(again, pinned.weights["stem/kernel"].scale)
    before, after = (t.quantize_weights(named())["stem/kernel"] for t in (q, pinned))
    np.testing.assert_array_equal(before, after)
    derived = Quantizers({"cell": Quantizer()}, derived=("cell",))
    assert derived.pin(params).weights["cell"].scale is None


def test_quantize_weights():
    leaves = named() | {"stem_bn/mean": f32(1, 2)}
    out = quantizers().quantize_weights(leaves)
    assert list(out) == list(leaves)
    assert out["stem_bn/mean"] is leaves["stem_bn/mean"]
    head = out["head/kernel"]
    assert isinstance(head, Compressed)
    np.testing.assert_array_equal(head.upper, [6, 6])
    w = np.asarray(leaves["head/kernel"].weight)
    expected = rounded(w, np.abs(w).max() / 7, 0, -7, 7)
    np.testing.assert_allclose(head.weight, expected, atol=1e-6)


def test_an_int32_bias_is_a_multiple_of_the_product_of_scales():
    leaves = named()
    w = np.asarray(leaves["stem/kernel"], np.float64)
    step = np.abs(w).max((0, 1, 2)) / 127 * 0.01
    bias = np.asarray(leaves["stem/bias"])
    expected = rounded(bias, step, 0, -(2.0**31), 2.0**31 - 1)
    q = quantizers()
    out = q.quantize_weights(leaves)["stem/bias"]
    assert np.abs(expected - bias).max() > 1e-6  # so that the next line says something
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-9)
    coarse = q.set("input", scale=1e3).set("stem/kernel", axis=None)
    w_step = np.abs(w).max() / 127
    out = coarse.quantize_weights(leaves)["stem/bias"]
    np.testing.assert_allclose(out, rounded(bias, w_step * 1e3, 0, -9, 9), rtol=2e-6)
    tiny = q.set("input", scale=1e-12).quantize_weights(leaves)["stem/bias"]
    np.testing.assert_allclose(tiny[4], 2.0**31 * step[4] * 1e-10, rtol=1e-5)
    none = q.set("input", scale=0.0).quantize_weights(leaves)["stem/bias"]
    assert np.isfinite(none).all()
    dead = leaves | {"stem/kernel": jnp.zeros((3, 3, 4, 5))}
    assert np.isfinite(q.quantize_weights(dead)["stem/bias"]).all()


def test_a_bias_stays_float_where_its_product_is_not_integer():
    q, leaves = quantizers(), named()
    for off in (
        q.set("stem/bias", enabled=False),
        q.set("input", enabled=False),
        q.set("stem/kernel", bits=32),
        q.set("input", scale=None),
    ):
        assert off.quantize_weights(leaves)["stem/bias"] is leaves["stem/bias"]
    data = grids(q)
    np.testing.assert_array_equal(
        q.quantize_weights(leaves, data)["stem/bias"],
        q.quantize_weights(leaves)["stem/bias"],
    )
    off = data.activations["input"]._replace(enabled=jnp.asarray(False))
    data = data._replace(activations=data.activations | {"input": off})
    np.testing.assert_array_equal(
        q.quantize_weights(leaves, data)["stem/bias"], leaves["stem/bias"]
    )
    lost = Quantizers({"stem/bias": q.weights["stem/bias"]})
    with pytest.raises(ValueError, match="'stem/bias'.*'stem/kernel'.*bias='float'"):
        lost.quantize_weights(leaves)


@jax.jit
def quantized(quantizers, leaves):
    return quantizers.quantize_weights(leaves)


def test_stacked_layers_have_a_scale_each():
    w, bias = kernel(3, (3, 4, 5)), kernel(4, (3, 5))
    for axis in ((0,), (0, 2)):
        q = Quantizers(
            {
                "k": Quantizer(axis=axis),
                "b": Quantizer(bits=32, product=("k", "x")),
            },
            {"x": Quantizer(f32(0.1, 1.0, 10.0))},
        )
        out = quantized(q, {"k": w, "b": bias})
        for i in range(3):
            one = Quantizers(
                {
                    "k": Quantizer(axis=None if len(axis) == 1 else (1,)),
                    "b": Quantizer(bits=32, product=("k", "x")),
                },
                {"x": Quantizer(jnp.float32(10.0 ** (i - 1)))},
            )
            one = quantized(one, {"k": w[i], "b": bias[i]})
            np.testing.assert_array_equal(out["k"][i], one["k"])
            np.testing.assert_allclose(out["b"][i], one["b"], rtol=1e-6)


def test_it_is_a_tree_that_jit_and_optax_take():
    q = quantizers().pin(tree())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(q))
    assert len(jax.tree.leaves(q)) == 2 + 2 * 2
    jax.tree.map(lambda _: object(), q)
    x = f32(0.0, 0.3, 200.0)  # the grid ends at 127.5

    @jax.jit
    def loss(q):
        return jnp.sum((q.activation("stem/relu")(x) - x) ** 2)

    optimizer = optax.sgd(1e-6)
    updates, _ = optimizer.update(jax.grad(loss)(q), optimizer.init(q), q)
    new = optax.apply_updates(q, updates)
    assert loss(new) < loss(q)
    assert new.shared == q.shared and new.activations["stem/relu"].bits == 8


def test_it_prints_as_a_table():
    text = repr(quantizers().set("head", enabled=False))
    assert "follows the weight" in text and "product of stem/kernel and input" in text
    row = next(line for line in text.splitlines() if line.startswith("input"))
    assert row.split() == ["input", "activation", "8", "no", "tensor", "0.01"]
    assert "head/softmax: its output is the model's" in text
    assert "stem/more as stem/relu" in text
    page = quantizers()._repr_html_()
    assert "<td>stem/kernel</td>" in page and "<li>stem/more as stem/relu</li>" in page
    assert "head/softmax: its output is the model&#x27;s</li>" in page
    pinned = repr(quantizers().pin(tree()))
    assert " .. " in pinned
    jax.jit(lambda q: repr(q) and 0)(quantizers())
    assert "4 bits, symmetric, channel" in repr(Quantizer(bits=4, axis=(1,)))


# Headroom


def ranges(q):
    """The real ends of a quantizer's quantizer, in float64."""
    scale, zero_point = (np.asarray(a, np.float64) for a in q.grid(None))
    return [scale * (end - zero_point) for end in q.ends]


@pytest.fixture(scope="module")
def calibrated():
    """Calibrations of values between −1 and 3 with some bits and settings."""

    def apply(p, x):
        return jnp.tanh(x @ p) @ p

    w, x = jnp.eye(4), jnp.linspace(-1.0, 3.0, 32).reshape(8, 4)
    graph = jm.trace(apply, w, x)

    def calibrate(bits, **settings):
        config = jm.QuantConfig(activation_bits=bits, **settings)
        found = jm.calibrate(w, graph, [x], config, progress=False)
        return found, found.activations["input"]

    return calibrate


@pytest.mark.parametrize("symmetric", [False, True])
def test_sixteen_bits_reach_twice_as_far(calibrated, symmetric):
    low, high = (-3, 3) if symmetric else (-1, 3)
    for bits, times in ((4, 1), (8, 1), (15, 1), (16, 2)):
        _, q = calibrated(bits, symmetric_activations=symmetric)
        step = times * (high - low) / 2**bits
        np.testing.assert_allclose(
            ranges(q), [times * low, times * high], atol=2 * step
        )
    _, q = calibrated(16, symmetric_activations=symmetric)
    np.testing.assert_allclose(q(f32(5.5, 100.0)), f32(5.5, 6.0), atol=2e-4)


def test_other_calibrators_have_no_headroom(calibrated):
    _, q = calibrated(16, activation_range="percentile", percentile=100)
    np.testing.assert_allclose(ranges(q), [-1, 3], atol=1e-3)


@pytest.mark.parametrize("learn", ["lsq", "minmax"])
@pytest.mark.parametrize("one, two", [(16, 8), (8, 16), (16, 5)])
def test_the_range_of_other_bits_is_that_of_calibrating_with_them(
    calibrated, one, two, learn
):
    old, new = (calibrated(bits)[0].set("*", learn=learn) for bits in (one, two))
    expected = ranges(new.activations["input"])
    step = 4 / 2 ** min(one, two)

    changed = old.set("*", bits=two)
    through_float = old.set("*", bits=32).set("*", bits=two)
    back = changed.set("*", bits=one).set("*", bits=two)
    for found in (changed, through_float, back):
        np.testing.assert_allclose(
            ranges(found.activations["input"]), expected, atol=step
        )

    @jax.jit
    def as_data(bits):
        grid = grids(old, activation_bits=bits).activations["input"]
        scale, zero_point = old.activations["input"].grid(None, grid)
        return scale * (grid.low - zero_point), scale * (grid.high - zero_point)

    np.testing.assert_allclose(as_data(jnp.int32(two)), expected, atol=step)


def test_a_stated_range_is_meant_as_it_is(calibrated):
    old, _ = calibrated(8)
    stated = old.set("input", bits=16, minimum=0.0, maximum=6.0)
    for q in (stated, stated.set("input", bits=8)):
        np.testing.assert_allclose(ranges(q.activations["input"]), [0, 6], atol=0.05)


def test_pinned_scales_of_another_tree_are_refused():
    draw = lambda *n: jax.device_put(np.float32(np.ones(n)))
    tree, other = {"w": draw(4, 6)}, {"w": draw(4, 8)}
    apply = lambda p, x: x @ p["w"]
    graph = jm.trace(apply, tree, draw(2, 4))
    quantizers = jm.calibrate(tree, graph, [draw(2, 4)], progress=False).pin(tree)
    with pytest.raises(ValueError, match=r"round_weights: .*'w'.*\(1, 6\).*\(4, 8\)"):
        jm.round_weights(other, quantizers)
    assert jm.round_weights(tree, quantizers)["w"].shape == (4, 6)
