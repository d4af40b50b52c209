"""Factorizing against published formulas, brute force and the function itself."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmet as jm
from jaxmet import Compressed, Pruned
from jaxmet.layers.once import run_once
from jaxmet.numerics.low_rank import masked
from jaxmet.transforms.factors import Shape, factors_of, placed_matrix, spectrum_of
from jaxmet.tree import plain_arrays
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from jaxmet.tree.structures import Keep
from zoo import model

densify = jax.jit(plain_arrays.densify)  # one program a tree, not one an operation


class Net(nn.Module):
    """Everything that has factors: strides, padding, dilation, groups, a window of one."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=(2, 1), name="stem")(x))
        x = nn.relu(nn.Conv(24, (3, 5), kernel_dilation=(1, 2), name="dilated")(x))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=2, name="grouped")(x))
        x = nn.relu(nn.Conv(32, (1, 1), name="point")(x))
        return nn.Dense(10, name="head")(jnp.mean(x, (1, 2)))


LAYERS = ["stem", "dilated", "grouped", "point", "head"]


@pytest.fixture(scope="module")
def net():
    model, keys = Net(), jax.random.split(jax.random.key(0), 3)
    # Inputs that live near a few directions, as natural images do.
    mixed = jax.random.normal(keys[0], (4, 8)) @ jax.random.normal(keys[1], (8, 8))
    x = jax.random.normal(keys[2], (6, 12, 10, 4)) @ mixed
    params = jax.jit(model.init)(jax.random.key(1), x)
    return model.apply, params, x, jm.trace(model.apply, params, x)


def kernel(params, layer):
    return np.asarray(named_leaves(densify(params))[f"{layer}/kernel"], np.float64)


