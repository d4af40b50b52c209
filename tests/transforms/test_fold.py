"""Folding of batch norms: whole models, forms of norms, layouts of products, what is skipped.

The oracle of a fold is the formula itself in float64 numpy, and the model's own output.
"""

import functools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmet as jm
from by_hand import x64
from folds import (
    EPSILON,
    KEY,
    ONE_ULP,
    affine,
    check_folded,
    close,
    gain_of,
    keys_of,
    mlp,
    norm_leaves,
    numbers,
    same_bits,
    same_function,
    same_outputs,
    wide,
)
from jaxmet import Compressed, evaluate, fold_batch_norm, trace
from jaxmet.numerics.norm import folded_statistics, norm_gain, unit_scale
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from zoo import CASES, model, traced
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

INVERTED = {"expand_bn": "expand", "depthwise_bn": "depthwise", "project_bn": "project"}
FOLDS = {  # case -> norm -> the product that takes its gain
    "conv_bn_relu": {"stem_bn": "stem"},
    "inverted_residual": INVERTED,
    "mobile": {
        "stem_bn": "stem",
        **{f"block1/{k}": f"block1/{v}" for k, v in INVERTED.items()},
        **{f"block2/{k}": f"block2/{v}" for k, v in INVERTED.items()},
        "last_bn": "last",
    },
    "residual": {"bn1": "conv1", "bn2": "conv2"},
    "resnet": {
        "block1/bn1": "block1/conv1",
        "block1/bn2": "block1/conv2",
        "block2/bn1": "block2/conv1",
        "block2/bn2": "block2/conv2",
        "block2/proj_bn": "block2/proj",
    },
    "pre_activation": {"bn2": "conv1"},
    "haiku_conv": {"net/~/stem_bn": "net/~/stem"},
}
SKIPPED = {"pre_activation": {"bn1"}}
RUNS = [(name, front) for name in FOLDS for front in CASES[name].frontends]


@functools.cache
def folded(name, front):
    apply, params, inputs = model(name, front)
    graph = traced(name, front)
    return (
        apply,
        params,
        inputs,
        graph,
        *fold_batch_norm(params, graph, with_report=True),
    )


# The zoo


def test_every_case_with_a_norm_is_here():
    assert FOLDS.keys() == {name for name, case in CASES.items() if case.has_norm}


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_keeps_the_function_and_makes_identities(name, front):
    apply, params, inputs, graph, after, report = folded(name, front)
    same_function(apply, params, after, *inputs)
    old, new = named_leaves(params), named_leaves(after)
    for norm, product in FOLDS[name].items():
        check_folded(norm, product, old, new)
    rows = {row["norm"]: row for row in report}
    left = SKIPPED.get(name, set())
    assert rows.keys() == FOLDS[name].keys() | left
    assert {n: r["into"] for n, r in rows.items() if n not in left} == FOLDS[name]
    for norm in left:
        assert rows[norm]["into"] is None
        assert "relu" in rows[norm]["note"]
        for leaf in keys_of(norm, old).values():
            assert new[leaf] is old[leaf]
    touched = {
        n for pair in FOLDS[name].items() for p in pair for n in old if n.startswith(p)
    }
    for leaf in old.keys() - touched:
        assert new[leaf] is old[leaf]


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_keeps_the_tree_and_its_input(name, front):
    _, params, _, graph, after, _ = folded(name, front)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    same_bits(params, CASES[name].make[front](KEY)[1])


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_folding_twice_changes_no_bit(name, front):
    _, params, _, graph, after, _ = folded(name, front)
    same_bits(fold_batch_norm(after, graph), after)


@pytest.mark.parametrize("name", [n for n in FOLDS if "nnx" in CASES[n].frontends])
def test_twins_are_folded_alike(name):
    linen, state = (named_leaves(folded(name, f)[4]) for f in ("linen", "nnx"))
    assert linen.keys() == state.keys()
    for leaf in linen:
        np.testing.assert_array_equal(linen[leaf], state[leaf])


