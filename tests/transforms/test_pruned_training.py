"""A pruned network trains as it was written: what norms return fits the tree that went in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmet as jm
from jaxmet import densify
from jaxmet.tree.named_leaves import named_leaves

X = np.random.default_rng(0).normal(size=(16, 6, 6, 3)).astype(np.float32)
Y = np.arange(16) % 4


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda name: nn.BatchNorm(not train, momentum=0.5, name=name)
        x = nn.relu(norm("bn1")(nn.Conv(8, (3, 3), name="conv1")(x)))
        x = nn.relu(x + norm("bn2")(nn.Conv(8, (3, 3), name="conv2")(x)))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(x + self.bn2(self.conv2(x)))
        return self.head(x.mean((1, 2)))


def linen():
    """Tree, how it runs, how it trains: its logits and the tree with new statistics."""
    model = Linen()
    params = jax.jit(model.init)(jax.random.key(0), X)
    lifted = jm.lift(model.apply)

    def train(params, x):
        logits, new = lifted(params, x, train=True, mutable=["batch_stats"])
        return logits, {**params, **new}

    return params, model.apply, train


def of_nnx():
    model = Nnx()
    model.eval()
    apply, params, _ = jm.functional(model)
    model.train()
    lifted = jm.lift(jm.functional(model)[0])

    def train(params, x):
        logits, new = lifted(params, x, mutable=nnx.BatchStat)
        return logits, nnx.merge_state(params, new)

    return params, apply, train


@pytest.mark.parametrize("make", [linen, of_nnx])
@pytest.mark.parametrize("times", [1, 2])
def test_statistics_come_back_as_the_tree_holds_them(make, times):
    params, apply, train = make()
    small = params
    for _ in range(times):
        small = jm.prune(small, jm.trace(apply, small, X[:1]), 0.6)
    logits, after = jax.jit(train)(small, X)
    assert jax.tree.structure(after) == jax.tree.structure(small)
    assert sizes(after) == sizes(small) < sizes(params)
    wanted, masked = jax.jit(train)(densify(small), X)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    found = densify(after)
    moved = 0
    for name, old in named_leaves(densify(small)).items():
        new = np.asarray(named_leaves(found)[name])
        kept = (np.asarray(old) != 0) | (new != 0)  # means begin at zero
        np.testing.assert_allclose(
            new[kept], np.asarray(named_leaves(masked)[name])[kept], atol=1e-5
        )
        moved += name.endswith(("mean", "var")) and not np.allclose(new, old)
    assert moved == 4


def sizes(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


def test_steps_compile_once_and_learn():
    params, apply, train = linen()
    small = jm.prune(params, jm.trace(apply, params, X[:1]), 0.5)
    optimizer, traces = optax.sgd(0.1), []

    @jax.jit
    def step(params, state):
        traces.append(1)

        def loss(weights):
            logits, new = train({**params, "params": weights}, X)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, Y)
            return losses.mean(), new

        (value, params), grads = jax.value_and_grad(loss, has_aux=True)(
            params["params"]
        )
        updates, state = optimizer.update(grads, state)
        weights = optax.apply_updates(params["params"], updates)
        return {**params, "params": weights}, state, value

    state, values = optimizer.init(small["params"]), []
    for _ in range(30):
        small, state, value = step(small, state)
        values.append(float(value))
    assert len(traces) == 1
    assert values[-1] < 0.8 * values[0]


def test_fake_quantization_returns_them_likewise():
    params, apply, train = linen()
    small = jm.prune(params, jm.trace(apply, params, X[:1]), 0.5)
    train = jax.jit(train)
    for _ in range(9):  # until both modes norm alike
        _, small = train(small, X)
    graph = jm.trace(apply, small, X[:1])
    quantizers = jm.calibrate(small, graph, [X], progress=False)
    run = jax.jit(jm.simulate(apply, quantizers), static_argnames=("train", "mutable"))
    logits, new = run(small, X, train=True, mutable=("batch_stats",))
    assert jax.tree.structure({**small, **new}) == jax.tree.structure(small)
    exact = jax.jit(apply, static_argnames=("train", "mutable"))
    wanted, _ = exact(densify(small), X, train=True, mutable=("batch_stats",))
    assert 0 < np.abs(logits - wanted).max() < 0.2 * np.abs(wanted).max()


def test_a_result_of_another_shape_or_name_is_whole():
    params, apply, _ = linen()
    small = jm.prune(params, jm.trace(apply, params, X[:1]), 0.5)

    def features(params, x):
        stats = params["batch_stats"]["bn1"]
        outer = jnp.outer(stats["mean"], stats["var"])
        return {"batch_stats": {"bn1": {"mean": outer}}, "mean": stats["mean"]}

    found = jax.jit(jm.lift(features))(small, X)
    assert found["mean"].shape == (8,)
    assert found["batch_stats"]["bn1"]["mean"].shape == (8, 8)


@pytest.mark.parametrize("rows", [4, 16])
def test_a_result_with_the_name_and_shape_of_a_parameter_is_none(rows):
    """A batch may have as many rows as a weight has inputs."""

    def apply(params, x):
        return {"head": jax.nn.relu(x @ params["body"]) @ params["head"]}

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "body": jax.random.normal(keys[0], (16, 16)),
        "head": jax.random.normal(keys[1], (16, 5)),
    }
    x = jax.random.normal(keys[2], (rows, 16))
    small = jm.prune(params, jm.trace(apply, params, x[:1]), 0.5)
    found = jax.jit(jm.lift(apply))(small, x)["head"]
    np.testing.assert_allclose(found, apply(densify(small), x)["head"], atol=1e-4)
