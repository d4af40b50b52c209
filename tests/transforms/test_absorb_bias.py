"""Bias absorption: the function to rounding where the norms tell the truth, borders too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.nn import leaky_relu, relu, relu6

import jaxmet as jm
from by_hand import x64
from folds import affine
from jaxmet.layers.moments import input_moments, node_moments
from jaxmet.tree.named_leaves import named_leaves
from zoo import CASES

KEY = jax.random.key(0)
ROW = (1, 1, 1, -1)
C = 4
LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(p, x, groups=1, padding="SAME", strides=(1, 1), **kw):
    y = lax.conv_general_dilated(
        x,
        p["w"],
        strides,
        padding,
        dimension_numbers=LAYOUT,
        feature_group_count=groups,
        **kw,
    )
    return y + p["b"].reshape(ROW) if "b" in p else y


def norm(p, x):
    return affine(p, x, shape=ROW)


def weight(*shape, seed=5, bias=True):
    rng = np.random.default_rng(seed)
    p = {"w": rng.normal(size=shape)}
    return {**p, "b": rng.normal(size=shape[-1])} if bias else p


def high(n=C, seed=2):
    """A norm whose values stay within its three standard deviations, most of them high."""
    rng = np.random.default_rng(seed)
    sign = np.where(np.arange(n) % 4 == 2, -1.0, 1.0)
    return {
        "mean": rng.normal(size=n),
        "var": np.full(n, 1e3),
        "scale": sign * rng.uniform(0.4, 0.7, n),
        "bias": np.where(np.arange(n) == n - 1, -2.0, rng.uniform(2.5, 5.0, n)),
    }


def sigma(norm):
    """The standard deviation of what a norm makes."""
    return np.abs(norm["scale"]) * np.sqrt(norm["var"] / (norm["var"] + 1e-3))


def pool(x):
    window = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return lax.reduce_window(x, 0.0, lax.add, *window) / 4.0


def two_channels(p, y):
    z = relu(norm(p["other"], conv(p["side"], y)))
    y = relu(norm(p["norm"], y))
    return jnp.concatenate([z, y], -1)


def two_parts(p, y):
    return conv(p["a"], two_channels(p, y))


SIDE = {"side": weight(1, 1, C, 3, seed=6), "other": high(3, 8)}
# After a first product: the layers, the parameters, how many kernels then hold an offset.
NETS = {
    "conv": (
        lambda p, y: conv(p["a"], relu(norm(p["norm"], y))),
        weight(3, 3, C, 5),
        1,
    ),
    "no padding": (
        lambda p, y: conv(p["a"], relu(norm(p["norm"], y)), padding="VALID"),
        weight(3, 3, C, 5),
        0,
    ),
    "strided": (
        lambda p, y: conv(p["a"], relu(norm(p["norm"], y)), strides=(2, 2)),
        weight(3, 3, C, 5),
        1,
    ),
    "relu6": (
        lambda p, y: conv(p["a"], relu6(norm(p["norm"], y))),
        weight(3, 3, C, 5),
        1,
    ),
    "leaky": (
        lambda p, y: conv(p["a"], leaky_relu(norm(p["norm"], y))),
        weight(3, 3, C, 5),
        1,
    ),
    "depthwise": (
        lambda p, y: conv(p["a"], relu(norm(p["norm"], y)), C),
        weight(3, 3, 1, 2 * C),
        1,
    ),
    "grouped": (
        lambda p, y: conv(p["a"], relu(norm(p["norm"], y)), 2),
        weight(3, 3, C // 2, 6),
        1,
    ),
    "dilated": (
        lambda p, y: conv(p["a"], relu(norm(p["norm"], y)), rhs_dilation=(2, 2)),
        weight(3, 3, C, 5),
        1,
    ),
    "uneven padding": (
        lambda p, y: conv(p["a"], relu(norm(p["norm"], y)), padding=((0, 2), (3, -1))),
        weight(3, 3, C, 5),
        1,
    ),
    "dense after flatten": (
        lambda p, y: (
            relu(norm(p["norm"], y)).reshape(len(y), -1) @ p["a"]["w"]
            + p["a"]["b"].reshape(1, -1)
        ),
        weight(6 * 6 * C, 5),
        0,
    ),
    "dense after a mean": (
        lambda p, y: (
            jnp.mean(relu6(norm(p["norm"], y)), (1, 2)) @ p["a"]["w"]
            + p["a"]["b"].reshape(1, -1)
        ),
        weight(C, 5),
        0,
    ),
    "pool": (
        lambda p, y: conv(p["a"], pool(relu(norm(p["norm"], y)))),
        weight(3, 3, C, 5),
        1,
    ),
    "concatenation": (two_parts, weight(3, 3, C + 3, 5), 1),
    "flattened concatenation": (
        lambda p, y: (
            two_channels(p, y).reshape(len(y), -1) @ p["a"]["w"]
            + p["a"]["b"].reshape(1, -1)
        ),
        weight(6 * 6 * (C + 3), 5),
        0,
    ),
    "norm after": (
        lambda p, y: norm(p["after"], conv(p["a"], relu(norm(p["norm"], y)))),
        weight(3, 3, C, 3, bias=False),
        1,
    ),
    "two consumers": (
        lambda p, y: (
            conv(p["a"], z := relu(norm(p["norm"], y))),
            conv(p["second"], z),
        ),
        weight(3, 3, C, 5),
        1,
    ),
}


def network(name, dtype=np.float64):
    body, a, _ = NETS[name]
    params = {"first": weight(1, 1, 3, C, seed=3), "norm": high(), "a": a, **SIDE}
    params |= {"after": high(3, 9), "second": weight(1, 1, C, 2, seed=7)}
    params = jax.tree.map(lambda v: jnp.asarray(v, dtype), params)

    def apply(p, x):
        return body(p, conv(p["first"], x))

    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 3)), dtype)
    return apply, params, x


def difference(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


def offsets(params):
    leaves = named_leaves(params).items()
    return {
        k: v.input_offset
        for k, v in leaves
        if getattr(v, "input_offset", None) is not None
    }


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_to_rounding(name):
    with x64(True):
        apply, params, x = network(name)
        graph = jm.trace(apply, params, x)
        after, table = jm.absorb_bias(params, graph, with_report=True)
        got, want = jax.jit(jm.lift(apply))(after, x), apply(params, x)
        assert difference(got, want) < 1e-12 * max(
            1.0, difference(want, jax.tree.map(jnp.zeros_like, want))
        )
        assert len(offsets(after)) == NETS[name][2]
        assert max(table["largest"]) > 0.5 and "a" in str(table["into"])
        c = np.maximum(
            0,
            high()["bias"] - 3 * np.abs(high()["scale"]) * np.sqrt(1e3 / (1e3 + 1e-3)),
        )
        np.testing.assert_allclose(
            after["norm"]["bias"], high()["bias"] - c, atol=1e-12
        )
        for role in ("mean", "var", "scale"):
            np.testing.assert_array_equal(after["norm"][role], params["norm"][role])


def test_the_worth_of_a_constant_by_hand():
    with x64(True):
        apply, params, x = network("conv")
        after = jm.absorb_bias(params, jm.trace(apply, params, x), n_sigma=2.0)
        c = np.maximum(0, params["norm"]["bias"] - 2 * sigma(params["norm"]))
        worth = np.asarray(params["a"]["w"]).sum((0, 1)).T @ c
        np.testing.assert_allclose(
            after["a"]["b"], params["a"]["b"] + worth, atol=1e-12
        )
        np.testing.assert_allclose(after["a"]["w"].input_offset, -c, atol=1e-12)


def test_without_the_offset_borders_are_wrong_and_the_inside_is_not():
    with x64(True):
        apply, params, x = network("conv")
        after = jm.absorb_bias(params, jm.trace(apply, params, x))
        plain = {**after, "a": {**after["a"], "w": after["a"]["w"].weight}}
        error = np.abs(np.asarray(apply(plain, x) - apply(params, x)))
        assert error[:, 1:-1, 1:-1].max() < 1e-12 and error[:, 0].max() > 1.0


def test_a_bound_is_less_and_caps_what_is_absorbed():
    with x64(True):
        apply, params, x = network("relu6")
        bias = jnp.asarray([4.0, 20.0, 3.0, 2.5])  # the second is always clipped
        params["norm"]["bias"] = bias
        after = jm.absorb_bias(params, graph := jm.trace(apply, params, x))
        c = np.asarray(bias - after["norm"]["bias"])
        assert c[1] == 6 and 0 < c[0] < 4
        np.testing.assert_allclose(after["first"]["w"].upper, 6 - c, atol=1e-12)
        assert difference(jax.jit(jm.lift(apply))(after, x), apply(params, x)) < 1e-12
        assert not np.any(node_moments(graph, after)["first/clip"].high > 6 - c + 1e-12)


def test_after_folding_and_equalizing_and_again_after_it():
    with x64(True):
        apply, params, x = network("norm after")
        graph = jm.trace(apply, params, x)
        want, lifted = apply(params, x), jax.jit(jm.lift(apply))
        tree = jm.fold_batch_norm(params, graph)
        for _ in range(2):
            tree = jm.equalize(tree, graph, objective="range", progress=False)
            tree = jm.absorb_bias(tree, graph)
            assert difference(lifted(tree, x), want) < 1e-11
        unequal = jax.tree.map(lambda v: v, tree)
        kernel = unequal["first"]["w"]
        unequal["first"]["w"] = kernel * jnp.asarray([1.0, 9.0, 0.1, 3.0]).reshape(ROW)
        unequal["norm"] |= {"scale": tree["norm"]["scale"] * 2}
        again = jm.equalize(unequal, graph, objective="range", progress=False)
        assert difference(lifted(again, x), lifted(unequal, x)) < 1e-10
        old, new = (offsets(t)["a/w"] for t in (unequal, again))
        assert np.abs(np.log(np.asarray(old[:3] / new[:3]))).max() > 0.1


def test_statistics_stay_true():
    """The norm after stores the mean of what it reads, as before so afterwards."""
    with x64(True):
        apply, params, x = network("norm after")
        graph = jm.trace(apply, params, x)
        after = jm.absorb_bias(params, graph)
        reads = lambda node, run, operands: (
            (run(*operands), operands[0] if node.name == "after" else None)
        )
        seen = [jm.evaluate(apply, reads)(p, x)[1]["after"] for p in (params, after)]
        moved = params["after"]["mean"] - after["after"]["mean"]
        assert float(jnp.max(jnp.abs(moved))) > 0.1
        lower = seen[0] - seen[1] - moved.reshape(ROW)  # at every place, borders too
        np.testing.assert_allclose(lower, np.zeros_like(lower), atol=1e-12)
        before, now = (input_moments(graph, p)["a"] for p in (params, after))
        c = params["norm"]["bias"] - after["norm"]["bias"]
        high_ones = c > 0
        np.testing.assert_allclose(
            (before.mean - now.mean)[high_ones], c[high_ones], atol=0.01
        )


def test_nothing_to_absorb_leaves_the_tree_as_it_is():
    apply, params, x = network("conv", np.float32)
    params["norm"]["bias"] = jnp.asarray([-1.0, 0.5, 0.0, 1.0])
    after, table = jm.absorb_bias(params, jm.trace(apply, params, x), with_report=True)
    assert table["note"] == ["nothing to absorb"]
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        assert a is b


def test_constant_channels_stay_finite():
    apply, params, x = network("conv", np.float32)
    params["norm"] |= {"var": jnp.zeros(C), "scale": jnp.zeros(C)}
    after = jm.absorb_bias(params, jm.trace(apply, params, x))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(after))
    assert difference(jax.jit(jm.lift(apply))(after, x), apply(params, x)) < 1e-4
    np.testing.assert_array_equal(after["norm"]["bias"][:-1], np.zeros(C - 1))


LEFT = {
    "addition": (
        lambda p, y: conv(p["a"], y + relu(norm(p["norm"], y))),
        "add' reads it",
    ),
    "output": (
        lambda p, y: ((z := relu(norm(p["norm"], y))), conv(p["a"], z)),
        "output",
    ),
    "no bias after": (
        lambda p, y: conv({"w": p["a"]["w"]}, relu(norm(p["norm"], y))),
        "no bias; no norm",
    ),
    "padded apart": (
        lambda p, y: conv(
            p["a"],
            jnp.pad(relu(norm(p["norm"], y)), ((0, 0), (1, 1), (1, 1), (0, 0))),
            padding="VALID",
        ),
        "pad reads it",
    ),
    "padded pool": (
        lambda p, y: conv(
            p["a"],
            lax.reduce_window(
                relu(norm(p["norm"], y)),
                0.0,
                lax.add,
                (1, 3, 3, 1),
                (1, 1, 1, 1),
                "SAME",
            )
            / 9.0,
        ),
        "pool' reads it",
    ),
    "other axis": (
        lambda p, y: conv(
            p["a"], jnp.concatenate([relu(norm(p["norm"], y)), y], axis=1)
        ),
        "concat' reads it",
    ),
    "both signs": (
        lambda p, y: conv(
            p["a"], jnp.concatenate([relu(z := norm(p["norm"], y)), relu(-z)], axis=1)
        ),
        "alone in reading",
    ),
    "dilated input": (
        lambda p, y: conv(
            p["a"],
            relu(norm(p["norm"], y)),
            padding=((1, 1), (1, 1)),
            lhs_dilation=(2, 2),
        ),
        "dilated input",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_give_is_left_alone_and_said(name):
    body, why = LEFT[name]
    _, params, x = network("conv", np.float32)

    def apply(p, x):
        return body(p, conv(p["first"], x))

    graph = jm.trace(apply, params, x)
    after, table = jm.absorb_bias(params, graph, with_report=True)
    assert why in table["note"][0] and not any(table["into"])
    assert difference(after, params) == 0
    with pytest.raises(
        ValueError, match=r"'first/relu' cannot give anything: .*by name"
    ):
        jm.absorb_bias(params, graph.only("first/relu"))


def test_only_what_is_selected_changes():
    apply, params, x = network("two consumers", np.float32)
    graph = jm.trace(apply, params, x)
    for part, why in (("norm", "norm: not selected"), ("second", "second: not")):
        _, table = jm.absorb_bias(params, graph.without(part), with_report=True)
        assert why in table["note"][0]


@pytest.mark.parametrize("n_sigma", [-1.0, float("nan"), float("inf")])
def test_a_bad_n_sigma_is_refused(n_sigma):
    apply, params, x = network("conv", np.float32)
    with pytest.raises(ValueError, match=r"jaxmet.absorb_bias: n_sigma is .*3\.0"):
        jm.absorb_bias(params, jm.trace(apply, params, x), n_sigma=n_sigma)


def test_missing_statistics_and_integers_are_refused():
    apply, params, x = network("conv", np.float32)
    graph = jm.trace(apply, params, x)
    lost = {**params, "norm": {k: v for k, v in params["norm"].items() if k != "var"}}
    with pytest.raises(ValueError, match="the tree has no 'norm/var'"):
        jm.absorb_bias(lost, graph)
    whole = {**params, "a": {**params["a"], "w": params["a"]["w"].astype(jnp.int8)}}
    with pytest.raises(ValueError, match="'a/w' has dtype int8"):
        jm.absorb_bias(whole, graph)


# What an offset goes through


@pytest.fixture(scope="module")
def absorbed():
    apply, params, inputs = CASES["mobile"].make["linen"](KEY)
    graph = jm.trace(apply, params, *inputs)
    after = jm.absorb_bias(params, graph, n_sigma=0.0)
    assert set(offsets(after)) == {"block1/depthwise/kernel", "block2/depthwise/kernel"}
    return apply, graph, after, inputs[0]


def test_an_offset_is_what_padding_holds(absorbed):
    """Against numpy's own padding, in the depthwise convolution that CPUs run otherwise."""
    apply, _, params, x = absorbed
    name = "block1/depthwise"

    def hook(node, run, operands):
        y = run(*operands)
        return y, (operands[0], y) if node.name == name else None

    for formulations in (True, False):
        run = jm.evaluate(apply, hook, cpu_formulations=formulations)
        x_in, y = jax.jit(run)(params, x)[1][name]
        leaf = params["params"]["block1"]["depthwise"]["kernel"]
        w, held = np.asarray(leaf.weight, np.float64), np.asarray(leaf.input_offset)
        a = np.asarray(x_in, np.float64)
        wide = np.broadcast_to(
            held, (len(a), a.shape[1] + 2, a.shape[2] + 2, len(held))
        )
        wide = wide.copy()
        wide[:, 1:-1, 1:-1] = a
        want = sum(
            wide[:, i : i + a.shape[1], j : j + a.shape[2]] * w[i, j, 0]
            for i in range(3)
            for j in range(3)
        )
        bias = np.asarray(params["params"]["block1"]["depthwise"].get("bias", 0.0))
        np.testing.assert_allclose(y, want + bias, atol=1e-4)