@pytest.mark.parametrize("name", ["mobile", "residual", "haiku_conv"])
def test_under_jit(name):
    front = CASES[name].frontends[0]
    apply, params, inputs, graph, after, _ = folded(name, front)
    jitted = jax.jit(partial(fold_batch_norm, graph=graph))
    once = jitted(params)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(after), strict=True):
        close(a, np.asarray(b, np.float64), 1e-6)
    same_bits(jitted(once), once)
    same_bits(jitted(after), after)


@pytest.mark.parametrize("name", ["inverted_residual", "residual", "pre_activation"])
def test_float64(name):
    make = CASES[name].make[CASES[name].frontends[0]]
    with x64(True):
        apply, params, inputs = make(KEY)
        params, inputs = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x,
            (params, inputs),
        )
        after = fold_batch_norm(params, graph := trace(apply, params, *inputs))
        same_function(apply, params, after, *inputs, rtol=1e-10)
        same_bits(fold_batch_norm(after, graph), after)
        old, new = named_leaves(params), named_leaves(after)
        for norm in FOLDS[name]:
            gains = gain_of(norm, wide(new), graph[norm].norm.epsilon)
            close(gains, np.ones_like(gains), 2.0**-51)
            k = keys_of(norm, old)["mean"]
            g = gain_of(norm, wide(old), graph[norm].norm.epsilon)
            close(new[k], np.asarray(old[k]) * g, 1e-14)


def test_equinox():
    def build(key):
        k0, k1 = jax.random.split(key)
        layers = [
            eqx.nn.Conv2d(3, 8, 3, padding=1, key=k0),
            eqx.nn.BatchNorm(8, "batch", mode="ema"),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(8, 4, 3, key=k1),
        ]
        return eqx.nn.Sequential(layers)

    model = eqx.nn.inference_mode(eqx.nn.make_with_state(build)(KEY))
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params, x):
        layers, state = eqx.combine(params, static)
        across = {"in_axes": (0, None), "out_axes": (0, None), "axis_name": "batch"}
        return jax.vmap(layers, **across)(x, state)[0]

    leaves = named_leaves(params)
    graph = trace(apply, params, x := jax.random.normal(KEY, (2, 3, 8, 8)))
    norm = graph["0/layers/1"].norm
    drawn = norm_leaves(8)
    roles = {
        "mean": norm.mean,
        "var": norm.variance,
        "scale": norm.scale,
        "bias": norm.bias,
    }
    params = replace_leaves(params, {name: drawn[role] for role, name in roles.items()})
    after = fold_batch_norm(params, graph)
    same_function(apply, params, after, x)
    new, g = named_leaves(after), drawn["scale"] / np.sqrt(drawn["var"] + norm.epsilon)
    close(
        new["0/layers/0/weight"],
        leaves["0/layers/0/weight"] * g.reshape(8, 1, 1, 1),
        1e-6,
    )
    close(new["0/layers/0/bias"], leaves["0/layers/0/bias"] * g.reshape(8, 1, 1), 1e-6)
    close(new[norm.mean], drawn["mean"] * g, 1e-6)
    gains = new[norm.scale] / np.sqrt(new[norm.variance] + norm.epsilon)
    close(gains, np.ones(8), 2 * ONE_ULP)


def test_inside_remat():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(6, (3, 3), name="conv")(x)
            y = nn.BatchNorm(True, epsilon=EPSILON, name="bn")(y)
            return x + nn.relu(y)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(Block)(name="block")(nn.Conv(6, (1, 1), name="stem")(x))
            return nn.Conv(2, (1, 1), name="head")(x)

    (x,), model = image()(KEY), Net()
    params = fill(jax.eval_shape(model.init, KEY, x), KEY)
    after = fold_batch_norm(params, trace(model.apply, params, x))
    same_function(model.apply, params, after, x)
    check_folded("block/bn", "block/conv", named_leaves(params), named_leaves(after))


# The statistics stay true


