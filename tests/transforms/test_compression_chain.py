"""Everything on one tree: factors, fewer channels, folded, equalized, rounded, trained."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxmet as jm

FINE_TUNING = 60


class Net(nn.Module):
    """Two convolutions after an addition, all with norms."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm(name="stem_bn")(nn.Conv(12, (3, 3), name="stem")(x)))
        y = nn.relu(norm(name="wide_bn")(nn.Conv(24, (3, 3), name="wide")(x)))
        y = norm(name="narrow_bn")(nn.Conv(12, (3, 3), name="narrow")(y))
        return nn.Dense(5, name="head")(nn.relu(x + y).mean((1, 2)))


def error(apply, params, x, wanted):
    return jnp.mean((apply(params, x) - wanted) ** 2) / jnp.mean(wanted**2)


def trained(loss, tree, labels, rate=3e-4):
    """A tree after some steps of Adam on its weights, and the loss before and after."""
    still = dict.fromkeys(("statistics", "bounds"), optax.set_to_zero())
    falling = optax.cosine_decay_schedule(rate, FINE_TUNING)
    each = {"weights": optax.adam(falling), "ranges": optax.lamb(falling), **still}
    optimizer = optax.multi_transform(each, labels)
    state, before = optimizer.init(tree), loss(tree)

    @jax.jit
    def step(tree, state):
        grads = jax.grad(loss)(tree)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            updates, state = optimizer.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    for _ in range(FINE_TUNING):
        tree, state = step(tree, state)
    return tree, before, loss(tree)


@pytest.mark.slow
def test_the_whole_chain_on_one_tree():
    model, keys = Net(), jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (32, 8, 8, 3))
    params = jax.jit(model.init)(keys[1], x)
    # Norms that do something: folding must not be the identity.
    moved = lambda a: a * (1 + 0.3 * jnp.sin(jnp.arange(a.size, dtype=a.dtype)))
    params = dict(params) | {
        "batch_stats": jax.tree.map(moved, params["batch_stats"]),
    }
    apply, wanted = jm.lift(model.apply), model.apply(params, x)

    def cost(tree):
        graph = jm.trace(model.apply, tree, x)
        return jm.cost(tree, graph, x).where(layer="(all)")["macs"][0]

    def fine_tuned(tree):
        loss = jax.jit(lambda p: error(apply, p, x, wanted))
        labels = jm.optimizer_labels(tree, jm.trace(model.apply, tree, x))
        tree, before, after = trained(loss, tree, labels)
        assert 0 < after < before
        return tree

    # A layer at a time, as AIMET's trainer does, then all at once.
    small = params
    for layer in ("wide", "narrow"):
        graph = jm.trace(model.apply, small, x)
        small = jm.factorize(
            small, graph, ratios={layer: 0.6}, batches=[x], progress=False
        )
        small = fine_tuned(small)
    assert {"wide/in", "wide/out", "narrow/in", "narrow/out"} <= {
        n.name for n in jm.trace(model.apply, small, x).layers
    }
    factors = cost(small)
    small = jm.prune(
        small, jm.trace(model.apply, small, x), 0.75, batches=[x], progress=False
    )
    small = fine_tuned(small)
    assert cost(small) < 0.85 * factors < 0.85 * 0.75 * cost(params)

    # The same function after folding and equalization.
    there = apply(small, x)
    folded = jm.fold_batch_norm(small, jm.trace(model.apply, small, x))
    graph = jm.trace(model.apply, folded, x)
    equal = jm.equalize(folded, graph, objective="range", progress=False)
    for tree in (folded, equal):
        assert error(apply, tree, x, there) < 1e-9
        assert cost(tree) == cost(small)

    # On a low bit-widths, rounding by data beats rounding to the nearest, and training both.
    config = jm.QuantConfig(weight_bits=2, activation_bits=8)
    quantizers = jm.calibrate(equal, graph, [x], config, progress=False)
    simulated = jm.simulate(model.apply, quantizers)
    nearest = error(simulated, equal, x, wanted)
    rounded, kept = jm.adaround(
        equal, graph, quantizers, [x], key=keys[2], progress=False
    )
    by_data = error(jm.simulate(model.apply, kept), rounded, x, wanted)
    assert error(apply, small, x, wanted) < by_data < 0.7 * nearest

    def loss(pair):
        return error(jm.simulate(model.apply, pair[1]), pair[0], x, wanted)

    coarse = equal, quantizers.pin(equal).set("*", learn="lsq")
    labels = jm.optimizer_labels(equal, graph, coarse[1])
    _, before, after = trained(jax.jit(loss), coarse, labels)
    assert after < before
    # Of what the data rounded so few steps make little: with 2 bits they may end beside it.
    pair = rounded, kept.pin(rounded).set("*", learn="lsq")
    labels = jm.optimizer_labels(rounded, graph, pair[1])
    pair, before, after = trained(jax.jit(loss), pair, labels)
    assert after < 1.05 * before
    assert jax.tree.structure(pair[0]) == jax.tree.structure(rounded)
    assert cost(pair[0]) == cost(small)
