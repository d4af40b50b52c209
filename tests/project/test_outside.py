"""The zoo from outside: its independent count, and its smallest models through the battery."""

import contextlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from outside.battery import Cell, Subject, battery, sqnr
from outside.count import counted
from outside.model import MODELS, drawn, load_models, settled

SMALLEST = ("linen VAE", "nnx transformer", "haiku MLP", "equinox MLP")
# Not W16A16: on other inputs it measures what their extremes lose, which these models cannot help.
CELLS = ("layers", "replay", "batch of 1", "W8A8", "cost", "compare", "trace")

load_models()


@contextlib.contextmanager
def as_users_run():
    """Other people's models are not written for JAX at its strictest."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_count_by_hand():
    def apply(p, x, ids):
        y = jax.nn.relu(x @ p["a"])  # a layer: 2 examples x 3 x 4
        dead = x @ p["unused"]  # nothing reads it
        del dead
        y = y + p["table"][ids]  # a lookup
        y = y * (p["a"].T @ p["a"])[:1]  # a product of parameters is no layer
        scores = y @ y.T  # one of inputs is none either, but costs 2 x 2 x 4
        step = lambda carry, row: (jnp.tanh(p["r"] @ carry + row), None)
        last, _ = jax.lax.scan(step, jnp.zeros(4), y)  # one layer, twice 4 x 4
        conv = jax.lax.conv(y[:, None], p["k"], (1,), "SAME")  # 2 x 4 x 5 x 3
        return scores, last, conv

    shapes = {
        "a": (3, 4),
        "unused": (3, 9),
        "table": (7, 4),
        "r": (4, 4),
        "k": (5, 1, 3),
    }
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    found = counted(apply, params, jnp.ones((2, 3)), jnp.arange(2))
    wanted = ["conv_general_dilated (5, 1, 3)", "dot_general (3, 4)"]
    wanted += ["dot_general (4, 4)", "gather (7, 4)"]
    assert sorted(found.layers) == sorted(wanted)
    assert found.macs == 24 + 16 + 32 + 120


def test_count_through_calls_and_branches():
    def apply(p, x):
        inner = jax.checkpoint(lambda x: jax.jit(lambda a, b: a @ b)(x, p))
        return jax.lax.cond(x[0, 0] > 0, inner, lambda x: x @ p @ p, x)

    assert (
        counted(apply, jnp.ones((3, 3)), jnp.ones((2, 3))).layers
        == ["dot_general (3, 3)"] * 3
    )


def test_statistics_are_those_of_data():
    def train(p):
        old, new = p["mean"], jnp.full(3, 5.0)
        return {**p, "mean": 0.9 * old + 0.1 * new, "var": 0.9 * p["var"] + 0.1 * 4.0}

    params = {"mean": jnp.zeros(3), "var": jnp.ones(3), "scale": jnp.ones(3)}
    found = settled(train, params, jax.random.key(0))
    np.testing.assert_allclose(found["mean"], 5.0, atol=0.5)
    np.testing.assert_allclose(np.log(found["var"]), np.log(4.0), atol=1.0)
    np.testing.assert_array_equal(found["scale"], 1.0)
    again = drawn(found, jax.random.key(0))
    assert np.std(again["scale"]) > 0
    np.testing.assert_array_equal(again["var"], found["var"])


def test_sqnr_takes_the_worst_output():
    exact = [np.ones(4), np.ones(4)]
    assert sqnr(exact, [np.ones(4), np.full(4, 1.1)]) == pytest.approx(20)
    assert np.isnan(sqnr(exact, [np.ones(4), np.full(4, np.nan)]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_small_models_pass_the_battery(name):
    model = MODELS[name]
    if model.missing:
        pytest.skip(f"{model.missing} not installed")
    found: dict[str, Cell] = {}
    with as_users_run():
        battery(model, list(CELLS), found.__setitem__)
    holes = {cell: f for cell, f in found.items() if f.verdict not in ("right", "n/a")}
    assert not holes and found.keys() == set(CELLS)


@pytest.mark.slow
def test_statistics_of_a_built_model_are_drawn():
    with as_users_run():
        subject = Subject(MODELS["nnx CNN"])
    leaves = [
        np.asarray(x, np.float32)
        for x in jax.tree.leaves(subject.params)
        if x.ndim == 1
    ]
    assert subject.built.norms == 2
    assert all(np.std(x) > 0 for x in leaves if x.size > 2)
