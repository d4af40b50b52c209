"""The table of nodes, against noise put in by hand and sums in float64."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
import zoo

KEY = jax.random.key(6)


def model(name, front=None):
    return *zoo.redrawn(name, front, 6), zoo.traced(name, front)


def plain(layers=3, size=6):
    rng = np.random.default_rng(1)
    params = {
        f"{i}": {
            "w": jax.device_put(np.float32(rng.normal(size=(size, size)))),
            "b": jax.device_put(np.float32(rng.normal(size=size))),
        }
        for i in range(layers)
    }

    def apply(p, x):
        for i in range(layers):
            x = x @ p[f"{i}"]["w"] + p[f"{i}"]["b"][None]
            x = jnp.tanh(x) if i < layers - 1 else x
        return x

    x = jax.device_put(np.float32(rng.normal(size=(64, size))))
    return apply, params, jm.trace(apply, params, x), x


def rows_of(table):
    return {row["node"]: row for row in table}


def decibel(signal, noise):
    signal, noise = np.float64(signal), np.float64(noise)
    return 10 * np.log10(np.sum(signal**2) / np.sum(noise**2))


def clean(value):
    """Whether there is no error but that of float32."""
    return value is None or value > 110


def test_noise_shows_where_it_enters_and_not_before():
    """One low bit-widths in the middle, all others too fine to see."""
    apply, params, graph, x = plain()
    config = jm.QuantConfig(weight_bits=16, activation_bits=16)
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    coarse = quantizers.set("1/tanh", bits=3)
    table = jm.compare(params, graph, coarse, x)
    rows = rows_of(table)
    assert list(rows) == ["input", "0", "0/tanh", "1", "1/tanh", "2"]
    quiet = rows_of(jm.compare(params, graph, quantizers, x))
    for name in ("input", "0", "0/tanh", "1"):
        assert rows[name]["SQNR (dB)"] == pytest.approx(
            quiet[name]["SQNR (dB)"], abs=1e-3
        )
        assert rows[name]["SQNR (dB)"] > 70
    assert rows["1/tanh"]["SQNR (dB)"] < 25
    assert rows["1/tanh"]["own share"] == pytest.approx(1.0, abs=1e-2)
    assert rows["2"]["SQNR (dB)"] < 25 and rows["2"]["own share"] < 1e-3
    assert rows["2"]["own SQNR (dB)"] > 70
    assert "most noise enters at 1/tanh" in table.title
    outputs = decibel(
        apply(params, x),
        np.float64(jax.jit(jm.simulate(apply, coarse))(params, x))
        - np.float64(apply(params, x)),
    )
    assert f"outputs {outputs:.1f} dB" in table.title


def test_numbers_are_those_of_a_calculation_by_hand():
    """A weight and the result after it on quantizers, in float64."""
    _, params, graph, x = plain(2)
    quantizers = jm.Quantizers(
        {"0/w": jm.Quantizer(scale=jnp.float32(0.25), bits=8)},
        {"0/tanh": jm.Quantizer(scale=jnp.float32(0.125), bits=4)},
    )
    rows = rows_of(jm.compare(params, graph, quantizers, x))
    assert set(rows) == {"0", "0/tanh"}
    w, b, data = (np.float64(v) for v in (params["0"]["w"], params["0"]["b"], x))
    rounded = 0.25 * np.round(w / 0.25)
    y, z = data @ w + b, data @ rounded + b
    t, u = np.tanh(y), np.tanh(z)
    q = np.round(u / 0.125)
    on_grid = 0.125 * np.clip(q, -7, 7)
    assert rows["0"]["SQNR (dB)"] == pytest.approx(decibel(y, z - y), abs=1e-3)
    assert rows["0"]["own SQNR (dB)"] == pytest.approx(rows["0"]["SQNR (dB)"], abs=1e-3)
    assert rows["0"]["weight SQNR (dB)"] == pytest.approx(
        decibel(w, rounded - w), abs=1e-3
    )
    assert rows["0"]["levels used"] is None and rows["0"]["clipped"] is None
    row = rows["0/tanh"]
    assert row["SQNR (dB)"] == pytest.approx(decibel(t, on_grid - t), abs=2e-2)
    assert row["own SQNR (dB)"] == pytest.approx(decibel(t, on_grid - u), abs=2e-2)
    share = np.sum((on_grid - u) ** 2) / np.sum((on_grid - t) ** 2)
    assert row["own share"] == pytest.approx(share, rel=1e-2)
    assert row["levels used"] == pytest.approx(1.0)
    assert row["clipped"] == pytest.approx(np.mean(np.abs(q) > 7), abs=2 / x.size)


def test_badly_used_grids_are_flagged():
    _, params, graph, x = plain()
    quantizers = jm.calibrate(params, graph, [x], progress=False).pin(params)
    assert not any(jm.compare(params, graph, quantizers, x)["note"])
    scale = {n: quantizers.activations[n].scale for n in ("0/tanh", "1/tanh")}
    weight = quantizers.weights["2/w"].scale
    bad = quantizers.set("0/tanh", scale=10 * scale["0/tanh"])
    bad = bad.set("1/tanh", scale=0.5 * scale["1/tanh"]).set("2/w", scale=0.3 * weight)
    rows = rows_of(jm.compare(params, graph, bad, x))
    assert re.match("too wide: 1[01] % of the levels used", rows["0/tanh"]["note"])
    assert "too narrow" in rows["1/tanh"]["note"]
    assert "weight: too narrow" in rows["2"]["note"]
    assert [n for n, r in rows.items() if r["note"]] == ["0/tanh", "1/tanh", "2"]
    assert rows["0/tanh"]["levels used"] == pytest.approx(0.1, abs=0.02)
    assert rows["1/tanh"]["clipped"] > 0.01
    title = jm.compare(params, graph, bad.set("2/w", scale=20 * weight), x).title
    assert "badly used quantizers: 0/tanh, 1/tanh, 2" in title


def test_a_stale_weight_grid_is_flagged():
    _, params, graph, x = plain(2)
    quantizers = jm.Quantizers({"1/w": jm.Quantizer(bits=8, axis=(1,))})
    pinned = quantizers.pin(params)
    grown = {**params, "1": {**params["1"], "w": 4.0 * params["1"]["w"]}}
    follows = rows_of(jm.compare(grown, graph, quantizers, x))["1"]
    stale = rows_of(jm.compare(grown, graph, pinned, x))["1"]
    assert follows["note"] is None and follows["weight SQNR (dB)"] > 30
    assert "weight: too narrow" in stale["note"]
    assert stale["weight SQNR (dB)"] < 10


def test_rounded_weights_show_their_error_only_beside_a_reference():
    apply, params, graph, x = plain()
    quantizers = jm.Quantizers(
        {f"{i}/w": jm.Quantizer(bits=4, axis=(1,)) for i in range(3)}
    ).pin(params)
    rounded = jm.round_weights(params, quantizers)
    wanted = rows_of(jm.compare(params, graph, quantizers, x))
    alone = rows_of(jm.compare(rounded, graph, quantizers, x))
    assert all(clean(r["SQNR (dB)"]) for r in alone.values())
    assert all(clean(r["weight SQNR (dB)"]) for r in alone.values())
    for reference in (params, (lambda p, x: apply(p, x), params)):
        given = rows_of(jm.compare(rounded, graph, quantizers, x, reference=reference))
        assert set(given) == {"0", "1", "2"}
        for name, row in given.items():
            assert row["weight SQNR (dB)"] < 30
            for key in ("SQNR (dB)", "own SQNR (dB)", "weight SQNR (dB)"):
                assert row[key] == pytest.approx(wanted[name][key], abs=1e-2)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["scan", "cond", "standardized", "tied_embedding"])
def test_every_node_on_a_grid_has_a_row(name):
    """Loops count all their iterations, branches the one that was taken."""
    apply, params, inputs, graph = model(name)
    quantizers = jm.calibrate(params, graph, [inputs], progress=False)
    table = jm.compare(params, graph, quantizers, inputs)
    grids = {n.name for n in graph.nodes if quantizers.activation(n.name)}
    layers = {
        s.name for s in graph.layers if (s.weight.name or s.name) in quantizers.weights
    }
    rows = rows_of(table)
    assert set(rows) == grids | layers
    for row in rows.values():
        ran = row["SQNR (dB)"] is not None
        assert not ran or row["SQNR (dB)"] > 15
        assert not row["note"]
    if name == "scan":

        def hook(node, run, operands):
            return (y := run(*operands)), (y if node.name == "stack/dense" else None)

        tree = jm.round_weights(params, quantizers)
        exact = jm.evaluate(apply, hook)(params, *inputs)[1]["stack/dense"]

        def simulated(node, run, operands):
            q = quantizers.activation(node.name)
            y = run(*operands)
            if q is not None and q.scale is not None and q.scale.ndim:
                i = run.iteration[-1]
                q = jm.Quantizer(
                    scale=q.scale[i],
                    zero_point=q.zero_point[i],
                    symmetric=q.symmetric,
                    signed=q.signed,
                    narrow=q.narrow,
                )
            y = y if q is None else q(y)
            return y, (y if node.name == "stack/dense" else None)

        noisy = jm.evaluate(apply, simulated)(tree, *inputs)[1]["stack/dense"]
        found = rows["stack/dense"]["SQNR (dB)"]
        error = np.float64(noisy) - np.float64(exact)
        assert found == pytest.approx(decibel(exact, error), abs=0.5)


def test_compressed_leaves_and_their_bounds():
    _, params, inputs, graph = model("inverted_residual")
    folded = jm.fold_batch_norm(params, graph)
    tree = jm.equalize(folded, graph, objective="range", progress=False)
    quantizers = jm.calibrate(tree, graph, [inputs], progress=False)
    rows = rows_of(jm.compare(tree, graph, quantizers, inputs))
    assert all(r["SQNR (dB)"] > 20 for r in rows.values())
    assert rows["expand"]["weight SQNR (dB)"] > 30


def test_without_grids_there_is_nothing_to_say():
    _, params, graph, x = plain(1)
    table = jm.compare(params, graph, jm.Quantizers(), x)
    assert len(table) == 0 and "outputs" in table.title
    wide = jm.Quantizers({"0/w": jm.Quantizer(bits=32)})
    assert len(jm.compare(params, graph, wide, x)) == 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_reference_is_refused_only_where_channels_are_rescaled(bits, per_channel):
    rng = np.random.default_rng(bits)
    w = jax.device_put(
        np.float32(rng.normal(size=(40, 24)) * np.exp(rng.normal(size=24)))
    )
    v = jax.device_put(np.float32(rng.normal(size=(24, 5))))
    apply = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    params, x = (
        {"w": w, "v": v},
        jax.device_put(np.float32(rng.normal(size=(32, 40)))),
    )
    graph = jm.trace(apply, params, x)
    config = jm.QuantConfig(weight_bits=bits, per_channel=per_channel)
    quantizers = jm.calibrate(params, graph, [x], config, progress=False).pin(params)
    compare = partial(jm.compare, graph=graph, quantizers=quantizers, batch=x)
    rounded = jm.round_weights(params, quantizers)
    key = jax.random.key(bits)
    steps = jax.tree.map(lambda a, b: 2 * jnp.abs(a - b), params, rounded)
    flipped = jax.tree.map(
        lambda a, s: a + s * jax.random.choice(key, jnp.arange(-1.0, 2.0), a.shape),
        rounded,
        steps,
    )
    trained = jax.tree.map(
        lambda a: a * (1 + 0.2 * jax.random.normal(key, a.shape)), params
    )
    for same in (params, rounded, flipped, trained):
        assert compare(same, reference=params)["own share"][0] is not None
    scale = jnp.exp(jnp.linspace(-1.5, 1.5, 24))
    equalized = {"w": w * scale[None], "v": v / scale[:, None]}
    one = {"w": w.at[:, :6].multiply(4), "v": v.at[:6].divide(4)}
    for other in (equalized, one, {"w": 2 * w, "v": v / 2}):
        with pytest.raises(ValueError, match="is scaled in another way"):
            compare(params, reference=other)


def test_refusals():
    _, params, graph, x = plain(2)
    grid = jm.Quantizer(scale=jnp.float32(0.01))
    quantizers = jm.Quantizers({"1/w": grid}, {"0/tanh": grid})
    compare = partial(jm.compare, params, graph)
    with pytest.raises(ValueError, match=r"jaxmet\.compare: .*NaN"):
        compare(quantizers, x * jnp.nan)
    with pytest.raises(ValueError, match=r"jaxmet\.compare: .*Give one batch"):
        compare(quantizers, jm.batched(x, 16))
    for several in ([x], iter([x]), ()):
        with pytest.raises(
            ValueError, match=r"jaxmet\.compare: batch .*Give one batch"
        ):
            compare(quantizers, several)
    for wrong in ((x, x), x[:, :2]):
        with pytest.raises(
            ValueError, match=r"compare: the model did not accept .*one b"
        ):
            compare(quantizers, wrong)
    with pytest.raises(ValueError, match=r"jaxmet\.compare: the parameters are traced"):
        jax.jit(lambda p: jm.compare(p, graph, quantizers, x).title)(params)
    for other in (jm.Quantizers({"5/w": grid}), jm.Quantizers({}, {"0/relu": grid})):
        with pytest.raises(ValueError, match=r"compare: the quantizers have one for '"):
            compare(other, x)
    with pytest.raises(ValueError, match=r"jaxmet\.compare: .*no parameter"):
        jm.compare({"other": x}, graph, quantizers, x)
    scaled = {**params, "1": {**params["1"], "w": 5.0 * params["1"]["w"]}}
    with pytest.raises(
        ValueError, match=r"jaxmet\.compare: '1/w'.*scaled in another way"
    ):
        compare(quantizers, x, reference=scaled)
    with pytest.raises(ValueError, match=r"compare, reference: .*no parameter"):
        compare(quantizers, x, reference={"other": x})
    short = lambda p, x: x @ p["0"]["w"] + p["0"]["b"][None]
    with pytest.raises(ValueError, match=r"jaxmet\.compare: .*does not run '0/tanh'"):
        compare(quantizers, x, reference=(short, params))
    assert math.isfinite(compare(quantizers, x)["SQNR (dB)"][0])


def test_the_graph_says_of_which_nodes():
    apply, params, graph, x = plain()
    quantizers = jm.calibrate(params, graph, [x], progress=False)
    whole = rows_of(jm.compare(params, graph, quantizers, x))
    some = rows_of(jm.compare(params, graph.only("1"), quantizers, x))
    assert set(some) == {n for n in whole if n == "1" or n.startswith("1/")} != set()
    assert all(some[n] == whole[n] for n in some)


def test_pixels_may_be_integers():
    apply, params, graph, x = plain()
    quantizers = jm.calibrate(params, graph, [x], progress=False)
    pixels = jnp.clip(jnp.round(3 * x), -5, 5).astype(jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # the model itself multiplies them
        table = jm.compare(params, graph, quantizers, pixels)
        simulated = jax.jit(jm.simulate(apply, quantizers))(params, pixels)
    exact = apply(params, pixels.astype(jnp.float32))
    found = float(re.search(r"outputs (-?[\d.]+) dB", table.title)[1])
    assert abs(found - decibel(exact, simulated - exact)) < 0.1


def test_quantizers_of_other_widths_are_refused():
    _, params, graph, x = plain()
    wider, more, other, y = plain(size=8)
    quantizers = jm.calibrate(more, other, [y], progress=False).pin(more)
    with pytest.raises(ValueError, match=r"compare: the quantizer of '0/w' has scales"):
        jm.compare(params, graph, quantizers, x)
