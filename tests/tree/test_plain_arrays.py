"""A pruned or factorized tree as the small arrays of a model that is built anew."""

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

WIDTHS = (8, 12)


class Linen(nn.Module):
    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=True, name=f"bn{i}")(x)
            x = nn.relu(x)
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


class Nnx(nnx.Module):
    def __init__(self, widths, rngs):
        first, second = widths
        self.one = nnx.Linear(5, first, rngs=rngs)
        self.norm = nnx.BatchNorm(first, use_running_average=True, rngs=rngs)
        self.two = nnx.Linear(first, second, rngs=rngs)
        self.head = nnx.Linear(second, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.one(x)))
        return self.head(nnx.relu(self.two(x)))


def shaken(params):
    rng = np.random.default_rng(1)
    noise = lambda a: a + jnp.asarray(0.3 * rng.random(size=a.shape), a.dtype)
    return jax.tree.map(noise, params)


def shapes(tree):
    return jax.tree.map(np.shape, tree)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ratio", [0.7, 0.4])
def test_a_linen_model_of_the_left_widths_computes_the_same(ratio):
    x = jax.device_put(np.float32(np.random.default_rng(0).normal(size=(3, 5, 5, 2))))
    model = Linen()
    params = shaken(jax.jit(model.init)(jax.random.key(0), x))
    graph = jm.trace(model.apply, params, x)
    small = jm.prune(params, graph, ratio)
    plain = jm.rebuild(small)
    widths = tuple(plain["params"][f"conv{i}"]["kernel"].shape[-1] for i in (0, 1))
    assert all(n < m for n, m in zip(widths, WIDTHS, strict=True))
    anew = Linen(widths)
    assert shapes(plain) == shapes(jax.eval_shape(anew.init, jax.random.key(0), x))
    wanted = jm.lift(model.apply)(small, x)
    np.testing.assert_allclose(anew.apply(plain, x), wanted, rtol=1e-5, atol=1e-5)
    far = np.abs(np.asarray(wanted) - np.asarray(model.apply(params, x))).max()
    assert far > 1e-3  # something was lost: the small model is not the old one
    with pytest.raises(TypeError, match=r"jm\.rebuild"):
        small["params"]["conv0"]["kernel"] + 1


def test_an_nnx_model_is_updated_with_them():
    x = jax.device_put(np.float32(np.random.default_rng(0).normal(size=(3, 5))))
    apply, params, _ = jm.functional(Nnx((8, 10), nnx.Rngs(0)))
    params = shaken(params)
    graph = jm.trace(apply, params, x)
    small = jm.prune(params, graph, 0.5)
    plain = jm.rebuild(small)
    widths = [plain[n]["kernel"].get_value().shape[-1] for n in ("one", "two")]
    assert widths[0] < 8 and widths[1] < 10
    anew = Nnx(widths, nnx.Rngs(1))
    nnx.update(anew, plain)
    np.testing.assert_allclose(anew(x), jm.lift(apply)(small, x), rtol=1e-5, atol=1e-5)


def test_factors_are_two_kernels():
    x = jax.device_put(np.float32(np.random.default_rng(0).normal(size=(3, 4, 4, 6))))
    model = nn.Conv(9, (3, 1), name="conv")
    params = shaken(jax.jit(model.init)(jax.random.key(0), x))
    graph = jm.trace(model.apply, params, x)
    small = jm.factorize(params, graph, ratios=0.5, method="spatial")
    plain = jm.rebuild(small)["params"]
    first, second = plain["kernel"]["first"], plain["kernel"]["second"]
    rank = first.shape[-1]
    hidden = nn.Conv(rank, first.shape[:2], use_bias=False).apply(
        {"params": {"kernel": first}}, x
    )
    made = nn.Conv(9, second.shape[:2]).apply(
        {"params": {"kernel": second, "bias": plain["bias"]}}, hidden
    )
    wanted = jm.lift(model.apply)(small, x)
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5)


def test_plain_trees_stay_and_bounds_are_refused():
    params = {"a": jnp.ones(3), "b": 2.0}
    jax.tree.map(np.testing.assert_array_equal, jm.rebuild(params), params)
    bounded = {"a": jm.Compressed(jnp.ones(3), upper=jnp.ones(3))}
    with pytest.raises(ValueError, match=r"jaxmet\.rebuild: 'a' states upper"):
        jm.rebuild(bounded)
