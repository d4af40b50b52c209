"""Adaptive rounding on whole models: oracles in float64, bad input, interruptions."""

import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm
from jaxmet.transforms.rounding import layerwise, solvers
from jaxmet.transforms.rounding.layer_order import find_waves
from jaxmet.transforms.rounding.methods import coordinate_rounding
from jaxmet.transforms.rounding.rounded_layers import find_layers
from jaxmet.tree.leaves import dense
from jaxmet.tree.named_leaves import named_leaves
from zoo import CASES

KEY = jax.random.key(0)
W3 = jm.QuantConfig(weight_bits=3, activation_bits=32)
METHODS = ("coordinate", "gptq", "gram", "adam")
QUICK = {"gram": jm.Gram(iterations=300), "adam": jm.Adam(iterations=300)}


def spec(q):
    return {n: np.asarray(w.scale) for n, w in q.weights.items() if w.scale is not None}


@functools.cache
def mlp(seed=0, sizes=(12, 16, 8), act=jax.nn.relu, rows=256):
    """Two dense layers on inputs that hang together, so that rounding has what to win."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(sizes[0], sizes[0])) * np.linspace(2, 0.05, sizes[0])
    x = (rng.normal(size=(rows, sizes[0])) @ mix + 0.5).astype(np.float32)
    params = {
        f"l{i}": {
            "w": rng.normal(size=(n, m)).astype(np.float32) / np.sqrt(n),
            "b": rng.normal(size=m).astype(np.float32),
        }
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    }

    def apply(p, x):
        h = act(x @ p["l0"]["w"] + p["l0"]["b"][None])
        return h @ p["l1"]["w"] + p["l1"]["b"][None]

    return apply, jax.tree.map(jnp.asarray, params), jnp.asarray(x)


def prepared(apply, params, *inputs, config=W3):
    graph = jm.trace(apply, params, *inputs)
    return graph, jm.calibrate(params, graph, [inputs], config, progress=False)


def run(apply, params, inputs, *, config=W3, method="coordinate", **more):
    graph, quantizers = prepared(apply, params, *inputs, config=config)
    return jm.adaround(
        params, graph, quantizers, [inputs], key=KEY, method=QUICK.get(method, method),
        progress=False, with_report=True, **more,
    )  # fmt: skip


def error(apply, params, quantizers, inputs, exact):
    y = jax.jit(jm.simulate(apply, quantizers))(params, *inputs)
    pairs = zip(jax.tree.leaves(y), jax.tree.leaves(exact), strict=True)
    return sum(float(jnp.sum(jnp.square(a - b))) for a, b in pairs)


MODELS = {
    "dense": lambda: mlp(),
    "inverted_residual": None,
    "grouped": None,
    "transposed": None,
    "concatenation": None,
}


@functools.cache
def model(name):
    if MODELS[name] is not None:
        apply, params, x = MODELS[name]()
        return apply, params, (x,)
    apply, params, inputs = CASES[name].make["linen"](jax.random.key(1))
    graph = jm.trace(apply, params, *inputs)
    params = jm.fold_batch_norm(params, graph)
    many = tuple(
        jax.random.normal(jax.random.key(2), (16, *x.shape[1:]), x.dtype)
        for x in inputs
    )
    return jm.lift(apply), params, many


@pytest.mark.parametrize("name,method", [
    ("dense", "coordinate"), ("dense", "gptq"), ("dense", "gram"), ("dense", "adam"),
    ("inverted_residual", "coordinate"), ("inverted_residual", "adam"),
    ("grouped", "coordinate"), ("transposed", "gram"), ("concatenation", "adam"),
])  # fmt: skip
@pytest.mark.slow
def test_it_beats_nearest_rounding_and_stays_on_the_grid(name, method):
    apply, params, inputs = model(name)
    graph, before = prepared(apply, params, *inputs)
    new, after, report = run(apply, params, inputs, method=method)
    exact = jax.jit(apply)(params, *inputs)
    gained = error(apply, new, after, inputs, exact)
    assert gained < 0.8 * error(apply, params, before, inputs, exact)
    ratios = [r for r in report["ratio"] if r is not None]
    assert len(ratios) == len(graph.layers) and max(ratios) <= 1 + 1e-6
    assert np.median(ratios) < 0.97 and min(ratios) < 0.85
    curves = report.columns.get("curve", [])
    assert len(curves) == (0 if method in ("coordinate", "gptq") else len(graph.layers))
    for curve, loss in zip(curves, report["loss"], strict=bool(curves)):
        assert len(curve) == 20 and 0.1 < curve[-1] / loss < 1
        assert 0 <= min(curve) < 0.9 * curve[-1]
    old, found = named_leaves(params), named_leaves(new)
    for layer in graph.layers:
        weight = layer.weight.name
        q = after.weights[weight]
        leaf = dense(found[weight])
        assert q.scale is not None
        np.testing.assert_array_equal(q(leaf), leaf)  # rounding again changes nothing
        if method in ("gram", "adam"):
            scale = np.asarray(before.weights[weight].grid(dense(old[weight]))[0])
            np.testing.assert_array_equal(np.asarray(q.scale), scale)
            inside = np.abs(np.asarray(dense(old[weight])) / scale) <= q.ends[1]
            moved = np.abs(np.asarray(leaf - dense(old[weight]))) / scale
            assert moved[inside].max() <= 1 + 1e-5
    untouched = set(found) - {p for s in graph.layers for p in s.parameters}
    for name in untouched:
        np.testing.assert_array_equal(dense(found[name]), dense(old[name]))


@pytest.mark.parametrize("bits,symmetric", [(2, True), (3, False)])
def test_coordinate_descent_is_near_the_best_of_all_roundings(bits, symmetric):
    """Every pattern of up and down and beyond, by float64 on the rows themselves."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 4)) @ rng.normal(size=(4, 4))
    w = rng.normal(size=(4, 3)).astype(np.float32)
    apply = lambda p, x: x @ p["w"]
    config = jm.QuantConfig(bits, 32, symmetric_weights=symmetric)
    inputs = (jax.device_put(np.float32(x)),)
    new, q, _ = run(apply, {"w": jnp.asarray(w)}, inputs, config=config,
                    method=jm.Coordinate(scales="given"), damping=0.0, bias=False)  # fmt: skip
    grid = q.weights["w"]
    scale, zero = (np.asarray(v, np.float64) for v in grid.grid(None))
    low, high = grid.ends
    every = np.array(list(itertools.product(range(low, high + 1), repeat=4)))
    best = np.array([
        min(np.sum((x @ (s * (every[k] - z) - w[:, o])) ** 2) for k in range(len(every)))
        for o, (s, z) in enumerate(zip(scale[0], np.broadcast_to(zero, (1, 3))[0], strict=True))
    ])  # fmt: skip
    mine = np.sum((x @ (np.asarray(new["w"], np.float64) - w)) ** 2, axis=0)
    near = np.sum((x @ (np.asarray(grid(jnp.asarray(w)), np.float64) - w)) ** 2, axis=0)
    assert np.all(mine >= best * (1 - 1e-4)) and np.all(mine <= near * (1 + 1e-5))
    assert mine.sum() <= 1.15 * best.sum() < near.sum()


