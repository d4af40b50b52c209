"""Layers that divide what they read: the function stays, and what is quantized is divided."""

import functools
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm
from jaxmet.layers.moments import input_moments
from jaxmet.numerics.smoothing import smoothing_noise
from jaxmet.plot.counts import activations
from jaxmet.tree.batches import as_batches
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.named_leaves import named_leaves
from random_nets import NETWORKS, random_values

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


# Layouts of weights, and what is skipped


def heads_out(p, x):
    """A sum over two axes of the data, in another order than those of the weight."""
    h = jax.nn.gelu(dense(p["q"], x)).reshape(*x.shape[:2], 2, WIDTH // 2)
    return jnp.einsum(
        "btdh,dho->bto", h.swapaxes(2, 3), p["out"]["w"].reshape(4, 2, WIDTH)
    )


def transposed(p, x):
    h = jax.nn.gelu(dense(p["q"], x))
    return jnp.einsum("oi,bti->bto", p["out"]["w"], h)


def first_operand(p, x):
    h = jax.nn.gelu(dense(p["q"], x))
    return jnp.einsum("io,bti->obt", p["out"]["w"], h)


def reshaped_away(p, x):
    h = jax.nn.gelu(dense(p["q"], x)).reshape(*x.shape[:2], 2, WIDTH // 2)
    w = p["out"]["w"].reshape(2, WIDTH // 2, 2, WIDTH // 2)
    return jnp.einsum("bthi,hijo->btjo", h, w)


@pytest.mark.parametrize(
    "model",
    [heads_out, transposed, first_operand, reshaped_away],
    ids=lambda f: f.__name__,
)
def test_any_layout_of_the_weight(model):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = {n: drawn(np.float64)["layer0"][n] for n in ("q", "out")}
        params, x = jax.tree.map(jnp.asarray, (params, inputs(np.float64)))
        graph = jm.trace(model, params, x)
        new = jm.smooth(params, graph, [x], input_scales=True, **QUIET)
        assert carried(new).keys() == {"out/w"}
        close(jax.jit(jm.lift(model))(new, x), model(params, x), 1e-13)
        close(model(jm.densify(new), x), model(params, x), 1e-13)


def two_readers(p, x):
    """A product of activations reads the value too: its quantizer would have two ranges."""
    h = jax.nn.gelu(dense(p["q"], x))
    return dense(p["out"], h) + jnp.einsum("btd,bsd,bsw->btw", h, h, x)


def pooled(p, x):
    h = lax.reduce_window(
        jax.nn.gelu(dense(p["q"], x)), -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID"
    )
    return dense(p["out"], h)


def two_lengths(p, x):
    h = jax.nn.gelu(dense(p["q"], x))
    return dense(p["out"], h), jnp.einsum(
        "bti,tio->bo", h, p["k"]["w"][None] * jnp.ones((4, 1, 1))
    )


def used_twice(p, x):
    h = jax.nn.gelu(dense(p["q"], x))
    return dense(p["out"], jax.nn.gelu(dense(p["out"], h)))


SKIPPED = {
    "a matmul": (two_readers, "reads it too"),
    "a pool that chooses": (pooled, "quantized at products alone"),
    "another product": (two_lengths, "reads it too|computed from parameters"),
    "a shared weight": (used_twice, "used elsewhere"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_has_no_quantizer_of_its_own_is_skipped_and_said(name):
    model, why = SKIPPED[name]
    params = {n: drawn()["layer0"][n] for n in ("q", "k", "out")}
    x = inputs()
    graph = jm.trace(model, params, x)
    how = {"input_scales": True, "with_report": True}
    new, report = jm.smooth(params, graph, [x], **how, **QUIET)
    assert not carried(new)
    assert any(note and re.search(why, note) for note in report["note"])


def test_a_scale_that_the_model_has_no_place_for_is_refused():
    model, params, new, x, _ = made()

    def twice(p, x):
        return model(p, x) + jnp.sum(p["layer0"]["down"]["w"])

    def looked_up(p, x):
        return dense(p["down"], x) + p["down"]["w"][0][None, None]

    with pytest.raises(
        ValueError, match=r"'layer0/down/w' states what is done to the inputs"
    ):
        jm.lift(twice)(new, x)
    other = {"down": {**params["layer0"]["q"], "w": new["layer1"]["q"]["w"]}}
    with pytest.raises(ValueError, match="not the weight of one dense layer"):
        jm.lift(looked_up)(other, x)


def test_alpha_by_noise_loses_no_more_than_any_number():
    """What a layer after GELU loses, in squares of its outputs; the prediction is near it."""
    rng = np.random.default_rng(0)
    few, many = 24, 64
    channels = rng.lognormal(0, 1, (1, many)), rng.lognormal(0, 0.5, (many, 1))
    w = [rng.normal(size=(few, many)) / 5 * channels[0]]
    w += [rng.normal(size=(many, few)) / 8 * channels[1]]
    layers = [
        {"w": a.astype(np.float32), "b": np.zeros(a.shape[1], np.float32)} for a in w
    ]
    params = dict(zip(("up", "down"), layers, strict=True))
    x = rng.normal(size=(32, 8, few)).astype(np.float32)

    def model(p, x):
        return dense(p["down"], jax.nn.gelu(dense(p["up"], x)))

    graph, errors = jm.trace(model, params, x), {}
    rules = [jm.Rule(name, quantize=False) for name in ("up/w", "input")]
    config = jm.QuantConfig(placement="products", rules=rules)
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0, "noise"):
        new = jm.smooth(params, graph, [x], input_scales=True, alpha=alpha, **QUIET)
        q = jm.calibrate(new, graph, [x], config, **QUIET)
        found = jax.jit(jm.simulate(model, q))(new, x) - model(params, x)
        errors[alpha] = float(jnp.mean(jnp.sum(found**2, -1)))
        s = np.asarray(new["down"]["w"].input_scale, np.float64)[:, 0]
        h = np.asarray(jax.nn.gelu(dense(params["up"], x)), np.float64).reshape(
            -1, many
        )
        ends = np.asarray([(h / s).max() - (h / s).min()])
        squares, weight = np.mean(h**2, 0)[None], np.float64(params["down"]["w"][None])
        predicted = smoothing_noise(s[None], [ends], squares, weight)[0]
        assert 0.8 < errors[alpha] / predicted < 1.1
    assert (
        errors["noise"] == min(errors.values()) < 0.95 * errors[0.5] < errors[1.0] / 1.5
    )


# Other transforms


def snr(found, expected):
    found, expected = (np.asarray(v, np.float64) for v in (found, expected))
    return 10 * np.log10(np.mean(expected**2) / np.mean((found - expected) ** 2))


@pytest.mark.parametrize("name", ["unrolled", "scanned"])
def test_files_and_integers_keep_the_scales(name, tmp_path):
    model, _, new, x, graph = made(name)
    q = jm.calibrate(new, graph, [x], **QUIET)
    simulated = jax.jit(jm.simulate(model, q))(new, x)
    jm.save(tmp_path / "tree.npz", params=new, quantizers=q)
    saved = jm.load(tmp_path / "tree.npz")
    close(jax.jit(jm.simulate(model, saved.quantizers))(saved.params, x), simulated, 0)
    integers = jm.quantize(new, graph, q)
    assert carried(integers).keys() >= carried(new).keys()
    run = jax.jit(jm.simulate(model, q, weights=False))
    close(run(integers, x), simulated, 1e-6)
    close(run(jm.round_weights(new, q), x), simulated, 1e-6)
    plain = jm.densify(integers)
    close(model(plain, x), jax.jit(jm.lift(model))(integers, x), 1e-5)
    if name == "unrolled":
        assert snr(jax.jit(jm.lift(model, q))(integers, x), simulated) > 25


def test_what_is_said_of_a_grid_is_said_of_what_enters():
    """The values of the node itself would say that it fits badly."""
    _, _, new, x, graph = made()
    q = jm.calibrate(new, graph, [x], **QUIET)
    rows = {row["node"]: row for row in jm.compare(new, graph, q, x)}
    assert rows["layer0/up/gelu"]["clipped"] is None
    assert rows["embed"]["clipped"] is not None
    names = ["layer0/up/gelu", "embed"]
    found = activations(new, graph, as_batches([x], "test"), names, "test")
    for name in names:
        counts, edges = found[name]
        there = np.flatnonzero(counts)
        width, step = edges[1] - edges[0], float(q.activations[name].scale)
        seen = edges[there[-1] + 1] - min(edges[there[0]], 0)
        assert abs(seen - 255 * step) <= 2 * width + step


@pytest.mark.slow
def test_compressed_trees_keep_the_scales_of_what_is_left():
    model, params, new, x, graph = made()
    factors = jm.factorize(new, graph, ratios=0.9, method="weight")
    assert {"layer0/down/in/w", "layer1/q/in/w"} <= carried(factors).keys()
    close(jax.jit(jm.lift(model))(factors, x), model(jm.densify(factors), x), 1e-4)
    small = jm.prune(new, graph, 0.7, batches=[x], **QUIET)
    assert carried(small)["layer0/down/w"].shape[0] < HIDDEN
    close(jax.jit(jm.lift(model))(small, x), model(jm.densify(small), x), 1e-4)
    same = jm.prune(params, graph, 0.7, batches=[x], **QUIET)
    assert snr(jax.jit(jm.lift(model))(small, x), model(params, x)) > 0.8 * snr(
        jax.jit(jm.lift(model))(same, x), model(params, x)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unrolled", "scanned"])
def test_rounding_is_solved_for_what_enters(name):
    """The rows and Gram matrices are those of divided inputs: AdaRound beats nearest."""
    model, params, new, x, graph = made(name)
    config = jm.QuantConfig(weight_bits=4, activation_bits=32)
    q = jm.calibrate(new, graph, [x], config, **QUIET)
    run = lambda q, tree: snr(jax.jit(jm.simulate(model, q))(tree, x), model(params, x))
    rounded, pinned = jm.adaround(new, graph, q, [x], key=jax.random.key(0), **QUIET)
    assert run(pinned, rounded) > run(q, new) + 1
    assert carried(rounded).keys() == carried(new).keys()


@pytest.mark.slow
def test_statistics_of_norms_are_divided():
    """Data-free ranges, and data-free correction: beside the same tree without scales."""

    def model(p, x):
        h = dense(p["up"], x)
        mean, var = (p["bn"][n][None, None] for n in ("mean", "var"))
        h = (h - mean) / jnp.sqrt(var + 1e-5) * p["bn"]["g"][None, None] + p["bn"]["b"][
            None, None
        ]
        return dense(p["down"], jax.nn.silu(h))

    rng = np.random.default_rng(3)
    params: dict[str, Any] = {n: drawn()["layer0"][n] for n in ("up", "down")}
    draws = {
        n: rng.uniform(0.5, 2, HIDDEN).astype(np.float32)
        for n in ("mean", "var", "g", "b")
    }
    params["bn"], x = draws, inputs()
    graph = jm.trace(model, params, x)
    new = jm.smooth(params, graph, [x], input_scales=True, **QUIET)
    (name,) = carried(new)
    scale = carried(new)[name][:, 0]
    plain, divided = (input_moments(graph, tree)["down"] for tree in (params, new))
    np.testing.assert_allclose(divided.mean, plain.mean / scale, rtol=1e-4)
    np.testing.assert_allclose(divided.variance, plain.variance / scale**2, rtol=1e-4)
    q = jm.calibrate(new, graph, None, **QUIET)
    (quantizer,) = (v for n, v in q.activations.items() if n.endswith("silu"))
    wide = jm.calibrate(params, graph, None, **QUIET).activations
    (before,) = (v for n, v in wide.items() if n.endswith("silu"))
    ratio = float(quantizer.scale) / float(before.scale)
    assert 1 / scale.max() < ratio < 1 / scale.min() and abs(ratio - 1) > 0.05


@pytest.mark.slow
@hypothesis.settings(max_examples=10)
@hypothesis.given(NETWORKS)
def test_random_networks_keep_their_function(network):
    params, x = random_values((network.params, network.inputs(2)))
    graph = jm.trace(network, params, x)
    new = jm.smooth(params, graph, [x], input_scales=True, alpha="noise", **QUIET)
    expected = np.asarray(jax.jit(network)(params, x))
    lifted, plain = jax.jit(jm.lift(network))(new, x), network(jm.densify(new), x)
    for found in (lifted, plain):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * scale)
    q = jm.calibrate(new, graph, [x], **QUIET)
    assert np.isfinite(jax.jit(jm.simulate(network, q))(new, x)).all()
