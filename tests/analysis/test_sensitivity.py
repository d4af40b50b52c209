"""The score of every quantizer alone, and without it, against networks set by hand."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmet as jm


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="a")(x))
        x = x + nn.Conv(6, (3, 3), name="b")(x)
        return nn.Dense(4, name="c")(nn.relu(x).mean((1, 2)))


@pytest.fixture(scope="module")
def net():
    model, x = Net(), jax.random.normal(jax.random.key(0), (8, 6, 6, 3))
    params = jax.jit(model.init)(jax.random.key(1), x)
    graph = jm.trace(model.apply, params, x)
    config = jm.QuantConfig(weight_bits=4, bias="int32")
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    wanted = model.apply(params, x)

    def score(apply, params):
        return -jnp.mean((apply(params, x) - wanted) ** 2)

    return model.apply, params, graph, quantizers, score


@pytest.fixture(scope="module")
def table(net):
    _, params, graph, quantizers, score = net
    return jm.sensitivity(params, graph, quantizers, score, progress=False)


def only(quantizers, *names):
    """These alone on; `set` would mean what lies below a name too."""
    groups = [
        {n: dataclasses.replace(q, enabled=n in names) for n, q in group.items()}
        for group in (quantizers.weights, quantizers.activations)
    ]
    return dataclasses.replace(
        quantizers, **dict(zip(("weights", "activations"), groups))
    )


def test_each_row_is_the_score_of_that_network(net, table):
    apply, params, _, quantizers, score = net
    every = [*quantizers.weights, *quantizers.activations]
    rows = [row for row in table if row["tensor"] != "(all)"]
    assert {row["tensor"] for row in rows} == set(every) and len(rows) == len(every)
    for row in rows:
        if quantizers.weights.get(row["tensor"], jm.Quantizer()).product:
            continue  # a bias has no quantizer where its product has none
        rest = [n for n in every if n != row["tensor"]]
        for names, found in (
            ([row["tensor"]], row["only this"]),
            (rest, row["all but this"]),
        ):
            one = jm.simulate(apply, only(quantizers, *names))
            assert found == pytest.approx(float(score(one, params)), rel=1e-4, abs=1e-9)


def test_the_last_rows_are_weights_activations_and_both(net, table):
    apply, params, _, quantizers, score = net
    groups = [list(quantizers.weights), list(quantizers.activations)]
    for row, names in zip(list(table)[-3:-1], groups):
        one = jm.simulate(apply, only(quantizers, *names))
        assert row["only this"] == pytest.approx(float(score(one, params)), rel=1e-4)
    last = list(table)[-1]
    assert last["kind"] is None and last["all but this"] == pytest.approx(0, abs=1e-9)
    whole = float(score(jm.simulate(apply, quantizers), params))
    assert last["only this"] == pytest.approx(whole, rel=1e-4)
    assert f"quantized {whole:.4g}" in table.title


def test_layers_and_kinds(net, table):
    rows = {row["tensor"]: (row["layer"], row["kind"], row["bits"]) for row in table}
    assert rows["a/kernel"] == ("a", "weight", 4)
    assert rows["c/bias"] == ("c", "weight", 32)
    assert rows["c"] == ("c", "activation", 8)


def test_widths_are_data_too(net):
    apply, params, graph, quantizers, score = net
    found = jm.sensitivity(
        params, graph.only("a"), quantizers, score, bits=(3, 8), progress=False
    )
    rows = [row for row in found if row["tensor"] == "a/kernel"]
    assert [row["bits"] for row in rows] == [3, 8]
    for row in rows:
        other = only(quantizers.set("a/kernel", bits=row["bits"]), "a/kernel")
        expected = float(score(jm.simulate(apply, other), params))
        assert row["only this"] == pytest.approx(expected, rel=1e-4)
    assert rows[0]["only this"] < rows[1]["only this"]
    assert rows[0]["all but this"] == rows[1]["all but this"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", ["host", "jitted by the user", "together"])
def test_however_it_runs_it_is_the_same_table(net, table, how):
    _, params, graph, quantizers, score = net

    def on_the_host(apply, params):
        run = jax.jit(apply) if how == "jitted by the user" else apply
        return float(score(run, params))

    found = jm.sensitivity(
        params,
        graph.only("b", "b*"),
        quantizers,
        score if how == "together" else on_the_host,
        together=3,
        progress=False,
    )
    assert 0 < len(found) < len(table)
    for row in found:
        (same,) = table.where(tensor=row["tensor"], kind=row["kind"])
        assert row["only this"] == pytest.approx(same["only this"], rel=1e-4, abs=1e-9)
        assert row["all but this"] == pytest.approx(
            same["all but this"], rel=1e-4, abs=1e-9
        )


def test_one_program_runs_every_row(net):
    _, params, graph, quantizers, score = net
    traced = []

    def counted(apply, params):
        traced.append(1)
        return score(apply, params)

    jm.sensitivity(params, graph, quantizers, counted, bits=(2, 4, 8), progress=False)
    assert len(traced) == 2  # one look whether it can be traced, one program


def test_static_keywords_reach_the_model_on_the_host():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(4, name="a")(x))

    model, x = Dropped(), jnp.ones((2, 3))
    params = model.init(jax.random.key(0), x, train=False)
    graph = jm.trace(model.apply, params, x, train=False)
    quantizers = jm.calibrate(params, graph, [x], progress=False)

    def score(apply, params):
        return float(jnp.sum(apply(params, x, train=False)))

    assert len(jm.sensitivity(params, graph, quantizers, score, progress=False)) > 3


@pytest.mark.slow
def test_an_nnx_model_scores_the_same(net):
    class Twin(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 5, rngs=rngs)
            self.c = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.c(nnx.relu(self.a(x)))

    x = jax.random.normal(jax.random.key(3), (16, 3))
    apply, params, _ = jm.functional(Twin(nnx.Rngs(0)))
    wanted = apply(params, x)

    def plain(p, x):
        first = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"][None])
        return first @ p["c"]["kernel"] + p["c"]["bias"][None]

    tree = {
        name: {
            leaf: jnp.asarray(params[name][leaf][...]) for leaf in ("kernel", "bias")
        }
        for name in ("a", "c")
    }
    tables = []
    for run, p in ((apply, params), (plain, tree)):
        graph = jm.trace(run, p, x)
        quantizers = jm.calibrate(p, graph, [x], progress=False)
        score = lambda apply, p: -jnp.sum((apply(p, x) - wanted) ** 2)
        tables.append(jm.sensitivity(p, graph, quantizers, score, progress=False))
    assert tables[0]["tensor"] == tables[1]["tensor"]
    assert tables[0]["only this"] == pytest.approx(
        tables[1]["only this"], rel=1e-4, abs=1e-7
    )


@pytest.mark.slow
def test_a_score_without_number_stays_unless_float_has_it(net):
    _, params, graph, quantizers, score = net

    def picky(apply, params):
        found = score(apply, params)
        return jnp.where(found < -1e-3, jnp.nan, found)

    table = jm.sensitivity(
        params, graph.only("a"), quantizers, picky, bits=[2], progress=False
    )
    assert np.isnan(table.where(tensor="a/kernel")["only this"][0])
    assert "a/kernel" in table.title
    with pytest.raises(ValueError, match="score of the float model is nan"):
        nothing = lambda apply, params: score(apply, params) * jnp.nan
        jm.sensitivity(params, graph, quantizers, nothing, progress=False)


@pytest.mark.parametrize(
    "change, stated",
    [
        ({"bits": [1]}, "bits is 1"),
        ({"bits": 8}, r"bits is 8. Give the widths to try"),
        ({"bits": ()}, r"bits is \(\). Give the widths to try"),
        ({"together": 0}, "together"),
        (
            {"score": lambda apply, params: jnp.zeros((), jnp.complex64)},
            "is a complex number",
        ),
        ({"quantizers": jm.Quantizers({"z": jm.Quantizer()})}, "sensitivity: .*'z'"),
        ({"quantizers": jm.Quantizers()}, "no quantizer of the selected nodes is on"),
        ({"score": lambda apply, params: jnp.ones(3)}, r"array of shape \(3,\)"),
    ],
)
def test_bad_input(net, change, stated):
    _, params, graph, quantizers, score = net
    given = {"graph": graph, "quantizers": quantizers, "score": score} | change
    options = {k: given.pop(k) for k in ("bits", "together") if k in given}
    with pytest.raises(ValueError, match=stated):
        jm.sensitivity(params, *given.values(), **options, progress=False)


def test_tables_are_saved(table, tmp_path):
    jm.save(tmp_path / "table.npz", table=table)
    assert jm.load(tmp_path / "table.npz").table.columns == table.columns