@pytest.mark.slow
@pytest.mark.parametrize("of", ["weights", "both"])
def test_losses_are_those_of_the_copies_run_by_hand(of):
    """The second layer reads what the rounded first one makes; the bias takes the mean."""
    apply, params, x = mlp()
    config = jm.QuantConfig(3, 6) if of == "both" else W3
    graph, before = prepared(apply, params, x, config=config)
    new, after, report = run(apply, params, (x,), config=config, of=of)
    f64 = lambda v: np.asarray(v, np.float64)
    first, second = graph.layers

    def reads(tree, quantizers):
        seen = {}

        def hook(node, run_, operands):
            seen[node.name] = operands[0]
            return run_(*operands), None

        own = quantizers
        if of == "weights":
            own = dataclasses.replace(quantizers, activations={}, shared=())
        rounded = jm.round_weights(tree, own)
        jm.evaluate(jm.simulate(apply, own, weights=False), hook)(rounded, x)
        return seen

    exact = {}

    def watch(node, run_, operands):
        exact[node.name] = operands[0]
        return run_(*operands), None

    jm.evaluate(apply, watch)(params, x)
    seen = reads(new, after)
    for i, layer in enumerate((first, second)):
        w, b = (f64(params[f"l{i}"][k]) for k in "wb")
        y = f64(exact[layer.name]) @ w + b
        read = f64(seen[layer.name])
        z = read @ f64(new[f"l{i}"]["w"]) + f64(new[f"l{i}"]["b"])
        np.testing.assert_allclose(np.mean(z - y, 0), 0, atol=3e-5 * np.abs(y).max())
        loss = np.sum(np.mean((z - y) ** 2, 0))
        np.testing.assert_allclose(report["loss"][i], loss, rtol=2e-3)
        near = read @ f64(before.weights[layer.weight.name](params[f"l{i}"]["w"]))
        near = near - near.mean(0) + y.mean(0)
        plain = np.sum(np.mean((near - y) ** 2, 0))
        np.testing.assert_allclose(report["nearest loss"][i], plain, rtol=2e-3)
        r, e = read - read.mean(0), y - y.mean(0)
        gram = r.T @ r / len(r)
        held = gram + 0.2 * np.mean(np.diag(gram)) * np.eye(len(gram))
        best = w + np.linalg.solve(held, r.T @ (e - r @ w) / len(r))
        inherited = np.sum(np.mean((r @ best - e) ** 2, 0))
        tiny = 1e-5 * plain
        np.testing.assert_allclose(report["inherited"][i], inherited, 2e-3, tiny)
        ratio = (loss - inherited) / (plain - inherited)
        np.testing.assert_allclose(report["ratio"][i], max(ratio, 0), 0.01, 1e-4)
        assert i == 0 or of == "both" or inherited > 10 * tiny
    assert np.any(np.asarray(seen[second.name]) != np.asarray(exact[second.name]))


