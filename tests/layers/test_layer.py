"""A layer's weight as matrices: what the product reads, and back to the parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxmet as jm
from jaxmet.layers.layer import WeightMatrix, matrix_of
from jaxmet.tree.named_leaves import named_leaves
from zoo import model


def read(graph, params, inputs):
    """By layer the matrices of what its equation gets, as the model runs: (layers · groups, …)."""

    def hook(node, run, operands):
        if node.weight is None or node.weight.name is None or node.kind != "product":
            return run(*operands), None
        return run(*operands), matrix_of(node, operands[node.weight.operand])

    found = jax.jit(jm.evaluate(graph.apply, hook))(params, *inputs)[1]
    return {n: np.asarray(m).reshape(-1, *m.shape[-2:]) for n, m in found.items()}


def check(apply, params, inputs):
    graph = jm.trace(apply, params, *inputs)
    leaves = named_leaves(params)
    expected = read(graph, params, inputs)
    assert expected
    for name, matrix in expected.items():
        leaf = np.asarray(leaves[graph[name].kernel])
        found = WeightMatrix.of(graph[name], leaf)
        np.testing.assert_array_equal(found.matrix(leaf), matrix, err_msg=name)
        np.testing.assert_array_equal(found.leaf(matrix), leaf, err_msg=name)
        np.testing.assert_array_equal(leaf.reshape(-1)[found.index], matrix)
        assert found.sizes == matrix.shape
    return graph


@pytest.mark.parametrize(
    "name",
    [
        "scan",
        "grouped",
        "transposed",
        "dilated",
        "transformer",
        "einsum_heads",
        "haiku_conv",
    ],
)
def test_matrices_of_the_zoo(name):
    check(*model(name))


VIEWS = {
    "transpose": lambda w: jnp.transpose(w, range(w.ndim)[::-1]),
    "swap": lambda w: jnp.swapaxes(w, 0, -1),
    "flat": lambda w: w.reshape(-1),
    "split": lambda w: w.reshape(2, -1),
    "split last": lambda w: (
        w.reshape(*w.shape[:-1], -1, 2) if w.shape[-1] % 2 == 0 else w
    ),
    "add axis": lambda w: w[:, None],
    "squeeze": lambda w: w.reshape(1, *w.shape)[0],
    "flip": lambda w: jnp.flip(w, -1),
    "cast": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
}


def viewed(w, chain):
    for name in chain:
        w = VIEWS[name](w)
    return w.reshape(4, -1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*VIEWS]), max_size=5), st.booleans())
def test_matrices_through_random_views(chain, loops):
    w = np.arange(48, dtype=np.float32).reshape(4, 12)  # exact in bfloat16

    def layer(x, w):
        return jnp.tanh(x @ viewed(w, chain)).reshape(-1, 3, 4).sum(1)

    def apply(p, x):
        if not loops:
            return layer(x, p["w"])
        return lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])[0]

    w = np.stack([w, w[::-1] + 48, w + 96]) if loops else w
    check(apply, {"w": jnp.asarray(w)}, (jnp.ones((5, 4)),))


def test_a_weight_of_which_a_part_is_read_has_no_matrix():
    def apply(p, x):
        return x @ jnp.broadcast_to(p["w"], (4, 3))

    params = {"w": jnp.ones((1, 3))}
    graph = jm.trace(apply, params, jnp.ones((2, 4)))
    layers = [n for n in graph.layers if n.weight.name]
    assert all(WeightMatrix.of(n, params["w"]) is None for n in layers)
