"""A weight that one layer reads as it is and another one transposed.

No scale, factor or set of channels of one use is right for the other, so the weight is changed
by nothing but its quantizer, one scale for all of it; what changes other parameters is right
for both uses.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet import densify
from jaxmet.tree.named_leaves import named_leaves

BITS = 3
W3 = jm.QuantConfig(weight_bits=BITS, activation_bits=32)


def normal(*shape, seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).normal(size=shape)))


def autoencoder(p, x):
    """A batch norm, then a tied autoencoder, each of its layers with a bias of its own."""
    h = (x @ p["first"] - p["mean"][None]) / jnp.sqrt(p["var"] + 1e-3)[None]
    h = jax.nn.relu(h * p["scale"][None] + p["shift"][None])
    h = jax.nn.relu(h @ p["w"] + p["b"][None])
    return jax.nn.relu(h @ p["w"].T + p["c"][None]) @ p["last"]


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")(
            nn.Dense(6, use_bias=False, name="first")(x)
        )
        h = nn.relu(h)
        w = self.param("w", nn.initializers.lecun_normal(), (6, 4))
        b = self.param("b", nn.initializers.normal(), (4,))
        c = self.param("c", nn.initializers.normal(), (6,))
        h = nn.relu(h @ w + b[None])
        return nn.Dense(3, use_bias=False, name="last")(nn.relu(h @ w.T + c[None]))


def pure():
    shapes = {
        "first": (5, 6), "scale": (6,), "shift": (6,), "mean": (6,), "var": (6,),
        "w": (6, 4), "b": (4,), "c": (6,), "last": (6, 3),
    }  # fmt: skip
    params = {k: normal(*n, seed=i) for i, (k, n) in enumerate(shapes.items())}
    params["var"] = jnp.square(params["var"]) + 0.5
    params["w"] = params["w"] * jnp.geomspace(0.3, 3, 4)[None]
    return autoencoder, params


def linen():
    module = Autoencoder()
    variables = jax.jit(module.init)(jax.random.key(0), normal(2, 5))
    stats = {"mean": normal(6, seed=3), "var": jnp.square(normal(6, seed=4)) + 0.5}
    return module.apply, variables | {"batch_stats": {"norm": stats}}


@pytest.fixture(params=[pure, linen])
def model(request):
    apply, params = request.param()
    x = normal(64, 5, seed=9)
    graph = jm.trace(apply, params, x)
    params = jm.fold_batch_norm(params, graph)
    quantizers = jm.calibrate(params, graph, [x], W3, progress=False)
    return apply, params, x, graph, quantizers


def found(params):
    return {k: np.asarray(v, np.float64) for k, v in named_leaves(params).items()}


def uses(graph):
    return [n.name for n in graph.layers if n.weight.name == "w"]


def rounded(w):
    """The whole matrix on one symmetric grid, in float64."""
    scale = np.abs(w).max() / (2 ** (BITS - 1) - 1)
    return np.rint(w / scale) * scale


def layers_of(params, x):
    """What both layers make, and what enters them, in float64."""
    p = found(params)
    first = next(p[n] for n in p if n.startswith("first"))
    get = lambda name: p.get(f"norm/{name}", p.get({"bias": "shift"}.get(name, name)))
    h = (x @ first - get("mean")) / np.sqrt(get("var") + 1e-3)
    h = np.maximum(h * get("scale") + get("bias"), 0)
    one = h @ p["w"] + p["b"]
    return h, one, np.maximum(one, 0) @ p["w"].T + p["c"]


def test_one_scale_serves_both_uses(model):
    apply, params, x, graph, quantizers = model
    assert uses(graph) == ["w:0", "w:1"] and quantizers.weights["w"].axis is None
    row = jm.plan(params, graph, W3).where(name="w")
    assert row["note"] == ["per tensor: its uses disagree about the channel axis"]
    new = found(jm.round_weights(params, quantizers))["w"]
    np.testing.assert_allclose(new, rounded(found(params)["w"]), atol=1e-6)
    exact = apply(jm.round_weights(params, quantizers), x)
    np.testing.assert_array_equal(jm.simulate(apply, quantizers)(params, x), exact)


def test_the_bias_of_each_use_is_corrected(model):
    """No weight changes: whatever reads it, each bias takes its own mean error."""
    _, params, x, graph, quantizers = model
    new, report = jm.correct_bias(
        params, graph, quantizers, [x], with_report=True, progress=False
    )
    rows = [row for row in report if row["layer"] in uses(graph)]
    assert [(row["into"], row["note"]) for row in rows] == [("b", None), ("c", None)]
    x = np.asarray(x, np.float64)
    plain, noisy = (
        layers_of(jm.round_weights(tree, quantizers), x)[1:] for tree in (params, new)
    )
    for before, after, exact in zip(
        plain, noisy, layers_of(params, x)[1:], strict=True
    ):
        assert np.abs(before.mean(0) - exact.mean(0)).max() > 1e-2
        np.testing.assert_allclose(after.mean(0), exact.mean(0), atol=2e-6)


def test_without_data_the_inputs_of_neither_use_are_known(model):
    """Channels are not followed through such a weight, and the reason is given."""
    _, params, _, graph, quantizers = model
    with pytest.raises(ValueError, match=r"w:0: w:0: 'w' is used elsewhere too"):
        jm.correct_bias(params, graph.only("w:0"), quantizers)


TRANSFORMS = {
    "fold_batch_norm": lambda p, g, q, b: jm.fold_batch_norm(p, g, with_report=True),
    "equalize, range": lambda p, g, q, b: jm.equalize(
        p, g, objective="range", with_report=True
    ),
    "equalize, noise": lambda p, g, q, b: jm.equalize(
        p, g, batches=b, with_report=True, progress=False
    ),
    "factorize": lambda p, g, q, b: jm.factorize(p, g, ratios=0.5, with_report=True),
    "factorize, data": lambda p, g, q, b: jm.factorize(
        p, g, ratios=0.5, batches=b, with_report=True, progress=False
    ),
    "prune": lambda p, g, q, b: jm.prune(p, g, 0.5, with_report=True),
    "prune, data": lambda p, g, q, b: jm.prune(
        p, g, 0.5, batches=b, with_report=True, progress=False
    ),
    "adaround": lambda p, g, q, b: jm.adaround(
        p, g, q, b, with_report=True, progress=False
    )[::2],
}
KEEPS = ("fold_batch_norm", "equalize, range", "equalize, noise")
WHY = "'w' is used elsewhere too"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_transform_changes_the_weight_for_one_of_its_uses(model, name):
    apply, params, x, graph, quantizers = model
    new, report = TRANSFORMS[name](params, graph, quantizers, [x])
    np.testing.assert_array_equal(found(densify(new))["w"], found(params)["w"])
    if name != "fold_batch_norm":
        notes = [note for note in report["note"] if note is not None]
        assert sum(WHY in note for note in notes) >= (1 if "prune" in name else 2)
    if name in KEEPS:
        y = apply(params, x)
        np.testing.assert_allclose(jm.lift(apply)(new, x), y, rtol=1e-4, atol=1e-4)
    else:
        y = apply(densify(new), x)
        np.testing.assert_allclose(jm.lift(apply)(new, x), y, rtol=1e-4, atol=1e-4)


def test_a_norm_is_not_folded_into_one_of_the_uses():
    def apply(p, x):
        h = (x @ p["w"] - p["mean"][None]) / jnp.sqrt(p["var"] + 1e-3)[None]
        h = jax.nn.relu(h * p["scale"][None] + p["shift"][None])
        return h @ p["w"].T

    shapes = {"w": (6, 4), "mean": (4,), "scale": (4,), "shift": (4,)}
    params = {k: normal(*n, seed=i) for i, (k, n) in enumerate(shapes.items())}
    params |= {"var": jnp.ones(4)}
    x = normal(8, 6)
    graph = jm.trace(apply, params, x)
    new, report = jm.fold_batch_norm(params, graph, with_report=True)
    assert WHY in report["note"][0]
    np.testing.assert_array_equal(apply(new, x), apply(params, x))


def test_searched_scales_leave_out_the_weight(model):
    _, params, x, graph, quantizers = model
    new, report = jm.search_scales(
        params, graph, quantizers, [x], with_report=True, progress=False
    )
    assert new.weights["w"].follows
    notes = [row["note"] for row in report if row["layer"] in ("w:0", "w:1")]
    assert notes == [f"rounded to nearest: {WHY}"] * 2


def test_one_use_that_is_asked_for_by_name_raises(model):
    _, params, x, graph, quantizers = model
    graph = graph.only("w:0")
    for call in (
        lambda: jm.adaround(params, graph, quantizers, [x], progress=False),
        lambda: jm.search_scales(params, graph, quantizers, [x], progress=False),
        lambda: jm.factorize(params, graph, ratios=0.5),
    ):
        with pytest.raises(ValueError, match=r"'w:0' cannot .*'w' is used elsewhere"):
            call()


def test_a_tied_embedding_has_one_scale_per_row():
    """A lookup and a head that reads the transpose agree about the channels: the entries."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(20, 8, name="embed")
            return embed.attend(nn.relu(nn.Dense(8, name="inner")(embed(ids))))

    ids = jnp.asarray(np.random.default_rng(1).integers(0, 20, (64, 3)))
    params = jax.jit(Tied().init)(jax.random.key(0), ids)
    graph = jm.trace(Tied().apply, params, ids)
    quantizers = jm.calibrate(params, graph, [ids], W3, progress=False)
    assert quantizers.weights["embed/embedding"].axis == (0,)
    e = found(params)["embed/embedding"]
    scale = np.abs(e).max(1, keepdims=True) / (2 ** (BITS - 1) - 1)
    new = found(jm.round_weights(params, quantizers))["embed/embedding"]
    np.testing.assert_allclose(new, np.rint(e / scale) * scale, atol=1e-6)
