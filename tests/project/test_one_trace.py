"""One trace serves a whole recipe: the graph of the float model with compressed trees."""

import dataclasses
import functools
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import folds
import jaxmet as jm
from random_nets import IMAGES, READOUTS, Net, random_values


class Residual(nn.Module):
    """Convolutions with norms after an addition."""

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
    widths: tuple[int, ...] = (6, 4, 5, 6)

    @nn.compact
    def __call__(self, x):
        stem, left, right, merge = self.widths
        x = nn.relu(nn.Conv(stem, (3, 3), name="stem")(x))
        y = nn.relu(nn.Conv(left, (1, 1), name="left")(x))
        z = nn.relu(nn.Conv(right, (3, 3), name="right")(x))
        y = nn.Conv(merge, (1, 1), name="merge")(jnp.concatenate([y, z], -1))
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


@functools.cache
def anew(name: str, chain: str) -> jm.Graph:
    """The graph that a new trace finds of a compressed tree."""
    apply, _, x, _ = net(name)
    return jm.trace(jm.lift(apply), compressed(name, chain), x[:1])


def coarse(params: Any, graph: jm.Graph, x: jax.Array) -> jm.Quantizers:
    config = jm.QuantConfig(weight_bits=4, per_channel=False)
    return jm.calibrate(params, graph, [x], config, progress=False)


@functools.cache
def quantizers_of(name: str, chain: str) -> jm.Quantizers:
    return coarse(compressed(name, chain), anew(name, chain), net(name)[2])


@dataclasses.dataclass(frozen=True)
class Case:
    """A public function of a tree, a graph, inputs and, where it takes them, quantizers."""

    name: str
    run: Callable[..., Any]
    quantized: bool = False
    skip: tuple[str, ...] = ()

    def __call__(self, name: str, chain: str, graph: jm.Graph) -> Any:
        more = (quantizers_of(name, chain),) if self.quantized else ()
        return self.run(compressed(name, chain), graph, net(name)[2], *more)


quiet: dict[str, Any] = {"progress": False}


def error(apply: Callable, params: Any, x: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.square(apply(params, x)))


def quantized(function: Callable, **options: Any) -> Callable:
    """What takes quantizers and batches."""
    return lambda p, g, x, q: function(p, g, q, [x], **quiet, **options)


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


def folded_inside(params, graph, x, quantizers):
    return jax.jit(jm.simulate(graph.apply, quantizers, fold=graph))(params, x)


def sensitive(params, graph, x, quantizers):
    score = functools.partial(error, x=x)
    return jm.sensitivity(params, graph, quantizers, score, **quiet)


def drawn(params, graph, x, quantizers):
    del x
    pytest.importorskip("altair")
    chart = jm.plot.graph(graph, params=params, quantizers=quantizers)
    return str(chart.to_dict())


def histogram(params, graph, x, quantizers):
    pytest.importorskip("altair")
    return str(jm.plot.histograms(params, graph, quantizers, [x]).to_dict())


def reported(params, graph, x, quantizers):
    del x
    pytest.importorskip("vl_convert")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        jm.report(path, params, graph, quantizers=quantizers)
        return path.read_text("utf-8")


def input_scales(params, graph, x):
    how = {"alpha": "noise", "input_scales": True, "with_report": True}
    return jm.smooth(params, graph, [x], **how, **quiet)