@pytest.mark.parametrize("act", [jax.nn.relu, jax.nn.gelu, lambda x: jnp.clip(x, 0, 1)])
@pytest.mark.slow
def test_adam_counts_what_the_activation_lets_through(act):
    apply, params, x = mlp(act=act)
    new, _, report = run(apply, params, (x,), method="adam", bias=False)
    f = lambda w: np.asarray(act(x @ w + params["l0"]["b"][None]), np.float64)
    loss = np.sum(np.mean((f(new["l0"]["w"]) - f(params["l0"]["w"])) ** 2, 0))
    np.testing.assert_allclose(report["loss"][0], loss, rtol=1e-3)


@pytest.mark.slow
def test_scales_that_are_numbers_are_kept_and_others_searched():
    apply, params, x = mlp()
    graph, q = prepared(apply, params, x)
    pinned = q.pin(params)
    _, kept = jm.adaround(params, graph, pinned, [(x,)], key=KEY, progress=False)
    _, free = jm.adaround(params, graph, q, [(x,)], key=KEY, progress=False)
    for name, scale in spec(pinned).items():
        np.testing.assert_array_equal(kept.weights[name].scale, scale)
        assert np.any(np.asarray(free.weights[name].scale) != scale)


GRIDS = [{"per_channel": False}, {"block": 4}, {"symmetric_weights": False}]


@pytest.mark.parametrize(  # the default method on each, each other method on one
    ("options", "method"),
    [*((g, METHODS[0]) for g in GRIDS), *zip(GRIDS, METHODS[1:], strict=True)],
)
@pytest.mark.slow
def test_every_kind_of_grid(options, method):
    config = jm.QuantConfig(4, 32, **options)
    apply, params, x = mlp()
    _, before = prepared(apply, params, x, config=config)
    new, after, report = run(apply, params, (x,), config=config, method=method)
    exact = apply(params, x)
    found = error(apply, new, after, (x,), exact)
    assert found < 0.85 * error(apply, params, before, (x,), exact)
    for name, old in before.weights.items():
        q = after.weights[name]
        assert np.shape(q.scale) == np.shape(old.grid(named_leaves(params)[name])[0])
    assert max(report["ratio"]) <= 1


