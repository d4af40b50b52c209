"""The range of activations in the weights: the function stays, and quantized it loses less."""

import functools
from typing import Any

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from random_nets import NETWORKS, random_values

WIDTH, HEADS = 16, 4
EACH = WIDTH // HEADS


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return (
        x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["g"][None, None]
        + p["b"][None, None]
    )


def rms_norm(p, x, plus=0.0):
    gain = (plus + p["g"]).reshape((1,) * (x.ndim - 1) + (-1,))
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def dense(p, x):
    return x @ p["w"] + p["b"][None, None]


def heads(x, number=HEADS):
    return x.reshape(*x.shape[:-1], number, -1)


def whole(x):
    return x.reshape(*x.shape[:2], -1)


def attended(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q / EACH**0.5, k)
    scores = jnp.where(jnp.tri(q.shape[1])[None, None] > 0, scores, -1e9)
    return whole(jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v))


def rotated(x):
    """Rotary embeddings of halves."""
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None, None]
    one, two = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


# Every model reads `p`, in which any name is a norm or a dense layer, and x (batch, time, width).


def separate(p, x, q=lambda x: x, k=lambda x: x, v=lambda x: x):
    h = layer_norm(p["norm"], x)
    q, k, v = (f(heads(dense(p[n], h))) for n, f in (("q", q), ("k", k), ("v", v)))
    return x + dense(p["out"], attended(q, k, v))


def fused(p, x, split):
    q, k, v = split(dense(p["qkv"], layer_norm(p["norm"], x)))
    return x + dense(p["out"], attended(q, k, v))


def by_split(y):
    return map(heads, jnp.split(y, 3, -1))


def by_index(y):
    y = y.reshape(*y.shape[:2], 3, HEADS, EACH)
    return y[:, :, 0], y[:, :, 1], y[:, :, 2]


def by_head(y):
    return jnp.split(heads(y), 3, -1)


def grouped(p, x, how):
    h = layer_norm(p["norm"], x)
    q, k, v = heads(dense(p["q"], h)), *(heads(dense(p[n], h), 2) for n in "kv")
    if how == "repeated":
        mixed = attended(q, *(jnp.repeat(a, 2, axis=2) for a in (k, v)))
    elif how == "of jax":
        mixed = whole(jax.nn.dot_product_attention(q, k, v, is_causal=True))
    else:
        q = q.reshape(*q.shape[:2], 2, 2, EACH)
        weights = jax.nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", q, k))
        mixed = whole(jnp.einsum("bgrts,bsgd->btgrd", weights, v))
    return x + dense(p["out"], mixed)


def one_key_head(p, x):
    h = layer_norm(p["norm"], x)
    q, k, v = heads(dense(p["q"], h)), dense(p["k1"], h), dense(p["v1"], h)
    weights = jax.nn.softmax(jnp.einsum("bthd,bsd->bhts", q, k))
    return x + dense(p["out"], whole(jnp.einsum("bhts,bsd->bthd", weights, v)))


def gated(p, x, act=jax.nn.silu):
    h = rms_norm(p["norm"], x)
    return x + dense(p["down"], act(dense(p["gate"], h)) * dense(p["up"], h))


def bilinear(p, x):
    h = rms_norm(p["norm"], x)
    return x + dense(p["down"], dense(p["gate"], h) * dense(p["up"], h))


def one_plus(p, x):
    return x + dense(
        p["down"], jax.nn.gelu(dense(p["up"], rms_norm(p["norm"], x, 1.0)))
    )


def with_relu(p, x):
    return x + dense(p["down"], jax.nn.relu(dense(p["up"], layer_norm(p["norm"], x))))


def post_norm(p, x):
    q, k, v = (heads(dense(p[n], x)) for n in "qkv")
    x = layer_norm(p["norm"], x + dense(p["out"], attended(q, k, v)))
    return layer_norm(p["norm2"], x + dense(p["down"], jax.nn.gelu(dense(p["up"], x))))


def normed_both(p, x):
    """The gains of these norms, which all heads share, stand next to the product."""
    norms = {n: functools.partial(rms_norm, p[f"{n}norm"]) for n in "qk"}
    return separate(p, x, **norms)


