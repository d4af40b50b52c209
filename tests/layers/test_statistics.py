"""What norms know of a network: moments carried on, against integrals and drawn numbers.

The oracles are adaptive quadrature and Monte Carlo in float64, and what networks hand out
on data themselves.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from jax import lax
from jax.nn import relu, relu6

import jaxmet as jm
from folds import affine, norm_leaves, numbers
from jaxmet.demo.network import Network as Demo
from jaxmet.engine.nodes.scalar_function import compute
from jaxmet.layers.moments import input_moments, node_moments, unreached
from jaxmet.numerics.moments import Moments, multiplied, normal, through
from jaxmet.numerics.moments import affine as scaled
from zoo import CASES, model, traced
from zoo_nets import fill

KEY = jax.random.key(0)
SMOOTH = {
    "gelu": (jax.nn.gelu, None),
    "exact gelu": (
        lambda x: jax.nn.gelu(x, approximate=False),
        lambda x: x * scipy.stats.norm.cdf(x),
    ),
    "silu": (jax.nn.silu, lambda x: x * scipy.special.expit(x)),
    "sigmoid": (jax.nn.sigmoid, scipy.special.expit),
    "tanh": (jnp.tanh, np.tanh),
    "softplus": (jax.nn.softplus, lambda x: np.logaddexp(x, 0)),
    "elu": (jax.nn.elu, lambda x: np.where(x > 0, x, np.expm1(x))),
    "hard_swish": (jax.nn.hard_silu, lambda x: x * np.clip(x + 3, 0, 6) / 6),
    "hard_sigmoid": (jax.nn.hard_sigmoid, lambda x: np.clip(x + 3, 0, 6) / 6),
    "mish": (
        lambda x: x * jnp.tanh(jax.nn.softplus(x)),
        lambda x: x * np.tanh(np.logaddexp(x, 0)),
    ),
}
KNOWN = {name: pair for name, pair in SMOOTH.items() if pair[1] is not None}


def moments(mean, variance):
    return normal(
        jax.device_put(np.float32(mean)),
        jax.device_put(np.float32(variance)),
    )


def close(got, want, rtol=0.0, atol=0.0):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol, atol)


# The numerics


@pytest.mark.parametrize("name", KNOWN)
def test_quadrature_against_adaptive_integration(name):
    function, exact = KNOWN[name]
    grid = [(m, s) for m in (-3.0, 0.0, 0.7, 5.0) for s in (0.05, 1.0, 4.0)]
    found = through(
        moments(*zip(*((m, s * s) for m, s in grid), strict=True)), function
    )
    for i, (m, s) in enumerate(grid):
        kinks = [(k - m) / s for k in (-3.0, 0.0, 3.0) if abs((k - m) / s) < 12]

        def mean(f, m=m, s=s, kinks=kinks):
            g = lambda t: float(f(m + s * t)) * scipy.stats.norm.pdf(t)
            return scipy.integrate.quad(g, -12, 12, points=kinks or None, limit=400)[0]

        first = mean(exact)
        second = mean(lambda x, first=first: (exact(x) - first) ** 2)
        close(found.mean[i], first, 2e-5, 2e-5 * s)
        close(found.variance[i], second, 1e-4, 1e-5 * s * s)
        x = np.linspace(m - 4 * s, m + 4 * s, 20001)
        close(found.low[i], exact(x).min(), 1e-4, 1e-4)
        close(found.high[i], exact(x).max(), 1e-4, 1e-4)


def test_a_constant_goes_through_as_it_is():
    found = through(moments([2.0, -1.0], [0.0, 0.0]), jax.nn.silu)
    close(found.mean, jax.nn.silu(jnp.array([2.0, -1.0])), 1e-6)
    close(found.variance, [0.0, 0.0], atol=1e-10)


def test_what_is_not_finite_beyond_the_range_counts_as_at_its_end():
    x = Moments(*(jnp.float32(v) * jnp.ones(1) for v in (1.0, 0.2, 0.5, 2.0)))
    found = through(x, jnp.log)
    assert all(np.isfinite(v).all() for v in found) and found.low >= np.log(0.5) - 1e-6


def test_products_and_affine_maps_against_drawn_numbers():
    rng = np.random.default_rng(1)
    a, b = rng.normal(1.5, 0.7, 10**6), rng.normal(-0.4, 1.2, 10**6)
    one, two = moments([1.5], [0.49]), moments([-0.4], [1.44])
    found = multiplied(one, two)
    close(found.mean, [(a * b).mean()], atol=6e-3)
    close(found.variance, [(a * b).var()], rtol=0.01)
    assert found.low <= (a * b).min() * 0.5 and found.high >= 3
    turned = scaled(one, -2.0, 1.0)
    close([turned.mean[0], turned.variance[0]], [1 - 3.0, 4 * 0.49], 1e-6)
    close([turned.low[0], turned.high[0]], [-2 - 5.6, -2 + 5.6], 1e-6)


# Activations by their own equations


@pytest.mark.parametrize("name", [*SMOOTH, "selu", "celu", "square", "step"])
def test_an_activation_is_computed_by_its_equations(name):
    more = {
        "selu": jax.nn.selu,
        "celu": jax.nn.celu,
        "square": lambda x: relu(x) ** 2,
        "step": lambda x: (x > 0).astype(x.dtype) * x,
    }
    function = SMOOTH[name][0] if name in SMOOTH else more[name]
    params = numbers(1, a=(6, 6), b=(6, 6))
    x = jnp.linspace(-5, 5, 24).reshape(4, 6)
    graph = jm.trace(lambda p, x: function(x @ p["a"]) @ p["b"], params, x)
    got = x[0]
    for node in graph.nodes:
        if node.kind == "activation":
            assert node.activation is not None
            assert node.activation.formula is not None
            got = compute(node.activation.formula, got)
    close(got, function(x[0]), 1e-6, 1e-7)


def test_an_activation_with_a_parameter_has_no_formula():
    def apply(p, x):
        y = x @ p["a"]
        return (y * jax.nn.sigmoid(p["beta"] * y)) @ p["b"]

    params = {**numbers(1, a=(6, 6), b=(6, 6)), "beta": jnp.float32(1.5)}
    graph = jm.trace(apply, params, jnp.ones((2, 6)))
    activations = [n for n in graph.nodes if n.kind == "activation"]
    formulas = [n.activation.formula for n in activations if n.activation is not None]
    assert formulas and None in formulas


# Through a network, against drawn numbers: the first thing is a norm, which is told


def conv(x, w, groups=1, padding="VALID", dilation=1):
    return lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        padding,
        (dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def average(x):
    sums = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return sums / 4.0


CHANNELS = 4
ROW = (1, 1, 1, -1)
NETS = {
    "silu": (lambda p, y: jax.nn.silu(y) @ p["w"], {"w": (4, 5)}),
    "by hand": (lambda p, y: (y * relu6(y + 3) / 6) @ p["w"], {"w": (4, 5)}),
    "negated": (lambda p, y: relu(-y) @ p["w"], {"w": (4, 5)}),
    "scaled": (lambda p, y: (0.5 * relu(y) + 0.25) @ p["w"], {"w": (4, 5)}),
    "leaky": (lambda p, y: jax.nn.leaky_relu(y, 0.2) @ p["w"], {"w": (4, 5)}),
    "convolution": (lambda p, y: conv(relu(y), p["w"]), {"w": (2, 2, 4, 5)}),
    "grouped": (lambda p, y: conv(relu(y), p["w"], 2), {"w": (1, 1, 2, 6)}),
    "depthwise": (lambda p, y: conv(relu6(y), p["w"], 4), {"w": (2, 2, 1, 8)}),
    "two products": (
        lambda p, y: relu(conv(y, p["w"]) + p["b"].reshape(ROW)) @ p["v"],
        {"w": (1, 1, 4, 3), "b": (3,), "v": (3, 2)},
    ),
    "subtraction": (
        lambda p, y: (conv(y, p["w"]) - relu(conv(y, p["v"]))) @ p["u"],
        {"w": (1, 1, 4, 3), "v": (1, 1, 4, 3), "u": (3, 2)},
    ),
    "concatenation": (
        lambda p, y: jnp.concatenate([relu(y), jnp.tanh(conv(y, p["w"]))], -1) @ p["v"],
        {"w": (1, 1, 4, 3), "v": (7, 2)},
    ),
    "flatten": (
        lambda p, y: relu(y).reshape(y.shape[0], -1) @ p["w"],
        {"w": (4 * 4 * 4, 3)},
    ),
    "mean": (
        lambda p, y: jnp.mean(relu(y), (1, 2), keepdims=True) @ p["w"],
        {"w": (4, 3)},
    ),
    "average pool": (
        lambda p, y: average(relu(y)) @ p["w"],
        {"w": (4, 3)},
    ),
}
DEPENDENT = ("subtraction", "concatenation", "two products")  # what is added is not
POOLED = ("mean", "average pool")  # and a pool keeps what it pools


def network(name, batch=1):
    body, shapes = NETS[name]
    params = {"norm": norm_leaves(CHANNELS), **numbers(7, **shapes)}
    if "b" in params:
        params["b"] = params["b"] + 1.0

    def apply(p, x):
        return body(p, affine(p["norm"], x, shape=ROW))

    return apply, params, jnp.ones((batch, 4, 4, CHANNELS))


def drawn(params, batch):
    """What the norm's statistics say, drawn."""
    mean, var = (np.asarray(params["norm"][k], np.float64) for k in ("mean", "var"))
    x = np.random.default_rng(3).normal(mean, np.sqrt(var), (batch, 4, 4, CHANNELS))
    return jax.device_put(np.float32(x))