@pytest.mark.slow
def test_layers_of_a_scan_are_rounded_each_for_itself():
    rng = np.random.default_rng(0)
    w = jax.device_put(np.float32(rng.normal(size=(3, 8, 8)) / 3))
    b = jax.device_put(np.float32(rng.normal(size=(3, 8))))
    v = jax.device_put(np.float32(rng.normal(size=(8, 5))))
    x = jax.device_put(np.float32(rng.normal(size=(64, 8)) @ rng.normal(size=(8, 8))))

    def apply(p, x):
        body = lambda h, wb: (jnp.tanh(h @ wb[0] + wb[1][None]), None)
        return lax.scan(body, x, (p["w"], p["b"]))[0] @ p["v"]

    params = {"w": w, "b": b, "v": v}
    graph, before = prepared(apply, params, x)
    new, after, report = run(apply, params, (x,))
    assert list(report["turn"]) == [0, 1, 2, None] and not any(report["note"])
    exact = apply(params, x)
    found = error(apply, new, after, (x,), exact)
    assert found < 0.8 * error(apply, params, before, (x,), exact)
    np.testing.assert_array_equal(after.weights["w"](new["w"]), new["w"])
    assert all(np.any(np.asarray(new["w"][i]) != np.asarray(w[i])) for i in range(3))


def test_what_does_not_wait_for_another_is_one_wave():
    def apply(p, x):
        h = jax.nn.relu(x @ p["stem"])
        return h @ p["q"], h @ p["k"], jax.nn.relu(h @ p["v"]) @ p["o"]

    params = {n: jnp.ones((4, 4)) for n in ("stem", "q", "k", "v", "o")}
    graph, quantizers = prepared(apply, params, jnp.ones((2, 4)))
    waves = find_waves(graph, find_layers(graph, quantizers, "adaround"))
    assert [{x.node.name for x in w.layers} for w in waves] == [
        {"stem"}, {"q", "k", "v"}, {"o"},
    ]  # fmt: skip


@pytest.mark.slow
def test_one_program_for_layers_of_one_shape(monkeypatch):
    """Side by side where they can be, one after the other without compiling again."""
    apply, params, x = deep()
    programs = coordinate_rounding._descended._cache_size
    before = programs()
    graph, q = prepared(apply, params, x)
    jm.adaround(params, graph, q, [(x,)], key=KEY, progress=False)
    assert programs() <= before + 1  # other tests may have compiled that size

    def heads(p, x):
        return [x @ w for w in p]

    sizes, plain = [], layerwise.solve
    counted = lambda problems, *a: sizes.append(len(problems)) or plain(problems, *a)
    monkeypatch.setattr(layerwise, "solve", counted)
    graph, q = prepared(heads, params, x)
    apart = [
        jm.adaround(params, graph.only(s.name), q, [(x,)], key=KEY, progress=False)[0]
        for s in graph.layers[:2]
    ]
    new, _ = jm.adaround(params, graph, q, [(x,)], key=KEY, progress=False)
    assert sizes == [1, 1, 6]
    for i in (0, 1):  # what stands beside a layer does not change it
        np.testing.assert_array_equal(new[i], apart[i][i])


def test_too_little_memory_is_said_before_any_look(monkeypatch):
    apply, params, x = mlp()
    graph, q = prepared(apply, params, x)
    monkeypatch.setattr(layerwise, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="'l0' takes .* GiB.*rows="):
        jm.adaround(params, graph, q, [(x,)], key=KEY, method="adam", progress=False)


def test_same_key_same_bits():
    apply, params, x = mlp()
    one, two, other = (
        jm.adaround(params, *prepared(apply, params, x), [(x,)], key=jax.random.key(k),
                    method=jm.Adam(iterations=60, batch=16), progress=False)[0]
        for k in (0, 0, 1)
    )  # fmt: skip
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    assert not jax.tree.all(jax.tree.map(np.array_equal, one, other))


