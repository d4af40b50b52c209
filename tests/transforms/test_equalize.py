"""Equalization: scrambled networks get equal ranges back and keep their function."""

from collections.abc import Mapping
from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.nn import relu

import zoo
from jaxmet import Compressed, Graph, equalize, lift, trace
from jaxmet.engine.graph.channel_groups import Joined
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from zoo import CASES, twin

RANGE: dict[str, Any] = {"objective": "range"}

# For each case the channels that must come out equalized: the weights that make them, then
# those that read them. Written by hand from the models.
TIED: dict[str, list[tuple[str, str]]] = {
    "conv_bn_relu": [("stem", "head")],
    "inverted_residual": [("expand", "depthwise"), ("depthwise", "project")],
    "mobile": [
        ("stem block1/project block2/project", "block1/expand block2/expand last"),
        ("block1/expand", "block1/depthwise"),
        ("block1/depthwise", "block1/project"),
        ("block2/expand", "block2/depthwise"),
        ("block2/depthwise", "block2/project"),
        ("last", "head"),
    ],
    "residual": [("conv1", "conv2")],
    "resnet": [
        ("stem block1/conv2", "block1/conv1 block2/conv1 block2/proj"),
        ("block1/conv1", "block1/conv2"),
        ("block2/conv1", "block2/conv2"),
        ("block2/conv2 block2/proj", "head"),
    ],
    "grouped": [("stem", "grouped"), ("grouped", "depthwise"), ("depthwise", "point")],
    "dilated": [("first", "second")],
    "strided": [("first", "second")],
    "transposed": [("down", "up"), ("up", "head")],
    "concatenation": [("stem", "left right"), ("left", "merge"), ("right", "merge")],
    "flatten": [("stem", "head")],
    "global_pool": [("stem", "head")],
    "pooling": [("first", "second"), ("second", "third")],
    "resize": [("stem", "head")],
    "pre_activation": [("conv1", "conv2")],
    "slopes": [("first", "second"), ("second", "third")],
    "squeeze_excite": [("stem", "reduce head"), ("reduce", "grow")],
    "gated": [("up", "down")],
    "embedding": [("first", "second")],
    "dropout": [("first", "second")],
    "outputs_in_a_tree": [("stem", "centre size logits")],
    "remat": [("stem", "block/first"), ("block/first", "block/second"), ("block/second", "head")],
    "jit": [("stem", "block/first"), ("block/first", "block/second"), ("block/second", "head")],
    "two_inputs": [("left right", "head")],
    "equinox_conv": [("layers/0", "layers/2"), ("layers/2", "layers/5")],
    "haiku_conv": [("net/~/stem", "net/~/head")],
}  # fmt: skip

# What may be skipped, apart from channels that are outputs of the model.
LEFT: dict[str, str] = {
    "inverted_residual": "project",
    "residual": "conv2",
    "clip_after_add": "stem",
    "group_norm": "stem",
    "squeeze_excite": "grow",
    "dense_norm": "first second",
    "transformer": "attn/query attn/out attn/value up",
    "embedding": "embed",
    "tied_embedding": "middle embed:0 embed:1",
    "gelu_mlp": "first second",
    "tied": "shared:0",
    "outputs_in_a_tree": "size logits",
    "cond": "low",
    "scan": "stack/dense",
    "rnn": "rnn/cell/i",
    "lstm": "rnn/cell rnn/cell:1",
    "matmul_mlp": "w/0",
    "einsum_heads": "project",
    "gated": "gate",
    "plain_cond": "low",
    "standardized": "conv",
}
CASES_WITH_LAYERS = sorted(CASES)


def weight_of(leaves: Mapping[str, Any], layer: str) -> np.ndarray:
    """A layer's weight in float64, its inputs on the last axis but one, outputs last."""
    names = (layer, *(f"{layer}/{end}" for end in ("kernel", "weight", "w")))
    name = next(n for n in names if n in leaves)
    leaf = leaves[name]
    w = np.asarray(leaf.weight if is_compressed(leaf) else leaf, np.float64)
    return np.moveaxis(w, (1, 0), (-2, -1)) if name.endswith("weight") else w


def made(w: np.ndarray) -> np.ndarray:
    return np.abs(w).max(axis=tuple(range(w.ndim - 1)))