@pytest.mark.parametrize("name", ["conv_bn_relu", "inverted_residual"])
def test_statistics_are_those_of_the_folded_products(name):
    """Channels scaled by 1e-3 and 1e3 included: the truth is measured after folding."""
    apply, params, _ = model(name, "linen")
    x = image(8, 3 if name == "conv_bn_relu" else 4, batch=16)(jax.random.key(5))[0]
    leaves = named_leaves(params)
    for product in FOLDS[name].values():
        kernel = leaves[f"{product}/kernel"]
        factor = np.resize(np.float32([1e-3, 1.0, 1e3]), kernel.shape[-1])
        leaves[f"{product}/kernel"] = kernel * factor.reshape(1, 1, 1, -1)
    params = replace_leaves(params, leaves)

    def moments(node, run, operands):
        y = run(*operands)
        return y, (jnp.mean(y, (0, 1, 2)), jnp.var(y, (0, 1, 2)))

    measure = jax.jit(lambda p: evaluate(apply, moments)(p, x)[1])
    for norm, product in FOLDS[name].items():  # in order: a norm changes what follows
        mean, var = measure(params)[product]
        params = replace_leaves(params, {f"{norm}/mean": mean, f"{norm}/var": var})
    after = fold_batch_norm(params, trace(apply, params, x))
    same_function(apply, params, after, x)
    found = measure(after)
    for norm, product in FOLDS[name].items():
        mean, var = found[product]
        new = named_leaves(after)
        spread = np.sqrt(np.asarray(var, np.float64))
        np.testing.assert_array_less(
            np.abs(new[f"{norm}/mean"] - mean), 1e-4 * spread + 1e-7
        )
        close(new[f"{norm}/var"], var, 1e-3)
        check_folded(norm, product, named_leaves(params), new)


def test_dead_and_extreme_channels():
    apply, params, (x,) = model("conv_bn_relu")
    changed = {
        "stem_bn/scale": jnp.float32([0.0, 1.0, 1e3, -1e-3, 1e-30, 2.0, -0.0, 1.0]),
        "stem_bn/var": jnp.float32([1.0, 1e-30, 0.0, 1e6, 1.0, 1e-12, 0.0, 1e10]),
        "stem_bn/mean": jnp.float32([3.0, 1e-8, 0.0, 1e3, 1.0, 1e-6, 0.0, -1e5]),
    }
    params = replace_leaves(params, changed)
    graph = trace(apply, params, x)
    after = fold_batch_norm(params, graph)
    same_function(apply, params, after, x)
    new = named_leaves(after)
    assert all(np.all(np.isfinite(leaf)) for leaf in new.values())
    check_folded("stem_bn", "stem", named_leaves(params), new)
    assert not np.any(new["stem/kernel"][..., 0]) and not np.any(
        new["stem/kernel"][..., 6]
    )
    close(new["stem_bn/scale"][0], np.sqrt(1e-3), 1e-6)
    same_bits(fold_batch_norm(after, graph), after)


# Selection and refusals


def test_only_what_is_selected_is_touched():
    _, params, _, graph, full, _ = folded("residual", "linen")
    old, whole = named_leaves(params), named_leaves(full)
    for smaller in (graph.without("conv1"), graph.without("bn1"), graph.only("*2")):
        after, report = fold_batch_norm(params, smaller, with_report=True)
        new = named_leaves(after)
        for leaf in old:
            wanted = whole if leaf.split("/")[0].endswith("2") else old
            np.testing.assert_array_equal(new[leaf], wanted[leaf])
        assert report["into"] == [None, "conv2"]
        assert "not selected" in report["note"][0]
    same_bits(fold_batch_norm(params, graph.only("conv1", "bn1", "*2")), full)


@pytest.mark.parametrize("name", ["conv1", "bn1"])
def test_half_of_a_pair_cannot_be_asked_for(name):
    _, params, _, graph, _, _ = folded("residual", "linen")
    with pytest.raises(ValueError, match=r"not selected.*only\('bn1', 'conv1'\)"):
        fold_batch_norm(params, graph.only(name))


@pytest.mark.parametrize("front", ["linen", "nnx"])
@pytest.mark.parametrize("batch", [1, 2])
def test_batch_statistics_are_refused(front, batch):
    case = CASES["conv_bn_relu"]
    apply, params, (x,) = model(case.name, front)
    graph = trace(apply, params, x[:batch], **case.train_kwargs(front))
    with pytest.raises(ValueError, match=r"'stem_bn' computes .* batch.*train=False"):
        fold_batch_norm(params, graph)
    after = fold_batch_norm(params, graph.without("stem_bn"))
    same_bits(after, params)