@pytest.mark.parametrize(
    "method",
    [
        jm.Coordinate(sweeps=0, start="nearest", scales="given"),
        jm.Gram(iterations=0),
        jm.Adam(iterations=0),
    ],
)
def test_without_steps_it_is_nearest_rounding(method):
    apply, params, x = mlp()
    graph, q = prepared(apply, params, x)
    new, after, _ = run(apply, params, (x,), method=method, bias=False)
    wanted = jm.round_weights(params, q)
    assert jax.tree.all(jax.tree.map(np.array_equal, new, wanted))
    assert all(w.scale is not None for w in after.weights.values())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fill", [0.0, 2.0])
def test_constant_inputs_and_layers_that_nothing_reaches(method, fill):
    apply, params, x = mlp()
    x = jnp.full_like(x, fill)
    dead = {**params, "l0": {"w": params["l0"]["w"], "b": params["l0"]["b"] - 100.0}}
    new, q, report = run(apply, dead, (x,), method=method)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert max(report["ratio"]) <= 1
    exact, y = apply(dead, x), jax.jit(jm.simulate(apply, q))(new, x)
    np.testing.assert_allclose(y, exact, atol=1e-3)


def test_bad_input_is_refused():
    apply, params, x = mlp()
    graph, q = prepared(apply, params, x)
    good = {"key": KEY, "progress": False}
    other, tree, _ = mlp(sizes=(12, 16, 8))
    renamed = {"a": tree["l0"], "c": tree["l1"]}
    moved = lambda p, x: other({"l0": p["a"], "l1": p["c"]}, x)
    _, foreign = prepared(moved, renamed, x)
    rooted, _, _ = mlp(act=jnp.sqrt)  # of what is negative it is NaN
    trap, broken = jm.trace(rooted, params, x), q
    cases = [
        ("Calibrate", (params, graph, foreign, [(x,)]), good),
        ("method is 'best'", (params, graph, q, [(x,)]), good | {"method": "best"}),
        ("rows is 0", (params, graph, q, [(x,)]), good | {"rows": 0}),
        ("'l1'.*NaN", (params, trap, broken, [(x,)]), good),
    ]
    for match, args, options in cases:
        with pytest.raises(ValueError, match=match):
            jm.adaround(*args, **options)


def test_methods_are_values_with_options_of_their_own():
    """Short names are the defaults; values compare, print and are checked when made."""
    for method in (jm.Coordinate, jm.Gptq, jm.Gram, jm.Adam):
        assert method() == method() and hash(method()) == hash(method())
        assert repr(method()).startswith(f"{method.__name__}(")
        with pytest.raises(dataclasses.FrozenInstanceError):
            method().rows = 3
    assert jm.Gram(beta_range=[20, 2]) == jm.Gram() != jm.Adam()
    bad = [
        (lambda: jm.Coordinate(sweeps=-1), "Coordinate: sweeps is -1.*integer"),
        (lambda: jm.Coordinate(sweeps=2.5), "Coordinate: sweeps is 2.5.*integer"),
        (lambda: jm.Coordinate(start="best"), "Coordinate: start is 'best'.*'gptq'"),
        (lambda: jm.Coordinate(scales="all"), "Coordinate: scales is.*'refit'"),
        (lambda: jm.Gptq(scales="refit"), "Gptq: scales is 'refit'.*'search'"),
        (lambda: jm.Gram(iterations=True), "Gram: iterations is True"),
        (lambda: jm.Adam(batch=0), "Adam: batch is 0.*1 or more"),
        (lambda: jm.Adam(beta_range=5), "Adam: beta_range is 5"),
        (lambda: jm.Adam(beta_range=(2, "a")), "Adam: beta_range is 'a'"),
        (lambda: jm.Gram(learning_rate="x"), "Gram: learning_rate is 'x'"),
    ]
    for make, match in bad:
        with pytest.raises(ValueError, match=rf"jaxmet\.{match}"):
            make()


