"""Norms are found by what they compute: spellings drawn at random, against formulas.

A spelling is put together from independent choices: where epsilon is added, how the root is
inverted, where gain and shift go, how parameters are laid along the axes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxmet as jm

EPSILON = 1e-3
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
)

EPSILONS = {
    "v + e": lambda v: v + EPSILON,
    "e + v": lambda v: EPSILON + v,
    "array": lambda v: v + jnp.full(v.shape, EPSILON, v.dtype),
    "twice": lambda v: (v + 0.25 * EPSILON) + 0.75 * EPSILON,
    "max": lambda v: jnp.maximum(v, 0.0) + EPSILON,
}
INVERSES = {
    "rsqrt": lambda v: lax.rsqrt(v),
    "1/sqrt": lambda v: 1.0 / jnp.sqrt(v),
    "power": lambda v: v**-0.5,
    "power of root": lambda v: (v**0.5) ** -1,
    "reciprocal": lambda v: jnp.reciprocal(jnp.sqrt(v)),
    "root of inverse": lambda v: jnp.sqrt(1.0 / v),
    "logarithm": lambda v: jnp.exp(-0.5 * jnp.log(v)),
    "halved logarithm": lambda v: jnp.exp(-(jnp.log(v) / 2)),
    "over an exponential": lambda v: 1.0 / jnp.exp(jnp.log(v) * 0.5),
}
STORED_EPSILONS = EPSILONS | {
    "relu": lambda v: jax.nn.relu(v) + EPSILON,
    "clip": lambda v: jnp.clip(v, 0.0, 1e6) + EPSILON,
    "where": lambda v: jnp.where(v > 0, v, jnp.zeros_like(v)) + EPSILON,
    "where not": lambda v: jnp.where(v <= 0, 0.0, v) + EPSILON,
}
# x, mean, inverse root, root, scale, bias -> the norm
ORDERS = {
    "centre, gain": lambda x, m, i, r, g, b: (x - m) * i * g + b,
    "one gain": lambda x, m, i, r, g, b: (x - m) * (i * g) + b,
    "scale first": lambda x, m, i, r, g, b: b + (g * (x - m)) / r,
    "scale over root": lambda x, m, i, r, g, b: (x - m) * (g / r) + b,
    "division": lambda x, m, i, r, g, b: (x - m) / r * g + b,
    "folded shift": lambda x, m, i, r, g, b: x * (i * g) + (b - m * (i * g)),
    "keras": lambda x, m, i, r, g, b: jnp.add(x * (i * g), -m * (i * g) + b),
    "split shift": lambda x, m, i, r, g, b: x * i * g - m * i * g + b,
    "scaled both": lambda x, m, i, r, g, b: (x * g - m * g) / r + b,
    "negated mean": lambda x, m, i, r, g, b: (x + (-m)) * (i * g) - (-b),
    "divided both": lambda x, m, i, r, g, b: (x / r - m / r) * g + b,
    "negated": lambda x, m, i, r, g, b: b - (m - x) * (g * i),
    "from zero": lambda x, m, i, r, g, b: (b - g * m * i) + g * i * x,
}
UNCENTRED = {
    "gain": lambda x, i, r, g, b: x * i * g + b,
    "one gain": lambda x, i, r, g, b: x * (i * g) + b,
    "scale first": lambda x, i, r, g, b: b + (g * x) / r,
    "scale over root": lambda x, i, r, g, b: x * (g / r) + b,
    "division": lambda x, i, r, g, b: g * (x / r) + b,
}
BARE = {
    "gain": lambda x, m, i, r: (x - m) * i,
    "division": lambda x, m, i, r: (x - m) / r,
    "split shift": lambda x, m, i, r: x * i - m * i,
    "folded shift": lambda x, m, i, r: x * i + (-m * i),
    "divided both": lambda x, m, i, r: x / r - m / r,
}
LAYS = {
    "reshape": lambda v, shape: v.reshape(shape),
    "index": lambda v, shape: v[tuple(None if n == 1 else slice(None) for n in shape)],
    "expand": lambda v, shape: jnp.expand_dims(
        v, [i for i, n in enumerate(shape) if n == 1]
    ),
    "broadcast": lambda v, shape: lax.broadcast_in_dim(
        v, shape, [i for i, n in enumerate(shape) if n != 1]
    ),
    "held": lambda v, shape: lax.stop_gradient(v.reshape(shape)),
}


def choose(table):
    return st.sampled_from(sorted(table))


# Stored statistics.


@st.composite
def stored_forms(draw):
    return {
        "epsilon": draw(choose(STORED_EPSILONS)),
        "inverse": draw(choose(INVERSES)),
        "order": draw(choose(ORDERS)),
        "lay": draw(choose(LAYS)),
        "early": draw(st.booleans()),  # laid along the axes before the arithmetic
        "layout": draw(st.sampled_from(["dense", "NHWC", "NCHW"])),
        "roles": draw(st.sampled_from([(), ("scale",), ("bias",), ("scale", "bias")])),
        "jit": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }


def conv_of(form, p, x):
    if form["layout"] == "dense":
        y, shape = x @ p["conv"]["w"], (1, -1)
    else:
        spec = form["layout"]
        dims = (spec, "HWIO", spec)
        y = lax.conv_general_dilated(
            x, p["conv"]["w"], (1, 1), "SAME", dimension_numbers=dims
        )
        shape = (1, 1, 1, -1) if spec == "NHWC" else (1, -1, 1, 1)
    shape = tuple(5 if n == -1 else 1 for n in shape)
    return (y + p["conv"]["b"].reshape(shape) if form["bias"] else y), shape


def stored_model(form):
    without = form["roles"]

    def norm(p, y, shape):
        lay = lambda v: LAYS[form["lay"]](v, shape)
        first, then = (lay, lambda v: v) if form["early"] else (lambda v: v, lay)
        v = STORED_EPSILONS[form["epsilon"]](first(p["var"]))
        inverse, root = INVERSES[form["inverse"]](v), jnp.sqrt(v)
        one, zero = jnp.float32(1.0), jnp.float32(0.0)
        m = first(p["mean"])
        g = one if "scale" in without else first(p["scale"])
        b = zero if "bias" in without else first(p["bias"])
        if form["early"] or form["order"] in ("centre, gain", "division"):
            m, g, b = (
                v if v.ndim == 0 or form["early"] else then(v) for v in (m, g, b)
            )
            return ORDERS[form["order"]](y, m, then(inverse), then(root), g, b)
        # the gain and the shift are computed on the vectors, and laid out last
        gain = g * inverse
        return y * then(gain) + then(jnp.broadcast_to(b - m * gain, gain.shape))

    if form["jit"]:
        norm = jax.jit(norm, static_argnums=2)

    def apply(p, x):
        y, shape = conv_of(form, p, x)
        return jnp.maximum(norm(p["norm"], y, shape), 0.0)

    rng = np.random.default_rng(3)
    dense = form["layout"] == "dense"
    f32 = lambda a: jax.device_put(np.float32(a))
    norm_leaves = {
        "mean": rng.normal(size=5),
        "var": rng.uniform(0.2, 3.0, 5),
        "scale": rng.uniform(0.3, 2.0, 5) * np.array([1, -1, 1, 1, -1]),
        "bias": rng.normal(size=5),
    }
    params = {
        "conv": {"w": rng.normal(size=(4, 5) if dense else (3, 3, 4, 5))}
        | ({"b": rng.normal(size=5)} if form["bias"] else {}),
        "norm": {k: v for k, v in norm_leaves.items() if k not in without},
    }
    shape = {"dense": (6, 4), "NHWC": (2, 6, 6, 4), "NCHW": (2, 4, 6, 6)}
    x = f32(rng.normal(size=shape[form["layout"]]))
    return apply, jax.tree.map(f32, params), x


def decibels(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return 10 * np.log10(np.sum(wanted**2) / max(np.sum((got - wanted) ** 2), 1e-300))


@QUICK
@given(stored_forms())
def test_a_batch_norm_folds_however_it_is_written(form):
    apply, params, x = stored_model(form)
    graph = jm.trace(apply, params, x)
    [node] = [n for n in graph.nodes if n.kind == "norm"]
    norm = node.norm
    assert (node.name, norm.over, norm.plain) == ("norm", "stored", True), form
    for role, key in {"variance": "var"}.items() | {
        (r, r) for r in ("mean", "scale", "bias")
    }:
        assert getattr(norm, role) == (None if key in form["roles"] else f"norm/{key}")
    assert norm.epsilon == pytest.approx(EPSILON, rel=1e-6)
    folded, report = jm.fold_batch_norm(params, graph, with_report=True)
    assert report.title == "1 of 1 norms folded", (form, report)
    assert decibels(apply(folded, x), apply(params, x)) > 100, form
    leaves = {k: np.asarray(v, np.float64) for k, v in params["norm"].items()}
    gain = leaves.get("scale", 1.0) / np.sqrt(leaves["var"] + EPSILON)
    axes = gain if form["layout"] == "dense" else gain[None, None, None]
    wanted = np.asarray(params["conv"]["w"], np.float64) * axes
    np.testing.assert_allclose(folded["conv"]["w"], wanted, rtol=1e-5)
    again = jm.fold_batch_norm(folded, graph)
    for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


# Statistics of the data.


SPREADS = {
    "centred": lambda x, mean: mean(jnp.square(x - mean(x))),
    "product": lambda x, mean: mean((x - mean(x)) * (x - mean(x))),
    "of squares": lambda x, mean: mean(x * x) - mean(x) ** 2,
    "bounded": lambda x, mean: jnp.maximum(mean(x**2) - jnp.square(mean(x)), 0.0),
    "held": lambda x, mean: mean(jnp.square(x - lax.stop_gradient(mean(x)))),
    "again": lambda x, mean: mean(jnp.square(x - mean(x))) - mean(x - mean(x)) ** 2,
}
SQUARES = {
    "square": lambda x, mean: mean(jnp.square(x)),
    "product": lambda x, mean: mean(x * x),
    "absolute": lambda x, mean: mean(jnp.abs(x) ** 2),
}
ROOTS = {k: v for k, v in INVERSES.items() if k != "root of inverse"}


@st.composite
def data_forms(draw):
    kind = draw(st.sampled_from(["layer", "rms", "group", "instance"]))
    return {
        "kind": kind,
        "spread": draw(choose(SQUARES if kind == "rms" else SPREADS)),
        "epsilon": draw(choose(EPSILONS)),
        "inverse": draw(choose(ROOTS)),
        "order": draw(choose(UNCENTRED if kind == "rms" else ORDERS)),
        "bare": draw(choose(BARE)),
        "without": draw(st.sampled_from([(), ("bias",), ("scale", "bias")])),
        "dtype": draw(st.sampled_from(["float32", "wide", "narrow scale"])),
        "kept": draw(st.booleans()),
        "jit": draw(st.booleans()),
    }


def data_model(form):
    def norm(p, x):
        shape = x.shape
        kept = x.dtype
        x = x.astype(jnp.float32)
        late = (
            form["dtype"] == "narrow scale"
        )  # scale and shift in bfloat16, at the end
        g, b = jnp.float32(1.0), jnp.float32(0.0)
        if "scale" in p and not late:
            g = p["scale"][None, None].astype(jnp.float32)
        if "bias" in p and not late:
            b = p["bias"][None, None].astype(jnp.float32)
        axis = 1 if form["kind"] == "instance" else -1
        if form["kind"] == "group":
            x = x.reshape(*x.shape[:-1], 2, -1)
            g, b = (v.reshape(1, 1, 2, -1) if v.ndim else v for v in (g, b))

        def mean(v):
            if form["kept"]:
                return jnp.mean(v, axis, keepdims=True)
            return jnp.expand_dims(jnp.mean(v, axis), axis)

        table = SQUARES if form["kind"] == "rms" else SPREADS
        v = EPSILONS[form["epsilon"]](table[form["spread"]](x, mean))
        i, r = INVERSES[form["inverse"]](v), jnp.sqrt(v)
        if form["kind"] == "rms":
            y = x * i if late else UNCENTRED[form["order"]](x, i, r, g, b)
        elif late:
            y = BARE[form["bare"]](x, mean(x), i, r)
        else:
            y = ORDERS[form["order"]](x, mean(x), i, r, g, b)
        y = y.reshape(shape).astype(kept)
        if late and "scale" in p:
            y = p["scale"][None, None] * y
        return y + p["bias"][None, None] if late and "bias" in p else y

    run = jax.jit(norm) if form["jit"] else norm

    def apply(p, x):
        return run(p["norm"], x @ p["one"]["w"]) @ p["two"]["w"]

    rng = np.random.default_rng(5)
    dtype = jnp.float32 if form["dtype"] == "float32" else jnp.bfloat16
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {"one": {"w": draw(6, 8)}, "two": {"w": draw(8, 3)}}
    params["norm"] = {k: draw(8) for k in ("scale", "bias") if k not in form["without"]}
    return apply, params, draw(4, 5, 6)


@QUICK
@given(data_forms())
def test_a_norm_over_data_is_one_node_however_it_is_written(form):
    apply, params, x = data_model(form)
    graph = jm.trace(apply, params, x)
    kinds = [n.kind for n in graph.nodes]
    assert kinds == ["input", "product", "norm", "product", "output"], (form, graph)
    assert graph.nodes[2].norm.over == "data"
    config = jm.QuantConfig(placement="operations")
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    names = [n.name for n in graph.nodes[:4]]
    assert {*quantizers.activations} == {*names}, form


# Norms of libraries, and norms that are no centring and scaling.


def unit(x, axis=-1):
    return x / jnp.linalg.norm(x, axis=axis, keepdims=True)


OTHERS = {
    "unit": lambda s, x: unit(x),
    "unit, bounded": lambda s, x: (
        x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    ),
    "unit by einsum": lambda s, x: (
        x * lax.rsqrt(jnp.einsum("btc,btc->bt", x, x) + 1e-6)[..., None]
    ),
    "unit, scaled": lambda s, x: unit(x) * 8**0.5 * s[None, None],
    "one plus scale": lambda s, x: (
        x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + s[None, None])
    ),
    "scale first": lambda s, x: (
        (s[None, None] * x) / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    ),
    "by deviation": lambda s, x: (
        (x - jnp.mean(x, -1, keepdims=True)) / (jnp.std(x, -1, keepdims=True) + 1e-6)
    ),
    "sums": lambda s, x: (
        (x - jnp.sum(x, -1, keepdims=True) / 8)
        / jnp.sqrt(
            jnp.sum(
                jnp.square(x - jnp.sum(x, -1, keepdims=True) / 8), -1, keepdims=True
            )
        )
    ),
    "centred twice": lambda s, x: unit(
        (x - jnp.mean(x, -1, keepdims=True))
        - jnp.mean(x - jnp.mean(x, -1, keepdims=True), -1, keepdims=True)
    ),
    "mean by a product": lambda s, x: (
        x * lax.rsqrt((x * x) @ np.full((8, 8), 1 / 8, np.float32) + 1e-6)
    ),
    "masked": lambda s, x: masked(x),
}


def masked(x):
    """The statistics of some positions only, as with padding."""
    mask = x[:, :, :1] > -1e9
    count = jnp.sum(mask, 1, keepdims=True).astype(x.dtype)
    mean = jnp.sum(jnp.where(mask, x, 0.0), 1, keepdims=True) / count
    var = jnp.sum(jnp.where(mask, jnp.square(x - mean), 0.0), 1, keepdims=True) / count
    return (x - mean) * lax.rsqrt(var + 1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_other_norms_over_data_are_one_node(name):
    def apply(p, x):
        return OTHERS[name](p["norm"]["s"], x @ p["one"]["w"]) @ p["two"]["w"]

    rng = np.random.default_rng(5)
    f32 = lambda *shape: jax.device_put(np.float32(rng.normal(size=shape)))
    params = {"one": {"w": f32(6, 8)}, "norm": {"s": f32(8)}, "two": {"w": f32(8, 3)}}
    graph = jm.trace(apply, params, f32(4, 5, 6))
    kinds = [n.kind for n in graph.nodes]
    assert kinds == ["input", "product", "norm", "product", "output"], graph
    assert graph.nodes[2].norm.over == "data"


NO_NORMS = {
    "scaled up": lambda x: x * jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)),
    "response": lambda x: response(x),
    "of a sum": lambda x: x / jnp.sqrt(jnp.mean((x + 1.0) ** 2, -1, keepdims=True)),
    "square": lambda x: x * x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)),
}


def response(x):
    """Global response normalization: as large as x squared over its mean."""
    size = jnp.sqrt(jnp.sum(x * x, 1, keepdims=True))
    return x * (size / (jnp.mean(size, -1, keepdims=True) + 1e-6))


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_grows_with_its_input_is_no_norm(name):
    rng = np.random.default_rng(5)
    f32 = lambda *shape: jax.device_put(np.float32(rng.normal(size=shape)))
    apply = lambda p, x: NO_NORMS[name](x @ p["w"])
    graph = jm.trace(apply, {"w": f32(6, 8)}, f32(4, 5, 6))
    assert "norm" not in [n.kind for n in graph.nodes]


def test_batch_statistics_in_one_gain_and_shift_are_known_as_such():
    """As Keras trains: the statistics leave the norm, for the running averages."""

    def apply(p, x):
        y = x @ p["w"]
        mean, var = jnp.mean(y, 0), jnp.var(y, 0)
        inverse = lax.rsqrt(var + EPSILON) * p["norm"]["scale"]
        shift = p["norm"]["bias"] - mean * inverse
        return y * inverse[None] + shift[None], (mean, var)

    rng = np.random.default_rng(5)
    f32 = lambda *shape: jax.device_put(np.float32(rng.normal(size=shape)))
    params = {"w": f32(6, 8), "norm": {"scale": f32(8), "bias": f32(8)}}
    graph = jm.trace(apply, params, f32(7, 6))
    assert graph["norm"].norm.over == "batch"
    with pytest.raises(ValueError, match="computes its statistics from the batch"):
        jm.fold_batch_norm(params, graph)


# What cannot fold is counted, and says why.


def test_every_norm_is_counted_with_its_reason():
    def apply(p, x):
        norm = lambda n, y, v: (
            (y - p[n]["mean"][None]) / jnp.sqrt(v + EPSILON)[None] * p[n]["scale"][None]
        )
        y = norm("good", x @ p["w"], p["good"]["var"])
        y = norm(
            "of a square", jnp.maximum(y, 0.0) @ p["w2"], p["of a square"]["var"] ** 2
        )
        return norm("alone", jnp.tanh(y), p["alone"]["var"])

    rng = np.random.default_rng(5)
    f32 = lambda *shape: jax.device_put(np.float32(rng.uniform(0.5, 1.5, shape)))
    leaves = lambda: {k: f32(6) for k in ("mean", "var", "scale")}
    params = {
        "w": f32(6, 6),
        "w2": f32(6, 6),
        "good": leaves(),
        "of a square": leaves(),
        "alone": leaves(),
    }
    graph = jm.trace(apply, params, f32(4, 6))
    _, report = jm.fold_batch_norm(params, graph, with_report=True)
    assert report.title == "1 of 3 norms folded"
    notes = {row["norm"]: row["note"] for row in report}
    assert notes["good"] is None
    assert "not of the form" in notes["of a square"]
    assert "no product before it" in notes["alone"]


# What transforms do does not depend on the spelling.


def usual(p, y):
    return (y - p["mean"]) * lax.rsqrt(p["var"] + EPSILON) * p["scale"] + p["bias"]


def keras(p, y):
    inverse = lax.rsqrt(p["var"] + EPSILON) * p["scale"]
    return jnp.add(y * inverse, -p["mean"] * inverse + p["bias"])


def network(norm):
    lay = lambda p: {k: v[None, None, None] for k, v in p.items()}

    def apply(p, x):
        for name in ("a", "b"):
            y = lax.conv_general_dilated(
                x,
                p[name]["w"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jnp.maximum(norm(lay(p[f"{name}_norm"]), y), 0.0)
        return jnp.mean(x, (1, 2)) @ p["head"]["w"] + p["head"]["b"][None]

    return apply


def network_params():
    rng = np.random.default_rng(7)
    f32 = lambda *shape: jax.device_put(np.float32(rng.normal(size=shape)))
    norm = lambda n: {
        "mean": f32(n),
        "var": jnp.abs(f32(n)) + 0.3,
        "scale": f32(n),
        "bias": f32(n) + 2.0,
    }
    params = {"a": {"w": f32(3, 3, 3, 6)}, "b": {"w": f32(3, 3, 6, 4)}}
    params |= {"a_norm": norm(6), "b_norm": norm(4)}
    return params | {"head": {"w": f32(4, 2), "b": f32(2)}}, f32(24, 5, 5, 3)


def corrected(params, graph, x):
    q = jm.calibrate(params, graph, None, jm.QuantConfig(weight_bits=4), progress=False)
    return jm.correct_bias(params, graph, q, progress=False)


STEPS = {
    "fold": lambda p, g, x: jm.fold_batch_norm(p, g),
    "equalize": lambda p, g, x: jm.equalize(p, g, objective="range"),
    "absorb": lambda p, g, x: jm.absorb_bias(p, g),
    "reestimate": lambda p, g, x: jm.reestimate_batch_norm(p, g, [x], progress=False),
    "correct": corrected,
    "prune": lambda p, g, x: jm.prune(p, g, 0.6, batches=[x], progress=False),
}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_does_the_same_to_both_spellings(step):
    params, x = network_params()
    trees = []
    for norm in (usual, keras):
        graph = jm.trace(network(norm), params, x)
        trees.append(STEPS[step](params, graph, x))
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    changed = jax.tree.structure(trees[0]) != jax.tree.structure(params) or any(
        np.any(np.asarray(a) != np.asarray(b))
        for a, b in zip(*map(jax.tree.leaves, (trees[0], params)), strict=True)
    )
    assert changed


def test_a_constant_in_the_gain_counts_in_what_the_norm_makes():
    params, x = network_params()
    tripled = lambda p, y: usual(p | {"scale": 3.0 * p["scale"]}, y)
    scaled = {
        **params,
        "a_norm": params["a_norm"] | {"scale": 3 * params["a_norm"]["scale"]},
    }
    scaled["b_norm"] = params["b_norm"] | {"scale": 3 * params["b_norm"]["scale"]}
    found = [
        jm.calibrate(p, jm.trace(network(norm), p, x), None, progress=False)
        for norm, p in ((tripled, params), (usual, scaled))
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
