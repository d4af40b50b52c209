"""Folding of every form of a norm into every layout of a product, joined ones too.

The oracle of a fold is the formula itself in float64 numpy, and the model's own output.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmet as jm
from folds import (
    EPSILON,
    KEY,
    ONE_ULP,
    affine,
    check_folded,
    close,
    gain_of,
    mlp,
    norm_leaves,
    numbers,
    same_bits,
    same_function,
    same_outputs,
    wide,
)
from jaxmet.engine.graph.graph import trace
from jaxmet.numerics.norm import folded_statistics, norm_gain, unit_scale
from jaxmet.transforms.fold import fold_batch_norm
from jaxmet.tree.names import named_leaves, replace_leaves
from zoo_nets import (
    batch_norm,
    conv,
    conv_transpose,
    dense,
    fill,
    image,
    linen_factory,
    net,
    nnx_factory,
    normal,
)

# Forms of a norm


def test_published_numbers():
    """The example of AIMET's own test: the first bias rises by exactly one."""
    norm = {
        "mean": jnp.float32([1, 2]),
        "var": jnp.float32([1, 2]),
        "scale": jnp.float32([1, 3]),
        "bias": jnp.float32([2, 3]),
    }
    params = {"conv": numbers(0, w=(3, 3, 2, 2)) | {"b": jnp.zeros(2)}, "norm": norm}

    def apply(p, x):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, p["conv"]["w"], (1, 1), "SAME", dimension_numbers=layout
        )
        y = y + p["conv"]["b"].reshape(1, 1, 1, 2)
        return affine(p["norm"], y, 0.0, (1, 1, 1, 2))

    (x,) = image(channels=2)(KEY)
    after = fold_batch_norm(params, trace(apply, params, x))
    shift = after["norm"]["bias"] - after["norm"]["mean"] + after["conv"]["b"]
    np.testing.assert_array_equal(shift[0], np.float32(1))
    close(shift[1], 3 - 2 * 3 / np.sqrt(2), 1e-6)
    close(after["conv"]["w"], np.asarray(params["conv"]["w"]) * [1, 3 / 2**0.5], 1e-6)


@pytest.mark.parametrize("missing", ["scale", "bias", "mean", "scale bias mean"])
def test_norms_without_some_leaves(missing):
    apply, params, x = mlp()
    params["norm"] = norm_leaves(5, leave_out=missing.split())
    graph = trace(apply, params, x)
    after, report = fold_batch_norm(params, graph, with_report=True)
    same_function(apply, params, after, x)
    assert report["into"] == ["one"]
    old, new = wide(params["norm"]), wide(after["norm"])
    g = old.get("scale", 1.0) / np.sqrt(old["var"] + EPSILON)
    close(after["one"]["w"], np.asarray(params["one"]["w"]) * g, 1e-6)
    close(new.get("scale", 1.0) / np.sqrt(new["var"] + EPSILON), np.ones(5), ONE_ULP)
    if "scale" in missing:
        close(new["var"], np.full(5, 1 - EPSILON), 1e-7)
        assert "1 − epsilon" in report["note"][0]
    else:
        assert report["note"] == [None]
    same_bits(fold_batch_norm(after, graph), after)


def by_division(p, x):
    return (x - p["mean"][None]) / jnp.sqrt(p["var"] + EPSILON)[None] * p["scale"][
        None
    ] + p["bias"][None]


def scale_over_root(p, x):
    gain = p["scale"] / jnp.sqrt(p["var"] + EPSILON)
    return (x - p["mean"][None]) * gain[None] + p["bias"][None]


def by_power(p, x):
    gain = (p["var"] + EPSILON) ** -0.5
    return (x - p["mean"][None]) * gain[None] * p["scale"][None] + p["bias"][None]


def with_a_constant(p, x):
    gain = 3.0 * jax.lax.rsqrt(p["var"] + EPSILON) * p["scale"]
    return (x - p["mean"][None]) * gain[None] + p["bias"][None]