def product(ins=6, outs=4, rows=32):
    """A single product, on inputs that hang together."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(rows, ins)) @ rng.normal(size=(ins, ins))
    w = rng.normal(size=(ins, outs)).astype(np.float32)
    return (lambda p, x: x @ p["w"]), {"w": jnp.asarray(w)}, jnp.float32(x)


def test_a_short_name_is_the_method_with_its_defaults():
    apply, params, x = product()
    graph, q = prepared(apply, params, x)
    methods = ("gptq", jm.Gptq(), jm.Gptq(scales="search"))
    short, value, other = (
        jm.adaround(params, graph, q, [(x,)], method=m, progress=False) for m in methods
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, short, value))
    assert not jax.tree.all(jax.tree.map(np.array_equal, short, other))


@pytest.mark.parametrize(
    "method,given,written",
    [
        ("coordinate", {"iterations": 40}, r"jm\.Coordinate\(sweeps=40\)"),
        ("coordinate", {"scales": "given"}, r"jm\.Coordinate\(scales='given'\)"),
        ("adam", {"iterations": 40, "batch": 8}, r"jm\.Adam\(iterations=40, batch=8\)"),
        ("gram", {"learning_rate": 0.1}, r"jm\.Gram\(learning_rate=0\.1\)"),
        ("coordinate", {"warm_start": 0.1}, r"jm\.Gram\(warm_start=0\.1\)"),
        (jm.Gptq(), {"regularisation": 1}, r"jm\.Gram\(regularisation=1\)"),
    ],
)
def test_options_of_methods_among_the_keywords_are_refused(method, given, written):
    apply, params, x = mlp()
    graph, q = prepared(apply, params, x)
    stated = rf"jaxmet\.adaround: {', '.join(given)} is an option of.*{written}"
    with pytest.raises(ValueError, match=stated):
        jm.adaround(params, graph, q, iter(()), method=method, **given)


def test_a_model_may_take_a_keyword_that_a_method_has():
    apply, params, x = product()
    scaled = lambda p, x, batch=1.0, **others: apply(
        p, x * batch + sum(others.values())
    )
    graph, q = prepared(scaled, params, x)
    quiet = {"progress": False, "bias": False, "method": "gptq"}
    near = jm.round_weights(params, q)["w"]
    for scale in (1.0, 0.0):  # of what is always zero nothing is known
        new, _ = jm.adaround(params, graph, q, [(x,)], batch=scale, start=0.0, **quiet)
        assert bool(jnp.any(new["w"] != near)) == bool(scale)


def test_the_loss_counts_without_a_regulariser():
    """Its unit must not become infinite where the regulariser weighs nothing."""
    apply, params, x = product(rows=300)
    method = jm.Gram(regularisation=0.0, iterations=200)
    _, _, report = run(apply, params, (x,), method=method, bias=False)
    (curve,) = report["curve"]
    assert curve[-1] < 0.5 * curve[0]


@pytest.mark.parametrize("wrong", ["best", jm.Gram, None, 3])
def test_what_is_no_method_is_refused(wrong):
    apply, params, x = mlp()
    graph, q = prepared(apply, params, x)
    stated = r"jaxmet\.adaround: method is .*'coordinate', 'gptq'.*jm\.Gptq\("
    with pytest.raises(ValueError, match=stated):
        jm.adaround(params, graph, q, [(x,)], method=wrong)


def gptq(w, x, scale, low, high, damping):
    """Frantar et al., algorithm 1, one weight after the other, in float64."""
    w, levels = w.astype(np.float64).copy(), np.zeros(w.shape)
    hessian = x.T @ x / len(x)
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    left = list(np.argsort(-np.diag(x.T @ x)))
    while left:
        i, *rest = left
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        levels[i] = np.clip(np.rint(w[i] / scale), low, high)
        error = (w[i] - scale * levels[i]) / inverse[0, 0]
        w[rest] -= inverse[0, 1:, None] * error[None]
        left = rest
    return scale * levels


@pytest.mark.parametrize("damping", [0.01, 0.2])
def test_gptq_is_that_of_the_paper(damping):
    apply, params, inputs = product(10, 6, 300)
    x, w = np.asarray(inputs, np.float64), np.asarray(params["w"])
    graph, q = prepared(apply, params, inputs)
    new, after = jm.adaround(
        params, graph, q, [(inputs,)], method=jm.Gptq(), damping=damping, bias=False,
        progress=False,
    )  # fmt: skip
    scale = np.abs(w.astype(np.float64)).max(0, keepdims=True) / 3
    np.testing.assert_allclose(after.weights["w"].scale, scale, rtol=1e-6)
    wanted = gptq(w, x, scale[0], -3, 3, damping)
    plain = scale * np.clip(np.rint(w / scale), -3, 3)
    gram = x.T @ x / len(x)
    gram += damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    loss = lambda v: np.einsum("io,ij,jo->o", v - w, gram, v - w)
    wins = loss(wanted) < loss(plain)
    assert wins.sum() >= 4
    np.testing.assert_allclose(new["w"], np.where(wins, wanted, plain), atol=1e-5)


def test_a_method_of_the_users_own_is_one_class():
    """What the base class asks for is all that a method needs: here rounding up."""

    @dataclasses.dataclass(frozen=True)
    class Up(solvers.RoundingMethod):
        share: float = 1.0

        def solve(self, problem, kind, key, tick):
            step = problem.grid.scale  # (layers, groups, blocks, outs), one block here
            rounded = jnp.ceil(problem.weight / step - 1e-6) * step
            tick(1.0, 0.0)
            nothing = jnp.zeros((*rounded.shape[:2], rounded.shape[3]))
            return solvers.Solution(rounded, problem.grid, *[nothing] * 4)

    apply, params, x = product()
    graph, q = prepared(apply, params, x)
    new, after = jm.adaround(params, graph, q, [(x,)], method=Up(), progress=False)
    step = np.abs(np.asarray(params["w"])).max(0, keepdims=True) / 3
    np.testing.assert_allclose(
        new["w"], np.ceil(np.asarray(params["w"]) / step - 1e-6) * step, atol=1e-6
    )


def test_traced_trees_are_refused():
    apply, params, x = mlp()
    graph, q = prepared(apply, params, x)
    for call in (
        lambda p: jm.adaround(p, graph, q, [(x,)], key=KEY),
        lambda p: jm.search_scales(p, graph, q, [(x,)]),
    ):
        with pytest.raises(ValueError, match="traced"):
            jax.jit(call)(params)


def test_a_layer_asked_for_by_name_and_not_roundable_is_refused():
    apply, params, x = mlp()
    graph, q = prepared(apply, params, x)
    with pytest.raises(ValueError, match="'l0'.*not quantized.*without"):
        jm.adaround(params, graph.only("l0"), q.set("l0/w", enabled=False), [(x,)],
                    key=KEY, progress=False)  # fmt: skip


PROGRAM = """
import sys
sys.path[:0] = {folders!r}
import jax, numpy as np, jaxmet as jm
import jaxmet.transforms.rounding.layerwise as layerwise
from test_adaround import W3, prepared, deep
apply, params, x = deep()
graph, q = prepared(apply, params, x)
solve = layerwise.solve
def counted(problems, *a, **k):
    for _ in problems: print("solved", flush=True)
    return solve(problems, *a, **k)
