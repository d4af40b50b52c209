"""Models that ordinary users have and that are easy to get wrong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmet as jm
from zoo import CASES


class ClassToken(nn.Module):
    """Patches with a class token in front, as a vision transformer has them."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (4, 4), (4, 4), name="patch")(x).reshape(x.shape[0], -1, 6)
        token = self.param("token", nn.initializers.normal(0.5), (1, 1, 6))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        return nn.Dense(3, name="head")(x[:, 0] + x[:, 1])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_parameter_may_be_concatenated_in_front(batch):
    images = jax.random.normal(jax.random.key(0), (batch, 8, 8, 3))
    params = jax.jit(ClassToken().init)(jax.random.key(1), images)
    graph = jm.trace(ClassToken().apply, params, images)
    names = ["input", "patch", "patch/concat", "patch/add", "head", "output"]
    assert [n.name for n in graph.nodes] == names


class WithDropout(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x).mean((1, 2)))


@pytest.mark.slow
def test_random_state_in_the_tree_is_left_alone():
    apply, params, merge = jm.functional(WithDropout(nnx.Rngs(0)))
    params["norm"]["var"][...] = jnp.full(4, 0.3)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    expected = apply(params, images)
    graph = jm.trace(apply, params, images)
    folded = jm.fold_batch_norm(params, graph)
    new = jm.equalize(folded, graph, objective="range")
    quantizers = jm.calibrate(new, graph, [images], progress=False)
    assert not np.array_equal(new["conv"]["kernel"][...], params["conv"]["kernel"][...])
    np.testing.assert_allclose(
        jax.jit(jm.lift(apply))(new, images), expected, atol=1e-5
    )
    assert merge(new)(images).shape == (4, 2)
    simulated = jax.jit(jm.simulate(apply, quantizers))(new, images)
    assert 0 < float(jnp.abs(simulated - expected).max()) < 0.05


@pytest.mark.slow
def test_rounded_trees_round_derived_weights_where_they_are_used():
    apply, params, inputs = CASES["lstm"].make["linen"](jax.random.key(0))
    graph = jm.trace(apply, params, *inputs)
    quantizers = jm.calibrate(
        params, graph, [inputs], jm.QuantConfig(weight_bits=3), progress=False
    )
    assert quantizers.derived == ("rnn/cell", "rnn/cell:1")
    whole = jax.jit(jm.simulate(apply, quantizers))(params, *inputs)
    rounded = jm.round_weights(params, quantizers)
    fast = jax.jit(jm.simulate(apply, quantizers, weights=False))(rounded, *inputs)
    np.testing.assert_allclose(fast, whole, atol=1e-6)
    only_activations = jm.simulate(apply, quantizers.set("rnn", enabled=False))
    assert float(jnp.abs(only_activations(params, *inputs) - whole).max()) > 1e-3
    with pytest.raises(ValueError, match=r"jaxmet\.round_weights: .*'stray/kernel'"):
        jm.round_weights(params, jm.Quantizers({"stray/kernel": jm.Quantizer()}))
