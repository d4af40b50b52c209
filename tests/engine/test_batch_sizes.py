"""What is found in a model does not depend on the batch that it is called with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxmet as jm
from random_nets import (
    IMAGES,
    READOUTS,
    TOKENS,
    Net,
    products_with_a_parameter,
    random_values,
)

SIZES = (1, 2, 3, 7)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def structure(nodes):
    """Of each node what does not depend on layout ops, which differ at batch size one."""
    return {
        n.name: (n.kind, n.function, {*n.parameters}, {e.node for e in n.inputs})
        for n in nodes
    }


def nodes_of_a_call(apply, params, *inputs):
    """The nodes that a hook meets when the model runs on these inputs."""
    met = []

    def hook(node, run, operands):
        met.append(node)
        return run(*operands), None

    jax.eval_shape(jm.evaluate(apply, hook), params, *inputs)
    return met


def check_all_sizes(net):
    graph = jm.trace(net, net.params, net.inputs(1))
    want = structure(graph.nodes)
    assert len(graph.layers) == products_with_a_parameter(
        net, net.params, net.inputs(5)
    )
    for size in SIZES:
        x = net.inputs(size)
        assert structure(jm.trace(net, net.params, x).nodes) == want
        assert structure(nodes_of_a_call(net, net.params, x)) == want, size


@settings(max_examples=15)
@given(st.lists(st.sampled_from([*TOKENS]), max_size=4), st.sampled_from([*READOUTS]))
def test_sequence_models_have_the_same_nodes_at_all_sizes(blocks, readout):
    check_all_sizes(Net(blocks, readout))


@settings(max_examples=8)
@given(st.lists(st.sampled_from([*IMAGES]), max_size=4), st.sampled_from([*READOUTS]))
def test_image_models_have_the_same_nodes_at_all_sizes(blocks, readout):
    check_all_sizes(Net(blocks, readout, images=True))


@pytest.mark.slow
@settings(max_examples=50)
@given(st.booleans(), st.data(), st.integers(1, 6), st.sampled_from([*READOUTS]))
def test_many_models_have_the_same_nodes_at_all_sizes(images, data, count, readout):
    blocks = [
        data.draw(st.sampled_from([*(IMAGES if images else TOKENS)]))
        for _ in range(count)
    ]
    check_all_sizes(Net(blocks, readout, images=images))


def test_one_example_to_trace_many_to_calibrate_one_to_run():
    net = Net(("attention_operator", "experts"), "mean")
    params, x = random_values((net.params, net.inputs(17)))
    graph = jm.trace(net, params, x[:1])
    config = jm.QuantConfig(weight_bits=16, activation_bits=16)
    batches = [(x[:16],), (x[16:],)]
    quantizers = jm.calibrate(params, graph, batches, config, progress=False)
    run, plain = jax.jit(jm.simulate(net, quantizers)), jax.jit(net)
    for size in (1, 17):
        exact = np.asarray(plain(params, x[:size]), np.float64)
        error = np.asarray(run(params, x[:size]), np.float64) - exact
        assert np.sum(error**2) < 1e-6 * np.sum(exact**2)


# Where the sizes are not the library's to choose.

W, V = spec(6, 4), spec(4, 3)


def names(graph):
    return " ".join(n.name for n in graph.nodes)


def test_a_table_along_the_first_axis():
    def apply(p, x):
        return (x + p["positions"]) @ p["w"]

    graph = jm.trace(apply, {"positions": spec(3, 6), "w": W}, spec(3, 6))
    assert names(graph) == "input input/add w output"


def test_one_example_without_a_batch():
    def apply(p, x):
        return jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]

    params = {"w": W, "b": spec(4), "v": V}
    assert names(jm.trace(apply, params, spec(6))) == "input w w/relu v output"


def test_one_image_without_a_batch_is_padded_as_it_is():
    def apply(p, x):
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x[None], p["k"], (2, 2), "SAME", dimension_numbers=layout
        )
        return jax.nn.relu(y[0]).mean((0, 1)) @ p["v"]

    graph = jm.trace(apply, {"k": spec(3, 3, 3, 4), "v": V}, spec(8, 8, 3))
    assert names(graph) == "input k k/relu k/pool v output"
    convolution = graph["k"].convolution
    assert convolution is not None
    assert convolution.padding == ((0, 1), (0, 1))  # of 8 pixels, both ways


def test_each_example_by_itself():
    def apply(p, x):
        return [jax.nn.relu(row[None] @ p["w"]) for row in x]

    graph = jm.trace(apply, {"w": W}, spec(2, 6))
    assert names(graph) == "input w:0 w:0/relu w:1 w:1/relu output:0 output:1"


def test_pairs_of_examples():
    def apply(p, x):
        return (x.reshape(-1, 2, 6) @ p["w"]).mean(1) @ p["v"]

    assert (
        names(jm.trace(apply, {"w": W, "v": V}, spec(4, 6)))
        == "input w w/pool v output"
    )


def test_a_batch_after_another_axis():
    def apply(p, x):
        start = jnp.zeros((x.shape[1], 4))
        step = lambda c, x: (jnp.tanh(x @ p["w"] + c @ p["u"]), None)
        return lax.scan(step, start, x)[0] @ p["v"]

    params = {"w": W, "u": spec(4, 4), "v": V}
    graph = jm.trace(apply, params, spec(5, 1, 6))
    for size in SIZES:
        again = nodes_of_a_call(apply, params, spec(5, size, 6))
        assert structure(again) == structure(graph.nodes)


def test_only_one_of_the_inputs_has_a_batch():
    def apply(p, x, context):
        scores = jax.nn.softmax((x @ p["w"]) @ (context @ p["u"]).T)
        return scores @ context @ p["v"]

    params = {"w": W, "u": spec(5, 4), "v": spec(5, 3)}
    graph = jm.trace(apply, params, spec(1, 2, 6), spec(7, 5))
    assert len(graph.layers) == 3
    for size in SIZES:
        again = nodes_of_a_call(apply, params, spec(size, 2, 6), spec(7, 5))
        assert structure(again) == structure(graph.nodes)