def test_constant_statistics_are_refused():
    apply, variables, (x,) = model("conv_bn_relu")
    stats = variables["batch_stats"]

    def closed(params, x):
        return apply({"params": params, "batch_stats": stats}, x)

    graph = trace(closed, variables["params"], x)
    with pytest.raises(ValueError, match=r"'stem_bn' are constants") as error:
        fold_batch_norm(variables["params"], graph)
    assert "def apply(variables, x)" in str(error.value)
    same_bits(
        fold_batch_norm(variables["params"], graph.without("stem_bn")),
        variables["params"],
    )


def test_normalized_inputs_are_no_batch_norm():
    mean, var = jnp.float32([0.4, 0.5, 0.6]), jnp.float32([0.04, 0.05, 0.06])

    def apply(p, x):
        x = (x - mean[None]) / jnp.sqrt(var)[None]
        return affine(p["norm"], x @ p["one"]["w"])

    params = {"one": numbers(2, w=(3, 5)), "norm": norm_leaves(5)}
    (x,) = normal(4, 3)(KEY)
    after = fold_batch_norm(params, trace(apply, params, x))
    same_function(apply, params, after, x)
    assert np.any(after["one"]["w"] != params["one"]["w"])


def test_a_tree_without_statistics_is_refused():
    _, variables, _, graph, _, _ = folded("conv_bn_relu", "linen")
    with pytest.raises(ValueError, match=r"no 'stem_bn/mean'.*whole variables"):
        fold_batch_norm({"params": variables["params"]}, graph)
    with pytest.raises(ValueError, match=r"no 'stem_bn/mean'.*whole variables"):
        fold_batch_norm(variables["params"], graph)


def test_nan_is_refused():
    _, params, _, graph, _, _ = folded("conv_bn_relu", "linen")
    broken = replace_leaves(params, {"stem_bn/mean": jnp.full(8, jnp.nan)})
    with pytest.raises(ValueError, match=r"fold_batch_norm: .*'stem_bn/mean'"):
        fold_batch_norm(broken, graph)


# What is skipped


@pytest.mark.parametrize("name", ["group_norm", "dense_norm", "transformer"])
@pytest.mark.parametrize("front", ["linen", "nnx"])
@pytest.mark.parametrize("batch", [1, 2])
def test_norms_over_the_data_are_left_alone(name, front, batch):
    apply, params, (x,) = model(name, front)
    after, report = fold_batch_norm(
        params, trace(apply, params, x[:batch]), with_report=True
    )
    assert len(report) and set(report["note"]) == {"skipped: a norm over the data"}
    old, new = named_leaves(params), named_leaves(after)
    assert all(new[leaf] is old[leaf] for leaf in old)


def read_twice(p, x):
    y = x @ p["one"]["w"]
    return affine(p["norm"], y) + y


def counted(p, x):
    y = x @ p["one"]["w"]
    return affine(p["norm"], y), jnp.argmax(y, -1)


def looked_up(p, x):
    y = x @ p["one"]["w"]
    where = jnp.argsort(x[:, :5], axis=-1)
    return affine(p["norm"], y) + jnp.take_along_axis(y, where, axis=1)


def penalized(p, x):
    return affine(p["norm"], x @ p["one"]["w"]), jnp.sum(p["one"]["w"] ** 2)


def nonlinear_between(p, x):
    return affine(p["norm"], jnp.tanh(x @ p["one"]["w"]))


def moved_between(p, x):
    return affine(p["norm"], jnp.flip(x @ p["one"]["w"], axis=1))


def used_twice(p, x):
    h = affine(p["norm"], x @ p["one"]["w"])
    return affine(p["norm"], h @ p["two"]["w"])


def computed_weight(p, x):
    return affine(p["norm"], x @ (p["one"]["w"] * p["two"]["gain"][None]))


def over_another_axis(p, x):
    return affine(p["norm"], x @ p["one"]["w"], shape=(-1, 1))


def in_a_loop(p, x):
    def step(h, _):
        return affine(p["norm"], h @ p["two"]["w"]), None

    return jax.lax.scan(step, x @ p["one"]["w"], None, length=3)[0]


def read_by_itself(p, x):
    y = affine(p["norm"], x[:, :5])
    return y @ p["two"]["w"] + y


