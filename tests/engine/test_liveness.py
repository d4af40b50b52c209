"""A value counts where it reaches an output, whatever axes it has lost on the way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm
from random_nets import products_with_a_parameter, random_values

W, V = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((6, 4), (4, 4)))
X = jax.ShapeDtypeStruct((3, 6), jnp.float32)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def names(apply, params, *inputs, **kwargs):
    return " ".join(n.name for n in jm.trace(apply, params, *inputs, **kwargs).nodes)


def error_of(apply, params, *inputs, bits=16):
    """Quantized against exact outputs, relative, after a calibration on the same inputs."""
    graph = jm.trace(apply, params, *inputs)
    config = jm.QuantConfig(weight_bits=bits, activation_bits=bits)
    quantizers = jm.calibrate(params, graph, [inputs], config, progress=False)
    exact = np.asarray(jax.jit(apply)(params, *inputs), np.complex128)
    found = np.asarray(jax.jit(jm.simulate(apply, quantizers))(params, *inputs))
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


# The batch axis is summed, merged, taken apart, or was never there.


def stack_and_sum(p, x):
    return jnp.stack([x @ p["w"], jnp.tanh(x @ p["u"])]).sum(0)


def tile(p, x):
    return jnp.tile(x @ p["w"], (2, 1)) @ p["v"]


def over_the_batch(p, x):
    return (x @ p["w"]).sum(0) @ p["v"]


def views_of_one_image(p, x):
    both = jax.nn.relu(jnp.concatenate([x, x[:, ::-1]]) @ p["w"])
    return both.reshape(2, -1, 4).mean(0) @ p["v"]


def gram(p, x):
    y = x @ p["w"]
    return (y.T @ y) @ p["v"]


def transposed(p, x):
    return (p["v"] @ jnp.tanh(x @ p["w"]).T).T


@pytest.mark.parametrize(
    ("apply", "nodes"),
    [
        (stack_and_sum, "input w u u/tanh u/concat u/pool output"),
        (tile, "input w v output"),
        (over_the_batch, "input w w/pool v output"),
        (views_of_one_image, "input input/concat w w/relu w/pool v output"),
        (gram, "input w w/matmul v output"),
        (transposed, "input w w/tanh v output"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_axes_of_the_batch_may_go(apply, nodes):
    params = {"w": W, "u": W, "v": V}
    for size in (1, 2, 5):
        assert names(apply, params, spec(size, 6)) == nodes


# Graphs: nodes, and edges as pairs of numbers.


def messages(x, edges, count):
    return jax.ops.segment_sum(x[edges[0]], edges[1], num_segments=count)


def gcn(p, x, edges):
    degree = 1.0 + jnp.zeros(x.shape[0]).at[edges[1]].add(1.0)
    h = (x @ p["w"]) / jnp.sqrt(degree)[:, None]
    h = jax.nn.relu((messages(h, edges, x.shape[0]) + h) / jnp.sqrt(degree)[:, None])
    return messages(h @ p["v"], edges, x.shape[0])


def gat(p, x, edges):
    source, target = edges
    h, count = x @ p["w"], x.shape[0]
    score = jax.nn.leaky_relu((h[source] @ p["to"]) + (h[target] @ p["from"]))
    score = score - jax.ops.segment_max(score, target, num_segments=count)[target]
    weight = jnp.exp(score)
    total = jax.ops.segment_sum(weight, target, num_segments=count)
    weight = weight / total[target]
    out = jax.ops.segment_sum(h[source] * weight[:, None], target, num_segments=count)
    return out @ p["v"]


def readout(p, x, edges):
    h = jax.nn.relu(messages(x @ p["w"], edges, x.shape[0]))
    return jnp.mean(h, 0, keepdims=True) @ p["v"]


@pytest.mark.parametrize("apply", [gcn, gat, readout])
def test_graph_networks_have_all_their_layers(apply):
    shapes = {"w": W, "v": V, "to": spec(4), "from": spec(4)}
    params = random_values(shapes)
    x = random_values(spec(5, 6))
    edges = jnp.asarray([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]])
    used = {"gcn": "wv", "readout": "wv"}.get(apply.__name__)
    params = {k: v for k, v in params.items() if used is None or k in used}
    graph = jm.trace(apply, params, x, edges)
    count = products_with_a_parameter(apply, params, x, edges)
    assert len(graph.layers) == len(params) == count
    assert error_of(apply, params, x, edges) < 1e-3


# Running averages are state, biases are not.

AVERAGES = {
    "sum": lambda old, new: 0.9 * old + 0.1 * new,
    "difference": lambda old, new: old - 0.1 * (old - new),
    "to the new": lambda old, new: old + 0.1 * (new - old),
    "chosen": lambda old, new: jnp.where(jnp.arange(4) < 0, old, new),
    "cast": lambda old, new: (
        (old.astype(jnp.bfloat16) * 0.5).astype(jnp.float32) + new * 0.5
    ),
}


def normal(x, axes):
    mean = x.mean(axes, keepdims=True)
    spread = jnp.square(x).mean(axes, keepdims=True) - jnp.square(mean)
    return mean, spread


@pytest.mark.parametrize("form", AVERAGES)
@pytest.mark.parametrize("size", [2, 5])
def test_running_averages_give_no_nodes(form, size):
    def apply(p, x, train):
        x = x @ p["w"]
        mean, spread = normal(x, 0) if train else (p["mean"][None], p["spread"][None])
        y = (x - mean) * lax.rsqrt(spread + 1e-3) * p["scale"][None] + p["bias"][None]
        new = [
            AVERAGES[form](p[k], v[0]) if train else p[k]
            for k, v in (("mean", mean), ("spread", spread))
        ]
        return jax.nn.relu(y) @ p["v"], new

    vectors = {k: spec(4) for k in ("mean", "spread", "scale", "bias")}
    params = {"w": W, "v": V, **vectors}
    want = "input w bias w/relu v output"
    for train in (False, True):
        found = names(functools.partial(apply, train=train), params, spec(size, 6))
        assert found.replace("scale", "bias") == want


def test_running_averages_of_layers_in_a_scan_give_no_nodes():
    def apply(p, x, train):
        def layer(x, p):
            x = x @ p["w"]
            mean = x.mean(0) if train else p["mean"]
            y = jax.nn.relu(x - mean[None])
            return y, 0.9 * p["mean"] + 0.1 * mean if train else p["mean"]

        return lax.scan(layer, x, p)

    params = {"w": spec(3, 6, 6), "mean": spec(3, 6)}
    found = [
        names(functools.partial(apply, train=train), params, X).split()
        for train in (False, True)
    ]
    assert "output" in found[0] and "output" in found[1]  # one output: the layers'
    assert not [n for n in found[1] if n.startswith("output:")]


def test_what_is_added_to_a_parameter_is_a_result():
    def apply(p, x):
        h = jax.nn.relu(x @ p["w"] + p["b"])
        return h @ p["v"] + p["c"], p["b"] + h, 0.5 * p["c"] + h

    params = {"w": W, "b": spec(4), "v": V, "c": spec(4)}
    found = names(apply, params, spec(6))  # no batch: every shape is a parameter's
    assert found.split()[-3:] == ["output:0", "output:1", "output:2"]


def test_a_layer_that_only_an_average_needs_is_kept():
    def apply(p, x):
        return 0.9 * p["old"] + 0.1 * jnp.tanh(x @ p["w"]).mean(0)

    assert names(apply, {"old": spec(4), "w": W}, X) == (
        "input w w/tanh w/pool w/add output"
    )


def test_a_layer_that_decides_a_branch_is_a_layer():
    def apply(p, x):
        first = (x @ p["gate"]).sum() > 0
        return lax.cond(first, jnp.tanh, jnp.sin, x @ p["w"])

    graph = jm.trace(apply, {"gate": W, "w": W}, X)
    assert {n.name for n in graph.layers} == {"gate", "w"}


# What is neither a number nor an axis.


def test_complex_values_stay_in_float_and_the_plan_says_so():
    def apply(p, x):
        spectrum = jnp.fft.rfft(x @ p["w"]) * p["filter"][None]
        spectrum = spectrum * jnp.complex64(1 + 2j)
        mixed = spectrum @ p["mix"]
        return jnp.fft.irfft(mixed, n=4) @ p["v"]

    shapes = {"w": W, "v": V, "a": spec(3), "b": spec(3), "c": spec(3, 3)}
    r = random_values(shapes)
    filter, mix = lax.complex(r["a"], r["b"]), r["c"].astype(jnp.complex64)
    params = {"w": r["w"], "v": r["v"], "filter": filter, "mix": mix}
    x = random_values(X)
    graph = jm.trace(apply, params, x)
    assert " ".join(n.name for n in graph.nodes) == "input w v output"
    plan = str(jm.plan(params, graph))
    assert "complex" in plan and "filter" in plan and "mix" in plan
    assert error_of(apply, params, x) < 1e-3


def test_complex_inputs_have_no_quantizer():
    def apply(p, x):
        return jnp.abs(x) @ p["w"]

    params, x = random_values((W, X))
    assert error_of(apply, {"w": params}, x.astype(jnp.complex64)) < 1e-3


@pytest.mark.parametrize("borders", [[0, 2], [2, 2], [4], [0, 0, 4]])
def test_empty_pieces(borders):
    def apply(p, x):
        pieces = jnp.split(x @ p["w"], borders, axis=-1)
        return jnp.concatenate([*pieces[::-1], x[:, :0]], -1) @ p["v"]

    params, x = random_values(({"w": W, "v": V}, X))
    assert error_of(apply, params, x) < 1e-3


# Loops.


def test_a_concatenation_that_a_loop_feeds_back():
    def apply(p, x):
        def body(carry, _):
            one, two = carry
            both = jnp.concatenate([jnp.tanh(one @ p["w"]), two[:, :2]], -1)
            return (two, jnp.concatenate([both[:, :3], one[:, 3:]], -1)), None

        return lax.scan(body, (x, x), None, length=3)[0][1] @ p["v"]

    params, x = random_values(({"w": W, "v": spec(6, 2)}, X))
    assert error_of(apply, params, x) < 1e-3