def observed(apply, params, x):
    """Mean and variance of what enters and leaves each product, in float64."""

    def hook(node, run, operands):
        y = run(*operands)
        return y, (operands[0], y) if node.kind == "product" else None

    nodes = jm.trace(apply, params, x[:1]).nodes
    found = jax.jit(jm.evaluate(apply, hook))(params, x)[1]
    out = {}
    for node in nodes:
        if node.kind != "product":
            continue
        two = []
        for value, kept in zip(
            found[node.name], (node.in_features, node.features), strict=True
        ):
            value = np.moveaxis(np.asarray(value, np.float64), kept[0], -1)
            value = value.reshape(-1, value.shape[-1])
            two.append((value.mean(0), value.var(0)))
        out[node.name] = two
    return out


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", NETS)
def test_moments_through_a_network_against_drawn_numbers(name):
    apply, params, x = network(name)
    graph = jm.trace(apply, params, x)
    assert not unreached(graph, params)
    inputs, nodes = input_moments(graph, params), node_moments(graph, params)
    x = drawn(params, 4096)
    for node, (into, out) in observed(apply, params, x).items():
        sigma = np.sqrt(into[1].max()), np.sqrt(out[1].max())
        close(inputs[node].mean, into[0], atol=0.06 * sigma[0])
        if name not in (*POOLED, *DEPENDENT):
            close(inputs[node].variance, into[1], 0.05, 0.05 * sigma[0] ** 2)
        close(nodes[node].mean, out[0], atol=0.03 * sigma[1])
        if name not in (*DEPENDENT, *POOLED):
            close(nodes[node].variance, out[1], 0.08)
        assert np.all(nodes[node].low <= nodes[node].mean)