def stacked(p, x):
    def step(h, layer):
        return jnp.tanh(affine(layer["norm"], h @ layer["w"])), None

    return jax.lax.scan(step, x[:, :5], p["stacked"])[0]


def equal_channels_on_another_axis(p, x):
    """The transpose ties both axes; the norm still runs along the one without weight."""
    y = jnp.broadcast_to(x[:, None], (5, 5, 6)) @ p["one"]["w"]
    y = affine(p["norm"], y, shape=(1, -1, 1))
    return y + jnp.swapaxes(y, 1, 2)


def times_the_root(p, x):
    gain = jnp.sqrt(p["norm"]["var"] + EPSILON)
    return gained(p, x, gain * p["norm"]["scale"])


def over_the_scale(p, x):
    gain = jax.lax.rsqrt(p["norm"]["var"] + EPSILON)
    return gained(p, x, gain / p["norm"]["scale"])


def shifted_scale(p, x):
    gain = jax.lax.rsqrt(p["norm"]["var"] + EPSILON)
    return gained(p, x, gain * (1.0 + p["norm"]["scale"]))


def gained(p, x, gain):
    y = x @ p["one"]["w"] - p["norm"]["mean"][None]
    return y * gain[None] + p["norm"]["bias"][None]


def joined(parts):
    """A norm over a concatenation of `parts(p, x)`, and other outputs."""

    def apply(p, x):
        made, *more = parts(lambda name: x @ p[name]["w"], x)
        return jax.nn.relu(affine(p["both"], jnp.concatenate(made, -1))), more

    return apply


def joined_tokens(p, x):
    """Along another axis than the channels, which all parts share."""
    x = x.reshape(1, 5, 6)
    y = jnp.concatenate([x @ p["one"]["w"], x @ p["three"]["w"]], 1)
    return jax.nn.relu(affine(p["norm"], y, shape=(1, 1, -1)))


JOINED = {
    "the input itself": lambda of, x: ([of("four"), x],),
    "twice the same": lambda of, x: ([y := of("one"), y],),
    "read elsewhere": lambda of, x: ([of("one"), y := of("three")], y),
    "after a rectifier": lambda of, x: ([of("one"), jax.nn.relu(of("three"))],),
}


def one_weight_twice(p, x):
    parts = [x @ p["one"]["w"], (x + 1) @ p["one"]["w"]]
    return jax.nn.relu(affine(p["both"], jnp.concatenate(parts, -1)))


LEFT = {
    read_twice: "not alone in reading",
    counted: "not alone in reading",
    looked_up: "not alone in reading",
    penalized: "used elsewhere",
    nonlinear_between: "no product before",
    moved_between: "rev between",
    used_twice: "used elsewhere",
    computed_weight: "computed from parameters",
    over_another_axis: "channels are not those",
    in_a_loop: "inside a scan",
    read_by_itself: "is no product",
    stacked: "inside a scan",
    equal_channels_on_another_axis: "channels are not those",
    times_the_root: "not of the form",
    over_the_scale: "not of the form",
    shifted_scale: "not of the form",
    joined_tokens: "skipped: ",
    one_weight_twice: "skipped: ",
}
CASES_LEFT = {f.__name__: (f, text) for f, text in LEFT.items()} | {
    f"joined, {name}": (joined(parts), "skipped: ") for name, parts in JOINED.items()
}


@pytest.mark.parametrize("case", CASES_LEFT)
def test_left_alone_with_the_reason(case):
    apply, reason = CASES_LEFT[case]
    roles = dict.fromkeys(("mean", "var", "scale", "bias"), (3, 5))
    params = {
        "one": numbers(2, w=(6, 5)),
        "two": numbers(3, w=(5, 5), gain=(5,)),
        "three": numbers(4, w=(6, 5)),
        "four": numbers(5, w=(6, 4)),
        "norm": norm_leaves(5),
        "both": norm_leaves(10),
        "stacked": {**numbers(1, w=(3, 5, 5)), "norm": numbers(2, **roles)},
    }
    (x,) = normal(5, 6)(KEY)
    graph = trace(apply, params, x)
    after, report = fold_batch_norm(params, graph, with_report=True)
    same_bits(after, params)
    assert len(report) and report["into"] == [None] * len(report)
    assert all(reason in note for note in report["note"]), report
    (name, *_) = (node.name for node in graph.nodes if node.kind == "norm")
    with pytest.raises(ValueError, match=rf"fold_batch_norm: norm '{name}' .*without"):
        fold_batch_norm(params, graph.only(name))