def read(w: np.ndarray, channels: int, before: int = 0, total: int = 0) -> np.ndarray:
    """The largest magnitude that reads each channel, for any grouping, by brute force.

    With `total`, the channels are those from `before` on of a concatenation.
    """
    largest = np.zeros(total or channels)
    ins, outs = w.shape[-2:]
    if w.ndim == 2 and ins > largest.size:  # a flattened image: channels run fastest
        w = w.reshape(-1, largest.size, outs)
        ins = largest.size
    groups = largest.size // ins
    for j in range(ins):
        for o in range(outs):
            i = (o // (outs // groups)) * ins + j
            largest[i] = max(largest[i], np.abs(w[..., j, o]).max())
    return largest[before : before + channels]


def gaps(case: str, params: Any) -> np.ndarray:
    """log r1/r2 of all channels that the table of this file names."""
    leaves, found = named_leaves(params), []
    for producers, consumers in TIED[case]:
        one = np.max([made(weight_of(leaves, m)) for m in producers.split()], axis=0)
        if consumers == "merge":
            before = 0 if producers == "left" else 4
            two = read(weight_of(leaves, "merge"), len(one), before, 12)
        else:
            every = [read(weight_of(leaves, r), len(one)) for r in consumers.split()]
            two = np.max(every, axis=0)
        found.append(np.log(one / two))
    return np.concatenate(found)


def along(layout: Any, scales: Mapping[int, np.ndarray]) -> np.ndarray:
    """The factor of everything on an axis."""
    vector = np.ones(1)
    for item in layout:
        if isinstance(item, Joined):
            own = np.concatenate([along(part, scales) for part in item.parts])
        else:
            own = scales.get(item.group, np.ones(item.size))
        vector = np.outer(vector, own).ravel()
    return vector


def scrambled(params: Any, graph: Graph, seed: int, largest: float = 1e3) -> Any:
    """The same function with every free channel divided by a factor of its own."""
    rng = np.random.default_rng(seed)
    spread = np.log(largest)
    free = {g.index: g for g in graph.groups if g.free}
    free = {
        k: g
        for k, g in free.items()
        if all(graph[c].carrier is not None for c in g.clips)
    }
    scales = {k: np.exp(rng.uniform(-spread, spread, g.size)) for k, g in free.items()}
    leaves = {k: v for k, v in named_leaves(params).items() if hasattr(v, "shape")}
    new = {k: np.asarray(v, np.float64) for k, v in leaves.items()}
    for member in graph.members:
        factor = along(member.layout, scales)
        w = new[member.parameter]
        if member.groups != 1:
            outs, ins = w.shape[-1], w.shape[-2]
            for j in range(ins):
                for o in range(outs):
                    w[..., j, o] *= factor[(o // (outs // member.groups)) * ins + j]
            continue
        power = {"in": 1, "out": -1, "shift": -1, "variance": -2, "scale": 0}[
            member.role
        ]
        shape = [-1 if i == member.axis % w.ndim else 1 for i in range(w.ndim)]
        w *= factor.reshape(shape) ** power
    for node in graph.nodes:
        if (
            node.norm is not None
            and node.norm.scale in new
            and node.norm.over == "stored"
        ):
            n = node.norm
            old = np.asarray(leaves[n.variance], np.float64)
            new[n.scale] *= np.sqrt((new[n.variance] + n.epsilon) / (old + n.epsilon))
    tree = {k: jnp.asarray(v, leaves[k].dtype) for k, v in new.items()}
    for node in graph.nodes:
        if node.carrier is not None:
            member = next(
                m for m in graph.members if (m.node, m.role) == (node.carrier, "out")
            )
            upper = jax.device_put(
                np.float32(node.bounds[1] / along(member.layout, scales))
            )
            tree[member.parameter] = Compressed(tree[member.parameter], upper=upper)
    return replace_leaves(params, tree)


def model(name: str, frontend: str | None = None) -> tuple[Any, Any, Any, Graph]:
    return *zoo.model(name, frontend), zoo.traced(name, frontend)


def ran(apply: Any, params: Any, out: Any, inputs: Any) -> tuple[Any, Any]:
    """The model, and what was made of it."""
    return jax.jit(apply)(params, *inputs), jax.jit(lift(apply))(out, *inputs)


def difference(one: Any, two: Any) -> float:
    """The largest difference of two outputs, relative to the largest entry of the first."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return max(
        float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))
        / max(float(np.max(np.abs(np.asarray(a, np.float64)))), 1e-30)
        for a, b in pairs
        if np.asarray(a).dtype.kind == "f"
    )


@pytest.mark.parametrize("name", CASES_WITH_LAYERS)
@pytest.mark.slow
def test_scrambled_networks_get_equal_ranges_back(name: str) -> None:
    apply, params, inputs, graph = model(name)
    start = scrambled(params, graph, seed=1)
    before = jax.tree.map(np.array, start)
    out, report = equalize(start, graph, **RANGE, with_report=True)
    jax.tree.map(np.testing.assert_array_equal, before, start)
    assert difference(*ran(apply, params, out, inputs)) < 2e-5
    left = {row["group"] for row in report if row["note"] is not None}
    outputs = {
        r["group"] for r in report if r["note"] == "skipped: an output of the model"
    }
    assert left - outputs == set(LEFT.get(name, "").split())
    assert (name in TIED) == any(row["note"] is None for row in report)
    if name in TIED:
        assert np.abs(gaps(name, start)).max() > 1
        assert np.abs(gaps(name, out)).max() < 1e-4
        worst = max(row["residual"] for row in report if row["note"] is None)
        assert worst < 1e-4
    old, new = named_leaves(params), named_leaves(out)
    assert list(old) == list(new)
    for key, leaf in old.items():
        if hasattr(leaf, "shape"):
            assert (new[key].shape, new[key].dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "name", ["grouped", "concatenation", "inverted_residual", "resnet"]
)
def test_the_result_does_not_depend_on_the_scrambling(name: str) -> None:
    _, params, _, graph = model(name)
    run = jax.jit(partial(equalize, graph=graph, **RANGE))
    wanted = run(params)
    # Where channels are tied in a circle, equal ranges do not fix every scale.
    start = scrambled(params, graph, seed=2)
    if any(is_compressed(leaf) for leaf in named_leaves(start).values()):
        wanted = equalize(scrambled(params, graph, seed=5), graph, **RANGE)
        assert np.abs(gaps(name, wanted)).max() < 1e-4
    found = run(start)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-30)


def test_published_pair_and_triple() -> None:
    """The numbers of a published test, from (O, I, H, W) to the layout used here."""

    def hwio(values: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
        return jax.device_put(
            np.float32(np.transpose(values.reshape(shape), (2, 3, 1, 0)))
        )

    one = np.arange(1.0, 13)
    two = np.array([1.0, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23])
    del two
    params = {
        "one": {"w": hwio(one, (2, 2, 3, 1)), "b": jnp.array([1.0, 2.0])},
        "two": {
            "w": hwio(np.arange(1.0, 24, 2), (2, 1, 3, 2)),
            "b": jnp.array([1.0, 3.0]),
        },
        "three": {"w": hwio(one, (2, 2, 3, 1)), "b": jnp.zeros(2)},
    }
    layout = ("NHWC", "HWIO", "NHWC")

    def conv(p: Any, x: jax.Array, groups: int = 1) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            p["w"],
            (1, 1),
            "SAME",
            dimension_numbers=layout,
            feature_group_count=groups,
        )
        return y + p["b"][None, None, None]

    def triple(p: Any, x: jax.Array) -> jax.Array:
        return conv(p["three"], relu(conv(p["two"], relu(conv(p["one"], x)), 2)))

    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
    out = equalize(params, trace(triple, params, x), **RANGE)
    s = np.asarray(params["one"]["b"] / out["one"]["b"])
    t = np.asarray(params["two"]["b"] / out["two"]["b"])
    assert difference(triple(params, x), triple(out, x)) < 1e-6
    np.testing.assert_allclose(1 / s[0], 1 / 0.7137658, rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(out["three"]["w"] / params["three"]["w"])[0, 0, :, 0], t, rtol=1e-6
    )
    np.testing.assert_allclose(t[0], 0.93401319, rtol=1e-5)


def test_grouped_and_flattened_pairs_by_hand() -> None:
    """r1 = r2 = √(r1 r2) with s = √(r1/r2), computed channel by channel."""
    _, params, _, graph = model("flatten")
    leaves = named_leaves(params)
    r1 = made(weight_of(leaves, "stem"))
    r2 = read(weight_of(leaves, "head"), 4)
    out = named_leaves(equalize(params, graph, **RANGE))
    scale = np.asarray(leaves["stem/bias"] / out["stem/bias"], np.float64)
    np.testing.assert_allclose(scale, np.sqrt(r1 / r2), rtol=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["inverted_residual", "mobile"])
def test_clips_are_exact_in_float64(name: str) -> None:
    with jax.enable_x64(True):
        apply, params, inputs = CASES[name].make["linen"](jax.random.key(1))
        double = partial(
            jax.tree.map, lambda a: jnp.asarray(np.asarray(a), jnp.float64)
        )
        params, inputs = double(params), double(inputs)
        params = jax.tree.map(
            lambda a: a * 3, params
        )  # so that many values are clipped
        graph = trace(apply, params, *inputs)
        out = equalize(params, graph, **RANGE)
        assert any(is_compressed(leaf) for leaf in named_leaves(out).values())
        assert difference(*ran(apply, params, out, inputs)) < 1e-12
        relu_only = equalize(params, graph, **RANGE, clip="relu")
        assert difference(*ran(apply, params, relu_only, inputs)) > 1e-3


def test_modes_of_clips() -> None:
    apply, params, inputs, graph = model("inverted_residual")
    out, report = equalize(params, graph, **RANGE, clip="skip", with_report=True)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(out), strict=True)
    )
    assert all("skip" in r["note"] for r in report if r["group"] != "project")
    exact = equalize(params, graph, **RANGE)
    leaf = named_leaves(exact)["expand/kernel"]
    assert leaf.lower is None and leaf.upper.shape == (8,)
    norms = (
        named_leaves(params)["expand_bn/bias"] / named_leaves(exact)["expand_bn/bias"]
    )
    np.testing.assert_allclose(leaf.upper, 6 / norms, rtol=1e-5)
    plain = equalize(params, graph, **RANGE, clip="relu")
    assert np.all(np.isinf(named_leaves(plain)["expand/kernel"].upper))

    def unclipped(p: Any, x: jax.Array) -> jax.Array:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("zoo_models.relu6", relu)
            return apply(p, x)

    assert difference(unclipped(params, *inputs), lift(apply)(plain, *inputs)) < 1e-5


def test_symmetric_clip_and_clip_twice() -> None:
    """Both bounds follow; equalizing an equalized tree changes the bounds again."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.clip(x @ p["a"], -0.5, 0.7) @ p["b"]

    rng = np.random.default_rng(0)
    params = {
        "a": jax.device_put(np.float32(rng.normal(size=(5, 4)) * [1, 10, 0.1, 3])),
        "b": jax.device_put(np.float32(rng.normal(size=(4, 3)))),
    }
    x = jax.device_put(np.float32(rng.normal(size=(9, 5))))
    graph = trace(apply, params, x)
    once = equalize(params, graph, **RANGE)
    assert once["a"].lower.shape == once["a"].upper.shape == (4,)
    assert difference(apply(params, x), lift(apply)(once, x)) < 1e-6
    other = once | {"b": once["b"] * jnp.asarray([2.0, 30.0, 0.5, 1.0])[:, None]}
    twice = equalize(other, graph, **RANGE)
    assert difference(lift(apply)(other, x), lift(apply)(twice, x)) < 1e-6
    np.testing.assert_allclose(
        np.asarray(once["a"].upper / twice["a"].upper),
        np.sqrt(1 / np.array([2.0, 30.0, 0.5, 1.0])),
        rtol=1e-4,
    )


def test_dead_channels_keep_their_numbers() -> None:
    apply, params, inputs, graph = model("grouped")
    leaves = named_leaves(params)
    dead_out = leaves["stem/kernel"].at[..., 2].set(0)
    dead_in = leaves["point/kernel"].at[:, :, 5].set(0)
    no_bias = leaves["stem/bias"].at[2].set(0)  # a bias alone would be something
    dead = {"stem/kernel": dead_out, "stem/bias": no_bias, "point/kernel": dead_in}
    params = replace_leaves(params, dead)
    leaves, out = named_leaves(params), named_leaves(equalize(params, graph, **RANGE))
    assert all(np.all(np.isfinite(v)) for v in out.values())
    assert out["depthwise/bias"][5] == leaves["depthwise/bias"][5]
    assert out["stem/bias"][1] != leaves["stem/bias"][1]
    assert (
        difference(apply(params, *inputs), apply(replace_leaves(params, out), *inputs))
        < 1e-5
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["concatenation", "resnet"])
def test_eager_is_jit_and_linen_is_nnx(name: str) -> None:
    _, params, _, graph = model(name, "linen")
    eager = equalize(params, graph, **RANGE)
    traced = jax.jit(partial(equalize, graph=graph, **RANGE))(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), eager, traced)
    apply, state, inputs, other = model(name, "nnx")
    del apply, inputs
    state = twin(CASES[name], params)
    mirrored = named_leaves(equalize(state, other, **RANGE))
    for key, leaf in named_leaves(eager).items():
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5), leaf, mirrored[key]
        )


