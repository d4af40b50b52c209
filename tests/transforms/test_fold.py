"""Folding of batch norms in whole models: the function, the tree that is left, what is skipped.

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
    wide,
)
from jaxmet.engine.graph.graph import trace
from jaxmet.engine.run.replay import evaluate
from jaxmet.transforms.fold import fold_batch_norm
from jaxmet.tree.leaves import Compressed
from jaxmet.tree.names import named_leaves, replace_leaves
from zoo import CASES, model, traced
from zoo_nets import fill, image, normal

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
