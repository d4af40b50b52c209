"""Costs against hand-made counts, published ones, and XLA's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm


class Mnist(nn.Module):
    """The network whose costs AIMET's tests state."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (5, 5), name="conv1")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(64, (5, 5), name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(1024, name="fc1")(x))
        return nn.Dense(10, name="fc2")(x)


def test_multiplications_of_a_published_network():
    model, x = Mnist(), jnp.zeros((1, 28, 28, 1))
    params = jax.jit(model.init)(jax.random.key(0), x)
    table = jm.cost(params, jm.trace(model.apply, params, x), x)
    assert table["macs"][:4] == [627_200, 10_035_200, 3_211_264, 10_240]
    weights = [800, 51_200, 3_211_264, 10_240]
    biases = [32, 64, 1024, 10]
    assert table["parameters"][:4] == [
        a + b for a, b in zip(weights, biases, strict=True)
    ]
    everything = sum(a.size for a in jax.tree.leaves(params))
    assert table.where(layer="(all)")["parameters"] == [everything]
    assert table.where(layer="(all)")["bytes"] == [4 * everything]
    twice = jm.cost(params, jm.trace(model.apply, params, x), jnp.zeros((2, 28, 28, 1)))
    assert twice["macs"] == [2 * n for n in table["macs"]]


OPTIONS = {
    "same": {"padding": "SAME"},
    "strided": {"padding": "SAME", "window_strides": (2, 3)},
    "cut": {"padding": ((-1, 2), (0, -2))},
    "dilated": {"padding": ((3, 3), (1, 0)), "rhs_dilation": (2, 3)},
    "transposed": {"padding": ((2, 1), (2, 2)), "lhs_dilation": (2, 3)},
    "grouped": {"padding": "SAME", "feature_group_count": 2},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_operations_are_those_that_xla_counts(kind):
    options = {"window_strides": (1, 1)} | OPTIONS[kind]
    groups = options.get("feature_group_count", 1)
    x, kernel = jnp.ones((2, 9, 8, 6)), jnp.ones((3, 2, 6 // groups, 4))

    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, params["c"]["kernel"], dimension_numbers=numbers, **options
        )

    params = {"c": {"kernel": kernel}}
    table = jm.cost(params, jm.trace(apply, params, x), x)
    counted = jax.jit(apply).lower(params, x).cost_analysis()["flops"]
    assert table["flops"][0] == counted
    assert 2 * table["macs"][0] >= counted


def test_shapes_are_enough_and_factors_count_as_two_layers():
    kernel = jax.device_put(np.float32(np.random.default_rng(0).normal(size=(20, 30))))
    params = {"a": {"kernel": kernel}}

    def apply(params, x):
        return x @ params["a"]["kernel"]

    x = jax.ShapeDtypeStruct((1, 20), jnp.float32)
    graph = jm.trace(apply, params, x)
    assert jm.cost(params, graph, x)["macs"] == [600, 0, 600]
    small = jm.factorize(params, graph, ranks={"a": 5})
    table = jm.cost(small, jm.trace(apply, small, x), x)
    assert table["layer"][:2] == ["a/in", "a/out"]
    assert table["macs"] == [100, 150, 0, 250]
    assert table["parameters"] == [100, 150, 0, 250]
    sizes = jm.widths(small)
    assert list(sizes) == [
        {
            "parameter": "a/kernel",
            "shape": (20, 30),
            "stored": [(20, 5), (5, 30)],
            "rank": 5,
        }
    ]
    assert len(jm.widths(params)) == 0


def test_products_without_weights_and_steps_of_loops_count():
    """Attention over what a scan made, each counted with one weight at a time."""

    def apply(params, x):
        def step(h, row):
            h = jnp.tanh(h @ params["h"] + row @ params["i"])
            return h, h

        h = lax.scan(step, jnp.zeros((2, 8)), jnp.moveaxis(x, 1, 0))[1]
        h = jnp.moveaxis(h, 0, 1)
        seen = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", h, h), -1)
        return jnp.einsum("bqk,bkd->bqd", seen, h) @ params["o"]

    shapes = {"h": (8, 8), "i": (6, 8), "o": (8, 3)}
    params = {n: jnp.ones(s) for n, s in shapes.items()}
    x = jnp.ones((2, 5, 6))
    table = jm.cost(params, jm.trace(apply, params, x), x)
    rows = {r["layer"]: r for r in table}
    assert rows["h"]["macs"] == 5 * 2 * 8 * 8 and rows["i"]["macs"] == 5 * 2 * 6 * 8
    assert rows["o"]["macs"] == 10 * 8 * 3
    free = [r for r in table if r["parameters"] == 0 and r["macs"]]
    assert [r["macs"] for r in free] == [2 * 5 * 5 * 8] * 2
    total = 5 * 2 * 14 * 8 + 10 * 8 * 3 + 2 * 2 * 5 * 5 * 8
    assert rows["(all)"]["macs"] == total
    assert rows["(all)"]["parameters"] == sum(a.size for a in params.values())


def test_widths_are_those_that_are_stored():
    apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {n: jax.random.normal(jax.random.key(0), (16, 16)) for n in "ab"}
    x = jnp.ones((4, 16))
    small = jm.factorize(params, jm.trace(apply, params, x), ranks={"a": 6, "b": 6})
    small = jm.prune(small, jm.trace(apply, small, x), 0.5)
    for row in jm.widths(small):
        (_, one), (two, _) = row["stored"]
        assert row["rank"] == one == two == 3


def test_bad_input():
    params = {"a": {"kernel": jnp.ones((2, 3))}}
    apply = lambda p, x: x @ p["a"]["kernel"]
    graph = jm.trace(apply, params, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"jaxmet\.cost: there are no inputs"):
        jm.cost(params, graph)
    with pytest.raises(ValueError, match=r"jaxmet\.cost: .*'a/kernel'"):
        jm.cost({"b": params["a"]}, graph, jnp.ones((1, 2)))