def spatial_matrix(weight, groups):
    h, w, ins, outs = weight.shape
    weight = weight.reshape(h, w, ins, groups, outs // groups)
    return weight.transpose(3, 0, 2, 1, 4).reshape(groups, h * ins, -1)


def weight_matrix(weight, groups):
    h, w, ins, outs = weight.shape
    weight = weight.reshape(h, w, ins, groups, outs // groups)
    return weight.transpose(3, 2, 0, 1, 4).reshape(groups, ins, -1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spatial", "weight"])
def test_without_data_the_error_is_the_rest_of_the_singular_values(net, method):
    _, params, _, graph = net
    ranks = {"stem": 3, "dilated": 5, "grouped": 2, "point": 4, "head": 3}
    small, report = jm.factorize(
        params, graph, ranks=ranks, method=method, with_report=True
    )
    view = spatial_matrix if method == "spatial" else weight_matrix
    for layer, rank in ranks.items():
        before, after = kernel(params, layer), kernel(small, layer)
        if before.ndim == 2:
            before, after = before[None, None], after[None, None]
        groups = 2 if layer == "grouped" else 1
        values = np.linalg.svd(view(before, groups), compute_uv=False)
        left = np.sum(values[:, rank:] ** 2)
        assert np.sum((before - after) ** 2) == pytest.approx(left, rel=1e-4)
        given = report.where(layer=layer)["error"][0]
        assert given == pytest.approx(np.sqrt(left / np.sum(values**2)), rel=1e-3)
        assert all(
            np.linalg.matrix_rank(m, tol=1e-4) == rank for m in view(after, groups)
        )


@pytest.mark.parametrize("method", ["spatial", "weight"])
def test_the_model_runs_what_the_factors_stand_for(net, method):
    apply, params, x, graph = net
    small = jm.factorize(params, graph, ratios=0.5, method=method)
    found = jax.jit(jm.lift(apply))(small, x)
    np.testing.assert_allclose(found, apply(densify(small), x), rtol=1e-4, atol=1e-4)
    names = [n.name for n in jm.trace(apply, small, x).layers]
    assert names == [f"{s}/{part}" for s in LAYERS for part in ("in", "out")]
    with pytest.raises(Exception, match="shape"):  # flax looks before it multiplies
        apply(small, x)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spatial", "weight"])
def test_the_ratio_is_kept_and_nearly_used(net, method):
    apply, params, x, graph = net
    before = jm.cost(params, graph, x)
    for ratio in (0.3, 0.6, 0.9):
        small, report = jm.factorize(
            params, graph, ratios=ratio, method=method, with_report=True
        )
        after = jm.cost(small, jm.trace(apply, small, x), x)
        for row in report:
            layer, rank = row["layer"], row["rank"]
            old = before.where(layer=layer)["macs"][0]
            new = sum(
                after.where(layer=f"{layer}/{part}")["macs"][0]
                for part in ("in", "out")
            )
            assert new / old == pytest.approx(row["ratio"], rel=0.1)  # borders
            assert row["ratio"] <= ratio or rank == 1
            assert row["ratio"] * (rank + 1) / rank > ratio or rank == row["of"]


def test_published_ranks():
    """64 × 64 × 3 × 3 at half, and 512 × 1000 at 0.4: AIMET's formulas."""
    params = {
        "c": {"kernel": jnp.ones((3, 3, 64, 64))},
        "d": {"kernel": jnp.ones((512, 1000))},
    }

    def apply(p, x, y):
        conv = jax.lax.conv_general_dilated(
            x,
            p["c"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return conv, y @ p["d"]["kernel"]

    graph = jm.trace(apply, params, jnp.ones((1, 4, 4, 64)), jnp.ones((1, 512)))
    _, report = jm.factorize(
        params, graph, ratios={"c": 0.5, "d": 0.4}, method="weight", with_report=True
    )
    assert report["rank"] == [64 * 64 * 9 // 2 // (64 + 64 * 9), int(512 * 400 // 1512)]
    _, report = jm.factorize(params, graph, ratios={"c": 0.5}, with_report=True)
    assert report["rank"][0] == 64 * 64 * 9 // 2 // (64 * 3 * 2)
    _, report = jm.factorize(
        params, graph, ratios={"c": 0.5}, multiple=32, with_report=True
    )
    assert report["rank"][0] == 64


def output_error(apply, params, small, x, layer):
    """Relative error of one layer's output on its own float inputs, brute force."""
    seen = {}

    def hook(node, run, operands):
        seen[node.name] = run(*operands)
        return seen[node.name], None

    jm.evaluate(apply, hook)(params, x)
    wanted = np.asarray(seen[layer], np.float64)
    leaves = named_leaves(densify(small))
    one = replace_leaves(params, {f"{layer}/kernel": leaves[f"{layer}/kernel"]})
    jm.evaluate(apply, hook)(one, x)
    bias = np.asarray(named_leaves(params)[f"{layer}/bias"])
    error = np.sum((np.asarray(seen[layer]) - wanted) ** 2)
    return np.sqrt(error / np.sum((wanted - bias) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spatial", "weight"])
def test_data_make_the_error_of_the_output_smaller(net, method):
    apply, params, x, graph = net
    options = {"ratios": 0.4, "method": method}
    plain = jm.factorize(params, graph, **options)
    tuned, report = jm.factorize(
        params,
        graph,
        **options,
        batches=[x[:4], x[4:]],
        with_report=True,
        progress=False,
    )
    gains = []
    for layer in LAYERS:
        before = output_error(apply, params, plain, x, layer)
        after = output_error(apply, params, tuned, x, layer)
        assert report.where(layer=layer)["error"][0] == pytest.approx(after, rel=0.02)
        assert after <= before * 1.001
        gains.append(after / before)
    assert np.median(gains) < 0.8


def test_a_rank_that_costs_more_than_the_weight_is_refused(net):
    _, params, _, graph = net
    small, report = jm.factorize(params, graph, ranks={"head": 10}, with_report=True)
    assert "cost no less" in report.where(layer="head")["note"][0]
    assert small["params"]["head"]["kernel"] is params["params"]["head"]["kernel"]
    assert jm.factorize(params, graph, ratios=1.0)["params"] == params["params"]


def test_bounds_stay_with_the_second_factor():
    apply, params, inputs = model("inverted_residual")
    graph = jm.trace(apply, params, *inputs)
    tree = jm.equalize(
        jm.fold_batch_norm(params, graph), graph, objective="range", progress=False
    )
    leaf = named_leaves(tree)["expand/kernel"]
    assert leaf.upper is not None
    small = jm.factorize(
        tree, graph.only("expand"), ranks={"expand": 2}, method="weight"
    )
    leaves = named_leaves(small)
    assert leaves["expand/out/kernel"].upper is leaf.upper
    dense = leaf.replace(
        weight=jnp.einsum(
            "yxir,yxro->yxio",
            leaves["expand/in/kernel"],
            leaves["expand/out/kernel"].weight,
        )
    )
    wanted = jax.jit(jm.lift(apply))(
        replace_leaves(tree, {"expand/kernel": dense}), *inputs
    )
    np.testing.assert_allclose(
        jax.jit(jm.lift(apply))(small, *inputs), wanted, rtol=1e-4, atol=1e-4
    )


def test_what_is_left_of_a_pruned_weight_is_factorized(net):
    apply, params, x, graph = net
    rng = np.random.default_rng(0)
    keep = tuple(int(i) for i in np.sort(rng.choice(16, 9, replace=False)))
    leaf = named_leaves(params)["dilated/kernel"][:, :, np.array(keep)]
    tree = replace_leaves(
        params, {"dilated/kernel": Compressed(Pruned(leaf, (Keep(2, 16, keep),)))}
    )
    small = jm.factorize(tree, jm.trace(apply, tree, x), ranks={"dilated": 6})
    shapes = {n: v.shape for n, v in named_leaves(small).items()}
    assert shapes["dilated/in/kernel"] == (3, 1, 9, 6)
    assert shapes["dilated/out/kernel"] == (1, 5, 6, 24)
    found = jax.jit(jm.lift(apply))(small, x)
    np.testing.assert_allclose(found, apply(densify(small), x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_factors_are_calibrated_simulated_and_trained(net):
    apply, params, x, graph = net
    small = jm.factorize(params, graph, ratios=0.5)
    graph = jm.trace(apply, small, x)
    quantizers = jm.calibrate(small, graph, [x], progress=False)
    assert {"stem/in/kernel", "stem/out/kernel"} <= set(quantizers.weights)
    between = [e.node for e in graph["stem/out"].inputs]
    assert between == ["stem/in"] and quantizers.activation("stem/in") is not None
    exact = jax.jit(jm.lift(apply))(small, x)
    noisy = jax.jit(jm.simulate(apply, quantizers))(small, x)
    error = np.sqrt(np.mean((noisy - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.1

    def loss(tree):
        return jnp.mean((jm.lift(apply)(tree, x) - 1.0) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    optimizer = optax.sgd(3e-2)
    state, before = optimizer.init(small), step(small)[0]
    for _ in range(10):
        updates, state = optimizer.update(step(small)[1], state)
        small = optax.apply_updates(small, updates)
    assert step(small)[0] < 0.9 * before


BAD = {
    "ratio": ({"ratios": 1.5}, "the ratio is 1.5"),
    "zero": ({"ratios": {"stem": 0.0}}, "the ratio of 'stem' is 0"),
    "method": ({"ratios": 0.5, "method": "cp"}, "method is 'cp'"),
    "both": ({"ratios": 0.5, "ranks": {"stem": 1}}, "either ranks= or ratios="),
    "neither": ({}, "either ranks= or ratios="),
    "name": ({"ratios": {"stm": 0.5}}, "no selected layer 'stm'.*'stem'"),
    "rank": ({"ranks": {"head": 11}}, "rank of 'head' is 11.*from 1 to 10"),
    "rank of all": ({"ranks": 3}, "ranks is 3.*by name"),
    "no rank": ({"ranks": {"head": True}}, "rank of 'head' is True"),
    "multiple": ({"ratios": 0.5, "multiple": 0}, "multiple is 0"),
    "rows": ({"ratios": 0.5, "rows": -5}, "rows is -5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(net, case):
    _, params, _, graph = net
    options, message = BAD[case]
    with pytest.raises(ValueError, match=rf"(?s)jaxmet\.factorize: .*{message}"):
        jm.factorize(params, graph, **options)


@pytest.mark.parametrize("transform", [jm.factorize, jm.prune])
def test_data_with_nan_in_a_later_batch_are_refused(net, transform):
    _, params, x, graph = net
    name = transform.__name__
    with pytest.raises(ValueError, match=rf"jaxmet\.{name}: what '.*' reads holds NaN"):
        transform(params, graph, ratios=0.5, batches=[x, x * jnp.nan], progress=False)


def test_a_layer_without_factors_is_refused_by_name():
    apply, params, inputs = model("scan")
    graph = jm.trace(apply, params, *inputs)
    stacked = next(
        n.name for n in graph.layers if n.weight is not None and n.weight.stacked
    )
    report = jm.factorize(params, graph, ratios=0.5, with_report=True)[1]
    assert "stacked" in report.where(layer=stacked)["note"][0]
    with pytest.raises(ValueError, match=f"'{stacked}' cannot be compressed.*stacked"):
        jm.factorize(params, graph, ratios={stacked: 0.5})


@pytest.mark.parametrize("method", ["spatial", "weight"])
def test_the_first_factor_is_laid_out_as_the_second_reads_it(method):
    """An input and an output of different layouts; nothing else tells square ones apart."""

    def apply(params, x):
        layout = ("NHWC", "HWIO", "NCHW")
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=layout
        )

    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": jax.random.normal(keys[0], (3, 3, 6, 8))}
    x = jax.random.normal(keys[1], (2, 6, 6, 6))
    graph = jm.trace(apply, params, x)
    small = jm.factorize(params, graph, ranks={"w": 6}, method=method)
    exact = apply(densify(small), x)
    np.testing.assert_allclose(jax.jit(jm.lift(apply))(small, x), exact, atol=1e-4)


def test_factors_of_factors():
    def apply(params, x):
        dims = (((1, 2), (0, 1)), ((), ()))
        y = jax.lax.dot_general(jax.nn.relu(x), params["a"], dims)  # (n, 5, 6)
        return y.reshape(len(y), -1) @ params["b"]

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (4, 8, 5, 6), "b": (30, 12)}
    params = {
        n: jax.random.normal(k, s)
        for (n, s), k in zip(shapes.items(), keys[:2], strict=True)
    }
    x = jax.random.normal(keys[2], (16, 4, 8))
    dense = jm.trace(apply, params, x)
    small = jm.factorize(params, dense, ratios=0.9)
    graph = jm.trace(apply, small, x)
    small = jm.factorize(small, graph, ratios=0.6, batches=[x], progress=False)
    again = jm.trace(apply, small, x)
    assert "b/in/out" in [n.name for n in again.layers]
    exact = apply(densify(small), x)
    np.testing.assert_allclose(
        jax.jit(jm.lift(apply))(small, x), exact, rtol=1e-4, atol=1e-3
    )
    before, after = jm.cost(params, dense, x), jm.cost(small, again, x)
    assert after["macs"][-1] < 0.8 * before["macs"][-1]


def test_whole_numbers_of_any_kind_are_ranks(net):
    _, params, _, graph = net
    small = jm.factorize(params, graph, ranks={"head": np.int32(3)})
    assert jm.widths(small)["rank"] == [3]
    half = jm.factorize(params, graph, ratios=jnp.float32(0.5), method="weight")
    assert len(jm.widths(half)) == len(LAYERS)


def test_data_are_refused_under_jit(net):
    _, params, x, graph = net
    with pytest.raises(
        ValueError, match=r"jaxmet\.factorize: the parameters are traced"
    ):
        jax.jit(lambda p: jm.factorize(p, graph, ratios=0.5, batches=[x]))(params)


def test_a_weight_on_the_left_runs_as_two_products():
    """As an equinox layer has it: outputs first, the inputs on the right."""

    def apply(params, x):
        y = jax.nn.relu(jax.vmap(lambda row: params["a"] @ row)(x))
        return (params["b"] @ y.T).T

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(keys[0], (24, 16)),
        "b": jax.random.normal(keys[1], (10, 24)),
    }
    x = jax.random.normal(keys[2], (64, 16))
    dense = jm.trace(apply, params, x)
    for batches in (None, [x]):
        small = jm.factorize(params, dense, ratios=0.5, batches=batches, progress=False)
        graph = jm.trace(apply, small, x)
        assert [n.name for n in graph.layers] == ["a/in", "a/out", "b/in", "b/out"]
        exact = apply(densify(small), x)
        np.testing.assert_allclose(jax.jit(jm.lift(apply))(small, x), exact, atol=1e-3)
        before, after = (
            jm.cost(t, g, x)["macs"][-1] for t, g in ((params, dense), (small, graph))
        )
        assert 0.4 * before < after <= 0.5 * before
    pruned = jm.prune(small, graph, 0.5)
    exact = apply(densify(pruned), x)
    np.testing.assert_allclose(jax.jit(jm.lift(apply))(pruned, x), exact, atol=1e-3)
    less = jm.cost(pruned, jm.trace(apply, pruned, x), x)["macs"][-1]
    assert less < 0.7 * after


OFFSET = {
    "plain": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 1), "padding": ((1, 2), (2, 0))},
    "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
    "grouped": {
        "window_strides": (1, 1),
        "padding": "SAME",
        "feature_group_count": 2,
    },
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", OFFSET)
@pytest.mark.parametrize("method", ["spatial", "weight"])
def test_what_padding_holds_reaches_both_factors(kind, method):
    """A weight of rank one has exact factors, and so has what it makes of its borders."""

    def apply(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], dimension_numbers=layout, **OFFSET[kind]
        )

    groups = OFFSET[kind].get("feature_group_count", 1)
    ins, keys = 4 // groups, jax.random.split(jax.random.key(0), 3)
    one, two, what = {
        "spatial": ((3, ins, groups), (3, groups, 6 // groups), "yig,xgo->yxigo"),
        "weight": ((ins, groups), (3, 3, groups, 6 // groups), "ig,yxgo->yxigo"),
    }[method]
    factors = (jax.random.normal(k, s) for k, s in zip(keys, (one, two), strict=False))
    weight = jnp.einsum(what, *factors).reshape(3, 3, ins, 6)
    x, offset = jax.random.normal(keys[2], (2, 7, 6, 4)), jnp.array([1.0, -2.0, 3.0, 4])
    params = {"w": Compressed(weight, input_offset=offset)}
    graph = jm.trace(apply, params, x)
    wanted = jax.jit(jm.lift(apply))(params, x)
    assert np.abs(wanted - apply({"w": weight}, x)).max() > 1
    small = jm.factorize(params, graph, ranks={"w": 1}, method=method)
    assert jm.widths(small)["rank"] == [1]
    np.testing.assert_allclose(jax.jit(jm.lift(apply))(small, x), wanted, atol=1e-4)


def test_factors_compute_in_the_precision_of_the_weight():
    def apply(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, params["c"], (1, 1), "SAME", dimension_numbers=layout,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        y = y.mean((1, 2)).astype(jnp.bfloat16)
        return jnp.matmul(y, params["d"], preferred_element_type=jnp.float32)

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"c": (3, 3, 8, 8), "d": (8, 12)}
    params = {
        n: jax.random.normal(k, s, jnp.bfloat16)
        for (n, s), k in zip(shapes.items(), keys, strict=False)
    }
    x = jax.random.normal(keys[2], (2, 6, 6, 8), jnp.bfloat16)
    small = jm.factorize(params, jm.trace(apply, params, x), ratios=0.6)
    made, exact = jax.jit(jm.lift(apply))(small, x), apply(densify(small), x)
    assert made.dtype == exact.dtype == jnp.float32
    np.testing.assert_allclose(made, exact, rtol=0.05, atol=0.05 * np.std(exact))
    assert len(jm.widths(small)) == 2


def test_factors_that_cost_more_on_such_inputs_are_refused():
    """Where a window takes all of its input, the first factor runs on every column."""

    def apply(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["c"], (1, 1), "VALID", dimension_numbers=layout
        )

    params = {"c": jax.random.normal(jax.random.key(0), (5, 5, 32, 32))}
    for size, fits in ((5, False), (24, True)):
        x = jnp.ones((1, size, size, 32))
        graph = jm.trace(apply, params, x)
        small, report = jm.factorize(params, graph, ratios=0.6, with_report=True)
        assert (len(jm.widths(small)) == 1) == fits
        assert ("cost no less" in (report["note"][0] or "")) != fits
        if fits:
            after = jm.cost(small, jm.trace(apply, small, x), x)["macs"][-1]
            before = jm.cost(params, graph, x)["macs"][-1]
            assert report["ratio"] == [pytest.approx(after / before)]


def test_ranks_are_rounded_up_too(net):
    _, params, _, graph = net
    asked = {"stem": 3, "head": 6, "point": 8}
    report = jm.factorize(
        params, graph, ranks=asked, multiple=4, method="weight", with_report=True
    )[1]
    found = {r["layer"]: r["rank"] for r in report if r["rank"]}
    assert found == {
        "stem": 4,
        "head": 6,
        "point": 8,
    }  # 8 ranks of the head save nothing


# Weights that the model transposes or reshapes


def relu(x):
    return jnp.maximum(x, 0)


# by name: shape of the weight, the layer, and the weight in float64 as the matrix that x meets
STORED = {
    "plain": ((12, 10), lambda x, w: x @ w, lambda w: w),
    "transposed": ((10, 12), lambda x, w: x @ w.T, lambda w: w.T),
    "in two": ((3, 4, 10), lambda x, w: x @ w.reshape(12, 10), lambda w: w.reshape(12, 10)),
    "in two, turned": (
        (10, 3, 4),
        lambda x, w: x @ w.transpose(2, 1, 0).reshape(12, 10),
        lambda w: w.transpose(2, 1, 0).reshape(12, 10),
    ),
    "heads": (
        (12, 2, 5),
        lambda x, w: jnp.einsum("bsd,dhk->bshk", x, w).reshape(*x.shape[:2], 10),
        lambda w: w.reshape(12, 10),
    ),
    "heads first": (
        (2, 12, 5),
        lambda x, w: jnp.einsum("bsd,hdk->bshk", x, w).reshape(*x.shape[:2], 10),
        lambda w: w.transpose(1, 0, 2).reshape(12, 10),
    ),
    "heads, joined": (
        (12, 10),
        lambda x, w: jnp.einsum("bsd,dhk->bshk", x, w.reshape(12, 2, 5)).reshape(
            *x.shape[:2], 10
        ),
        lambda w: w,
    ),
    "from heads": (
        (3, 4, 10),
        lambda x, w: jnp.einsum("bshk,hkd->bsd", x.reshape(*x.shape[:2], 3, 4), w),
        lambda w: w.reshape(12, 10),
    ),
    "left": (
        (10, 12),
        lambda x, w: jnp.swapaxes(w @ jnp.swapaxes(x, 1, 2), 1, 2),
        lambda w: w.T,
    ),
    "flipped": ((12, 10), lambda x, w: x @ w[::-1], lambda w: w[::-1]),
    "one more axis": ((12, 10), lambda x, w: x @ w[:, None].reshape(12, 10), lambda w: w),
}  # fmt: skip


def dots(apply, *args):
    """How many multiplications the dots of a program do."""
    closed = jax.make_jaxpr(apply)(*args)
    total = 0
    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (lc, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += np.prod(eqn.outvars[0].aval.shape) * np.prod([lhs[i] for i in lc])
    return int(total)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("stored", sorted(STORED))
def test_factors_of_weights_however_they_are_stored(stored, data):
    """Against the SVD in float64 of the matrix that the inputs meet."""
    shape, layer, matrix = STORED[stored]
    rng = np.random.default_rng(3)
    params = {"w": jax.device_put(np.float32(rng.normal(size=shape)))}
    mix = rng.normal(size=(12, 12)) * np.linspace(2, 0.05, 12)
    x = jax.device_put(np.float32(rng.normal(size=(8, 6, 12)) @ mix))
    apply = lambda p, x: relu(layer(x, p["w"]))
    graph = jm.trace(apply, params, x)
    small, report = jm.factorize(
        params,
        graph,
        ranks={graph.layers[0].name: 3},
        batches=[x] if data else None,
        with_report=True,
        **({"progress": False} if data else {}),
    )
    assert isinstance(small["w"], Compressed)
    w = matrix(np.asarray(params["w"], np.float64))
    rows = np.asarray(x, np.float64).reshape(-1, 12)
    of = rows @ w if data else w
    values = np.linalg.svd(of, compute_uv=False)
    best = np.sqrt(np.sum(values[3:] ** 2) / np.sum(values**2))
    made = matrix(np.asarray(densify(small)["w"], np.float64))
    assert np.linalg.matrix_rank(made, tol=1e-4) == 3
    error = rows @ (made - w) if data else made - w
    reached = np.linalg.norm(error) / np.linalg.norm(of)
    assert reached == pytest.approx(best, rel=1e-3)
    assert report["error"][0] == pytest.approx(best, rel=1e-3)
    # two products run in place of one
    lifted = jm.lift(apply)
    np.testing.assert_allclose(
        lifted(small, x), apply(densify(small), x), rtol=1e-4, atol=1e-4
    )
    assert dots(lifted, small, x) == 8 * 6 * 3 * (12 + 10)
    # and the factors are layers like any other
    again = jm.trace(apply, small, x)
    assert len(again.layers) == 2
    quantizers = jm.calibrate(small, again, [x], progress=False)
    noisy = jax.jit(jm.simulate(apply, quantizers))(small, x)
    assert np.linalg.norm(noisy - lifted(small, x)) < 0.05 * np.linalg.norm(noisy)


KERNELS = {
    "OIHW": (
        (6, 4, 3, 3),
        lambda x, w: jax.lax.conv_general_dilated(
            x, w.transpose(2, 3, 1, 0), (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        lambda w: w.transpose(2, 3, 1, 0),
    ),
    "flipped": (
        (3, 3, 4, 6),
        lambda x, w: jax.lax.conv_general_dilated(
            x, jnp.flip(w, (0, 1)), (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        lambda w: w[::-1, ::-1],
    ),
    "WH": (
        (3, 5, 4, 6),
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "WHIO", "NHWC")
        ),
        lambda w: w.transpose(1, 0, 2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["spatial", "weight"])
@pytest.mark.parametrize("stored", sorted(KERNELS))
def test_factors_of_kernels_however_they_are_stored(stored, method):
    shape, layer, matrix = KERNELS[stored]
    rng = np.random.default_rng(4)
    params = {"w": jax.device_put(np.float32(rng.normal(size=shape)))}
    x = jax.device_put(np.float32(rng.normal(size=(4, 8, 7, 4))))
    apply = lambda p, x: relu(layer(x, p["w"]))
    graph = jm.trace(apply, params, x)
    small, whitened = (
        jm.factorize(
            params, graph, ranks={"w": 2}, method=method, batches=b, progress=False
        )
        for b in (None, [x])
    )
    exact = np.asarray(layer(x, params["w"]), np.float64)

    def error(tree):
        np.testing.assert_allclose(
            jax.jit(jm.lift(apply))(tree, x),
            apply(densify(tree), x),
            rtol=1e-4,
            atol=1e-4,
        )
        return np.linalg.norm(np.asarray(layer(x, densify(tree)["w"])) - exact)

    assert error(whitened) < error(small) < np.linalg.norm(exact)
    made = matrix(np.asarray(densify(small)["w"], np.float64))
    assert made.shape[2:] == (4, 6)
    cost = jm.cost(small, jm.trace(apply, small, x), x)
    assert sum(cost["macs"][:-1]) < sum(jm.cost(params, graph, x)["macs"][:-1])


@pytest.mark.parametrize("method", ["spatial", "weight"])
def test_traced_weights_have_the_factors_of_numbers(net, method):
    _, params, _, graph = net
    step = partial(jm.factorize, graph=graph, ratios=0.5, method=method)
    one, two = (densify(f(params)) for f in (step, jax.jit(step)))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), one, two)


SHAPES = {  # as (window of the first, of the second, ins, outs), groups
    "wide": ((1, 1, 4, 30), 1),
    "tall": ((3, 1, 12, 5), 1),
    "window": ((3, 3, 6, 8), 1),
    "groups": ((3, 2, 4, 12), 3),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("poor", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_factors_in_numpy_are_those_in_jax(kind, poor, with_gram, dtype):
    (mine, others, ins, outs), groups = SHAPES[kind]
    sizes, rng = SHAPES[kind][0], np.random.default_rng(5)
    shape = Shape("spatial", sizes, (2,), (3,), (0,), (1,), groups)
    weight = rng.normal(size=sizes)
    if poor:
        weight = weight[..., :1] * weight.mean((0, 1, 2))
    weight, gram = jnp.asarray(weight, dtype), None
    if with_gram:
        rows = rng.normal(size=(groups, 200, mine * others * ins))
        gram = jax.device_put(np.float32(np.swapaxes(rows, 1, 2) @ rows / 200))
    solve = lambda w, g: factors_of(w, shape, 2, g)
    one, two = run_once(solve, weight, gram), jax.jit(solve)(weight, gram)
    assert all(isinstance(v, np.ndarray | np.generic) for v in one)
    assert [v.dtype for v in one] == [v.dtype for v in two]
    assert [v.shape for v in one] == [v.shape for v in two]
    product = lambda first, second, _: np.einsum(
        "yaigr,axrgo->yxigo",
        *(np.asarray(v, np.float32) for v in (first, second)),
    )
    split = lambda v: (
        v[0].reshape(mine, 1, ins, groups, 2),
        v[1].reshape(1, others, 2, groups, outs // groups),
        v[2],
    )
    atol = 2e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(product(*split(one)), product(*split(two)), atol=atol)
    np.testing.assert_allclose(one[2], two[2], atol=1e-3)
    parts = spectrum_of(weight, shape, gram)
    cut = lambda rank: placed_matrix(masked(parts, rank), shape)
    assert isinstance(cut(2), np.ndarray) and cut(2).shape == sizes
    np.testing.assert_allclose(cut(2), jax.jit(cut)(2), atol=1e-5)
