"""Layers that divide what they read: the function stays, and what is quantized is divided."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.names import named_leaves

WIDTH, HIDDEN, DEPTH = 8, 12, 3
QUIET = {"progress": False}
ACTS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}


def normed(p, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * p["g"][None, None] + p["b"][None, None]


def dense(p, x):
    return x @ p["w"] + p["b"][None, None]


def block(p, x, act=jax.nn.gelu):
    """A layer of BERT: norms after the additions."""
    q, k, v = (dense(p[n], x) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / 3)
    x = normed(p["norm"], x + dense(p["out"], jnp.einsum("bts,bsd->btd", weights, v)))
    return normed(p["last"], x + dense(p["down"], act(dense(p["up"], x))))


def unrolled(p, x, act=jax.nn.gelu):
    x = normed(p["first"], dense(p["embed"], x))
    for i in range(DEPTH):
        x = block(p[f"layer{i}"], x, act)
    return dense(p["head"], x)


def scanned(p, x):
    x = normed(p["first"], dense(p["embed"], x))
    x = lax.scan(lambda x, layer: (block(layer, x), None), x, p["layers"])[0]
    return dense(p["head"], x)


def drawn(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def layer(n, m):
        w = rng.normal(size=(n, m)) / np.sqrt(n) * rng.uniform(0.3, 3, (n, 1))
        return {"w": w, "b": 0.1 * rng.normal(size=m)}

    def norm():
        gain = rng.uniform(0.5, 1.5, WIDTH) * np.where(np.arange(WIDTH) == 2, 9, 1)
        return {"g": gain, "b": 0.1 * rng.normal(size=WIDTH)}

    def one():
        names = {n: layer(WIDTH, WIDTH) for n in ("q", "k", "v", "out")}
        hidden = {"up": layer(WIDTH, HIDDEN), "down": layer(HIDDEN, WIDTH)}
        return names | hidden | {"norm": norm(), "last": norm()}

    tree = {"embed": layer(WIDTH, WIDTH), "first": norm(), "head": layer(WIDTH, 5)}
    tree |= {f"layer{i}": one() for i in range(DEPTH)}
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def stacked(tree: dict[str, Any]) -> dict[str, Any]:
    layers = [tree[f"layer{i}"] for i in range(DEPTH)]
    kept = {n: tree[n] for n in ("embed", "first", "head")}
    stack = lambda *a: None if a[0] is None else np.stack(a)
    return kept | {"layers": jax.tree.map(stack, *layers)}


def inputs(dtype: Any = np.float32, batch: int = 6) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 4, WIDTH)).astype(dtype)


@functools.cache
def made(name: str = "unrolled") -> tuple[Any, ...]:
    """A model, its parameters, those with input scales, inputs and the graph."""
    model, params = {
        "unrolled": (unrolled, drawn()),
        "scanned": (scanned, stacked(drawn())),
    }[name]
    x = inputs()
    graph = jm.trace(model, params, x)
    new = jm.smooth(params, graph, [x], input_scales=True, **QUIET)
    return model, params, new, x, graph


def close(one: Any, two: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def carried(params: Any) -> dict[str, np.ndarray]:
    leaves = named_leaves(params).items()
    return {n: np.asarray(x.input_scale) for n, x in leaves if is_compressed(x)}


# The function


@pytest.mark.parametrize("act", ACTS)
def test_the_function_stays_in_double_precision(act):
    model = functools.partial(unrolled, act=ACTS[act])
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, x = jax.tree.map(jnp.asarray, (drawn(np.float64), inputs(np.float64)))
        graph = jm.trace(model, params, x)
        given = {"input_scales": True, "with_report": True}
        new, report = jm.smooth(params, graph, [x], **given, **QUIET)
        close(jax.jit(jm.lift(model))(new, x), model(params, x), 1e-13)
        close(model(jm.densify(new), x), model(params, x), 1e-13)
    found = {r["producer"]: r["consumers"] for r in report if r["scale min"]}
    notes = dict(zip(report["producer"], report["note"], strict=True))
    by_weight = {n: found[n] for n in found if notes[n] == "carried by the weight"}
    assert by_weight == {
        "first": "layer0/q, layer0/k, layer0/v",
        "layer0/norm": "layer0/up",
        "layer1/norm": "layer1/up",
        "layer2/norm": "layer2/up",
        **{f"layer{i}/up/{act}": f"layer{i}/down" for i in range(3)},
        "layer0/last": "layer1/q, layer1/k, layer1/v",
        "layer1/last": "layer2/q, layer2/k, layer2/v",
    }
    assert notes["input"] == "skipped: an input of the model"
    # Plain arrays say it where products alone read a norm.
    assert found["layer2/last"] == "head"


def test_scales_are_those_of_the_paper_and_one_for_all_that_read_a_value():
    model, params, _, x, graph = made()
    new = jm.smooth(
        params, graph, [x[:3], x[3:]], input_scales=True, alpha=0.7, **QUIET
    )
    layer = params["layer0"]
    with jax.numpy_dtype_promotion("standard"):
        read = block(layer, normed(params["first"], dense(params["embed"], x)))
    plain = jm.densify(new)[
        "layer1"
    ]  # its values are divided for the layer after attention
    weights = np.concatenate([plain[n]["w"] for n in "qkv"], 1)
    s = np.abs(np.asarray(read)).max((0, 1)) ** 0.7 / np.abs(weights).max(1) ** 0.3
    s /= np.exp(np.log(s).mean())
    for n in "qkv":
        leaf = new["layer1"][n]["w"]
        assert leaf.input_scale.shape == (WIDTH, 1)
        np.testing.assert_allclose(leaf.input_scale[:, 0], s, rtol=1e-4)


def test_smoothing_again_multiplies_the_scales():
    model, params, new, x, graph = made()
    again = jm.smooth(new, graph, [x], input_scales=True, alpha=0.9, **QUIET)
    close(jax.jit(jm.lift(model))(again, x), model(params, x))
    one, two = carried(new), carried(again)
    assert one.keys() == two.keys()
    assert all(np.abs(np.log(two[n] / one[n])).max() > 0.05 for n in one)


def test_by_default_the_tree_has_plain_arrays():
    model, params, _, x, graph = made()
    new, report = jm.smooth(params, graph, [x], with_report=True, **QUIET)
    assert not carried(new)
    assert "carried by the weight" not in report["note"]
    close(model(new, x), model(params, x))


def test_plain_apply_refuses():
    model, _, new, x, _ = made()
    with pytest.raises(TypeError, match="jm.lift"):
        model(new, x)


@pytest.mark.parametrize("name", ["unrolled", "scanned"])
def test_gradients_and_batches_of_trees(name):
    model, params, new, x, _ = made(name)
    lifted = jm.lift(model)
    loss = lambda f: jax.jit(jax.grad(lambda p: jnp.sum(f(p, x) ** 2)))
    found, expected = loss(lifted)(new), loss(model)(params)
    plain = jm.densify(jax.tree.map(lambda g, w: g * 0 + w, found, new))
    close(plain, jm.densify(new))
    for n, leaf in named_leaves(found).items():
        if is_compressed(leaf):
            scale = named_leaves(new)[n].input_scale
            close(leaf.weight * scale, _at(new, params, expected, n), 1e-3)
            assert not np.any(leaf.input_scale)
    two = jax.tree.map(lambda a: jnp.stack([a, a * 1.01]), new)
    both = jax.jit(jax.vmap(lifted, (0, None)))(two, x)
    close(both[0], model(params, x))


def _at(new, params, gradient, name):
    """The gradient by the weight as it was, over what else moved along its outputs."""
    w = np.asarray(named_leaves(params)[name])
    made = np.asarray(named_leaves(jm.densify(new))[name])
    return np.asarray(named_leaves(gradient)[name]) * (w / made)


# Quantized


def grid(x, bits=8):
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def columns(w):
    scale = np.abs(w).max(0) / 127
    return np.round(w / scale) * scale


def test_what_enters_is_what_is_quantized():
    """The error of a layer after GELU, computed by hand."""

    def model(p, x):
        return dense(p["down"], jax.nn.gelu(dense(p["up"], x)))

    params, x = {n: drawn()["layer0"][n] for n in ("up", "down")}, 3 * inputs()
    graph = jm.trace(model, params, x)
    new = jm.smooth(params, graph, [x], input_scales=True, **QUIET)
    q = jm.calibrate(new, graph, [x], **QUIET)
    assert q.activations["up/gelu"].products_only
    hidden = np.asarray(
        jax.nn.gelu(grid(x) @ columns(params["up"]["w"]) + params["up"]["b"])
    )
    whole = np.asarray(jax.nn.gelu(x @ params["up"]["w"] + params["up"]["b"]))
    s = np.asarray(new["down"]["w"].input_scale)[:, 0]
    read = whole / s
    low, high = min(read.min(), 0), max(read.max(), 0)
    scale = (high - low) / 255
    np.testing.assert_allclose(q.activations["up/gelu"].scale, scale, rtol=1e-5)
    zero = np.round(-low / scale)
    entering = (np.clip(np.round(hidden / s / scale) + zero, 0, 255) - zero) * scale
    expected = (
        entering @ columns(np.asarray(new["down"]["w"].weight)) + params["down"]["b"]
    )
    outputs = q.activations["down"]
    expected = np.asarray(outputs(jnp.asarray(expected, jnp.float32)))
    found = np.asarray(jax.jit(jm.simulate(model, q))(new, x))
    step = float(outputs.scale)
    assert np.mean(np.abs(found - expected) > 0.01 * step) < 0.02
    error = np.mean((found - np.asarray(model(params, x))) ** 2)
    assert 0 < error < np.mean(np.asarray(model(params, x)) ** 2) / 1000


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_a_loop_has_the_scales_and_ranges_of_its_layers(ranges):
    config = jm.QuantConfig(activation_range=ranges)
    trees, quantizers, outputs = {}, {}, {}
    for name in ("unrolled", "scanned"):
        model, _, new, x, graph = made(name)
        q = jm.calibrate(new, graph, [x[:3], x[3:]], config, **QUIET)
        trees[name], quantizers[name] = carried(new), q.activations
        outputs[name] = jax.jit(jm.simulate(model, q))(new, x)
        if (
            ranges == "minmax"
        ):  # a first layer of the loop has no norm that could be divided
            outputs[name] = jax.jit(jm.lift(model))(new, x)
    # Written out, the last norm of all is read by the head alone, and takes its division.
    assert carried(new).keys() - trees["unrolled"].keys() >= {"head/w"}
    for name in trees["scanned"].keys() - {"head/w"}:
        scale = trees["scanned"][name]
        for i in range(DEPTH):
            one = name.replace("layers", f"layer{i}")
            np.testing.assert_allclose(scale[i], trees["unrolled"][one], rtol=1e-3)
    close(outputs["unrolled"], outputs["scanned"], 0.05)
    gelu = quantizers["scanned"]["layers/up/gelu"]
    mine = [quantizers["unrolled"][f"layer{i}/up/gelu"].scale for i in range(DEPTH)]
    np.testing.assert_allclose(gelu.scale, np.stack(mine), rtol=0.02)
    last = quantizers["scanned"]["layers/last"]
    assert last.products_only
    mine = [quantizers["unrolled"][f"layer{i}/last"].scale for i in range(DEPTH - 1)]
    np.testing.assert_allclose(last.scale[:-1], np.stack(mine), rtol=0.02)