def test_norms_follow_their_channels() -> None:
    """Gain and statistics fit the rescaled channel, so data-free steps can read them."""
    _, params, _, graph = model("conv_bn_relu")
    old, new = (named_leaves(t) for t in (params, equalize(params, graph, **RANGE)))
    s = np.asarray(old["stem/bias"] / new["stem/bias"])
    np.testing.assert_allclose(new["stem_bn/mean"], old["stem_bn/mean"] / s, rtol=1e-5)
    np.testing.assert_allclose(new["stem_bn/var"], old["stem_bn/var"] / s**2, rtol=1e-5)
    gain = [t["stem_bn/scale"] / np.sqrt(t["stem_bn/var"] + 1e-3) for t in (old, new)]
    np.testing.assert_allclose(gain[0], gain[1], rtol=1e-6)
    assert np.abs(np.log(s)).max() > 0.05


def test_half_precision_keeps_its_dtype() -> None:
    apply, params, inputs, graph = model("pooling")
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    out = equalize(half, graph, **RANGE)
    assert {a.dtype for a in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), out)
    assert np.abs(gaps("pooling", wide)).max() < 0.02
    assert difference(*(jax.jit(apply)(p, *inputs) for p in (params, wide))) < 0.03


def test_scales_are_limited_by_name() -> None:
    _, params, _, graph = model("pooling")
    start = scrambled(params, graph, seed=4)
    out, report = equalize(start, graph, **RANGE, max_scale=2.0, with_report=True)
    s = np.asarray(named_leaves(start)["first/bias"] / named_leaves(out)["first/bias"])
    assert 1.9 < s.max() < 2.0001 and 0.4999 < s.min() < 0.51
    assert max(r["scale max"] for r in report if r["scale max"] is not None) < 2.0001
    assert any(r["residual"] is not None and r["residual"] > 0.1 for r in report)
    assert any("max_scale" in (r["note"] or "") for r in report)