def other_layouts(p, x):
    """Weights with several axes, before or after what they multiply, and a transposed one."""
    h = layer_norm(p["norm"], x)
    q, k = (p[n]["w"].reshape(WIDTH, HEADS, EACH) for n in "qk")
    q = jnp.einsum("whd,btw->bthd", q, h)
    k = jnp.einsum("btw,whd->bhtd", h, k) * 0.3
    v = jnp.einsum("btw,vw->tbv", h, p["v"]["w"]) + p["v"]["b"][None, None]
    weights = jax.nn.softmax(jnp.einsum("bhtd,bshd->bhst", k, q))
    v = v.reshape(*v.shape[:2], EACH, HEADS)
    mixed = jnp.einsum("bhst,tbdh->bhsd", weights, -v)
    out = p["out"]["w"].reshape(HEADS, EACH, WIDTH)
    return x + jnp.einsum("hdw,bhtd->btw", out, mixed)


def rematerialised(p, x):
    return jax.checkpoint(separate)(p, x)


def masked_values(p, x):
    keep = (jnp.arange(x.shape[1]) > 0)[None, :, None, None]
    return separate(p, x, v=lambda v: jnp.where(keep, v, 0.0))


QKV = {("q", "k"), ("v",)}
EXACT: dict[str, tuple[Any, set[tuple[str, ...]]]] = {
    "separate": (separate, {("norm",), *QKV}),
    "masked values": (masked_values, {("norm",), *QKV}),
    "rematerialised": (rematerialised, {("norm",), *QKV}),
    "normed both": (normed_both, {("norm",), ("qnorm", "knorm"), ("v",)}),
    "other layouts": (other_layouts, {("norm",), *QKV}),
    "post-norm": (post_norm, QKV),
    "repeated": (functools.partial(grouped, how="repeated"), {("norm",), *QKV}),
    "of jax": (functools.partial(grouped, how="of jax"), {("norm",), *QKV}),
    "grouped": (functools.partial(grouped, how="grouped"), {("norm",), *QKV}),
    "one key head": (one_key_head, {("norm",), ("q", "k1"), ("v1",)}),
    "gated": (gated, {("norm",), ("up",)}),
    "one plus": (one_plus, {("norm",)}),
    "relu": (with_relu, {("norm",), ("up",)}),
    **{
        f"fused, {split.__name__}": (
            functools.partial(fused, split=split),
            {("norm",), ("qkv",)},
        )
        for split in (by_split, by_index, by_head)
    },
}


def parameters(dtype: Any = np.float64) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def vector(n):
        return (rng.normal(size=n) + 1.5).astype(dtype)

    sizes = {"q": WIDTH, "k": WIDTH, "v": WIDTH, "out": WIDTH, "qkv": 3 * WIDTH}
    sizes |= {"k1": EACH, "v1": EACH, "up": 24, "gate": 24, "down": WIDTH}
    reads = {"down": 24}
    tree: dict[str, Any] = {
        n: {
            "w": rng.normal(size=(reads.get(n, WIDTH), size)).astype(dtype) / 4,
            "b": vector(size),
        }
        for n, size in sizes.items()
    }
    tree["one"] = {"b": vector(1)}
    tree |= {"qnorm": {"g": vector(EACH)}, "knorm": {"g": vector(EACH)}}
    for name in ("norm", "norm2"):
        tree[name] = {"g": vector(WIDTH), "b": vector(WIDTH)}
    return tree


