"""What targets change of placement and calibration, on small models written here."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.tree.targets import TARGETS


class Net(nn.Module):
    """A concatenation read twice, an average pool, a leaky ReLU, tanh and softmax."""

    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
        b = nn.Conv(4, (3, 3), name="b")(x)
        c = nn.leaky_relu(nn.Conv(4, (3, 3), name="c")(x))
        ab = jnp.concatenate([a, b], -1)
        bc = jnp.concatenate([b, c], -1)
        y = nn.Conv(4, (1, 1), name="left")(ab) + nn.Conv(4, (1, 1), name="right")(bc)
        window = (1, 2, 2, 1)
        y = jax.lax.reduce_window(y, 0.0, jax.lax.add, window, window, "VALID") / 4.0
        y = nn.Dense(5, name="hidden")(y.mean((1, 2)))
        y = nn.Dense(5, name="gate")(nn.tanh(y))
        return nn.softmax(nn.Dense(3, name="head")(jnp.sort(jnp.cumsum(y, -1))))


@pytest.fixture(scope="module")
def net():
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    params = jax.jit(Net().init)(jax.random.key(0), x)
    return params, jm.trace(Net().apply, params, x[:1]), x


def rows(net, config):
    params, graph, _ = net
    table = jm.plan(params, graph, config)
    return {
        name: (kind, note)
        for name, kind, note in zip(
            table["name"], table["kind"], table["note"], strict=True
        )
    }


def quantizers_of(net, name, **fields):
    params, graph, x = net
    config = jm.QuantConfig.for_target(name, **fields)
    return jm.calibrate(params, graph, [x], config, progress=False)


def test_litert_has_one_scale_for_all_that_meet(net):
    found = rows(net, jm.QuantConfig.for_target("litert"))
    pools = [n for n in found if n.endswith("/pool")]
    concats = [n for n in found if "concat" in n]
    owners = {
        (note or "").removeprefix("as ").split(";")[0]
        for n, (_, note) in found.items()
        if (note or "").startswith("as ")
    }
    # both concatenations read b: they have one scale, all five of them
    assert len(concats) == 2 and len(owners & set(concats)) == 1
    assert any((found[p][1] or "").startswith("as ") or p in owners for p in pools)


def test_onnxruntime_shares_nothing_at_a_concatenation(net):
    found = rows(net, jm.QuantConfig.for_target("onnxruntime"))
    assert not [note for _, note in found.values() if (note or "").startswith("as ")]


def test_litert_fixes_ranges(net):
    quantizers = quantizers_of(net, "litert")
    scales = {
        name: (float(q.scale), int(q.zero_point))
        for name, q in quantizers.activations.items()
    }
    (tanh,) = [s for n, s in scales.items() if n.endswith("/tanh")]
    (softmax,) = [s for n, s in scales.items() if n.endswith("/softmax")]
    assert tanh == (1 / 128, 128) and softmax == (1 / 256, 0)
    plain = quantizers_of(net, "onnxruntime").activations
    assert all(float(q.scale) not in (1 / 128, 1 / 256) for q in plain.values())


def test_tensorrt_is_signed_and_symmetric(net):
    for q in quantizers_of(net, "tensorrt").activations.values():
        assert q.symmetric and q.signed and q.ends == (-128, 127)


def test_what_does_not_fuse_is_stored(net):
    assert "c" not in rows(net, None)
    assert rows(net, jm.QuantConfig.for_target("litert"))["c"][0] == "activation"
    assert "a" not in rows(net, jm.QuantConfig.for_target("litert"))


@pytest.mark.parametrize("name", list(TARGETS))
def test_what_a_target_does_not_know_is_stated_not_refused(net, name):
    found = rows(net, jm.QuantConfig.for_target(name))
    floats = [n for n, (_, note) in found.items() if "in float" in (note or "")]
    assert any("cumsum" in n or "sort" in n for n in floats)
    tanh = next(note for n, (_, note) in found.items() if n.endswith("/tanh"))
    known = TARGETS[name].computes("tanh")
    assert ("computed in float" in (tanh or "")) != known


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_sum_is_in_float_where_a_target_says_so(name):
    """Of a window and of all positions; their results have quantizers on every target."""

    def model(params, x):
        y = jax.lax.reduce_window(
            x @ params["w"], 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
        return jnp.sum(y @ params["w"], (1, 2)) @ params["w"]

    params, x = {"w": jnp.eye(4)}, jnp.ones((2, 8, 8, 4))
    graph = jm.trace(model, params, x)
    sums = [n.name for n in graph.nodes if n.function == "sum"]
    table = jm.plan(params, graph, jm.QuantConfig.for_target(name))
    found = dict(zip(table["name"], zip(table["kind"], table["note"], strict=True)))
    in_float = (
        None
        if name in ("litert", "htp", "openvino")
        else f"sum is computed in float on {name}; its output is quantized"
    )
    assert len(sums) == 2
    assert all(found[n] == ("activation", in_float) for n in sums)


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_target_simulates(net, name):
    params, _, x = net
    device = jm.simulate(Net().apply, quantizers_of(net, name))
    noise = jax.jit(device)(params, x) - Net().apply(params, x)
    assert float(jnp.abs(noise).max()) < 0.05


def test_htp_limits_the_multiplier_of_requantization():
    def apply(params, x):
        return (x @ params["w"]) + params["b"][None]

    x = jnp.linspace(-100.0, 100.0, 64).reshape(8, 8)
    params = {
        "w": jnp.eye(8).at[0].multiply(1e-9).astype(jnp.float32),
        "b": jnp.zeros(8),
    }
    graph = jm.trace(apply, params, x[:1])
    config = jm.QuantConfig.for_target("htp", bias="float")
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    s_w = np.asarray(quantizers.weights["w"].grid(params["w"])[0]).ravel()
    scales = [float(q.scale) for q in quantizers.activations.values()]
    assert len(scales) == 2
    names = list(quantizers.activations)
    s_x = float(quantizers.activations[names[0]].scale)
    s_y = float(quantizers.activations[names[1]].scale)
    assert (s_x * s_w / s_y > 2.0**-24).all()
    assert any("s_x s_w / s_y" in why for _, why in quantizers.skipped)
    free = jm.calibrate(
        params,
        graph,
        [x],
        jm.QuantConfig.for_target("xla", bias="float"),
        progress=False,
    )
    assert np.min(free.weights["w"].grid(params["w"])[0]) < s_w.min()
