"""Norms over a concatenation: each product takes the gain of the channels that it makes.

The oracle is the network and the fold written out in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmet as jm
from folds import EPSILON, norm_leaves, same_bits


def numbers(seed, *shape, low=-1.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def norm_of(n):
    return {role: np.array(leaf) for role, leaf in norm_leaves(n).items()}


def row(x, like):
    return x.reshape((1,) * (like.ndim - 1) + (-1,))


def normed(y, n, xp=jnp):
    gain = n["scale"] / xp.sqrt(n["var"] + EPSILON)
    return (y - row(n["mean"], y)) * row(gain, y) + row(n["bias"], y)


def convolved(x, kernel, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


def dense_net(widths, biases):
    parts = {
        f"part{i}": {"w": numbers(10 + i, 4, n)}
        | ({"b": numbers(20 + i, n)} if b else {})
        for i, (n, b) in enumerate(zip(widths, biases, strict=True))
    }
    params = parts | {"norm": norm_of(sum(widths)), "head": numbers(9, sum(widths), 3)}

    def apply(p, x, xp=jnp):
        made = []
        for name in parts:
            y = x @ p[name]["w"]
            made.append(y + row(p[name]["b"], y) if "b" in p[name] else y)
        return (
            xp.maximum(normed(xp.concatenate(made, -1), p["norm"], xp), 0) @ p["head"]
        )

    return apply, params, numbers(8, 7, 4)


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(2, 4), st.booleans()), min_size=2, max_size=4))
def test_every_product_takes_the_gain_of_its_channels(parts):
    widths, biases = zip(*parts, strict=True)
    apply, params, x = dense_net(widths, biases)
    graph = jm.trace(apply, params, x)
    after, table = jm.fold_batch_norm(params, graph, with_report=True)
    into = [name.split("/")[0] for name in table["into"][0].split(", ")]
    assert into == [f"part{i}" for i in range(len(widths))]
    wide = jax.tree.map(np.float64, params)
    gain = wide["norm"]["scale"] / np.sqrt(wide["norm"]["var"] + EPSILON)
    starts = np.cumsum([0, *widths])
    for i, start in enumerate(starts[:-1]):
        own = gain[start : starts[i + 1]]
        for name, before in wide[f"part{i}"].items():
            np.testing.assert_allclose(after[f"part{i}"][name], before * own, rtol=1e-5)
    np.testing.assert_allclose(
        after["norm"]["mean"], wide["norm"]["mean"] * gain, rtol=1e-5
    )
    exact = apply(wide, np.float64(x), np)
    found = apply(jax.tree.map(np.float64, after), np.float64(x), np)
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
    again = jm.fold_batch_norm(after, graph)
    for one, two in zip(jax.tree.leaves(after), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    device = jm.simulate(apply, jm.calibrate(after, graph, [x], progress=False))
    error = np.asarray(device(after, x)) - exact
    assert 10 * np.log10(np.sum(exact**2) / np.sum(error**2)) > 25


def test_convolutions_and_depthwise_ones_are_joined():
    params = {
        "a": numbers(1, 3, 3, 2, 4),
        "b": numbers(2, 3, 3, 1, 2),  # depthwise
        "norm": norm_of(6),
    }

    def apply(p, x):
        both = [convolved(x, p["a"]), convolved(x, p["b"], groups=2)]
        y = jax.nn.relu(normed(jnp.concatenate(both, -1), p["norm"]))
        return y.mean((1, 2)) @ jnp.ones((6, 2))

    x = numbers(3, 2, 5, 5, 2)
    graph = jm.trace(apply, params, x)
    after, table = jm.fold_batch_norm(params, graph, with_report=True)
    assert table["into"] == ["a, b"]
    gain = params["norm"]["scale"] / np.sqrt(
        np.float64(params["norm"]["var"]) + EPSILON
    )
    np.testing.assert_allclose(after["a"], params["a"] * gain[:4], rtol=1e-5)
    np.testing.assert_allclose(after["b"], params["b"] * gain[4:], rtol=1e-5)
    np.testing.assert_allclose(apply(after, x), apply(params, x), rtol=1e-4, atol=1e-5)


def test_quantizers_follow_and_training_folds_likewise():
    apply, params, x = dense_net((3, 2), (True, False))
    graph = jm.trace(apply, params, x)
    q = jm.calibrate(params, graph, [x], progress=False).pin(params)
    after, moved = jm.fold_batch_norm(params, graph, quantizers=q)
    gain = params["norm"]["scale"] / np.sqrt(params["norm"]["var"] + EPSILON)
    for i, own in ((0, gain[:3]), (1, gain[3:])):
        old, new = (p.weights[f"part{i}/w"].scale for p in (q, moved))
        np.testing.assert_allclose(new, np.asarray(old) * np.abs(own), rtol=1e-5)
    found = jm.calibrate(after, graph, [x], progress=False)
    trained = jm.simulate(apply, found, fold=graph)(params, x)
    deployed = jm.simulate(apply, found)(after, x)
    np.testing.assert_allclose(trained, deployed, atol=0.05 * np.abs(deployed).max())


OTHERS = {
    "the input itself": lambda p, x: ([x @ p["a"], x], None),
    "twice the same": lambda p, x: ([y := x @ p["a"], y], None),
    "read elsewhere": lambda p, x: ([x @ p["a"], y := x @ p["b"]], y),
    "after a rectifier": lambda p, x: ([x @ p["a"], jax.nn.relu(x @ p["b"])], None),
    "one weight twice": lambda p, x: ([x @ p["a"], (x + 1) @ p["a"]], None),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_joins_something_else_is_left_with_a_reason(case):
    params = {"a": numbers(1, 4, 4), "b": numbers(2, 4, 4), "norm": norm_of(8)}

    def apply(p, x):
        parts, more = OTHERS[case](p, x)
        y = jax.nn.relu(normed(jnp.concatenate(parts, -1), p["norm"]))
        return y if more is None else (y, more)

    x = numbers(3, 5, 4)
    graph = jm.trace(apply, params, x)
    after, table = jm.fold_batch_norm(params, graph, with_report=True)
    assert table["note"][0].startswith("skipped: ")
    same_bits(after, params)


def test_examples_joined_along_tokens_share_their_channels():
    params = {"a": numbers(1, 4, 6), "b": numbers(2, 4, 6), "norm": norm_of(6)}

    def apply(p, x):
        return jax.nn.relu(
            normed(jnp.concatenate([x @ p["a"], x @ p["b"]], 1), p["norm"])
        )

    x = numbers(3, 2, 3, 4)
    graph = jm.trace(apply, params, x)
    after, table = jm.fold_batch_norm(params, graph, with_report=True)
    assert table["note"][0].startswith("skipped: ")
    np.testing.assert_array_equal(after["a"], params["a"])


FLOORS = {
    "max(v, e)": lambda v, e: jnp.sqrt(jnp.maximum(v, e)),
    "max(√v, e)": lambda v, e: jnp.maximum(jnp.sqrt(v), e),
    "√v + e": lambda v, e: jnp.sqrt(v) + e,
}


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 1e-12])
@pytest.mark.parametrize("floor", FLOORS)
def test_a_divisor_of_another_form_is_left_however_small_its_epsilon(floor, epsilon):
    params = {"w": numbers(1, 4, 5), "norm": norm_of(5)}
    params["norm"]["var"][:3] = epsilon * np.array([0.25, 1.0, 4.0])
    params["norm"]["var"][3] = epsilon**2

    def apply(p, x):
        n = p["norm"]
        y = x @ p["w"]
        divisor = FLOORS[floor](n["var"], epsilon)
        return (y - row(n["mean"], y)) / row(divisor, y) * row(n["scale"], y)

    x = numbers(3, 2, 4)
    graph = jm.trace(apply, params, x)
    after, table = jm.fold_batch_norm(params, graph, with_report=True)
    assert "not of the form (x − mean)·scale/√(variance + epsilon)" in table["note"][0]
    np.testing.assert_array_equal(apply(after, x), apply(params, x))