CASES = [
    Case("cost", lambda p, g, x: jm.cost(p, g, x[:1])),
    Case("fold", lambda p, g, x: jm.fold_batch_norm(p, g, with_report=True)),
    Case(
        "range",
        lambda p, g, x: jm.equalize(p, g, objective="range", with_report=True, **quiet),
    ),
    Case("noise of scales", lambda p, g, x: jm.equalize(p, g, batches=[x], **quiet)),
    Case("smooth", lambda p, g, x: jm.smooth(p, g, [x], with_report=True, **quiet)),
    Case("input scales", input_scales),
    Case("rotate", lambda p, g, x: jm.rotate(p, g, with_report=True)),
    Case("absorb", lambda p, g, x: jm.absorb_bias(p, g, n_sigma=0.0, with_report=True)),
    Case("calibrate", coarse),
    Case("plan", lambda p, g, x: jm.plan(p, g)),
    Case("correct", quantized(jm.correct_bias, with_report=True), True),
    Case("adaround", quantized(jm.adaround, method=jm.Coordinate(sweeps=3)), True),
    Case("scales", quantized(jm.search_scales, candidates=8), True),
    Case(
        "reestimate",
        lambda p, g, x: jm.reestimate_batch_norm(p, g, [x], with_report=True, **quiet),
    ),
    Case("prune", prunes_again, skip=("stacked",)),
    Case("factorize", factorizes_again),
    Case("score spatial", scored("spatial")),
    Case("score prune", scored("prune"), skip=("stacked",)),
    Case("noise", quantized(jm.noise), True),
    Case("sensitivity", sensitive, True),
    Case("compare", lambda p, g, x, q: jm.compare(p, g, q, x), True),
    Case("quantize", lambda p, g, x, q: jm.quantize(p, g, q), True),
    Case("labels", lambda p, g, x, q: jm.optimizer_labels(p, g, q), True),
    Case("fold inside", folded_inside, True),
    Case("plot", drawn, True),
    Case("histograms", histogram, True),
    Case("report", reported, True),
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


# Every function meets two nets, each compressed by another chain; the next one the other two.
MEETINGS = [
    pytest.param(case, name, chain, id=f"{case.name}-{name}")
    for i, case in enumerate(CASES)
    for j, name in enumerate(NETS)
    for chain in [[*CHAINS][(i + j // 2) % len(CHAINS)]]
    if (i + j) % 2 == 0
]


@pytest.mark.one_in(24)
@pytest.mark.parametrize("case, name, chain", MEETINGS)
def test_the_float_graph_does_what_a_new_trace_does(case, name, chain):
    if name in case.skip:
        pytest.skip("nothing to do there")
    graph = net(name)[3]
    assert_same(case(name, chain, graph), case(name, chain, anew(name, chain)))


class AskedError(Exception):
    """The graph of a tree was asked for."""


class Asked(jm.Graph):
    def of(self, params: Any, caller: str = "") -> jm.Graph:
        del params
        raise AskedError(caller)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_function_asks_for_the_graph_of_its_tree(case):
    """Cheap for all of them: nothing is computed before the question."""
    graph = net("mlp")[3]
    fields = dataclasses.fields(graph)
    asking = Asked(**{f.name: getattr(graph, f.name) for f in fields})
    with pytest.raises(AskedError):
        case("mlp", "pruned", asking)


COVERED = """
    absorb_bias adaround calibrate compare correct_bias cost equalize factorize
    fold_batch_norm noise optimizer_labels plan prune quantize reestimate_batch_norm report rotate
    score_ratios search_scales sensitivity smooth plot.graph plot.histograms
""".split()
OTHERS = """
    segments plot.weight_ranges plot.relative_weight_ranges
""".split()  # the first cuts what runs, the others show layers by the names of the graph


def test_no_function_that_takes_a_graph_is_forgotten():
    modules = {"": jm, "plot.": jm.plot}
    taking = {
        prefix + name
        for prefix, module in modules.items()
        for name, function in vars(module).items()
        if callable(function) and not inspect.ismodule(function)
        if "graph" in parameters_of(function)
    }
    assert taking == {*COVERED, *OTHERS}


def parameters_of(function: Any) -> Any:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()


def assert_alike(one: jm.Graph, two: jm.Graph) -> None:
    fields = ("nodes", "groups", "members", "parameters", "unread", "selected")
    for field in (*fields, "scale_paths"):
        assert getattr(one, field) == getattr(two, field)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", NETS)
def test_the_graph_of_a_tree_is_what_a_new_trace_finds(name, chain):
    _, params, _, graph = net(name)
    tree = compressed(name, chain)
    found = graph.of(tree)
    assert_alike(found, anew(name, chain))
    # Other directions: from one compressed tree to another one, and back.
    assert_alike(anew(name, chain).of(params), graph)
    assert_alike(anew(name, chain).of(compressed(name, "pruned")), anew(name, "pruned"))
    assert graph.of(params) is graph and found.of(params) is graph
    assert graph.of(tree) is found and found.of(tree) is found
    assert found.of(jax.jit(jm.densify)(tree)) is graph


# Against models of these sizes, written by hand


def parts(tree: Any) -> Any:
    """Plain small arrays of a pruned tree."""

    def part(leaf: Any) -> Any:
        return leaf.weight.part if isinstance(leaf, jm.Compressed) else leaf

    return jax.tree.map(part, tree, is_leaf=lambda x: isinstance(x, jm.Compressed))


def small_model(name: str) -> tuple[Callable, Any, jm.Graph]:
    """A pruned tree as a model that was built with fewer features, traced by itself."""
    _, _, x, _ = net(name)
    tree = parts(compressed(name, "pruned"))
    layers = {
        "residual": ("stem", "wide"),
        "mlp": ("layer0", "layer1"),
        "concat": ("stem", "left", "right", "merge"),
    }[name]
    widths = tuple(tree["params"][n]["kernel"].shape[-1] for n in layers)
    model = type(NETS[name][0])(widths=widths)
    assert widths < NETS[name][0].widths
    return model.apply, tree, jm.trace(model.apply, tree, x[:1])


def close(tree: Any, small: Any) -> None:
    tree, small = parts(tree), parts(small)
    assert jax.tree.structure(tree) == jax.tree.structure(small)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["residual", "mlp", "concat"])
def test_a_recipe_on_a_pruned_tree_is_that_of_the_model_built_small(name):
    """Prune, fold, equalize, calibrate, correct, round: all with the graph of before."""
    apply, _, x, graph = net(name)
    model, small, of_small = small_model(name)
    tree = compressed(name, "pruned")
    assert_same(jm.cost(tree, graph, x[:1]), jm.cost(small, of_small, x[:1]))

    def step(function, *more, **options):
        first, second = (function(t, g, *more, **options) for t, g in both)
        close(first, second)
        return [(first, graph), (second, of_small)]

    both = [(tree, graph), (small, of_small)]
    both = step(jm.fold_batch_norm)
    both = step(jm.equalize, objective="range", progress=False)
    quantizers, others = (coarse(t, g, x) for t, g in both)
    for key, q in others.activations.items():
        mine = quantizers.activations[key]
        np.testing.assert_allclose(mine.grid(None)[0], q.grid(None)[0], rtol=1e-4)
    (tree, _), (small, _) = step(jm.correct_bias, quantizers, [x], progress=False)
    np.testing.assert_allclose(
        jax.jit(jm.simulate(apply, quantizers))(tree, x),
        jax.jit(jm.simulate(model, others))(small, x),
        atol=1e-4,
    )


class Factors(nn.Module):
    """An MLP of which every layer is two."""

    ranks: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        widths = (*Mlp.widths, 5)
        for i, (rank, width) in enumerate(zip(self.ranks, widths, strict=True)):
            x = nn.Dense(rank, use_bias=False, name=f"first{i}")(x)
            x = nn.Dense(width, name=f"second{i}")(x)
            x = nn.relu(x) if i < 2 else x
        return x


def test_a_factorized_tree_is_the_model_of_two_layers_each():
    apply, params, x, graph = net("mlp")
    tree = jm.factorize(params, graph, ranks={"layer0": 3, "layer1": 4, "head": 2})
    small = {}
    for i, name in enumerate(("layer0", "layer1", "head")):
        layer = tree["params"][name]
        factors = layer["kernel"].weight
        small[f"first{i}"] = {"kernel": factors.first}
        small[f"second{i}"] = {"kernel": factors.second, "bias": layer["bias"]}
    model = Factors((3, 4, 2))
    of_small = jm.trace(model.apply, {"params": small}, x[:1])
    ours = jm.cost(tree, graph, x[:1])
    theirs = jm.cost({"params": small}, of_small, x[:1])
    macs = [7 * 3, 3 * 12, 12 * 4, 4 * 10, 10 * 2, 2 * 5]
    assert ours["macs"][:6] == theirs["macs"][:6] == macs
    assert ours.where(layer="(all)")["parameters"] == [sum(macs) + 12 + 10 + 5]
    quantizers, others = (
        coarse(t, g, x) for t, g in ((tree, graph), ({"params": small}, of_small))
    )
    mine, other = (
        jm.correct_bias(t, g, q, [x], progress=False)
        for t, g, q in (
            (tree, graph, quantizers),
            ({"params": small}, of_small, others),
        )
    )
    np.testing.assert_allclose(
        jax.jit(jm.simulate(apply, quantizers))(mine, x),
        jax.jit(jm.simulate(model.apply, others))(other, x),
        atol=1e-5,
    )


def test_a_smaller_plain_tree_of_a_function_fits():
    """A function takes arrays of any size: channels are those of the tree at hand."""

    def apply(params, x):
        hidden = jax.nn.relu(x @ params["a"])
        return hidden @ params["b"]

    def tree(width):
        return {"a": jnp.ones((3, width)), "b": jnp.ones((width, 2))}

    x = jnp.ones((4, 3))
    graph = jm.trace(apply, tree(8), x)
    assert jm.cost(tree(5), graph, x[:1])["macs"] == [15, 10, 0, 25]
    pruned = jm.prune(tree(5), graph, 0.6)
    assert pruned["a"].weight.part.shape == (3, 3)


# Selections


def test_a_selected_layer_is_both_of_its_factors():
    _, params, _, graph = net("residual")
    tree = compressed("residual", "factorized")
    names = {n.name for n in graph.of(tree).nodes}
    wide = {"wide/in", "wide/out", "wide/out/relu"}
    only = graph.only("wide").of(tree)
    assert only.selected == wide & names and only.named == {"wide/in", "wide/out"}
    assert graph.without("wide").of(tree).selected == names - wide
    assert graph.without("wide/relu").of(tree).selected == names - {"wide/out/relu"}
    back = only.of(params)
    assert back.selected == {"wide", "wide/relu"} and back.named == {"wide"}
    assert not graph.of(tree).only("wide/in").of(params).selected

    report = jm.factorize(tree, graph.without("wide"), ratios=0.5, with_report=True)[1]
    assert not {"wide/in", "wide/out"} & {*report["layer"]}
    assert jm.prune(tree, graph.without("stem", "wide", "narrow"), 0.5) is not tree


def test_every_node_of_a_compressed_tree_is_selected_as_before():
    for name in NETS:
        _, params, _, graph = net(name)
        for chain in CHAINS:
            tree = compressed(name, chain)
            whole = {n.name for n in graph.of(tree).nodes}
            for node in graph.nodes:
                only, rest = (
                    act(node.name).of(tree).selected
                    for act in (graph.only, graph.without)
                )
                assert only and only | rest == whole and not only & rest
            assert graph.of(tree).only("*").of(params).selected == graph.selected


# Other front-ends, and keyword arguments


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(7, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, use_running_average=True, rngs=rngs)
        self.second = nnx.Linear(12, 10, rngs=rngs)
        self.head = nnx.Linear(10, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.head(nnx.relu(self.second(x)))


def test_states_of_nnx_fit():
    apply, params, _ = jm.functional(NnxMlp(nnx.Rngs(0)))
    x = jnp.ones((2, 7))
    graph = jm.trace(apply, params, x)
    tree = jm.factorize(jm.prune(params, graph, 0.6), graph, ranks={"second": 2})
    assert_alike(graph.of(tree), jm.trace(jm.lift(apply), tree, x))
    assert jm.cost(tree, graph, x[:1])["macs"][:4] == [7 * 7, 7 * 2, 2 * 6, 6 * 5]
    shapes = jax.eval_shape(lambda: tree)
    assert_same(jm.cost(shapes, graph, x[:1]), jm.cost(tree, graph, x[:1]))


class Modes(nn.Module):
    """A model that takes a flag, a key and another array by keyword."""

    @nn.compact
    def __call__(self, x, *, weight, train):
        x = nn.relu(nn.Dense(12, name="a")(x))
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(3, name="b")(x) * weight.reshape(-1, 1)


@pytest.mark.parametrize("train", [False, True])
def test_keyword_arguments_of_the_trace_hold_for_every_tree(train):
    model, x = Modes(), jnp.ones((4, 5))
    more: dict[str, Any] = {"weight": jnp.ones(4), "train": train}
    if train:
        more |= {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
    params = model.init(jax.random.key(0), x, weight=jnp.ones(4), train=False)
    graph = jm.trace(model.apply, params, x, **more)
    inference = jm.trace(model.apply, params, x, weight=jnp.ones(4), train=False)
    tree = jm.factorize(jm.prune(params, inference, 0.5), inference, ratios=0.7)
    assert_alike(graph.of(tree), jm.trace(jm.lift(model.apply), tree, x, **more))


# Refusals, and what is kept


def test_a_tree_of_another_model_is_refused_with_what_differs():
    _, params, x, graph = net("mlp")
    other = {"params": dict(params["params"]) | {"head": {"kernel": jnp.ones((3, 5))}}}
    message = r"jaxmet\.cost: parameter 'head/kernel' is stored as \(3, 5\).*\(10, 5\)"
    with pytest.raises(ValueError, match=message):
        jm.cost(other, graph, x[:1])
    part = {"params": {"layer0": compressed("mlp", "pruned")["params"]["layer0"]}}
    message = (
        r"'layer0/bias' is stored as Pruned, .*does not run with this tree.*whole tree"
    )
    with pytest.raises(ValueError, match=message):
        jm.fold_batch_norm(part, graph)


def test_under_jit_no_traced_value_is_kept():
    apply, params, x = folds.mlp()
    graph = jm.trace(apply, params, x[:1])
    tree = jm.factorize(params, graph, ratios=0.8)
    with jax.checking_leaks():
        inside = jax.jit(lambda p: jm.fold_batch_norm(p, graph))(tree)
    close_leaves = zip(
        jax.tree.leaves(inside), jax.tree.leaves(jm.fold_batch_norm(tree, graph)),
        strict=True,
    )  # fmt: skip
    for a, b in close_leaves:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_search_over_many_sizes_keeps_few_graphs():
    _, params, x, _ = net("mlp")
    graph = jm.trace(Mlp().apply, params, x[:1])
    for rank in range(1, 7):
        for other in range(1, 4):
            tree = jm.factorize(params, graph, ranks={"layer0": rank, "layer1": other})
            jm.cost(tree, graph, x[:1])
    assert len(graph.others) <= 8


# Random networks


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    blocks=st.lists(st.sampled_from([*IMAGES]), min_size=1, max_size=3),
    readout=st.sampled_from([*READOUTS]),
    ratio=st.sampled_from([0.4, 0.6, 0.8]),
    factors_first=st.booleans(),
)
def test_random_networks_fit_compressed(blocks, readout, ratio, factors_first):
    network = Net(blocks, readout, images=True)
    tree, x = random_values((network.params, network.inputs(2)))
    graph = jm.trace(network, tree, x)
    for factors in (factors_first, not factors_first):
        if factors:
            tree = jm.factorize(tree, graph, ratios=ratio)
        else:
            tree = jm.prune(tree, graph, ratio)
    found = graph.of(tree)
    assert_alike(found, jm.trace(jm.lift(network), tree, x))
    for node in graph.nodes:
        only, rest = (
            act(node.name).of(tree).selected for act in (graph.only, graph.without)
        )
        assert only and only | rest == found.selected and not only & rest