def narrowed(name: str, tree: dict[str, Any]) -> dict[str, Any]:
    """With half as many key and value heads, where the model has them."""
    if name not in ("repeated", "of jax", "grouped"):
        return tree
    half = {n: jax.tree.map(lambda a: a[..., : WIDTH // 2], tree[n]) for n in "kv"}
    return tree | half


def tokens(dtype: Any = np.float64) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(3, 5, WIDTH)).astype(dtype)
    return x * np.where(np.arange(WIDTH) == 3, 8, 1).astype(dtype)


def producers(report: jm.Table) -> set[tuple[str, ...]]:
    return {
        tuple(r["producer"].split(", ")) for r in report if r["scale min"] is not None
    }


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", EXACT)
def test_the_function_stays_in_double_precision(name):
    model, expected = EXACT[name]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, x = jax.tree.map(jnp.asarray, (narrowed(name, parameters()), tokens()))
        graph = jm.trace(model, params, x)
        new, report = jm.smooth(params, graph, [x], progress=False, with_report=True)
        run = jax.jit(model)
        added = run(params, x) - x
        np.testing.assert_allclose(run(new, x) - x, added, rtol=0, atol=1e-12)
    assert producers(report) == expected
    for row in report:
        assert (row["note"] is None) == (row["scale min"] is not None)
        if row["scale min"] is not None:
            assert row["scale min"] < 0.98 < 1.02 < row["scale max"]


def test_scales_of_norms_values_and_keys_are_those_of_the_paper():
    params, x = parameters(np.float32), tokens(np.float32)
    graph = jm.trace(separate, params, x)
    new = jm.smooth(params, graph, [x[:2], x[2:]], alpha=0.7, progress=False)
    h = np.asarray(layer_norm(params["norm"], x), np.float64)
    weights = np.concatenate([params[n]["w"] for n in "qkv"], 1)
    norm = np.abs(h).max((0, 1)) ** 0.7 / np.abs(weights).max(1) ** 0.3
    found = params["norm"]["g"] / new["norm"]["g"]
    np.testing.assert_allclose(found, norm / geometric(norm), rtol=1e-5)
    np.testing.assert_allclose(params["norm"]["b"] / new["norm"]["b"], found, rtol=1e-5)
    q, k, v = (np.asarray(h @ params[n]["w"] + params[n]["b"]) for n in "qkv")
    mixed = np.asarray(attended(heads(q), heads(k), heads(v)))
    values = np.abs(mixed).max((0, 1)) ** 0.7 / np.abs(params["out"]["w"]).max(1) ** 0.3
    found = params["v"]["b"] / new["v"]["b"]
    np.testing.assert_allclose(found, values / geometric(values), rtol=1e-4)
    queries = np.abs(q / EACH**0.5).max((0, 1)) ** 0.7 / np.abs(k).max((0, 1)) ** 0.3
    found = params["q"]["b"] / new["q"]["b"]
    np.testing.assert_allclose(found, queries / geometric(queries), rtol=1e-4)
    np.testing.assert_allclose(new["k"]["b"] / params["k"]["b"], found, rtol=1e-5)


def test_two_factors_of_a_product_are_not_smoothed_twice():
    params, x = parameters(np.float32), tokens(np.float32)
    graph = jm.trace(bilinear, params, x)
    options = {"alpha": 0.5, "progress": False, "with_report": True}
    new, report = jm.smooth(params, graph, [x], **options)
    rows = {row["producer"]: row for row in report}
    assert rows["gate"]["scale max"] > 1.2 * rows["gate"]["scale min"]
    assert np.isclose(rows["up"]["scale max"], 1, rtol=1e-5)
    assert np.isclose(rows["up"]["scale min"], 1, rtol=1e-5)
    expected = bilinear(params, x)
    np.testing.assert_allclose(bilinear(new, x), expected, rtol=1e-4, atol=1e-3)


def geometric(x: np.ndarray) -> float:
    return float(np.exp(np.log(x).mean()))


# What is skipped


def normed_queries(p, x):
    return separate(p, x, q=lambda q: rms_norm({"g": np.ones(EACH, np.float32)}, q))


def output_too(p, x):
    v = dense(p["v"], x)
    return dense(p["out"], v), v


def filled(p, x):
    keep = (jnp.arange(x.shape[1]) > 0)[None, :, None, None]
    return separate(p, x, v=lambda v: jnp.where(keep, v, 1.0))


def constant_added(p, x):
    return separate(p, x, v=lambda v: v + 1.0)


def squared(p, x):
    v = dense(p["v"], x)
    return dense(p["out"], v * v)


def of_itself(p, x):
    q = dense(p["q"], x)
    return dense(p["out"], jnp.einsum("btd,bsd->bts", q, q) @ x)


def twice(p, x):
    """Two products of the same queries: one scale would have to undo both."""
    q, k, v = (dense(p[n], x) for n in "qkv")
    both = [jnp.einsum("btd,bsd->bts", q, y) for y in (k, v)]
    return dense(p["out"], sum(both) @ x)


def shared_weight(p, x):
    return dense(p["out"], jax.nn.relu(dense(p["q"], x))) + p["q"]["w"].sum()


def one_bias(p, x):
    return dense(p["out"], jax.nn.relu(x @ p["q"]["w"] + p["one"]["b"][None, None]))


def derived(p, x):
    return dense(
        p["out"], jax.nn.relu(x @ p["q"]["w"] + jnp.tanh(p["q"]["b"])[None, None])
    )


def no_gain(p, x):
    x = x - x.mean(-1, keepdims=True)
    return dense(p["q"], x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6))


def other_gain(p, x):
    return dense(p["q"], rms_norm({"g": jnp.exp(p["norm"]["g"])}, x))


def with_a_cache(p, x):
    v = jax.lax.dynamic_update_slice(
        jnp.zeros((x.shape[0], 9, WIDTH)), dense(p["v"], x), (0, 0, 0)
    )
    return dense(p["out"], v)


SKIPPED = {
    "rotary": (functools.partial(separate, q=rotated, k=rotated), "q", "an addition"),
    "normed queries": (normed_queries, "k", "the other side of the product"),
    "an output": (output_too, "v", "it is an output"),
    "filled": (filled, "v", "select_n reads it"),
    "a constant": (constant_added, "v", "add reads it"),
    "squared": (squared, "v", "reads it twice|is not homogeneous"),
    "of itself": (of_itself, "q", "reads it twice"),
    "twice": (twice, "q", "several products read it"),
    "shared": (shared_weight, "q", "'q/w' is used elsewhere too"),
    "one bias": (one_bias, "q", "not one number for each channel"),
    "derived": (derived, "q", "its bias is computed from parameters"),
    "other gain": (other_gain, "norm", "not of the form"),
    "a cache": (with_a_cache, "v", "dynamic_update_slice reads it"),
    "post-norm": (post_norm, "norm", "an addition reads it"),
    "gelu": (post_norm, "up", "gelu is not homogeneous"),
    "a residual": (separate, "out", "an addition reads it"),
    "a gate": (gated, "gate", "silu is not homogeneous"),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", SKIPPED)
def test_what_cannot_be_undone_is_skipped_and_said(name):
    model, node, why = SKIPPED[name]
    params, x = parameters(np.float32), tokens(np.float32)
    graph = jm.trace(model, params, x)
    new, report = jm.smooth(params, graph, [x], progress=False, with_report=True)
    notes = [r["note"] for r in report if r["producer"] == node]
    assert len(notes) == 1 and notes[0] is not None and notes[0].startswith("skipped: ")
    with pytest.raises(ValueError, match=why):
        jm.smooth(params, graph.only(node), [x], progress=False)
    for one, two in zip(
        jax.tree.leaves(model(params, x)), jax.tree.leaves(model(new, x)), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * np.abs(one).max())


# Random networks


@pytest.mark.slow
@hypothesis.settings(max_examples=10)
@hypothesis.given(NETWORKS)
def test_random_networks_keep_their_function(network):
    params, x = random_values((network.params, network.inputs(2)))
    graph = jm.trace(network, params, x)
    new = jm.smooth(params, graph, [x], progress=False)
    one, two = (np.asarray(jax.jit(network)(p, x)) for p in (params, new))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * np.abs(one).max())


# Loops


class Gated(nn.Module):
    """A block of a language model, with norms before its layers."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(h)
        h = nn.RMSNorm(name="second")(x)
        gate = nn.silu(nn.Dense(24, name="gate")(h))
        return x + nn.Dense(WIDTH, name="down")(gate * nn.Dense(24, name="up")(h))


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Gated(name=f"layer{i}")(x)
        return x


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        loop = nn.scan(
            lambda block, x: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return loop(Gated(name="layers"), x)[0]


@functools.cache
def both() -> tuple[Any, Any, np.ndarray]:
    """Variables of both, and inputs."""
    x = tokens(np.float32)
    variables = jax.jit(Unrolled().init)(jax.random.key(0), x)
    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32), variables
    )
    layers = [variables["params"][f"layer{i}"] for i in range(2)]
    stack = {"params": {"layers": jax.tree.map(lambda *a: jnp.stack(a), *layers)}}
    return variables, stack, x


@pytest.mark.slow
def test_layers_of_a_loop_have_scales_of_their_own():
    variables, stack, x = both()
    found = []
    for model, params in ((Unrolled(), variables), (Scanned(), stack)):
        graph = jm.trace(model.apply, params, x)
        new, report = jm.smooth(params, graph, [x], progress=False, with_report=True)
        assert len(producers(report)) == (10 if params is variables else 5)
        found.append(new["params"])
    for i in range(2):
        mine = jax.tree.map(lambda a, i=i: a[i], found[1]["layers"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            mine,
            found[0][f"layer{i}"],
        )


def test_a_weight_that_a_loop_does_not_slice_is_skipped():
    def repeated(p, x):
        step = lambda x, _: (with_relu(p, x), None)
        return jax.lax.scan(step, x, None, length=2)[0]

    def branched(p, x):
        return jax.lax.cond(x[0, 0, 0] > 0, lambda x: with_relu(p, x), lambda x: x, x)

    params, x = parameters(np.float32), tokens(np.float32)
    for model, why in ((repeated, "inside a scan"), (branched, "inside a cond")):
        graph = jm.trace(model, params, x)
        new, report = jm.smooth(params, graph, [x], progress=False, with_report=True)
        assert not producers(report)
        assert why in dict(zip(report["producer"], report["note"], strict=True))["up"]
        jax.tree.map(np.testing.assert_array_equal, new, params)


# Selections


def test_only_what_is_selected_on_both_sides_changes():
    params, x = parameters(np.float32), tokens(np.float32)
    graph = jm.trace(separate, params, x)

    def changed(graph):
        new = jm.smooth(params, graph, [x], progress=False)
        return {
            name
            for name, leaves in new.items()
            if any(not np.array_equal(leaves[k], params[name][k]) for k in leaves)
        }

    assert changed(graph) == {"norm", "q", "k", "v", "out"}
    assert changed(graph.only("v", "out")) == {"v", "out"}
    assert changed(graph.without("norm", "k")) == {"v", "out"}
    assert changed(graph.only("q*", "k*")) == {"q", "k"}
    with pytest.raises(ValueError, match=r"norm 'norm' cannot be smoothed: k: not sel"):
        jm.smooth(params, graph.only("q", "norm"), [x], progress=False)


# What it is for


@pytest.mark.slow
def test_outlier_channels_of_a_model_with_norms_before_its_layers_cost_little():
    """Static W8A8, what enters a product quantized: several dB."""
    variables, _, x = both()
    x = np.random.default_rng(3).normal(size=(16, 5, WIDTH)).astype(np.float32)
    wide = np.ones(WIDTH, np.float32)
    wide[[2, 7]] = 40.0
    params = jax.tree.map(np.asarray, variables["params"])
    for layer in params.values():
        for norm in (
            "norm",
            "second",
        ):  # as after a training that lets a few channels grow
            layer[norm] = {k: v * wide for k, v in layer[norm].items()}
        readers = [layer["gate"], layer["up"]]
        readers += [layer["attention"][n] for n in ("query", "key", "value")]
        for one in readers:
            kernel = one["kernel"]
            one["kernel"] = kernel / wide.reshape(-1, *[1] * (kernel.ndim - 1))
    params, apply = {"params": params}, Unrolled().apply
    graph, batches = jm.trace(apply, params, x[:1]), [x]
    expected = jnp.asarray(apply(params, x))
    config = jm.QuantConfig(placement="products")

    def sqnr(tree: Any) -> float:
        quantizers = jm.calibrate(tree, graph, batches, config, progress=False)
        error = jax.jit(jm.simulate(apply, quantizers))(tree, x) - expected
        return 10 * float(jnp.log10(jnp.sum(expected**2) / jnp.sum(error**2)))

    new = jm.smooth(params, graph, batches, progress=False)
    before, after = sqnr(params), sqnr(new)
    assert after > before + 8, (before, after)