layerwise.solve = counted
print("begin", flush=True)
new, q = jm.adaround(params, graph, q, [(x,)], key=jax.random.key(5), checkpoint={path!r},
                     method=jm.Adam(iterations=40, batch=32), progress=False)
np.savez({out!r}, *jax.tree.leaves(new))
"""


def deep():
    rng = np.random.default_rng(0)
    params = [jax.device_put(np.float32(rng.normal(size=(8, 8)) / 2)) for _ in range(6)]
    x = jax.device_put(np.float32(rng.normal(size=(64, 8))))

    def apply(p, x):
        for w in p:
            x = jax.nn.relu(x @ w)
        return x

    return apply, params, x


def start(tmp_path, out):
    path, here = str(tmp_path / "run"), Path(__file__).parent
    folders = [str(here), str(here.parent)]
    text = PROGRAM.format(folders=folders, path=path, out=str(tmp_path / out))
    environment = {**os.environ, "JAXMET_TYPECHECK": "0", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_in_the_same_bits(tmp_path):
    """Killed after so many solved layers, at instants in between; each solved about once."""
    solved = 0
    for number, wait in ((1, 0.0), (2, 0.15)):
        process = start(tmp_path, "never.npz")
        for line in process.stdout:
            solved += line.strip() == "solved"
            number -= line.strip() == "solved"
            if number == 0:
                time.sleep(wait)
                break
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        solved += rest.count("solved")
    process = start(tmp_path, "resumed.npz")
    rest, _ = process.communicate()
    assert process.returncode == 0
    solved += rest.count("solved")
    assert (
        rest.count("solved") < 6 <= solved <= 6 + 2
    )  # at most the one in work is lost
    apply, params, x = deep()
    graph, q = prepared(apply, params, x)
    plain, _ = jm.adaround(params, graph, q, [(x,)], key=jax.random.key(5),
                           method=jm.Adam(iterations=40, batch=32), progress=False)  # fmt: skip
    with np.load(tmp_path / "resumed.npz") as found:
        for one, two in zip(found.values(), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    apply, params, x = deep()
    graph, q = prepared(apply, params, x)
    call = lambda p, **k: jm.adaround(
        p, graph, q, [(x,)], key=KEY, checkpoint=tmp_path / "c", progress=False, **k
    )
    call(params)
    again, _ = call(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, call(params)[0]))
    for other in ({"damping": 0.5}, {"method": "gram"}):
        with pytest.raises(ValueError, match="another"):
            call(params, **other)
    with pytest.raises(ValueError, match="another"):
        call([2.0 * w for w in params])
    for other in ({"weight_bits": 4}, {"weight_range": "mse"}, {"block": 4}):
        config = dataclasses.replace(W3, **other)
        _, others = prepared(apply, params, x, config=config)
        with pytest.raises(ValueError, match="another"):
            jm.adaround(params, graph, others, [(x,)], checkpoint=tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        jm.adaround(params, graph, q, [(x,)], key=KEY, checkpoint=tmp_path / "file")


# Scales


@pytest.mark.parametrize("config,shared", [
    (jm.QuantConfig(4, 32), (0,)),
    (jm.QuantConfig(4, 32, per_channel=False), (0, 1)),
    (jm.QuantConfig(4, 32, symmetric_weights=False), (0,)),
])  # fmt: skip
def test_the_scales_found_are_the_best_of_all_candidates(config, shared):
    """Each share of the range, by float64 on the rows themselves."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    w = rng.standard_t(1, size=(6, 4)).astype(np.float32)
    apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.asarray(w)}
    graph, q = prepared(apply, params, jax.device_put(np.float32(x)), config=config)
    found = jm.search_scales(
        params,
        graph,
        q,
        [(jax.device_put(np.float32(x)),)],
        candidates=10,
        progress=False,
    )
    base = q.weights["w"]
    errors, scales = [], []
    for k in range(1, 11):
        part = base.grid(jnp.asarray(w) * (k / 10))
        one = dataclasses.replace(
            base, scale=part[0], zero_point=None if base.symmetric else part[1]
        )
        e = np.asarray(one(jnp.asarray(w)), np.float64) - w
        errors.append(np.sum((x @ e) ** 2, axis=tuple({0, *shared}), keepdims=True))
        scales.append(np.asarray(part[0]))
    best = np.argmin(np.stack(errors), axis=0)
    wanted = np.take_along_axis(
        np.stack(scales), np.broadcast_to(best, (1, *scales[0].shape)), axis=0
    )[0]
    np.testing.assert_allclose(found.weights["w"].scale, wanted, rtol=1e-5)


def test_scales_of_later_layers_see_rounded_ones():
    apply, params, x = mlp()
    graph, q = prepared(apply, params, x)
    losses = {}
    for of in ("float", "weights"):
        _, report = jm.search_scales(
            params, graph, q, [(x,)], of=of, progress=False, with_report=True
        )
        losses[of] = report["nearest loss"]
    assert losses["float"][0] == losses["weights"][0]
    assert losses["float"][1] < losses["weights"][1]
