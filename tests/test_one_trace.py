"""One trace serves a whole recipe: the graph of the float model with compressed trees."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm


class Residual(nn.Module):
    """Convolutions with norms behind an addition."""

    widths: tuple[int, ...] = (6, 8)

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        outer, inner = self.widths
        x = nn.relu(norm(name="stem_bn")(nn.Conv(outer, (3, 3), name="stem")(x)))
        y = nn.relu(norm(name="wide_bn")(nn.Conv(inner, (3, 3), name="wide")(x)))
        y = norm(name="narrow_bn")(nn.Conv(outer, (3, 3), name="narrow")(y))
        return nn.Dense(5, name="head")(nn.relu(x + y).mean((1, 2)))


class Mlp(nn.Module):
    widths: tuple[int, ...] = (12, 10)

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, name=f"layer{i}")(x))
        return nn.Dense(5, name="head")(x)


class Concat(nn.Module):
    widths: tuple[int, ...] = (6, 4, 5)

    @nn.compact
    def __call__(self, x):
        stem, left, right = self.widths
        x = nn.relu(nn.Conv(stem, (3, 3), name="stem")(x))
        y = nn.relu(nn.Conv(left, (1, 1), name="left")(x))
        z = nn.relu(nn.Conv(right, (3, 3), name="right")(x))
        y = nn.Conv(6, (1, 1), name="merge")(jnp.concatenate([y, z], -1))
        return nn.Dense(5, name="head")(nn.relu(y).mean((1, 2)))


class Stacked(nn.Module):
    """A loop over layers between two layers."""

    @nn.compact
    def __call__(self, x):
        def step(block, x):
            return nn.relu(block(x)), None

        x = nn.relu(nn.Dense(10, name="before")(x))
        x = nn.relu(nn.Dense(8, name="stem")(x))
        loop = nn.scan(
            step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = loop(nn.Dense(8, name="blocks"), x)
        return nn.Dense(5, name="head")(x)


NETS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "residual": (Residual(), (8, 5, 5, 3)),
    "mlp": (Mlp(), (8, 7)),
    "concat": (Concat(), (8, 5, 5, 3)),
    "stacked": (Stacked(), (8, 7)),
}
RATIO = 0.6
CHAINS = {
    "pruned": (jm.prune,),
    "factorized": (jm.factorize,),
    "pruned, factorized": (jm.prune, jm.factorize),
    "factorized, pruned, factorized": (jm.factorize, jm.prune, jm.factorize),
}
STEPS: dict[Any, dict[str, Any]] = {
    jm.prune: {"ratios": 0.7},
    jm.factorize: {"ratios": 0.8},
}


@functools.cache
def net(name: str) -> tuple[Callable, Any, jax.Array, jm.Graph]:
    """A model, its tree with norms that do something, inputs, and the graph of the tree."""
    model, shape = NETS[name]
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], shape)
    params = jax.jit(model.init)(keys[1], x)

    def moved(a: jax.Array) -> jax.Array:
        return a * 0.8 + 0.3 * jnp.cos(jnp.arange(a.size, dtype=a.dtype)) ** 2

    stats = {k: jax.tree.map(moved, v) for k, v in params.items() if k != "params"}
    params = dict(params) | stats
    return model.apply, params, x, jm.trace(model.apply, params, x[:1])


@functools.cache
def compressed(name: str, chain: str) -> Any:
    """A tree after several steps, each with the graph of the float model."""
    _, params, _, graph = net(name)
    for step in CHAINS[chain]:
        params = step(params, graph, **STEPS[step])
    return params


def coarse(params: Any, graph: jm.Graph, x: jax.Array) -> jm.Quantizers:
    config = jm.QuantConfig(weight_bits=4, per_channel=False)
    return jm.calibrate(params, graph, [x], config, progress=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of a tree and a graph, and of which nets it says nothing."""

    name: str
    run: Callable[[Any, jm.Graph, jax.Array], Any]
    skip: tuple[str, ...] = ()


quiet: dict[str, Any] = {"progress": False}


def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def error(apply: Callable, params: Any, x: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.square(apply(params, x)))