def test_a_transposed_convolution_meets_fewer_inputs():
    def apply(p, x):
        y = relu(affine(p["norm"], x, shape=ROW))
        return lax.conv_transpose(y, p["w"], (2, 2), "VALID")

    params = {"norm": norm_leaves(CHANNELS), **numbers(7, w=(2, 2, CHANNELS, 3))}
    graph = jm.trace(apply, params, jnp.ones((1, 4, 4, CHANNELS)))
    (layer,) = graph.layers
    y = np.asarray(jax.jit(apply)(params, drawn(params, 4096)), np.float64)
    got = node_moments(graph, params)[layer.name]
    close(got.mean, y.mean((0, 1, 2)), atol=0.03 * y.std())


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        ("sum", lambda y: 0.5 * jnp.sum(relu(y), (1, 2)), "is a sum"),
        ("sort", lambda y: jnp.sort(relu(y), -1), "sort after"),
        ("layer norm", lambda y: jax.nn.standardize(y), "stores no statistics"),
        ("product", lambda y: y @ jnp.swapaxes(y, -1, -2), "a matmul"),
    ],
)
def test_what_is_not_known_is_said(name, body, why):
    params = {"norm": norm_leaves(CHANNELS), "w": jnp.ones((CHANNELS, 2))}

    def apply(p, x):
        return body(affine(p["norm"], x, shape=ROW)) @ p["w"]

    graph = jm.trace(apply, params, jnp.ones((2, 4, 4, CHANNELS)))
    assert why in unreached(graph, params)["w"], name
    assert "w" not in input_moments(graph, params)


# Whole networks


class Gated(nn.Module):
    """What EfficientNets are made of: SiLU, squeeze and excitation, residuals."""

    @nn.compact
    def __call__(self, x):
        norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)
        x = nn.silu(norm("stem_bn")(nn.Conv(8, (3, 3), 2, name="stem")(x)))
        y = nn.silu(norm("expand_bn")(nn.Conv(16, (1, 1), name="expand")(x)))
        y = nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(y)
        y = nn.silu(norm("depthwise_bn")(y))
        gate = jnp.mean(y, (1, 2), keepdims=True)
        gate = nn.silu(nn.Conv(4, (1, 1), name="squeeze")(gate))
        y = y * nn.sigmoid(nn.Conv(16, (1, 1), name="excite")(gate))
        y = norm("project_bn")(nn.Conv(8, (1, 1), name="project")(y)) + x
        y = nn.max_pool(nn.hard_swish(norm("head_bn")(nn.Conv(8, (1, 1))(y))), (2, 2))
        return nn.Dense(4, name="classifier")(y.reshape(len(y), -1))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["efficient", "mobile", "demo", "pre_activation"])