@pytest.mark.slow
def test_saving_simulating_and_segments_carry_it(absorbed, tmp_path):
    apply, graph, params, x = absorbed
    want = jax.jit(jm.lift(apply))(params, x)
    jm.save(tmp_path / "m.npz", params=params)
    back = jm.load(tmp_path / "m.npz").params
    assert difference(jax.jit(jm.lift(apply))(back, x), want) == 0
    config = jm.QuantConfig(weight_bits=32, activation_bits=32)
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    assert difference(jax.jit(jm.simulate(apply, quantizers))(params, x), want) < 1e-5
    config = jm.QuantConfig(activation_bits=32)
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    rounded = jm.round_weights(params, quantizers)
    assert offsets(rounded).keys() == offsets(params).keys()
    assert len(jm.plan(params, graph)) > 0
    pieces = jm.segments(graph, params, x, cuts=["block1/depthwise"])
    values = pieces.begin(x)
    for piece in pieces:
        values = piece(params, values)
    assert difference(pieces.finish(values), want) < 1e-5


def test_a_leaf_with_an_offset_is_no_plain_array(absorbed):
    apply, _, params, x = absorbed
    with pytest.raises(ValueError, match="states input_offset.*jm.lift"):
        jm.densify(
            jax.tree.map(
                lambda v: v, {"k": params["params"]["block1"]["depthwise"]["kernel"]}
            )
        )
    wrong = {"params": dict(params["params"]), "batch_stats": params["batch_stats"]}
    head = dict(wrong["params"]["head"])
    head["kernel"] = jm.Compressed(head["kernel"], input_offset=jnp.ones(16))
    wrong["params"]["head"] = head
    with pytest.raises(ValueError, match="'head/kernel' states what the padding"):
        jm.lift(apply)(wrong, x)


def test_eager_and_jitted_agree(absorbed):
    apply, graph, after, _ = absorbed
    params = CASES["mobile"].make["linen"](KEY)[1]
    jitted = jax.jit(lambda p: jm.absorb_bias(p, graph, n_sigma=0.0))(params)
    assert difference(jitted, after) < 1e-5
