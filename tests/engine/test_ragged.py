"""`lax.ragged_dot`, as of a mixture of experts, is a layer like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm

EXPERTS, WIDTH, HIDDEN = 3, 4, 6


def mixture(p, x):
    """Each token through the expert that its router likes best."""
    tokens = jnp.reshape(x, (-1, WIDTH))
    expert = jnp.argmax(tokens @ p["router"], axis=-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=EXPERTS).astype(jnp.int32)
    hidden = jax.nn.relu(lax.ragged_dot(tokens[order], p["up"], sizes))
    y = lax.ragged_dot(hidden, p["down"], sizes)
    return x + jnp.reshape(jnp.zeros_like(y).at[order].set(y), x.shape)


def by_hand(p, x, up, down):
    """The same in float64 loops over tokens, with weights of one's own."""
    out = np.array(x, np.float64)
    for at in np.ndindex(x.shape[:-1]):
        token = np.asarray(x[at], np.float64)
        expert = int(np.argmax(token @ np.asarray(p["router"], np.float64)))
        out[at] += np.maximum(token @ up[expert], 0) @ down[expert]
    return out


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "router": (WIDTH, EXPERTS),
        "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
    }
    p = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys)}
    p["up"] = p["up"] * jnp.asarray([1.0, 100.0, 0.01])[:, None, None]
    x = jax.random.normal(keys[3], (8, 5, WIDTH))
    return p, x, jm.trace(mixture, p, x[:1])


def test_it_is_found_counted_and_read_through_the_sorting(case):
    p, x, graph = case
    assert [n.name for n in graph.layers] == ["router", "up", "down"]
    assert [e.node for e in graph["up"].inputs] == ["input"]
    assert [e.node for e in graph["down"].inputs] == ["up/relu"]
    table = jm.cost(p, graph, x)
    macs = dict(zip(table["layer"], table["macs"], strict=True))
    tokens = x.shape[0] * x.shape[1]
    assert macs["up"] == macs["down"] == tokens * WIDTH * HIDDEN


def test_each_expert_and_channel_has_its_own_scale(case):
    p, x, graph = case
    config = jm.QuantConfig(weight_bits=4, rules=[jm.Rule("router", quantize=False)])
    quantizers = jm.calibrate(
        p, graph, jm.batched(x, batch_size=4), config, progress=False
    )

    def rounded(w):
        scale = np.max(np.abs(w), axis=1, keepdims=True) / 7
        return np.round(np.asarray(w, np.float64) / scale) * scale

    weights_only = jm.calibrate(
        p,
        graph,
        jm.batched(x, batch_size=4),
        jm.QuantConfig(
            weight_bits=4,
            activation_bits=32,
            rules=[jm.Rule("router", quantize=False)],
        ),
        progress=False,
    )
    got = jax.jit(jm.simulate(mixture, weights_only))(p, x)
    wanted = by_hand(p, x, rounded(np.asarray(p["up"])), rounded(np.asarray(p["down"])))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)
    assert set(quantizers.weights) == {"up", "down"}
    assert {"input", "up/relu", "down"} <= set(quantizers.activations)


def test_what_needs_one_matrix_leaves_it_and_says_why(case):
    p, x, graph = case
    batches = jm.batched(x, batch_size=4)
    quantizers = jm.calibrate(p, graph, batches, progress=False)
    quiet = {"with_report": True, "progress": False}
    reports = (
        jm.factorize(p, graph, ratios=0.5, with_report=True)[1],
        jm.correct_bias(p, graph, quantizers, batches, **quiet)[1],
        jm.equalize(p, graph, **quiet)[1],
        jm.adaround(p, graph, quantizers, batches, key=jax.random.key(0), **quiet)[-1],
    )
    for table in reports:
        notes = " ".join(str(note) for note in table["note"])
        assert "its rows choose among matrices" in notes
    with pytest.raises(ValueError, match="its rows choose among matrices"):
        jm.factorize(p, graph, ratios={"up": 0.5})


def test_one_that_only_decides_a_branch_is_found_too(case):
    p, x, _ = case

    def apply(p, x):
        tokens = jnp.reshape(x, (-1, WIDTH))
        sizes = jax.device_put(np.int32([len(tokens), 0, 0]))
        score = jnp.sum(lax.ragged_dot(tokens, p["up"], sizes))
        branches = (lambda y: y @ p["router"], lambda y: -y @ p["router"])
        return lax.cond(score > 0, *branches, x)

    assert "up" in [n.name for n in jm.trace(apply, p, x).layers]