def test_selection() -> None:
    _, params, _, graph = model("pooling")
    out, report = equalize(params, graph.without("third"), **RANGE, with_report=True)
    old, new = named_leaves(params), named_leaves(out)
    assert new["third/kernel"] is old["third/kernel"]
    assert new["second/bias"] is old["second/bias"]
    assert not np.allclose(new["first/bias"], old["first/bias"])
    [row] = report.where(group="second")
    assert row["note"] == "skipped: third: not selected"
    some = equalize(params, graph.only("second", "third"), **RANGE)
    assert named_leaves(some)["first/kernel"] is old["first/kernel"]
    with pytest.raises(ValueError, match="'third' cannot be rescaled: .*by name"):
        equalize(params, graph.only("third"), **RANGE)
    equalize(params, graph.only("thi*"), **RANGE)  # a pattern asks for what can be done


def test_gelu_asked_for_by_name_is_refused() -> None:
    _, params, _, graph = model("gelu_mlp")
    with pytest.raises(ValueError, match="gelu is not homogeneous"):
        equalize(params, graph.only("first", "second"), **RANGE)
    out = equalize(params, graph, **RANGE)
    assert out is params


def test_refusals() -> None:
    _, params, _, graph = model("conv_bn_relu")
    for wrong in ({"clip": "relu7"}, {"objective": "ranges"}, {"max_scale": 1.0}):
        with pytest.raises(
            ValueError, match=f"jaxmet.equalize: {next(iter(wrong))} is"
        ):
            equalize(params, graph, **RANGE | wrong)
    with pytest.raises(ValueError, match="'stem_bn/mean'.*whole variables"):
        equalize(params["params"], graph, **RANGE)
    bad = jax.tree.map(lambda a: a.at[0].set(jnp.nan), params)
    with pytest.raises(ValueError, match="NaN"):
        equalize(bad, graph, **RANGE)
    whole = jax.tree.map(lambda a: a.astype(jnp.int8), params)
    with pytest.raises(ValueError, match="int8"):
        equalize(whole, graph, **RANGE)