@pytest.mark.parametrize(
    "form", [by_division, scale_over_root, by_power, with_a_constant]
)
def test_other_forms_of_a_norm(form):
    apply, params, x = mlp(form)
    after = fold_batch_norm(params, trace(apply, params, x))
    same_function(apply, params, after, x)
    flat = {f"n/{k}": v for k, v in params["norm"].items()}
    check_folded(
        "n",
        "p",
        flat | {"p/w": params["one"]["w"], "p/b": params["one"]["b"]},
        {f"n/{k}": v for k, v in after["norm"].items()}
        | {"p/w": after["one"]["w"], "p/b": after["one"]["b"]},
    )


LAYERS = {  # what makes the channels of a norm: (layer, channels, features)
    "conv": (conv(3, 4, 3), 3, 4),
    "unbiased": (conv(3, 4, 3, use_bias=False), 3, 4),
    "strided": (conv(3, 4, 3, strides=(2, 2), kernel_dilation=(2, 1)), 3, 4),
    "grouped": (conv(6, 4, 3, feature_group_count=2), 6, 4),
    "depthwise": (conv(4, 4, 3, feature_group_count=4), 4, 4),
    "multiplier": (conv(3, 6, 3, feature_group_count=3), 3, 6),
    "transposed": (conv_transpose(3, 4, 3, strides=(2, 2)), 3, 4),
    "single": (conv(3, 1, 3), 3, 1),
    "dense": (dense(3, 4), 3, 4),
}


@pytest.mark.parametrize("factory", [linen_factory, nnx_factory])
def test_products_that_take_a_gain(factory):
    """All of them in one model, side by side: a branch and an output for each."""

    def branch(m, x):
        return jnp.tanh(m.bn(m.layer(x), use_running_average=True))

    def forward(m, x):
        return {n: getattr(m, n)(x[..., :c]) for n, (_, c, _) in LAYERS.items()}

    branches = {
        name: net(branch, layer=layer, bn=batch_norm(features))
        for name, (layer, _, features) in LAYERS.items()
    }
    apply, params, inputs = factory(net(forward, **branches), image(6, 6))(KEY)
    after = fold_batch_norm(params, trace(apply, params, *inputs))
    same_outputs(apply, params, after, *inputs)
    old, new = named_leaves(params), named_leaves(after)
    for name in LAYERS:
        check_folded(f"{name}/bn", f"{name}/layer", old, new)


