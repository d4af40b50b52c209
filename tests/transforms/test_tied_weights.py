"""A weight that several layers use is changed once, for all of them together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.tree import plain_arrays

densify = jax.jit(plain_arrays.densify)  # one program a tree, not one an operation


def relu(x):
    return jnp.maximum(x, 0)


def normal(*shape, seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).normal(size=shape)))


def twice(p, x):
    """One weight and bias twice, between others: as a module that is called twice."""
    h = relu(x @ p["a"] + p["ab"][None])
    for _ in range(2):
        h = relu(h @ p["w"] + p["b"][None])
    return h @ p["z"]


def branches(p, x):
    """One weight on two inputs, with a bias of its own each: a siamese network."""
    one, two = relu(x @ p["a"]), relu(x @ p["c"])
    y, z = relu(one @ p["w"] + p["b"][None]), relu(two @ p["w"] + p["d"][None])
    return y @ p["z"], z @ p["y"]


def tied_embedding(p, ids):
    """The embedding is the classifier too."""
    h = p["e"][ids]
    h = relu(h @ p["a"]) @ p["z"]
    return h @ p["e"].T


def tree(**shapes):
    return {
        k: normal(*n, seed=i) * n[0] ** -0.5 for i, (k, n) in enumerate(shapes.items())
    }


MODELS = {
    "twice": (twice, tree(a=(6, 8), ab=(8,), w=(8, 8), b=(8,), z=(8, 3)), normal(64, 6)),
    "branches": (
        branches,
        tree(a=(6, 8), c=(6, 8), w=(8, 7), b=(7,), d=(7,), z=(7, 3), y=(7, 2)),
        normal(64, 6),
    ),
    "tied embedding": (
        tied_embedding,
        tree(e=(20, 8), a=(8, 10), z=(10, 8)),
        jnp.asarray(np.random.default_rng(1).integers(0, 20, (64, 3))),
    ),
}  # fmt: skip
WEIGHT = {"twice": "w", "branches": "w", "tied embedding": "e"}


@pytest.fixture(params=sorted(MODELS))
def model(request):
    apply, params, x = MODELS[request.param]
    return apply, params, x, jm.trace(apply, params, x), WEIGHT[request.param]


def layers_of(graph, weight):
    return [
        n.name for n in graph.layers if n.weight.name == weight and n.kind == "product"
    ]


def outputs(apply, params, x):
    flat = jax.tree.leaves(jax.jit(jm.lift(apply))(params, x))
    return np.concatenate([np.asarray(y, np.float64).reshape(-1) for y in flat])


W3 = jm.QuantConfig(weight_bits=3, activation_bits=32)


def test_rounding_serves_every_use(model):
    """Less is lost on all that reads the weight, together, than by rounding to nearest."""
    apply, params, x, graph, weight = model
    graph = graph.only(*layers_of(graph, weight))
    quantizers = jm.calibrate(params, graph, [x], W3, progress=False)
    new, chosen, report = jm.adaround(
        params, graph, quantizers, [x], damping=0.01,
        with_report=True, progress=False,
    )  # fmt: skip
    w, r = (np.asarray(t[weight], np.float64) for t in (params, new))
    scale = np.asarray(chosen.weights[weight].scale, np.float64)
    assert np.any(r != w)
    np.testing.assert_allclose(r / scale, np.rint(r / scale), atol=1e-3)

    def rows(node, run, operands):
        if node.weight is None or node.weight.name != weight or node.kind != "product":
            return run(*operands), None
        return run(*operands), operands[0].reshape(-1, operands[0].shape[-1])

    seen = jm.evaluate(apply, rows)(params, x)[1]
    both = np.concatenate([np.asarray(v, np.float64) for v in seen.values()])
    assert len(seen) == len(layers_of(graph, weight))
    matrix = (lambda v: v.T) if weight == "e" else (lambda v: v)
    nearest = np.asarray(jm.round_weights(params, quantizers)[weight], np.float64)
    loss, plain = (np.sum((both @ (matrix(v) - matrix(w))) ** 2) for v in (r, nearest))
    assert loss < 0.8 * plain
    given = [v for v in report["loss"] if v is not None]
    assert len(given) == 1  # where the last of them runs


@pytest.mark.parametrize("method", ["coordinate", "adam"])
def test_a_bias_of_layers_with_one_weight_takes_the_mean_error_of_all(method):
    apply, params, x = MODELS["twice"]
    graph = jm.trace(apply, params, x)
    graph = graph.only("w")
    quantizers = jm.calibrate(params, graph, [x], W3, progress=False)
    method = jm.Adam(iterations=20) if method == "adam" else method
    new, _, report = jm.adaround(
        params, graph, quantizers, [x], method=method, progress=False, with_report=True
    )
    p, q = ({k: np.asarray(v, np.float64) for k, v in t.items()} for t in (params, new))
    nearest = np.asarray(jm.round_weights(params, quantizers)["w"], np.float64)
    first = np.maximum(np.asarray(x, np.float64) @ p["a"] + p["ab"], 0)
    exact = np.concatenate([first, np.maximum(first @ p["w"] + p["b"], 0)])
    noisy = np.concatenate([first, np.maximum(first @ nearest + p["b"], 0)])
    error = exact @ p["w"] - noisy @ q["w"]
    assert np.abs(error.mean(0)).max() > 1e-2
    np.testing.assert_allclose(q["b"] - p["b"], error.mean(0), atol=1e-5)
    last = report.where(layer="w:1")
    assert last["note"] == [None]
    if method == "coordinate":
        left = np.sum((error - error.mean(0)) ** 2) / len(error)
        assert last["loss"][0] == pytest.approx(left, rel=1e-3)


def one_bias(p, x):
    """One bias, added by two layers with weights of their own."""
    h = relu(x @ p["a"] + p["b"][None])
    return relu(h @ p["w"] + p["b"][None]) @ p["z"]


def thrice(p, x):
    """One weight, used once without the bias that two of its layers add."""
    return twice(p, x) @ p["y"] @ p["w"]


KEPT_BIASES = {
    "one bias": (one_bias, tree(a=(6, 8), b=(8,), w=(8, 8), z=(8, 3)), "b"),
    "not all": (thrice, MODELS["twice"][1] | {"y": normal(3, 8)}, "b"),
    "branches": (*MODELS["branches"][:2], "w"),
}


@pytest.mark.parametrize("name", KEPT_BIASES)
def test_a_bias_of_layers_that_share_only_that_is_unchanged_with_the_reason(name):
    apply, params, shared = KEPT_BIASES[name]
    x = normal(64, 6)
    graph = jm.trace(apply, params, x).without(*{"y", "z"} & params.keys())
    quantizers = jm.calibrate(params, graph, [x], W3, progress=False)
    new, quantizers, report = jm.adaround(
        params, graph, quantizers, [x], progress=False, with_report=True
    )
    for bias in {"b", "d"} & params.keys():
        np.testing.assert_array_equal(new[bias], params[bias])
    notes = report.where(layer="w" if name == "one bias" else "w:1")["note"]
    if name != "not all":  # there the weight is rounded with the third layer
        assert notes == [f"bias unchanged: '{shared}' is used elsewhere too"]
    fixed, given = jm.correct_bias(
        new, graph, quantizers, [x], reference=params, progress=False, with_report=True
    )
    assert all(note is None or "bias" in note for note in given["note"])
    if name != "not all":
        assert np.any(np.asarray(fixed["b"]) != np.asarray(params["b"]))


def test_a_bias_of_a_layer_that_is_not_selected_is_unchanged():
    apply, params, x = MODELS["twice"]
    graph = jm.trace(apply, params, x).only("w:1")
    quantizers = jm.calibrate(params, graph, [x], W3, progress=False)
    new, _, report = jm.adaround(
        params, graph, quantizers, [x], progress=False, with_report=True
    )
    np.testing.assert_array_equal(new["b"], params["b"])
    assert report["note"] == ["bias unchanged: w:0: not selected"]


def other_functions(p, x):
    """One weight without a bias, each time with another function after it."""
    h = relu(x @ p["a"])
    return jnp.tanh(relu(h @ p["w"]) @ p["w"]) @ p["z"]


def test_rows_of_all_uses_go_through_their_own_function():
    """Where these differ, the outputs of the products are what is compared."""
    params = {k: MODELS["twice"][1][k] for k in ("a", "w", "z")}
    x = normal(64, 6)
    graph = jm.trace(other_functions, params, x).only("w")
    quantizers = jm.calibrate(params, graph, [x], W3, progress=False)
    _, _, report = jm.adaround(
        params, graph, quantizers, [x], method=jm.Adam(iterations=0),
        progress=False, with_report=True,
    )  # fmt: skip
    w = np.asarray(params["w"], np.float64)
    nearest = np.asarray(jm.round_weights(params, quantizers)["w"], np.float64)
    first = np.maximum(np.asarray(x, np.float64) @ np.asarray(params["a"]), 0)
    exact = np.concatenate([first, np.maximum(first @ w, 0)])
    noisy = np.concatenate([first, np.maximum(first @ nearest, 0)])
    plain = np.sum((exact @ w - noisy @ nearest) ** 2) / len(exact)
    assert report.where(layer="w:1")["nearest loss"][0] == pytest.approx(
        plain, rel=1e-4
    )


def test_factors_serve_every_use(model):
    apply, params, x, graph, weight = model
    names = layers_of(graph, weight)
    small, report = jm.factorize(
        params,
        graph.only(*names),
        ratios=0.5,
        batches=[x],
        with_report=True,
        progress=False,
    )
    assert isinstance(small[weight], jm.Compressed)
    rank = {report.where(layer=n)["rank"][0] for n in names}
    assert len(rank) == 1
    made = np.asarray(densify(small)[weight], np.float64)
    assert np.linalg.matrix_rank(made, tol=1e-4) == rank.pop()
    np.testing.assert_allclose(
        outputs(apply, small, x), outputs(apply, densify(small), x), atol=1e-4
    )
    # nearer to the model, on all that reads it, than factors that have seen no data
    blind = jm.factorize(params, graph.only(*names), ratios=0.5)

    def rows(node, run, operands):
        mine = node.weight is not None and node.weight.name == weight
        x = operands[0] if mine and node.kind == "product" else None
        return run(*operands), x

    seen = jm.evaluate(apply, rows)(params, x)[1]
    both = np.concatenate(
        [np.asarray(v, np.float64).reshape(-1, v.shape[-1]) for v in seen.values()]
    )
    w = np.asarray(params[weight], np.float64)

    def error(tree):
        change = np.asarray(densify(tree)[weight], np.float64) - w
        return np.sum((both @ (change.T if weight == "e" else change)) ** 2)

    values = np.linalg.svd(both @ (w.T if weight == "e" else w), compute_uv=False)
    best = np.sum(values[np.linalg.matrix_rank(made, tol=1e-4) :] ** 2)
    assert error(small) <= error(blind)
    assert error(small) == pytest.approx(best, rel=1e-3, abs=1e-6)
    text = str(jax.make_jaxpr(jm.lift(apply))(small, x))
    dense = "8,8" if weight == "w" and apply is twice else None
    assert (
        dense is None or f"f32[{dense}]" not in text
    )  # two products run, no dense weight


@pytest.mark.one_in(3)
def test_equalizing_keeps_the_function_and_moves_tied_weights_once(model):
    apply, params, x, graph, weight = model
    params = params | {
        weight: params[weight] * jnp.geomspace(0.1, 10, params[weight].shape[-1])[None]
    }
    exact = outputs(apply, params, x)
    for options in ({"objective": "range"}, {"batches": [x], "progress": False}):
        new = jm.equalize(params, graph, **options)
        np.testing.assert_allclose(outputs(apply, new, x), exact, rtol=1e-4, atol=1e-4)
    if weight == "w":
        assert np.any(new["w"] != params["w"])


@pytest.mark.parametrize("name", ["twice", "branches"])
@pytest.mark.parametrize("data", [False, True])
def test_pruning_takes_the_same_channels_of_every_use(name, data):
    apply, params, x = MODELS[name]
    graph = jm.trace(apply, params, x)
    small = jm.prune(params, graph, 0.5, batches=[x] if data else None, progress=False)
    assert isinstance(small["w"], jm.Compressed)
    np.testing.assert_allclose(
        outputs(apply, small, x), outputs(apply, densify(small), x), atol=1e-4
    )
    before, after = (sum(a.size for a in jax.tree.leaves(t)) for t in (params, small))
    assert after < 0.7 * before
    dense = densify(small)
    gone = np.all(np.asarray(dense["w"]) == 0, axis=1)
    assert gone.sum() == 4


@pytest.mark.parametrize("name", ["branches", "tied embedding"])
def test_every_use_is_corrected(name):
    """The mean of what each use makes is that of the float model, on calibration's data."""
    apply, params, x = MODELS[name]
    graph = jm.trace(apply, params, x)
    quantizers = jm.calibrate(params, graph, [x], W3, progress=False)
    new, report = jm.correct_bias(
        params, graph, quantizers, [x], with_report=True, progress=False
    )
    if name == "tied embedding":
        return  # its head has no bias: nothing but the reason can be said

    def means(node, run, operands):
        y = run(*operands)
        mine = node.weight is not None and node.weight.name == "w"
        return y, y.mean(0) if mine else None

    exact = jm.evaluate(apply, means)(params, x)[1]
    noisy = jm.evaluate(jm.lift(apply), means)(jm.round_weights(new, quantizers), x)[1]
    for node in exact:
        np.testing.assert_allclose(noisy[node], exact[node], atol=2e-5)


def test_a_weight_that_something_else_reads_is_left_with_the_reason():
    def apply(p, x):
        return relu(x @ p["w"]) @ p["v"] + jnp.sum(p["w"] ** 2)

    params = {"w": normal(4, 4), "v": normal(4, 2)}
    x = normal(8, 4)
    graph = jm.trace(apply, params, x)
    _, report = jm.factorize(params, graph, ratios=0.5, with_report=True)
    assert "used elsewhere" in report.where(layer="w")["note"][0]


def test_a_weight_that_is_read_both_ways_is_left_with_the_reason():
    def apply(p, x):
        return relu(x @ p["w"]) @ p["w"].T

    params, x = {"w": normal(6, 4)}, normal(8, 6)
    graph = jm.trace(apply, params, x)
    _, report = jm.factorize(params, graph, ratios=0.5, with_report=True)
    assert all("w" in note for note in report["note"])