def test_a_layer_that_reads_what_it_makes() -> None:
    """x + f(x) over and over: the same channels on both sides of one weight."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        x = relu(x @ p["in"])
        for w in p["blocks"]:
            x = relu(x + x @ w)
        return x @ p["out"]

    rng = np.random.default_rng(3)
    spread = np.exp(rng.normal(size=(2, 6)))
    params = {
        "in": jax.device_put(np.float32(rng.normal(size=(4, 6)) * spread[0])),
        "blocks": [
            jax.device_put(np.float32(rng.normal(size=(6, 6)) * spread[1] * k))
            for k in (0.1, 0.2)
        ],
        "out": jax.device_put(np.float32(rng.normal(size=(6, 3)))),
    }
    x = jax.device_put(np.float32(rng.normal(size=(5, 4))))
    out, report = equalize(params, trace(apply, params, x), **RANGE, with_report=True)
    assert difference(apply(params, x), apply(out, x)) < 1e-5
    ws = [np.asarray(w, np.float64) for w in (out["in"], *out["blocks"], out["out"])]
    r1 = np.max([made(w) for w in ws[:-1]], axis=0)
    r2 = np.max([np.abs(w).max(axis=1) for w in ws[1:]], axis=0)
    assert np.abs(np.log(r1 / r2)).max() < 1e-4
    assert report["note"][0] is None


def chain(params: Any, x: jax.Array) -> jax.Array:
    for k in range(len(params) - 1):
        x = relu(x @ params[str(k)])
    return x @ params[str(len(params) - 1)]


@cache
def equalized_chain(sizes: tuple[int, ...]) -> Any:
    """One program for all chains of these sizes."""
    params = {
        str(k): jax.ShapeDtypeStruct(shape, jnp.float32)
        for k, shape in enumerate(pairwise(sizes))
    }
    graph = trace(chain, params, jax.ShapeDtypeStruct((7, sizes[0]), jnp.float32))
    return jax.jit(lambda params: equalize(params, graph, **RANGE))


@pytest.mark.parametrize(
    "sizes", [(3, 4, 5), pytest.param((2, 6, 3, 5, 4, 6), marks=pytest.mark.slow)]
)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), dead=st.floats(0, 0.4), spread=st.floats(0, 8))
def test_random_chains(
    sizes: tuple[int, ...], seed: int, dead: float, spread: float
) -> None:
    rng = np.random.default_rng(seed)

    def weight(i: int, o: int) -> jax.Array:
        w = rng.normal(size=(i, o)) * np.exp(rng.uniform(-spread, spread, o))
        w = w * (rng.random(o) >= dead) * (rng.random((i, 1)) >= dead)
        return jax.device_put(np.float32(w))

    params = {str(k): weight(*shape) for k, shape in enumerate(pairwise(sizes))}
    x = jax.device_put(np.float32(rng.normal(size=(7, sizes[0]))))
    out = equalized_chain(sizes)(params)
    assert all(np.all(np.isfinite(w)) for w in out.values())
    assert difference(chain(params, x), chain(out, x)) < 1e-4
    carries = np.ones(sizes[0], bool)  # channels that are not zero for every input
    for k in range(len(params) - 1):
        one, two = (np.asarray(out[str(j)], np.float64) for j in (k, k + 1))
        r1, r2 = np.abs(one).max(axis=0), np.abs(two).max(axis=1)
        carries = (one[carries] != 0).any(axis=0)
        alive = (r1 > 0) & (r2 > 0) & carries
        assert np.all(np.abs(np.log(r1[alive] / r2[alive])) < 1e-4)