def quantized(function: Callable, *more: str, **options: Any) -> Callable:
    """A case for what takes quantizers and batches."""

    def run(params, graph, x):
        quantizers = coarse(params, graph, x)
        return function(params, graph, quantizers, [x], **quiet, **options)

    return run


def prunes_again(params, graph, x):
    return jm.prune(params, graph, 0.8, batches=[x], with_report=True, **quiet)


def factorizes_again(params, graph, x):
    options = {"batches": [x], "with_report": True, **quiet}
    return jm.factorize(params, graph, ratios=0.9, method="weight", **options)


def scored(method: str) -> Callable:
    def run(params, graph, x):
        score = functools.partial(error, x=x)
        options = {"method": method, "ratios": (0.5, 0.8), **quiet}
        return jm.score_ratios(params, graph, score, batches=[x], **options)

    return run


def folded_inside(params, graph, x):
    quantizers = coarse(params, graph, x)
    return jm.simulate(graph.apply, quantizers, fold=graph)(params, x)


def labelled(params, graph, x):
    return jm.optimizer_labels(params, graph, coarse(params, graph, x))


def sensitive(params, graph, x):
    score = functools.partial(error, x=x)
    return jm.sensitivity(params, graph, coarse(params, graph, x), score, **quiet)


def compared(params, graph, x):
    return jm.compare(params, graph, coarse(params, graph, x), x)


def drawn(params, graph, x):
    pytest.importorskip("altair")
    quantizers = coarse(params, graph, x)
    charts = [
        jm.plot.graph(graph, params=params, quantizers=quantizers),
        jm.plot.histograms(params, graph, quantizers, [x]),
    ]
    return [str(chart.to_dict()) for chart in charts]


CASES = [
    Case("cost", lambda p, g, x: jm.cost(p, g, x[:1])),
    Case("fold", lambda p, g, x: jm.fold_batch_norm(p, g, with_report=True)),
    Case(
        "range",
        lambda p, g, x: jm.equalize(p, g, objective="range", with_report=True, **quiet),
    ),
    Case("noise of scales", lambda p, g, x: jm.equalize(p, g, batches=[x], **quiet)),
    Case("absorb", lambda p, g, x: jm.absorb_bias(p, g, n_sigma=0.0, with_report=True)),
    Case("calibrate", coarse),
    Case("plan", lambda p, g, x: jm.plan(p, g)),
    Case("correct", quantized(jm.correct_bias, with_report=True)),
    Case("adaround", quantized(jm.adaround, key=jax.random.key(0), iterations=3)),
    Case("scales", quantized(jm.search_scales, candidates=8)),
    Case(
        "reestimate",
        lambda p, g, x: jm.reestimate_batch_norm(p, g, [x], with_report=True, **quiet),
    ),
    Case("prune", prunes_again, ("stacked",)),
    Case("factorize", factorizes_again),
    Case("score spatial", scored("spatial")),
    Case("score prune", scored("prune"), ("stacked",)),
    Case("noise", quantized(jm.noise)),
    Case("sensitivity", sensitive),
    Case("compare", compared),
    Case("labels", labelled),
    Case("fold inside", folded_inside),
    Case("plots", drawn),
]


def plain(result: Any) -> Any:
    """A result as plain arrays, numbers and texts."""
    if isinstance(result, jm.Table):
        return {name: plain(result[name]) for name in result.columns}
    if isinstance(result, dict):
        return {k: plain(v) for k, v in result.items()}
    if isinstance(result, list | tuple) and type(result) in (list, tuple):
        return [plain(v) for v in result]
    return result


def assert_same(one: Any, two: Any) -> None:
    one, two = plain(one), plain(two)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if isinstance(a, str) or a is None:
            assert a == b
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_float_graph_does_what_a_new_trace_does(case, name, chain):
    apply, _, x, graph = net(name)
    if name in case.skip:
        pytest.skip("nothing to do there")
    tree = compressed(name, chain)
    anew = jm.trace(jm.lift(apply), tree, x[:1])
    assert_same(case.run(tree, graph, x), case.run(tree, anew, x))