FLOORS = {
    "max(v, e)": lambda v, e: jnp.sqrt(jnp.maximum(v, e)),
    "max(√v, e)": lambda v, e: jnp.maximum(jnp.sqrt(v), e),
    "√v + e": lambda v, e: jnp.sqrt(v) + e,
}


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 1e-12])
@pytest.mark.parametrize("floor", FLOORS)
def test_a_divisor_of_another_form_is_left_however_small_its_epsilon(floor, epsilon):
    params = {**numbers(1, w=(4, 5)), "norm": norm_leaves(5)}
    var = epsilon * jnp.float32([0.25, 1.0, 4.0, epsilon])
    params["norm"]["var"] = params["norm"]["var"].at[:4].set(var)

    def apply(p, x):
        n, divisor = p["norm"], FLOORS[floor](p["norm"]["var"], epsilon)
        return (x @ p["w"] - n["mean"][None]) / divisor[None] * n["scale"][None]

    (x,) = normal(2, 4)(KEY)
    after, report = fold_batch_norm(params, trace(apply, params, x), with_report=True)
    assert "not of the form (x − mean)·scale/√(variance + epsilon)" in report["note"][0]
    same_bits(after, params)


# Dtypes and leaves


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """Computed in float32 and rounded once: half an ulp of what float64 gives."""
    single, params, x = mlp()
    params, eps = (
        jax.tree.map(lambda x: x.astype(dtype), params),
        float(jnp.finfo(dtype).eps),
    )
    norm = params["norm"]
    params["norm"] = norm | {k: norm[k].astype(jnp.float32) for k in ("mean", "var")}

    def apply(p, x):
        return single(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p), x)

    graph = trace(apply, params, x)
    after = fold_batch_norm(params, graph)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        assert a.dtype == b.dtype
    same_function(apply, params, after, x, rtol=3 * eps)
    old, new = wide(params["norm"]), wide(after["norm"])
    left = new["scale"] / np.sqrt(new["var"] + EPSILON)
    close(left, np.ones(5), eps)
    g = old["scale"] / np.sqrt(old["var"] + EPSILON) / left
    close(after["one"]["w"], np.asarray(params["one"]["w"], np.float64) * g, 0.51 * eps)
    same_bits(fold_batch_norm(after, graph), after)


def test_float16_overflow_is_refused_by_name():
    apply, params, x = mlp()
    params["one"]["w"] = params["one"]["w"].astype(jnp.float16)
    params["norm"]["var"] = jnp.full(5, 1e-12)
    params["norm"]["scale"] = jnp.full(5, 1e6)

    def wider(p, x):
        return apply({**p, "one": jax.tree.map(jnp.float32, p["one"])}, x)

    graph = trace(wider, params, x)
    with pytest.raises(ValueError, match=r"'one/w' overflows float16"):
        fold_batch_norm(params, graph)


def test_compressed_leaves_keep_their_bounds():
    _, params, _, graph, full, _ = folded("inverted_residual", "linen")
    old, upper = named_leaves(params), jnp.linspace(1.0, 6.0, 8)
    leaf = Compressed(weight=old["expand/kernel"], upper=upper)
    after = fold_batch_norm(replace_leaves(params, {"expand/kernel": leaf}), graph)
    found = named_leaves(after)["expand/kernel"]
    assert (
        isinstance(found, Compressed) and found.upper is upper and found.lower is None
    )
    np.testing.assert_array_equal(found.weight, named_leaves(full)["expand/kernel"])


def test_integer_weights_are_refused():
    _, params, _, graph, _, _ = folded("conv_bn_relu", "linen")
    whole = Compressed(weight=jnp.ones((3, 3, 3, 8), jnp.int8))
    with pytest.raises(ValueError, match=r"'stem/kernel' .*int8"):
        fold_batch_norm(replace_leaves(params, {"stem/kernel": whole}), graph)


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


@settings(max_examples=4)
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
