"""Pruning to a share of the multiplications: one ratio for all layers, found by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmet as jm
from zoo import model, traced


def macs(tree, graph, inputs):
    return jm.cost(tree, graph, *inputs).where(layer="(all)")["macs"][0]


def share(tree, params, graph, inputs):
    return macs(tree, graph, inputs) / macs(params, graph, inputs)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "front", "target"),
    [("mobile", "linen", 0.5), ("resnet", "nnx", 0.6), ("transformer", "linen", 0.7)],
)
def test_the_largest_ratio_that_keeps_no_more(name, front, target):
    _, params, inputs = model(name, front)
    graph = traced(name, front)
    small = jm.prune(params, graph, macs=target)
    assert share(small, params, graph, inputs) <= target
    form = jax.tree.structure(small)
    for k in range(127, 0, -1):
        other = jm.prune(params, graph, k / 128)
        if jax.tree.structure(other) == form:
            jax.tree.map(np.testing.assert_array_equal, other, small)
            return
        assert share(other, params, graph, inputs) > target
    raise AssertionError("no ratio leaves this tree")


@settings(max_examples=5)
@given(st.lists(st.integers(2, 9), min_size=2, max_size=4), st.floats(0.3, 1.0))
def test_dense_layers_against_counting_by_hand(widths, target):
    rng = np.random.default_rng(0)
    sizes = [4, *widths, 3]
    params = {
        f"w{i}": jax.device_put(np.float32(rng.normal(size=pair)))
        for i, pair in enumerate(zip(sizes, sizes[1:], strict=False))
    }

    def apply(p, x):
        for i in range(len(sizes) - 2):
            x = jnp.maximum(x @ p[f"w{i}"], 0)
        return x @ p[f"w{len(sizes) - 2}"]

    def counted(ratio):
        kept = [4, *(max(1, int(n * ratio)) for n in widths), 3]
        return sum(a * b for a, b in zip(kept, kept[1:], strict=False))

    graph = jm.trace(apply, params, np.zeros((2, 4), np.float32))
    fit = [k for k in range(1, 129) if counted(k / 128) <= target * counted(1.0)]
    if not fit:
        with pytest.raises(ValueError, match=r"jaxmet\.prune: macs is .* leaves 0\."):
            jm.prune(params, graph, macs=target)
        return
    small = jm.prune(params, graph, macs=target)
    count = macs(small, graph, [np.zeros((1, 4), np.float32)])
    assert count == counted(fit[-1] / 128)


def test_all_of_them_and_multiples():
    _, params, inputs = model("mobile", "linen")
    graph = traced("mobile", "linen")
    whole = jm.prune(params, graph, macs=1)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    fours, report = jm.prune(params, graph, macs=0.7, multiple=4, with_report=True)
    assert share(fours, params, graph, inputs) <= 0.7
    for row in report:
        assert row["kept"] % 4 == 0 or row["kept"] == row["of"]


def test_one_of_two_ways_to_say_it():
    _, params, _ = model("mobile", "linen")
    graph = traced("mobile", "linen")
    for given_ in ({}, {"ratios": 0.5, "macs": 0.5}):
        with pytest.raises(
            ValueError, match=r"jaxmet\.prune: ratios is .* one of them"
        ):
            jm.prune(params, graph, **given_)
    for bad in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match=r"jaxmet\.prune: the share of macs is"):
            jm.prune(params, graph, macs=bad)
    with pytest.raises(ValueError, match=r"macs is 1e-06, and what can be removed"):
        jm.prune(params, graph, macs=1e-6)
