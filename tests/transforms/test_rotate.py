"""Dense layers whose inputs are rotated: the function stays, and outliers are spread."""

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import jaxmet as jm
from jaxmet.layers.moments import input_moments
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.named_leaves import named_leaves
from random_nets import NETWORKS, random_values

QUIET = {"progress": False}
WIDTH = 8


def dense(p, x):
    return x @ p["w"] + p["b"][None, None]


def mlp(p, x):
    return dense(p["down"], jax.nn.gelu(dense(p["up"], x)))


def drawn(dtype: Any = np.float32, hidden: int = 16) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    layer = lambda n, m: {
        "w": rng.normal(size=(n, m)) / n**0.5,
        "b": rng.normal(size=m),
    }
    tree = {"up": layer(WIDTH, hidden), "down": layer(hidden, WIDTH)}
    tree["up"]["w"][:, 3] *= 30  # one outlier channel behind GELU
    tree["down"]["w"][3] /= 30
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def inputs(dtype: Any = np.float32, batch: int = 6) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 4, WIDTH)).astype(dtype)


@functools.cache
def made() -> tuple[Any, ...]:
    params, x = drawn(), inputs()
    graph = jm.trace(mlp, params, x)
    return params, jm.rotate(params, graph), x, graph


def close(one: Any, two: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def snr(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(v, np.float64) for v in (found, expected))
    return 10 * np.log10(np.mean(expected**2) / np.mean((found - expected) ** 2))


def rotated_names(params: Any) -> set[str]:
    leaves = named_leaves(params).items()
    return {n for n, x in leaves if is_compressed(x) and x.input_signs is not None}


# The function


def test_the_weight_is_the_matrix_of_the_definition():
    params, new, *_ = made()
    leaf = new["down"]["w"]
    assert rotated_names(new) == {"down/w"} and leaf.input_signs.shape == (16, 1)
    signs = np.asarray(leaf.input_signs)[:, 0]
    assert set(signs) == {-1, 1}
    matrix = scipy.linalg.hadamard(16) / 4
    expected = matrix.T @ (signs[:, None] * params["down"]["w"])
    np.testing.assert_allclose(leaf.weight, expected, atol=1e-6)


def heads_out(p, x):
    """A sum over two axes of the data, in another order than those of the weight."""
    h = jax.nn.gelu(dense(p["up"], x)).reshape(*x.shape[:2], 4, 4)
    w = p["down"]["w"].reshape(4, 4, WIDTH)
    return jnp.einsum("btdh,dho->bto", h.swapaxes(2, 3), w)


def transposed_view(p, x):
    h = jax.nn.gelu(dense(p["up"], x))
    w = p["down"]["w"].reshape(4, 4, WIDTH).transpose(1, 0, 2).reshape(16, WIDTH)
    return jnp.einsum("bti,io->bto", h, w)


def stored_transposed(p, x):
    h = jax.nn.gelu(dense(p["up"], x))
    return jnp.einsum("oi,bti->bto", p["turned"], h)


def first_operand(p, x):
    return jnp.einsum("io,bti->obt", p["down"]["w"], jax.nn.gelu(dense(p["up"], x)))


@pytest.mark.parametrize(
    "model",
    [mlp, heads_out, transposed_view, stored_transposed, first_operand],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("hidden", [16])
def test_the_function_stays_in_double_precision(model, hidden):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = drawn(np.float64, hidden)
        params["turned"] = params["down"]["w"].T
        params, x = jax.tree.map(jnp.asarray, (params, inputs(np.float64)))
        graph = jm.trace(model, params, x)
        new = jm.rotate(params, graph)
        assert len(rotated_names(new)) == 1
        close(jax.jit(jm.lift(model))(new, x), model(params, x), 1e-13)
        close(model(jm.densify(new), x), model(params, x), 1e-13)


def block(p, x):
    q, k, v = (dense(p[n], x) for n in "qkv")
    x = x + dense(p["out"], jax.nn.softmax(q @ k.swapaxes(1, 2) / 3) @ v)
    scale = p["g"][None, None] / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x + mlp(p, x * scale)


def unrolled(p, x):
    x = jax.nn.relu(dense(p["embed"], x))
    for layer in p["layers"]:
        x = block(layer, x)
    return x


def scanned(p, x):
    x = jax.nn.relu(dense(p["embed"], x))
    return jax.lax.scan(lambda x, layer: (block(layer, x), None), x, p["layers"])[0]


def both_forms() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    layer = lambda n, m: {
        "w": (rng.normal(size=(n, m)) / n**0.5).astype(np.float32),
        "b": rng.normal(size=m).astype(np.float32),
    }

    def one():
        names = {n: layer(WIDTH, WIDTH) for n in ("q", "k", "v", "out")}
        gain = {"g": rng.uniform(0.5, 2, WIDTH).astype(np.float32)}
        return names | gain | {"up": layer(WIDTH, 12), "down": layer(12, WIDTH)}

    layers, first = [one(), one()], layer(WIDTH, WIDTH)
    stacked = jax.tree.map(lambda *a: np.stack(a), *layers)
    return {
        "unrolled": (unrolled, {"embed": first, "layers": layers}),
        "scanned": (scanned, {"embed": first, "layers": stacked}),
    }


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_attention_and_loops(form):
    model, params = both_forms()[form]
    x = inputs()
    graph = jm.trace(model, params, x)
    new, report = jm.rotate(params, graph, with_report=True)
    number = 6 if form == "scanned" else 12
    assert len(rotated_names(new)) == number
    rows = {r["consumers"]: r for r in report}
    down = "layers/down" if form == "scanned" else "layers/0/down"
    assert rows[down]["block"] == rows[down]["channels"] == 12
    assert rows["embed"]["note"] == "skipped: an input of the model"
    expected = jax.jit(model)(params, x)
    close(jax.jit(jm.lift(model))(new, x), expected, 1e-5)
    close(jax.jit(model)(jm.densify(new), x), expected, 1e-5)
    # Layers that read one value hold one array, and share its transform.
    layer = new["layers"] if form == "scanned" else new["layers"][0]
    assert layer["q"]["w"].input_signs is layer["k"]["w"].input_signs
    q = jm.calibrate(new, graph, [x], **QUIET)
    assert snr(jax.jit(jm.simulate(model, q))(new, x), expected) > 15


@pytest.mark.slow
@hypothesis.settings(max_examples=10)
@hypothesis.given(NETWORKS)
def test_random_networks_keep_their_function(network):
    params, x = random_values((network.params, network.inputs(2)))
    graph = jm.trace(network, params, x)
    new = jm.rotate(params, graph)
    expected = np.asarray(jax.jit(network)(params, x))
    lifted, plain = jax.jit(jm.lift(network))(new, x), network(jm.densify(new), x)
    for found in (lifted, plain):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * scale)
    q = jm.calibrate(new, graph, [x], **QUIET)
    assert np.isfinite(jax.jit(jm.simulate(network, q))(new, x)).all()


def test_plain_apply_refuses_and_gradients_flow():
    params, new, x, _ = made()
    with pytest.raises(TypeError, match="jm.lift"):
        mlp(new, x)
    loss = lambda f: jax.jit(jax.grad(lambda p: jnp.sum(f(p, x) ** 2)))
    found, expected = loss(jm.lift(mlp))(new), loss(mlp)(params)
    close(found["up"], expected["up"], 1e-4)
    leaf = found["down"]["w"]
    assert not np.any(leaf.input_signs)
    matrix = scipy.linalg.hadamard(16) / 4
    signs = np.asarray(new["down"]["w"].input_signs)
    close(leaf.weight, matrix.T @ (signs * expected["down"]["w"]), 1e-4)


def test_the_key_draws_the_signs():
    params, new, _, graph = made()
    again = jm.rotate(params, graph, key=jax.random.key(0))
    other = jm.rotate(params, graph, key=jax.random.key(1))
    assert np.array_equal(new["down"]["w"].weight, again["down"]["w"].weight)
    signs = [t["down"]["w"].input_signs for t in (new, other)]
    assert not np.array_equal(*signs)


# Quantized


def test_outlier_channels_cost_little():
    params, new, x, graph = made()
    expected, found = mlp(params, x), {}
    config = jm.QuantConfig(rules=[jm.Rule("input", quantize=False)])
    for name, tree in {"plain": params, "rotated": new}.items():
        q = jm.calibrate(tree, graph, [x], config, **QUIET)
        found[name] = snr(jax.jit(jm.simulate(mlp, q))(tree, x), expected)
    assert q.activations["up/gelu"].products_only
    assert found["rotated"] > found["plain"] + 3


def test_the_range_is_that_of_what_enters():
    params, new, x, graph = made()
    q = jm.calibrate(new, graph, [x], **QUIET).activations["up/gelu"]
    h = np.asarray(jax.nn.gelu(dense(params["up"], x)), np.float64)
    signs = np.asarray(new["down"]["w"].input_signs)[:, 0]
    read = (h * signs) @ scipy.linalg.hadamard(16) / 4
    np.testing.assert_allclose(q.scale, (read.max() - read.min()) / 255, rtol=1e-5)


def test_a_reference_that_is_not_rotated_is_refused():
    params, new, x, graph = made()
    q = jm.calibrate(new, graph, [x], **QUIET)
    assert len(jm.compare(new, graph, q, x)) > 0
    with pytest.raises(ValueError, match="'down/w' of the reference .* or rotated"):
        jm.compare(new, graph, q, x, reference=params)


# Other transforms


def test_files_and_integers_keep_the_signs(tmp_path):
    params, new, x, graph = made()
    q = jm.calibrate(new, graph, [x], **QUIET)
    simulated = jax.jit(jm.simulate(mlp, q))(new, x)
    jm.save(tmp_path / "tree.npz", params=new, quantizers=q)
    saved = jm.load(tmp_path / "tree.npz")
    close(jax.jit(jm.simulate(mlp, saved.quantizers))(saved.params, x), simulated, 0)
    integers = jm.quantize(new, graph, q)
    assert rotated_names(integers) == {"down/w"}
    run = jax.jit(jm.simulate(mlp, q, weights=False))
    close(run(integers, x), simulated, 1e-6)
    close(jax.jit(jm.lift(mlp, q))(integers, x), simulated, 0.02)
    close(mlp(jm.densify(integers), x), mlp(params, x), 0.05)
    close(mlp(jm.rebuild(new), x), mlp(params, x))


def test_adaround_solves_for_what_enters():
    params, new, x, graph = made()
    config = jm.QuantConfig(weight_bits=3, activation_bits=32)
    q = jm.calibrate(new, graph, [x], config, **QUIET)
    rounded, pinned = jm.adaround(new, graph, q, [x], **QUIET)
    run = lambda q, tree: snr(jax.jit(jm.simulate(mlp, q))(tree, x), mlp(params, x))
    assert run(pinned, rounded) > run(q, new) + 1


def with_norm(p, x):
    h = dense(p["up"], x)
    mean, var, g, b = (p["bn"][n][None, None] for n in ("mean", "var", "g", "b"))
    h = (h - mean) / jnp.sqrt(var + 1e-5) * g + b
    return dense(p["down"], jax.nn.relu(h))


@functools.cache
def normed() -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    draws = {n: rng.uniform(0.5, 2, 16) for n in ("mean", "var", "g", "b")}
    params = drawn() | {"bn": {n: a.astype(np.float32) for n, a in draws.items()}}
    graph = jm.trace(with_norm, params, inputs())
    return params, jm.rotate(params, graph), inputs(), graph


CHANNELS = {
    "fold": lambda p, g, x: jm.fold_batch_norm(p, g),
    "equalize": lambda p, g, x: jm.equalize(p, g, objective="range", **QUIET),
    "equalize, noise": lambda p, g, x: jm.equalize(p, g, batches=[x], **QUIET),
    "smooth": lambda p, g, x: jm.smooth(p, g, [x], input_scales=True, **QUIET),
    "absorb": lambda p, g, x: jm.absorb_bias(p, g),
    "factorize": lambda p, g, x: jm.factorize(p, g, ratios=1.0, method="weight"),
    "again": lambda p, g, x: jm.rotate(p, g, key=jax.random.key(4)),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_what_works_channel_by_channel_keeps_the_function(name):
    params, new, x, graph = normed()
    if name == "absorb":  # the ReLU never cuts: then a constant moves exactly
        params = jax.tree.map(np.copy, params)
        params["bn"]["b"] += np.float32(100)
        params["up"] = jax.tree.map(lambda a: a * np.float32(1e-3), params["up"])
        new = jm.rotate(params, graph)
    changed = CHANNELS[name](new, graph, x)
    expected = jax.jit(with_norm)(params, x)
    close(jax.jit(jm.lift(with_norm))(changed, x), expected, 1e-4)
    if name == "absorb":
        assert not np.array_equal(changed["down"]["b"], new["down"]["b"])


def test_single_channels_of_rotated_inputs_are_not_removed():
    _, new, x, graph = normed()
    same, report = jm.prune(new, graph, 0.5, batches=[x], with_report=True, **QUIET)
    assert rotated_names(same) == {"down/w"} and same["down"]["w"].shape == (16, 8)
    assert any("its inputs are rotated" in (note or "") for note in report["note"])
    with pytest.raises(ValueError, match="its inputs are rotated"):
        jm.prune(new, graph.only("down"), 0.5, batches=[x], **QUIET)


def test_statistics_of_norms_go_through_the_transform():
    params, new, _, graph = normed()
    plain, turned = (input_moments(graph, tree)["down"] for tree in (params, new))
    signs = np.asarray(new["down"]["w"].input_signs)[:, 0]
    matrix = signs[:, None] * scipy.linalg.hadamard(16) / 4
    np.testing.assert_allclose(turned.mean, plain.mean @ matrix, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(turned.variance, plain.variance @ matrix**2, rtol=1e-4)


def odd(p, x):
    h = jax.nn.gelu(dense(p["up"], x))[..., :7]
    return dense(p["down"], h)


def test_sizes_without_a_hadamard_matrix_are_left_and_said():
    params, x = drawn(), inputs()
    params["down"]["w"] = params["down"]["w"][:7]
    graph = jm.trace(odd, params, x)
    new, report = jm.rotate(params, graph, with_report=True)
    assert not rotated_names(new)
    assert any("divides its 7 inputs" in (note or "") for note in report["note"])
    with pytest.raises(ValueError, match=r"jaxmet.rotate: layer 'down' cannot"):
        jm.rotate(params, graph.only("down"))
    with pytest.raises(
        ValueError, match="'up' cannot have rotated inputs: an input of"
    ):
        jm.rotate(params, graph.only("up"))


def test_a_model_without_that_layer_is_refused():
    _, new, x, _ = made()
    twice = lambda p, x: mlp(p, x) + jnp.sum(p["down"]["w"])
    with pytest.raises(ValueError, match=r"'down/w' states what is done to the inputs"):
        jm.lift(twice)(new, x)
