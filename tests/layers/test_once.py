"""Work on weights that runs once: it compiles nothing, and its results lie where weights did."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import jaxmet as jm
from jaxmet.layers.once import run_once
from zoo import model, traced

COMPILED = "/jax/core/compile/backend_compile_duration"
TRANSFORMS: dict[str, Callable] = {
    "fold_batch_norm": jm.fold_batch_norm,
    "equalize, range": lambda p, g: jm.equalize(p, g, objective="range"),
    "equalize, noise": lambda p, g: jm.equalize(jm.fold_batch_norm(p, g), g),
    "absorb_bias": jm.absorb_bias,
    "factorize, spatial": lambda p, g: jm.factorize(p, g, ratios=0.5),
    "factorize, weight": lambda p, g: jm.factorize(p, g, ratios=0.5, method="weight"),
}
PROGRAMS = {"equalize, range": 1, "equalize, noise": 2}  # however many layers there are


@pytest.fixture
def compiled() -> Iterator[list[float]]:
    """What XLA compiles, as it happens."""
    found: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_programs(transform: str, compiled: list[float]) -> None:
    apply, params, inputs = model("inverted_residual")
    graph, function = jm.trace(apply, params, *inputs), TRANSFORMS[transform]
    host = jax.device_get(params)
    other = jax.device_put(jax.tree.map(lambda x: x * x.dtype.type(1.01), host))
    compiled.clear()
    function(params, graph)
    assert len(compiled) <= PROGRAMS.get(transform, 0)
    compiled.clear()
    function(other, graph)
    assert not compiled


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_leaves_stay_on_their_devices(transform: str) -> None:
    params, graph = model("inverted_residual")[1], traced("inverted_residual")
    function = TRANSFORMS[transform]
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def placed(leaf: Any) -> Any:
        last = "x" if leaf.ndim and leaf.shape[-1] % 2 == 0 else None
        spec = Spec(*[None] * (leaf.ndim - 1), last) if leaf.ndim else Spec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    spread = jax.tree.map(placed, params)
    wanted, found = function(params, graph), function(spread, graph)
    before, after = (dict(jax.tree.leaves_with_path(t)) for t in (spread, found))
    for path in before.keys() & after.keys():
        assert after[path].sharding == before[path].sharding
    for one, two in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert isinstance(two, jax.Array)
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_factors_stay_on_the_device_of_their_weight() -> None:
    params, graph = model("inverted_residual")[1], traced("inverted_residual")
    last = jax.devices()[-1]
    every = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), Spec())
    for place, devices in ((last, {last}), (every, every.device_set)):
        small = jm.factorize(jax.device_put(params, place), graph, ratios=0.5)
        assert all(x.devices() == devices for x in jax.tree.leaves(small))


def test_numbers_come_as_numpy_and_traced_values_as_they_are() -> None:
    seen = []

    def double(x: Any) -> Any:
        seen.append(type(x))
        return 2 * x

    assert isinstance(run_once(double, jnp.ones(3)), np.ndarray)
    jax.jit(lambda x: run_once(double, x))(jnp.ones(3))
    assert seen[0] is np.ndarray and issubclass(seen[1], jax.core.Tracer)
    # Without x64, what is wider counts as float32, as in JAX.
    assert run_once(double, np.ones(3)).dtype == jnp.asarray(np.ones(3)).dtype
    key = jax.random.key(0)
    assert run_once(lambda k: k, key) is key