@pytest.mark.parametrize("axis", [-1, (-2, -1), 1])
def test_products_with_two_feature_axes(axis):
    """A norm over one of them, both (in any order of layouts), or another axis."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.DenseGeneral((3, 4), name="heads")(x)
            y = nn.BatchNorm(True, axis=axis, epsilon=EPSILON, name="bn")(y)
            return jnp.tanh(y)

    (x,) = normal(2, 5, 6)(KEY)
    model = Net()
    params = fill(jax.eval_shape(model.init, KEY, x), KEY)
    after, report = fold_batch_norm(
        params, trace(model.apply, params, x), with_report=True
    )
    same_function(model.apply, params, after, x)
    if axis == 1:
        assert "channels" in report["note"][0]
        same_bits(after, params)
        return
    assert report["into"] == ["heads"]
    gains = gain_of("bn", wide(named_leaves(after)))
    close(gains, np.ones_like(gains), ONE_ULP)


# Norms before a product


AFTER = {  # the products that read the norm
    "padded": [conv(4, 6, 3)],
    "doubled": [conv(4, 6, 3), conv(4, 6, 3, use_bias=False)],
    "grouped": [conv(4, 6, 3, feature_group_count=2)],
    "multiplier": [conv(4, 8, 3, feature_group_count=4)],
    "transposed": [conv_transpose(4, 6, 3, strides=(2, 2))],
    "dense": [dense(4, 6)],
}


@pytest.mark.parametrize("factory", [linen_factory, nnx_factory])
def test_a_norm_before_products_gives_them_its_gain(factory):
    """All of them in one model, side by side: a norm and an output for each."""

    def branch(layers):
        def forward(m, x):
            x = m.bn(x, use_running_average=True)
            return sum(getattr(m, k)(x) for k in layers)

        return net(forward, bn=batch_norm(4), **layers)

    branches = {n: branch(dict(zip("ab", AFTER[n], strict=False))) for n in AFTER}
    model = net(lambda m, x: {n: getattr(m, n)(x) for n in AFTER}, **branches)
    apply, params, inputs = factory(model, image(6, 4))(KEY)
    graph = trace(apply, params, *inputs)
    after, report = fold_batch_norm(params, graph, with_report=True)
    same_outputs(apply, params, after, *inputs)  # the padded border is in it
    assert set(report["side"]) == {"after"}
    into = dict(zip(report["norm"], report["into"], strict=True))
    old, new = wide(named_leaves(params)), wide(named_leaves(after))
    for n, layers in AFTER.items():
        assert into[f"{n}/bn"] == ", ".join(f"{n}/{k}" for k in "ab"[: len(layers)])
        g = gain_of(f"{n}/bn", old)
        close(gain_of(f"{n}/bn", new), np.ones(4), ONE_ULP)
        close(new[f"{n}/bn/bias"], old[f"{n}/bn/bias"] / g, 1e-6)
        for leaf in ("bn/mean", "bn/var", "a/bias"):
            np.testing.assert_array_equal(new[f"{n}/{leaf}"], old[f"{n}/{leaf}"])
        before, kernel = (p[f"{n}/a/kernel"] for p in (old, new))
        if n in ("padded", "doubled", "transposed"):
            close(kernel, before * g[:, None], 1e-6)
        if n == "multiplier":  # output 2i and 2i + 1 read input i
            close(kernel, before * np.repeat(g, 2), 1e-6)
    same_bits(fold_batch_norm(after, graph), after)


def test_both_sides_of_one_product():
    def forward(m, x):
        x = m.conv(m.one(x, use_running_average=True))
        return jnp.tanh(m.two(x, use_running_average=True))

    layers = {"one": batch_norm(4), "conv": conv(4, 6, 3), "two": batch_norm(6)}
    apply, params, inputs = linen_factory(net(forward, **layers), image(6, 4))(KEY)
    after, report = fold_batch_norm(
        params, trace(apply, params, *inputs), with_report=True
    )
    same_function(apply, params, after, *inputs)
    assert report["side"] == ["after", "before"]
    old, new = wide(named_leaves(params)), wide(named_leaves(after))
    both = gain_of("one", old)[:, None] * gain_of("two", old)
    close(new["conv/kernel"], old["conv/kernel"] * both, 1e-6)


def test_a_gain_too_faint_to_divide_by_stays():
    model = net(
        lambda m, x: m.conv(m.bn(x, use_running_average=True)),
        bn=batch_norm(4),
        conv=conv(4, 6, 3),
    )
    apply, params, inputs = linen_factory(model, image(6, 4))(KEY)
    scale = jnp.float32([0.0, 1e-12, -0.5, 2.0])
    params = replace_leaves(params, {"bn/scale": scale})
    graph = trace(apply, params, *inputs)
    after, report = fold_batch_norm(params, graph, with_report=True)
    same_function(apply, params, after, *inputs)
    new = named_leaves(after)
    np.testing.assert_array_equal(new["bn/scale"][:2], scale[:2])
    close(gain_of("bn", wide(new))[2:], np.ones(2), ONE_ULP)
    assert report["note"] == ["2 of 4 channels keep their gain"]
    same_bits(fold_batch_norm(after, graph), after)


# Norms over a concatenation: each product takes the gain of the channels it makes


def draw(seed, *shape):
    return np.random.default_rng(seed).uniform(-1.0, 1.0, shape).astype(np.float32)


def np_norm(n):
    return {role: np.array(leaf) for role, leaf in norm_leaves(n).items()}


def row(x, like):
    return x.reshape((1,) * (like.ndim - 1) + (-1,))


def normed(y, n, xp=jnp):
    gain = n["scale"] / xp.sqrt(n["var"] + EPSILON)
    return (y - row(n["mean"], y)) * row(gain, y) + row(n["bias"], y)


def convolved(x, kernel, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


def dense_net(widths, biases):
    parts = {
        f"part{i}": {"w": draw(10 + i, 4, n)} | ({"b": draw(20 + i, n)} if b else {})
        for i, (n, b) in enumerate(zip(widths, biases, strict=True))
    }
    params = parts | {"norm": np_norm(sum(widths)), "head": draw(9, sum(widths), 3)}

    def apply(p, x, xp=jnp):
        made = []
        for name in parts:
            y = x @ p[name]["w"]
            made.append(y + row(p[name]["b"], y) if "b" in p[name] else y)
        return (
            xp.maximum(normed(xp.concatenate(made, -1), p["norm"], xp), 0) @ p["head"]
        )

    return apply, params, draw(8, 7, 4)


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(2, 4), st.booleans()), min_size=2, max_size=4))
def test_every_product_takes_the_gain_of_its_channels(parts):
    widths, biases = zip(*parts, strict=True)
    apply, params, x = dense_net(widths, biases)
    graph = jm.trace(apply, params, x)
    after, table = jm.fold_batch_norm(params, graph, with_report=True)
    into = [name.split("/")[0] for name in table["into"][0].split(", ")]
    assert into == [f"part{i}" for i in range(len(widths))]
    wide = jax.tree.map(np.float64, params)
    gain = wide["norm"]["scale"] / np.sqrt(wide["norm"]["var"] + EPSILON)
    starts = np.cumsum([0, *widths])
    for i, start in enumerate(starts[:-1]):
        own = gain[start : starts[i + 1]]
        for name, before in wide[f"part{i}"].items():
            np.testing.assert_allclose(after[f"part{i}"][name], before * own, rtol=1e-5)
    np.testing.assert_allclose(
        after["norm"]["mean"], wide["norm"]["mean"] * gain, rtol=1e-5
    )
    exact = apply(wide, np.float64(x), np)
    found = apply(jax.tree.map(np.float64, after), np.float64(x), np)
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
    again = jm.fold_batch_norm(after, graph)
    for one, two in zip(jax.tree.leaves(after), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    device = jm.simulate(apply, jm.calibrate(after, graph, [x], progress=False))
    error = np.asarray(device(after, x)) - exact
    assert 10 * np.log10(np.sum(exact**2) / np.sum(error**2)) > 25


def test_convolutions_and_depthwise_ones_are_joined():
    params = {
        "a": draw(1, 3, 3, 2, 4),
        "b": draw(2, 3, 3, 1, 2),  # depthwise
        "norm": np_norm(6),
    }

    def apply(p, x):
        both = [convolved(x, p["a"]), convolved(x, p["b"], groups=2)]
        y = jax.nn.relu(normed(jnp.concatenate(both, -1), p["norm"]))
        return y.mean((1, 2)) @ jnp.ones((6, 2))

    x = draw(3, 2, 5, 5, 2)
    graph = jm.trace(apply, params, x)
    after, table = jm.fold_batch_norm(params, graph, with_report=True)
    assert table["into"] == ["a, b"]
    gain = params["norm"]["scale"] / np.sqrt(
        np.float64(params["norm"]["var"]) + EPSILON
    )
    np.testing.assert_allclose(after["a"], params["a"] * gain[:4], rtol=1e-5)
    np.testing.assert_allclose(after["b"], params["b"] * gain[4:], rtol=1e-5)
    np.testing.assert_allclose(apply(after, x), apply(params, x), rtol=1e-4, atol=1e-5)


def test_quantizers_follow_and_training_folds_likewise():
    apply, params, x = dense_net((3, 2), (True, False))
    graph = jm.trace(apply, params, x)
    q = jm.calibrate(params, graph, [x], progress=False).pin(params)
    after, moved = jm.fold_batch_norm(params, graph, quantizers=q)
    gain = params["norm"]["scale"] / np.sqrt(params["norm"]["var"] + EPSILON)
    for i, own in ((0, gain[:3]), (1, gain[3:])):
        old, new = (p.weights[f"part{i}/w"].scale for p in (q, moved))
        np.testing.assert_allclose(new, np.asarray(old) * np.abs(own), rtol=1e-5)
    found = jm.calibrate(after, graph, [x], progress=False)
    trained = jax.jit(jm.simulate(apply, found, fold=graph))(params, x)
    deployed = jax.jit(jm.simulate(apply, found))(after, x)
    np.testing.assert_allclose(trained, deployed, atol=0.05 * np.abs(deployed).max())


# Any numbers


@st.composite
def any_norms(draw):
    """Leaves of a norm with channels that are dead, ordinary, tiny and enormous."""
    sizes = st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 0.5, 1.0, 3.0, 1e3, 1e12, 1e30])
    channels = draw(st.sampled_from([1, 5]))
    row = st.lists(sizes, min_size=channels, max_size=channels)
    sign = st.lists(st.sampled_from([-1, 1]), min_size=channels, max_size=channels)
    roles = ("mean", "var", "scale", "bias")
    norm = {role: np.array(draw(row)) for role in roles}
    signs = {role: draw(sign) if role != "var" else 1 for role in roles}
    return {
        role: jax.device_put(np.float32(norm[role] * signs[role])) for role in roles
    }


@settings(max_examples=80)
@given(any_norms(), st.sampled_from([0.0, 1e-12, 1e-3]), st.booleans())
@pytest.mark.slow
def test_any_numbers_stay_finite_and_mean_the_same(norm, epsilon, behind):
    """Norm and product together are W·g, W·bias and the mean: in float64, each channel."""
    channels = norm["var"].size
    params = {"w": numbers(channels, w=(channels, channels))["w"], "norm": norm}

    def apply(p, x):
        if behind:
            return affine(p["norm"], x, epsilon) @ p["w"]
        return affine(p["norm"], x @ p["w"], epsilon)

    graph = trace(apply, params, jnp.ones((2, channels)))
    after = fold_batch_norm(params, graph)
    same_bits(fold_batch_norm(after, graph), after)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))

    (old, w), (new, v) = (
        (wide(p["norm"]), np.float64(p["w"])) for p in (params, after)
    )
    w, v = (w, v) if behind else (w.T, v.T)  # a row of weights for each channel
    eps = graph.nodes[1 if behind else 2].norm.epsilon
    with np.errstate(all="ignore"):
        g, h = (p["scale"] / np.sqrt(p["var"] + eps) for p in (old, new))
    moved = np.any(v != w, axis=1)
    tame = [(np.abs(p) > 1e-4) & (np.abs(p) < 1e4) for p in old.values()]
    assert np.all(moved | ~np.all(tame, axis=0) | (np.abs(g - 1) < 1e-6))
    for role in old:
        np.testing.assert_array_equal(new[role][~moved], old[role][~moved])
    old, new = ({k: p[k][moved] for k in p} for p in (old, new))
    g, h, w, v = g[moved], h[moved], w[moved].T, v[moved].T
    close(h, np.ones_like(h), 2 * ONE_ULP)
    close(v, w * g, 1e-6, 1e-37)
    close(new["mean"], old["mean"] * (1 if behind else g), 1e-6, 1e-37)
    gain = g if behind else 1.0
    lost = 1e-30 * np.abs(old["scale"])  # β/g may be below the smallest float32
    assert np.all(
        np.abs(new["bias"] * gain - old["bias"]) <= 1e-6 * np.abs(old["bias"]) + lost
    )
    if not behind:
        close(new["var"], old["var"] * g**2, 1e-6, 1e-37)


def test_the_numerics_against_float64():
    mean, var, scale = (np.random.default_rng(3).uniform(0.1, 4, 50) for _ in range(3))
    single = [jax.device_put(np.float32(a)) for a in (mean, var, scale)]
    g = norm_gain(single[1], single[2], 1e-3)
    close(g, scale / np.sqrt(var + 1e-3), 1e-6)
    close(norm_gain(single[1], None, 1e-3), 1 / np.sqrt(var + 1e-3), 1e-6)
    m, v = folded_statistics(single[0], single[1], g)
    close(m, mean * scale / np.sqrt(var + 1e-3), 1e-6)
    close(v, var * scale**2 / (var + 1e-3), 1e-6)
    close(unit_scale(v, 1e-3) / np.sqrt(np.asarray(v) + 1e-3), np.ones(50), 1e-6)