def test_a_whole_network_is_reached(name):
    if name in CASES:
        apply, params, inputs = CASES[name].make["linen"](KEY)
    else:
        model = Gated() if name == "efficient" else Demo()
        x = jnp.ones((2, 28, 28, 1 if name == "demo" else 3))
        params = fill(jax.eval_shape(model.init, KEY, x), KEY)
        apply, inputs = model.apply, (x,)
    graph = jm.trace(apply, params, *inputs)
    left = unreached(graph, params)
    assert left == ({} if name == "pre_activation" else {"stem": left["stem"]})
    assert all("outside" in why for why in left.values())
    known = node_moments(graph, params)
    assert {n.name for n in graph.nodes} - set(known) <= {"input"}
    assert all(np.isfinite(v).all() for x in known.values() for v in x)


def measured_norms(apply, params, x):
    """Moments of what every norm reads and makes on data."""

    def hook(node, run, operands):
        y = run(*operands)
        return y, (operands[0], y) if node.kind == "norm" else None

    found = jax.jit(jm.evaluate(apply, hook))(params, x)[1]
    flat = lambda v: np.asarray(v, np.float64).reshape(-1, v.shape[-1])
    return {name: [flat(v) for v in pair] for name, pair in found.items()}


@pytest.mark.slow
def test_true_statistics_give_the_moments_that_are_measured():
    apply, params, (x,) = CASES["mobile"].make["linen"](KEY)
    x = jax.random.normal(KEY, (64, 12, 12, 3))
    graph = jm.trace(apply, params, x)
    params = jm.reestimate_batch_norm(params, graph, [x], progress=False)
    for tree in (params, jm.fold_batch_norm(params, graph)):
        known = node_moments(graph, tree)
        for name, (before, after) in measured_norms(apply, tree, x).items():
            producer = graph[name].inputs[0].node or ""
            close(known[producer].mean, before.mean(0), atol=1e-4 * before.std())
            close(known[producer].variance, before.var(0), 1e-3)
            close(known[name].mean, after.mean(0), atol=1e-3 * after.std())
            close(known[name].variance, after.var(0), 1e-2)


def test_equalizing_divides_what_is_known_of_each_channel():
    (_, params, _), graph = model("inverted_residual"), traced("inverted_residual")
    params = jm.fold_batch_norm(params, graph)
    after = jm.equalize(params, graph, objective="range", progress=False)
    before, now = input_moments(graph, params), input_moments(graph, after)
    w, v = (np.asarray(p["params"]["project"]["kernel"])[0, 0] for p in (params, after))
    scale = (v / w)[
        :, :1
    ]  # what project reads was divided by it, its outputs by nothing
    close(v / w, np.broadcast_to(scale, v.shape), 1e-5)
    assert np.ptp(np.log(scale)) > 0.1
    close(now["project"].mean * scale[:, 0], before["project"].mean, 1e-5, 1e-6)
    for got, want in zip(now["project"], before["project"], strict=True):
        power = 2 if want is before["project"].variance else 1
        close(got * scale[:, 0] ** power, want, 1e-4, 1e-6)


def test_ranges_reach_as_far_as_asked():
    (_, params, _), graph = model("conv_bn_relu"), traced("conv_bn_relu")
    for n_sigma in (2.0, 6.0):
        found = node_moments(graph, params, n_sigma=n_sigma)
        x, y = found["stem_bn"], found["stem/relu"]
        close(x.high - x.mean, n_sigma * np.sqrt(x.variance), 1e-5)
        close(y.high, np.maximum(x.high, 0), 1e-6)


def test_unknown_inputs_are_implied_by_what_they_make():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), 2, "VALID", name="stem")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(x))
            return nn.Conv(4, (1, 1), name="head")(x)

    true = np.array([0.3, -0.5, 2.0])
    x = jax.random.normal(KEY, (64, 9, 9, 3)) + jax.device_put(
        np.float32(true)
    ).reshape(ROW)
    params = fill(jax.eval_shape(Net().init, KEY, x), KEY)
    graph = jm.trace(Net().apply, params, x)
    params = jm.reestimate_batch_norm(params, graph, [x], progress=False)
    for tree in (params, jm.fold_batch_norm(params, graph)):
        assert "stem" not in input_moments(graph, tree)
        found = input_moments(graph, tree, implied=True)["stem"]
        close(found.mean, true, atol=0.1)
        close(found.variance, np.ones(3), 0.1)


@pytest.mark.slow
def test_it_runs_under_jit():
    apply, params, inputs = CASES["mobile"].make["nnx"](KEY)
    graph = jm.trace(apply, params, *inputs)
    one = input_moments(graph, params)
    two = jax.jit(lambda p: input_moments(graph, p))(params)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        close(a, b, 1e-5, 1e-6)
