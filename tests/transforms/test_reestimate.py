"""Norms measured again: each stores the moments of what it reads, over all batches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from folds import affine, norm_leaves, numbers
from jaxmet.tree.named_leaves import named_leaves
from zoo import CASES

KEY = jax.random.key(0)
QUIET: Any = {"progress": False}


def case(name="mobile", front="linen"):
    apply, params, (x,) = CASES[name].make[front](KEY)
    x = jax.random.normal(KEY, (7, *x.shape[1:]))
    return apply, params, x, jm.trace(apply, params, x)


def batches(x):
    """Of different sizes, and far apart: what lies between them counts."""
    return [x[:3] + 1.0, x[3:6] * 2.0, x[6:]]


def what_norms_read(apply, params, data):
    """All values that each norm reads in inference, by channel, in float64."""

    def hook(node, run, operands):
        return run(*operands), operands[0] if node.kind == "norm" else None

    run = jax.jit(jm.evaluate(apply, hook))
    found = [run(params, x)[1] for x in data]
    flat = lambda v: np.asarray(v, np.float64).reshape(-1, v.shape[-1])
    return {n: np.concatenate([flat(f[n]) for f in found]) for n in found[0]}


def check(apply, params, graph, data, names=None):
    leaves, read = named_leaves(params), what_norms_read(apply, params, data)
    for name in names or read:
        norm = graph[name].norm
        mean, var = (np.ravel(leaves[n]) for n in (norm.mean, norm.variance))
        x = read[name]
        np.testing.assert_allclose(mean, x.mean(0), atol=1e-5 * x.std(0).max())
        np.testing.assert_allclose(var, x.var(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "front"),
    [("pre_activation", "nnx"), ("mobile", "linen"), ("haiku_conv", "haiku")],
)
@pytest.mark.one_in(2)
def test_each_norm_stores_the_pooled_moments_of_what_it_reads(name, front):
    apply, params, x, graph = case(name, front)
    data = batches(x)[: 2 if name == "mobile" else 3]
    after = jm.reestimate_batch_norm(params, graph, data, **QUIET)
    check(apply, after, graph, data)
    statistics = {n for node in graph.nodes if node.norm
                  for n in (node.norm.mean, node.norm.variance)}  # fmt: skip
    old, new = named_leaves(params), named_leaves(after)
    for leaf in old:
        same = np.array_equal(old[leaf], new[leaf])
        assert same != (leaf in statistics)


def test_it_is_neither_a_mean_of_variances_nor_of_the_training_mode():
    apply, params, x, graph = case("conv_bn_relu")
    data = batches(x)
    after = named_leaves(jm.reestimate_batch_norm(params, graph, data, **QUIET))
    read = [what_norms_read(apply, params, [b])["stem_bn"] for b in data]
    within = np.mean([b.var(0) for b in read], axis=0)
    whole = np.concatenate(read).var(0)
    assert np.abs(within - whole).max() > 0.1
    np.testing.assert_allclose(after["stem_bn/var"], whole, rtol=1e-4)


def test_batches_in_any_form_and_order_and_store_give_the_same():
    apply, params, x, graph = case("conv_bn_relu")
    one = jm.reestimate_batch_norm(params, graph, [x], **QUIET)
    others = [
        jm.reestimate_batch_norm(params, graph, jm.batched(x, batch_size=3), **QUIET),
        jm.reestimate_batch_norm(params, graph, iter([x[4:], x[:4]]), **QUIET),
        jm.reestimate_batch_norm(
            params, graph, [x[:4], x[4:]], store="device", **QUIET
        ),
        jm.reestimate_batch_norm(
            params, graph, [(x, 3)], inputs=lambda batch: batch[0], **QUIET
        ),
        jax.jit(lambda p: jm.reestimate_batch_norm(p, graph, [x], **QUIET))(params),
    ]
    for other in others:
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, 1e-5, 1e-6)


def test_a_folded_norm_is_what_it_would_have_been_before_folding():
    apply, params, x, graph = case("conv_bn_relu")
    after, table = jm.reestimate_batch_norm(
        jm.fold_batch_norm(params, graph), graph, [x], with_report=True, **QUIET
    )
    check(apply, after, graph, [x])
    assert table["note"] == ["was folded: fold it again"]
    unfolded = jm.reestimate_batch_norm(params, graph, [x], **QUIET)
    want = apply(unfolded, x)
    np.testing.assert_allclose(apply(after, x), want, atol=3e-3)  # epsilon moved too
    again = jm.fold_batch_norm(after, graph)
    np.testing.assert_allclose(apply(again, x), apply(after, x), atol=1e-4)
    _, table = jm.reestimate_batch_norm(unfolded, graph, [x], with_report=True, **QUIET)
    assert table["note"] == [None] and table["mean moved"][0] < 1e-4
    assert abs(table["variance max"][0] - 1) < 1e-4


def test_only_selected_norms_change_and_named_ones_must():
    apply, params, x, graph = case("mobile")
    after, table = jm.reestimate_batch_norm(
        params, graph.only("last_bn"), [x], with_report=True, **QUIET
    )
    changed = [
        n for n, v in named_leaves(after).items()
        if not np.array_equal(v, named_leaves(params)[n])
    ]  # fmt: skip
    assert changed == ["last_bn/mean", "last_bn/var"]
    check(apply, after, graph, [x], ["last_bn"])
    left = [r["note"] for r in table if r["norm"] != "last_bn"]
    assert left and all(note == "skipped: not selected" for note in left)
    apply, params, x, graph = case("dense_norm")
    assert jm.reestimate_batch_norm(params, graph, [x], **QUIET) is params
    with pytest.raises(
        ValueError, match="'ln1' cannot be measured: a norm over the data"
    ):
        jm.reestimate_batch_norm(params, graph.only("ln1"), [x], **QUIET)


def test_norms_of_training_and_missing_statistics_are_refused():
    apply, params, inputs = CASES["conv_bn_relu"].make["linen"](KEY)
    training = jm.trace(apply, params, *inputs, train=True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="'stem_bn' computes its .*train=False"):
        jm.reestimate_batch_norm(params, training, [inputs[0]], **QUIET)
    graph = jm.trace(apply, params, *inputs)
    with pytest.raises(ValueError, match="has no 'stem_bn/mean'.*batch_stats"):
        lost = {"params": params["params"]}
        jm.reestimate_batch_norm(lost, graph, [inputs[0]], **QUIET)
    with pytest.raises(ValueError, match="store is 'disk'"):
        jm.reestimate_batch_norm(params, graph, [inputs[0]], store="disk", **QUIET)
    with pytest.raises(ValueError, match="could be one batch or all"):
        jm.reestimate_batch_norm(params, graph, inputs[0], **QUIET)


def test_infinities_name_the_norm_and_constants_stay_finite():
    params = {"w": jnp.ones((3, 4)), "norm": norm_leaves(4), **numbers(1, v=(4, 2))}

    def apply(p, x):
        return jnp.maximum(affine(p["norm"], x @ p["w"]), 0) @ p["v"]

    graph = jm.trace(apply, params, jnp.ones((2, 3)))
    after = jm.reestimate_batch_norm(params, graph, [jnp.ones((2, 3))] * 2, **QUIET)
    np.testing.assert_array_equal(after["norm"]["var"], np.zeros(4))
    assert np.isfinite(apply(after, jnp.ones((2, 3)))).all()
    large = [jnp.ones((2, 3)), jnp.full((2, 3), 3e38)]
    with pytest.raises(ValueError, match="norm 'norm' reads NaN or infinity"):
        jm.reestimate_batch_norm(params, graph, large, **QUIET)


def test_keyword_arguments_go_to_the_model_and_sharded_batches_are_one():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, scale=None):
            x = x if scale is None else x * scale
            x = nn.Dense(4, name="first")(x)
            x = nn.BatchNorm(use_running_average=True, name="bn")(x)
            return nn.Dense(2, name="last")(nn.relu(x))

    x = jax.random.normal(KEY, (16, 3))
    params = jax.jit(Net().init)(KEY, x)
    graph = jm.trace(Net().apply, params, x, scale=jnp.float32(1))
    twice: Any = {"scale": jnp.float32(2), **QUIET}
    one = jm.reestimate_batch_norm(params, graph, [x], **twice)
    dense = params["params"]["first"]
    read = np.asarray(2 * x) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    np.testing.assert_allclose(
        one["batch_stats"]["bn"]["mean"], read.mean(0), atol=1e-5
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for store in ("host", "device"):
        split = jm.reestimate_batch_norm(
            params, graph, [jax.device_put(x, place)], store=store, **twice
        )
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(split), strict=True):
            np.testing.assert_allclose(a, b, 1e-5, 1e-6)


def exposed(p, x):
    """Two norms after one another and one beside them; what each reads comes out too."""
    y = x @ p["a"] + p["b"][None]
    h = jnp.maximum(affine(p["one"], y), 0)
    z = h @ (p["part"]["v"] * p["part"]["g"][None])
    w = jnp.maximum(h @ p["w"], 0) + y
    return affine(p["two"], z) @ p["c"] + affine(p["three"], w), y, z, w


@pytest.mark.one_in(4)
@pytest.mark.parametrize("store", ["host", "device"])
@pytest.mark.parametrize("bias", ["float", "int32"])
def test_in_the_quantized_model_each_norm_reads_what_simulate_computes(bias, store):
    params = numbers(1, a=(6, 5), b=(5,), w=(5, 5), c=(5, 5))
    params |= {k: norm_leaves(5, i) for i, k in enumerate(("one", "two", "three"))}
    params["part"] = numbers(2, v=(5, 5), g=(5,))
    data = [jax.random.normal(jax.random.key(i), (n, 6)) for i, n in enumerate((9, 4))]
    graph = jm.trace(exposed, params, data[0])
    config = jm.QuantConfig(weight_bits=3, activation_bits=4, bias=bias)
    quantizers = jm.calibrate(params, graph, data, config, **QUIET)
    assert quantizers.derived == ("part",)
    assert ("b" in quantizers.weights) == (bias == "int32")
    given: Any = {"quantizers": quantizers, "store": store, **QUIET}
    after = jm.reestimate_batch_norm(params, graph, data, **given)
    run = jax.jit(jm.simulate(exposed, quantizers))
    outs = [run(after, x)[1:] for x in data]
    for i, name in enumerate(("one", "two", "three")):
        read = np.concatenate([np.float64(out[i]) for out in outs])
        mean, var = after[name]["mean"], after[name]["var"]
        np.testing.assert_allclose(mean, read.mean(0), atol=1e-5 * read.std(0).max())
        np.testing.assert_allclose(var, read.var(0), rtol=1e-4, atol=1e-6)
    floats = jm.reestimate_batch_norm(params, graph, data, **QUIET)
    assert np.abs(floats["two"]["mean"] - after["two"]["mean"]).max() > 1e-2


def test_a_norm_of_the_input():
    """It reads the input itself, which here are integers."""
    params = {"norm": norm_leaves(6), **numbers(1, v=(6, 2))}
    apply = lambda p, x: affine(p["norm"], jnp.float32(x)) @ p["v"]
    x = jax.random.randint(KEY, (12, 6), 0, 255)
    graph = jm.trace(apply, params, x)
    after = jm.reestimate_batch_norm(params, graph, [x[:7], x[7:]], **QUIET)
    np.testing.assert_allclose(after["norm"]["mean"], np.mean(x, 0), rtol=1e-5)
    np.testing.assert_allclose(after["norm"]["var"], np.var(x, 0), rtol=1e-4)


def test_norms_in_two_branches_of_one_value():
    params = {k: norm_leaves(4, i) for i, k in enumerate(("one", "two"))}
    params |= numbers(1, v=(4, 4), w=(4, 4))

    def apply(p, x):
        return (
            affine(p["one"], x) @ p["v"] + affine(p["two"], x[:, ::-1] + 1.0) @ p["w"]
        )

    x = jax.random.normal(KEY, (12, 4))
    graph = jm.trace(apply, params, x)
    after = jm.reestimate_batch_norm(params, graph, [x[:7], x[7:]], **QUIET)
    for name, read in (("one", x), ("two", x[:, ::-1] + 1.0)):
        read = np.float64(read)
        np.testing.assert_allclose(after[name]["mean"], read.mean(0), atol=1e-5)
        np.testing.assert_allclose(after[name]["var"], read.var(0), rtol=1e-4)


def test_a_batch_that_the_model_does_not_take_is_named():
    _, params, x, graph = case("conv_bn_relu")
    with pytest.raises(ValueError, match="jaxmet.reestimate_batch_norm: .*"):
        jm.reestimate_batch_norm(params, graph, [x[..., :2]], **QUIET)
