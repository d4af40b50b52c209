"""Parameters and batches over a mesh of eight devices: the same numbers, and leaves that stay."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmet as jm


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            y = nn.Dense(32, name=f"up{i}")(nn.LayerNorm(name=f"norm{i}")(x))
            x = x + nn.Dense(16, name=f"down{i}")(nn.gelu(y))
        return nn.Dense(8, name="head")(nn.LayerNorm(name="norm")(x))


MODEL = Blocks()
X = jax.random.normal(jax.random.key(0), (32, 4, 16))
PARAMS = MODEL.init(jax.random.key(1), X)
GRAPH = jm.trace(MODEL.apply, PARAMS, X[:2])
FOUR = jm.QuantConfig(weight_bits=4)
OPTIONS: dict[str, Any] = {"progress": False}


def sharded(path: Any, leaf: jax.Array) -> jax.Array:
    """Products along their hidden axis over 'model', as tensor parallelism has them."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
    name, spec = jax.tree_util.keystr(path), PartitionSpec()
    if leaf.ndim == 2 and "up" in name:
        spec = PartitionSpec(None, "model")
    elif leaf.ndim == 2 and "down" in name:
        spec = PartitionSpec("model", None)
    return jax.device_put(leaf, NamedSharding(mesh, spec))


def over_mesh() -> tuple[Any, list[jax.Array]]:
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.tree_util.tree_map_with_path(sharded, PARAMS)
    return params, [jax.device_put(x, rows) for x in (X[:16], X[16:])]


@pytest.fixture(scope="module")
def quantizers() -> jm.Quantizers:
    return jm.calibrate(PARAMS, GRAPH, [X[:16], X[16:]], FOUR, **OPTIONS)


Step = Callable[[Any, Any, jm.Quantizers], Any]
STEPS: dict[str, Step] = {
    "calibrate": lambda p, b, q: jm.calibrate(p, GRAPH, b, **OPTIONS),
    "mse": lambda p, b, q: jm.calibrate(
        p,
        GRAPH,
        b,
        jm.QuantConfig(activation_range="mse", weight_range="mse"),
        **OPTIONS,
    ).pin(p),
    "batched": lambda p, b, q: jm.calibrate(
        p, GRAPH, jm.batched(b[0], batch_size=8), **OPTIONS
    ),
    "equalize": lambda p, b, q: jm.equalize(p, GRAPH, batches=b, **OPTIONS),
    "correct_bias": lambda p, b, q: jm.correct_bias(p, GRAPH, q, b, **OPTIONS),
    "adaround": lambda p, b, q: jm.adaround(p, GRAPH, q, b, **OPTIONS)[0],
    "round_weights": lambda p, b, q: jm.round_weights(p, q),
    "quantize": lambda p, b, q: jm.quantize(p, GRAPH, q),
    "noise": lambda p, b, q: np.asarray(
        jm.noise(p, GRAPH, q, b, **OPTIONS)["SQNR (dB)"]
    ),
    "factorize": lambda p, b, q: jm.densify(
        jm.factorize(p, GRAPH, ratios=0.5, batches=b, **OPTIONS)
    ),
    "prune": lambda p, b, q: jm.prune(p, GRAPH, 0.5, batches=b, **OPTIONS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_the_same_on_one_device_and_on_eight(
    name: str, quantizers: jm.Quantizers
) -> None:
    one = STEPS[name](PARAMS, [X[:16], X[16:]], quantizers)
    params, batches = over_mesh()
    assert len({d for a in jax.tree.leaves(params) for d in a.devices()}) == 8
    many = STEPS[name](params, batches, quantizers)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max() + 1e-12)
    kept = jax.tree.structure(many) == jax.tree.structure(params)
    if kept and name != "factorize":  # products of new factors lie on one device
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(many), strict=True)
        assert all(b.sharding.is_equivalent_to(a.sharding, a.ndim) for a, b in pairs)


@pytest.mark.slow
def test_outputs_keep_the_batch_apart(quantizers: jm.Quantizers) -> None:
    """The simulation runs where the data lies: no device sees another's rows."""
    params, (x, _) = over_mesh()
    device = jax.jit(jm.simulate(MODEL.apply, quantizers))
    compiled = device.lower(params, x).compile()
    assert "all-gather" not in compiled.as_text()
    found = compiled(params, x)
    assert found.sharding.is_equivalent_to(x.sharding, found.ndim)
    wanted = jax.jit(jm.simulate(MODEL.apply, quantizers))(PARAMS, X[:16])
    np.testing.assert_allclose(found, wanted, atol=2e-2)
    assert float(jnp.mean(jnp.abs(found - wanted) < 1e-5)) > 0.9
