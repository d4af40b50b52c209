"""The table of scores against networks really rebuilt, and what is chosen from it."""

import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import isotonic_regression

import jaxmet as jm


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="a")(x))
        x = nn.relu(nn.Conv(12, (3, 3), strides=(2, 2), name="b")(x))
        x = nn.relu(nn.Conv(8, (1, 1), name="c")(x))
        return nn.Dense(4, name="d")(x.mean((1, 2)))


RATIOS = (0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def net():
    model, keys = Net(), jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (16, 8, 8, 6))
    params = jax.jit(model.init)(keys[1], x)
    graph, wanted = jm.trace(model.apply, params, x), model.apply(params, x)

    def score(apply, params):
        return -jnp.mean((apply(params, x) - wanted) ** 2)

    return model.apply, params, x, graph, score


@pytest.fixture(scope="module")
def table(net):
    _, params, x, graph, score = net
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jm.score_ratios(params, graph, score, batches=shape, progress=False)


def rebuilt(method, params, graph, layer, ratio, **options):
    if method == "prune":
        return jm.prune(params, graph, {layer: ratio})
    return jm.factorize(params, graph, ratios={layer: ratio}, method=method, **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spatial", "weight", "prune"])
def test_every_row_scores_as_the_network_that_is_really_small(net, method):
    apply, params, x, graph, score = net
    table = jm.score_ratios(
        params, graph, score, batches=jax.ShapeDtypeStruct(x.shape, x.dtype),
        method=method, ratios=RATIOS, progress=False,
    )  # fmt: skip
    layers = ["b", "c", "d"] if method == "prune" else ["a", "b", "c", "d"]
    assert list(dict.fromkeys(table["layer"])) == [*layers, "(all)"]
    whole = jm.cost(params, graph, x[:1])
    run = jax.jit(jm.lift(apply))
    for row in table:
        if row["layer"] == "(all)" or row["ratio"] == 1:
            assert row["score"] == pytest.approx(0.0, abs=1e-9)
            for name, costs in row["costs"].items():
                assert [costs["macs"]] == whole.where(layer=name)["macs"]
            continue
        small = rebuilt(method, params, graph, row["layer"], row["ratio"])
        assert row["score"] == pytest.approx(
            float(score(run, small)), rel=1e-3, abs=1e-7
        )
        after = jm.cost(small, jm.trace(apply, small, x), x[:1])
        kernels = {n: params["params"][n]["kernel"].size for n in "abcd"}
        for key in ("macs", "parameters"):
            assert row[key] == sum(c[key] for c in row["costs"].values())
            gone = whole[key][-1] - after[key][-1]
            if key == "macs":
                assert gone == sum(
                    whole.where(layer=n)[key][0] - c[key]
                    for n, c in row["costs"].items()
                )
            else:  # biases lose entries too
                weights = sum(kernels[n] - c[key] for n, c in row["costs"].items())
                assert gone - 12 < weights <= gone


@pytest.mark.slow
def test_rows_of_pruning_are_refitted_as_pruning_does(net):
    apply, params, x, graph, score = net
    options = {"batches": [x], "progress": False}
    table = jm.score_ratios(
        params, graph, score, method="prune", ratios=RATIOS, **options
    )
    run = jax.jit(jm.lift(apply))
    blind = jax.ShapeDtypeStruct(x.shape, x.dtype)
    plain = jm.score_ratios(
        params,
        graph,
        score,
        method="prune",
        ratios=RATIOS,
        batches=blind,
        progress=False,
    )
    gained = []
    for row, bare in zip(table, plain, strict=True):
        if row["ratio"] < 1:
            small = jm.prune(params, graph, {row["layer"]: row["ratio"]}, **options)
            found = float(score(run, small))
            assert row["score"] == pytest.approx(found, rel=1e-2, abs=1e-7)
            gained.append(row["score"] - bare["score"])
    assert len(gained) == 9 and np.mean(gained) > 0


@pytest.mark.slow
def test_scores_that_cannot_be_traced_give_the_same_table(net):
    _, params, x, graph, score = net
    shape, calls = jax.ShapeDtypeStruct(x.shape, x.dtype), []

    def on_the_host(apply, params):
        calls.append(apply)
        found = np.asarray(apply(params, x))  # a traced array has no numbers
        return float(score(lambda p, x: found, params))

    options = {"batches": shape, "ratios": RATIOS, "progress": False}
    one = jm.score_ratios(params, graph, score, **options)
    two = jm.score_ratios(params, graph, on_the_host, **options)
    np.testing.assert_allclose(one["score"], two["score"], rtol=1e-4, atol=1e-7)
    assert len({id(apply) for apply in calls[1:]}) == 1


def test_one_program_scores_every_row(net):
    _, params, x, graph, score = net
    traces = []

    def counted(apply, params):
        traces.append(None)
        return score(apply, params)

    jm.score_ratios(
        params,
        graph,
        counted,
        batches=jax.ShapeDtypeStruct(x.shape, x.dtype),
        progress=False,
    )
    assert len(traces) == 2  # once to see whether it can be traced


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spatial", "prune"])
def test_rows_that_run_together_score_the_same(net, method):
    _, params, x, graph, score = net
    shape, traced = jax.ShapeDtypeStruct(x.shape, x.dtype), []

    def counted(apply, params):
        traced.append(None)
        return score(apply, params)

    options = {"batches": shape, "method": method, "ratios": RATIOS, "progress": False}
    alone = jm.score_ratios(params, graph, score, **options)
    for together in (4, 100):
        traced.clear()
        table = jm.score_ratios(params, graph, counted, together=together, **options)
        assert len(traced) == 2  # whether it can be traced, and the one program
        np.testing.assert_allclose(table["score"], alone["score"], rtol=1e-4, atol=1e-6)
    assert len(set(alone["score"])) > 5


@pytest.mark.slow
def test_with_data_the_cut_is_whitened(net):
    _, params, x, graph, score = net
    keys = jax.random.split(jax.random.key(5), 2)
    through = jax.random.normal(keys[0], (6, 2)) @ jax.random.normal(keys[1], (2, 6))
    tables = [
        jm.score_ratios(params, graph.only("a"), score, batches=batches, progress=False)
        for batches in (jax.ShapeDtypeStruct(x.shape, x.dtype), [x @ through])
    ]
    plain, tuned = (np.array(t["score"]) for t in tables)
    assert np.any(np.abs(plain - tuned) > 1e-4)


def test_a_whitened_row_scores_as_the_whitened_network():
    """Of dense layers nothing is refitted after the cut: the row is the network itself."""

    def apply(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        "a": jax.random.normal(keys[0], (12, 16)),
        "b": jax.random.normal(keys[1], (16, 10)),
    }
    x = jax.random.normal(keys[2], (64, 12)) @ jax.random.normal(keys[3], (12, 12))
    x = x * jnp.linspace(0.1, 3, 12)[None]
    graph, wanted = jm.trace(apply, params, x), apply(params, x)

    def score(run, tree):
        return -jnp.mean((run(tree, x) - wanted) ** 2)

    options = {"batches": [x], "progress": False}
    table = jm.score_ratios(params, graph, score, ratios=RATIOS, **options)
    gained = []
    for row in (r for r in table if r["ratio"] < 1):
        ratios = {row["layer"]: row["ratio"]}
        small = jm.factorize(params, graph, ratios=ratios, **options)
        assert row["score"] == pytest.approx(float(score(jm.lift(apply), small)), 1e-3)
        plain = jm.factorize(params, graph, ratios=ratios)
        gained.append(row["score"] - float(score(jm.lift(apply), plain)))
    assert len(gained) == 6 and min(gained) > 0


class Tied(nn.Module):
    """A sum that two layers read, and a concatenation that a third reads with it."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="a")(x))
        y = nn.relu(nn.Conv(6, (3, 3), name="b")(x))
        x = x + nn.Conv(8, (3, 3), name="c")(y)
        z = nn.Conv(4, (1, 1), name="d")(x)
        return nn.Dense(3, name="e")(jnp.concatenate([x, z], -1).mean((1, 2)))


@pytest.mark.slow
def test_layers_that_read_the_same_channels_take_one_ratio():
    model, x = Tied(), jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    params = jax.jit(model.init)(jax.random.key(1), x)
    graph, wanted = jm.trace(model.apply, params, x), model.apply(params, x)

    def score(apply, params):
        return -jnp.mean((apply(params, x) - wanted) ** 2)

    table = jm.score_ratios(
        params, graph, score, batches=[x], method="prune", progress=False
    )
    tied = dict(zip(table["layer"], table["tied"], strict=True))
    assert tied == {"b": "d, e", "c": None, "(all)": None}
    before = jm.cost(params, graph, x[:1])
    own = {n: before.where(layer=n)["macs"][0] for n in "abcde"}
    # Whoever reads or makes the channels: 'd' makes some that 'e' reads.
    (costs,) = table.where(layer="b", ratio=1.0)["costs"]
    assert {n: c["macs"] for n, c in costs.items()} == own
    (costs,) = table.where(layer="c", ratio=1.0)["costs"]
    assert {n: c["macs"] for n, c in costs.items()} == {n: own[n] for n in "bc"}
    again = jm.select_ratios(table, 0.9, manual={"d": 0.5, "b": 0.5})
    assert again["b"] == again["d"] == again["e"] == 0.5
    with pytest.raises(ValueError, match="'d' reads the same channels as 'b'"):
        jm.select_ratios(table, 0.9, manual={"b": 0.5, "d": 0.6})
    for target in (0.3, 0.5, 0.6, 0.8):
        chains, best = every_choice(table, own, before["macs"][-1], target)
        for method in ("greedy", "optimal"):
            ratios = jm.select_ratios(table, target, method=method)
            assert ratios.get("b") == ratios.get("d") == ratios.get("e")
            small = jm.prune(params, graph, ratios)
            after = jm.cost(small, jm.trace(model.apply, small, x), x[:1])
            assert after["macs"][-1] <= target * before["macs"][-1]
            chosen = (ratios.get("b", 1.0), ratios.get("c", 1.0))
            if method == "greedy":
                assert chosen == max(chains)[1]
            else:
                score = sum(best[0](n, r) for n, r in zip("bc", chosen))
                assert score >= 1.5 * best[1]  # scores are negative; 1.0 is the optimum


def every_choice(table, own, total, target):
    """By brute force: what one threshold for both layers may choose, and the best score."""
    kept = {
        (row["layer"], row["ratio"]): row for row in table if row["layer"] in ("b", "c")
    }
    ratios = sorted({r for _, r in kept})
    rising = {
        n: dict(
            zip(ratios, isotonic_regression([kept[n, r]["score"] for r in ratios]).x)
        )
        for n in "bc"
    }

    def cost(pair):
        left = dict(own)
        for n, r in zip("bc", pair):
            for name, row in kept[n, r]["costs"].items():
                left[name] *= row["macs"] / own[name]
        return sum(left.values())

    def cheapest(threshold):
        return tuple(
            min(r for r in ratios if rising[n][r] >= threshold or r == 1.0)
            for n in "bc"
        )

    thresholds = {s for each in rising.values() for s in each.values()}
    chains = [
        (cost(p), p) for p in map(cheapest, thresholds) if cost(p) <= target * total
    ]
    within = [p for p in itertools.product(ratios, ratios) if cost(p) <= target * total]
    best = max(sum(rising[n][r] for n, r in zip("bc", p)) for p in within)
    return chains, (lambda n, r: rising[n][r], best)


@pytest.mark.slow
def test_depthwise_convolutions_count_once():
    class Depthwise(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(16, (1, 1), name="expand")(x))
            x = nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x)
            return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))

    model, x = Depthwise(), jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    params = jax.jit(model.init)(jax.random.key(1), x)
    graph = jm.trace(model.apply, params, x)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    table = jm.score_ratios(
        params,
        graph,
        lambda apply, params: jnp.sum(apply(params, x)),
        batches=shape,
        method="prune",
        ratios=(0.5,),
        progress=False,
    )
    small = jm.prune(params, graph, {"head": 0.5})
    after = jm.cost(small, jm.trace(model.apply, small, x), x[:1])
    (costs,) = table.where(layer="head", ratio=0.5)["costs"]
    assert set(costs) == {"expand", "depthwise", "head"}
    for name, cost in costs.items():
        assert [cost["macs"]] == after.where(layer=name)["macs"]
    with pytest.raises(ValueError, match=r"'depthwise' cannot .* 'head' does without"):
        jm.prune(params, graph, {"depthwise": 0.5})


@pytest.mark.parametrize("method", ["greedy", "optimal"])
@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_the_target_is_kept_by_the_network_that_is_built(net, table, method, budget):
    apply, params, x, graph, _ = net
    before = jm.cost(params, graph, x[:1]).where(layer="(all)")[budget][0]
    for target in (0.5, 0.8):
        ratios = jm.select_ratios(table, target, method=method, budget=budget)
        small = jm.factorize(params, graph, ratios=ratios)
        after = jm.cost(small, jm.trace(apply, small, x), x[:1])
        assert after.where(layer="(all)")[budget][0] <= target * before * 1.01
        assert ratios
    assert jm.select_ratios(table, 1.0, method=method) == {}


def test_the_best_of_all_combinations_is_chosen(net):
    _, params, x, graph, score = net
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    table = jm.score_ratios(
        params, graph, score, batches=shape, ratios=RATIOS, progress=False
    )
    layers = ["a", "b", "c", "d"]
    rows = {n: table.where(layer=n) for n in layers}
    total = table.where(layer="(all)")["macs"][0]
    best, found = -np.inf, None
    for choice in itertools.product(range(4), repeat=4):
        cost = sum(rows[n]["macs"][c] for n, c in zip(layers, choice, strict=True))
        worth = sum(rows[n]["score"][c] for n, c in zip(layers, choice, strict=True))
        if cost <= 0.6 * total and worth > best:
            best, found = worth, choice
    wanted = {n: rows[n]["ratio"][c] for n, c in zip(layers, found, strict=True)}
    chosen = jm.select_ratios(table, 0.6, fit=False)
    assert chosen == {n: r for n, r in wanted.items() if r < 1}


def test_published_thresholds():
    """AIMET's example: a threshold of 45 means ratio .5, 48 means .7."""
    scores = {0.1: 11.0, 0.3: 23.0, 0.5: 47.0, 0.7: 85.0, 0.9: 89.0, 1.0: 90.0}
    rows = [("x", r, round(1000 * r), s) for r, s in scores.items()]
    rows.append(("(all)", 1.0, 1000, 90.0))
    columns = dict(
        zip(("layer", "ratio", "macs", "score"), zip(*rows, strict=True), strict=True)
    )
    table = jm.Table(columns | {"parameters": columns["macs"]})
    for target, ratio in ((0.55, 0.5), (0.7, 0.7), (0.69, 0.5), (0.1, 0.1)):
        assert jm.select_ratios(table, target, method="greedy") == {"x": ratio}
    with pytest.raises(ValueError, match=r"0\.05 cannot be reached.*0\.1000"):
        jm.select_ratios(table, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "optimal"])
def test_manual_ratios_are_part_of_the_budget(net, table, method):
    apply, params, x, graph, score = net
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    manual = {"a": 0.9, "d": 1.0}
    found = jm.select_ratios(table, 0.8, manual=manual, method=method)
    assert found["a"] == 0.9 and "d" not in found
    small = jm.factorize(params, graph, ratios=found)
    after, before = (
        jm.cost(t, jm.trace(apply, t, x), x[:1])["macs"][-1] for t in (small, params)
    )
    assert 0.6 * before < after <= 0.8 * before
    fewer = jm.score_ratios(
        params, graph.without("b"), score, batches=shape, progress=False
    )
    assert "b" not in fewer["layer"]


@pytest.mark.slow
def test_a_run_that_stops_goes_on_after_its_last_row(net, tmp_path):
    _, params, x, graph, score = net
    shape, calls = jax.ShapeDtypeStruct(x.shape, x.dtype), []

    def on_the_host(apply, params):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return float(np.asarray(score(apply, params)))

    options = {
        "batches": shape,
        "ratios": RATIOS,
        "progress": False,
        "checkpoint": tmp_path,
    }
    with pytest.raises(KeyboardInterrupt):
        jm.score_ratios(params, graph, on_the_host, **options)
    before = len(calls)
    table = jm.score_ratios(params, graph, on_the_host, **options)
    rows = len({(r["layer"], r["kept"]) for r in table if r["ratio"] < 1}) + 1
    # One try of each run says whether the score can be traced.
    assert len(calls) - before == 1 + rows - (before - 2)
    again = jm.score_ratios(
        params, graph, score, batches=shape, ratios=RATIOS, progress=False
    )
    np.testing.assert_allclose(table["score"], again["score"], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="holds a run on another"):
        jm.score_ratios(params, graph, score, **(options | {"method": "weight"}))
    thrice = lambda apply, params: 3 * on_the_host(apply, params)
    with pytest.raises(ValueError, match="holds a run on another"):
        jm.score_ratios(params, graph, thrice, **options)


LEAK = []


def leaking(apply, params):
    LEAK.append(apply(params, jnp.ones((1, 8, 8, 6))))
    return jnp.sum(LEAK[-1])


BAD = {
    "nan": ({"score": lambda a, p: jnp.nan}, "the score of the model as it is is nan"),
    "infinite": ({"score": lambda a, p: -jnp.inf}, "as it is is -inf. .*finite"),
    "rows": ({"rows": 0}, "rows is 0"),
    "array": (
        {"score": lambda a, p: jnp.ones(3)},
        r"the score is an array of shape \(3,\)",
    ),
    "text": ({"score": lambda a, p: "good"}, "the score is str"),
    "leak": ({"score": leaking}, "keeps an array that is being traced"),
    "ratio": ({"ratios": (0.5, 1.5)}, r"ratios holds \[1.5\]"),
    "method": ({"method": "luck"}, "method is 'luck'"),
    "together": ({"together": 0}, "together is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(net, case):
    _, params, x, graph, score = net
    options, message = BAD[case]
    options = {
        "score": score,
        "batches": jax.ShapeDtypeStruct(x.shape, x.dtype),
    } | options
    score = options.pop("score")
    with pytest.raises(ValueError, match=rf"jaxmet\.score_ratios: .*{message}"):
        jm.score_ratios(params, graph, score, progress=False, **options)


BAD_CHOICES = {
    "zero": ({"target": 0.0}, "the target is 0"),
    "above one": ({"target": 1.5}, "the target is 1.5"),
    "unreachable": (
        {"target": 0.01},
        r"0\.01 cannot be reached\. The smallest .* is 0\.",
    ),
    "method": ({"method": "luck"}, "method is 'luck'.*'greedy' or 'optimal'"),
    "budget": ({"budget": "bytes"}, "budget is 'bytes'.*'macs' or 'parameters'"),
    "layer": ({"manual": {"z": 0.5}}, "the table has no layer 'z'"),
    "manual": ({"manual": {"a": 2.0}}, "manual ratio of 'a' is 2"),
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_bad_selections(table, case):
    options, message = BAD_CHOICES[case]
    with pytest.raises(ValueError, match=rf"(?s)jaxmet\.select_ratios: .*{message}"):
        jm.select_ratios(table, **({"target": 0.5} | options))


@pytest.mark.parametrize("digits", [3, 4, 5])
def test_the_ratio_that_is_named_can_be_reached(table, digits):
    whole = table["macs"][-1]
    columns = dict(table.columns)
    columns["macs"] = [*table["macs"][:-1], whole + digits]
    costs = jm.Table(columns)
    with pytest.raises(ValueError, match=r"allows is 0\.\d{4}") as refused:
        jm.select_ratios(costs, 0.01)
    named = float(re.search(r"allows is (0\.\d{4})", str(refused.value))[1])
    assert jm.select_ratios(costs, named)


def test_bad_tables(table):
    holed = dict(table.columns) | {"score": [float("nan")] * len(table)}
    for bad, message in (
        (jm.Table({"layer": ["a"]}), "the table is none of"),
        (jm.Table(holed), "scores that are no numbers"),
        (table.where(layer="a"), "no rows of layers, or none of the whole"),
    ):
        with pytest.raises(ValueError, match=f"jaxmet.select_ratios: .*{message}"):
            jm.select_ratios(bad, 0.5)


def halves(params, inputs):
    """Inputs in a dict, and a layer whose outputs two others read, a part each."""
    h = jax.nn.relu(inputs["x"] @ params["a"])
    return h[:, :12] @ params["b"] + jnp.tanh(h[:, 12:] @ params["c"])


@pytest.mark.parametrize("sighted", [False, True])
def test_pieces_are_scored_as_they_are_pruned(sighted):
    keys = jax.random.split(jax.random.key(4), 4)
    shapes = {"a": (6, 16), "b": (12, 5), "c": (4, 5)}
    params = {
        n: jax.random.normal(k, s)
        for (n, s), k in zip(shapes.items(), keys, strict=False)
    }
    inputs = {"x": jax.random.normal(keys[3], (80, 6))}
    graph, wanted = jm.trace(halves, params, inputs), halves(params, inputs)

    def score(run, tree):
        return -jnp.mean((run(tree, inputs) - wanted) ** 2)

    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    options = {"batches": [inputs] if sighted else shape, "progress": False}
    table = jm.score_ratios(
        params, graph, score, method="prune", ratios=(0.5,), **options
    )
    if not sighted:
        options.pop("batches")
    found = {r["layer"]: r for r in table if r["ratio"] < 1}
    assert {n: (r["kept"], r["of"]) for n, r in found.items()} == {
        "b": (6, 12),
        "c": (2, 4),
    }
    for name, row in found.items():
        small = jm.prune(params, graph, {name: 0.5}, **options)
        made = float(score(jm.lift(halves), small))
        assert row["score"] == pytest.approx(made, rel=1e-3) and made < -1e-3


def test_a_checkpoint_knows_the_model_and_the_data(net, tmp_path):
    _, params, x, graph, score = net
    options = {"ratios": (0.5,), "progress": False, "checkpoint": tmp_path}
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    jm.score_ratios(params, graph.only("d"), score, batches=shape, **options)
    smooth = type("Smooth", (Net,), {})

    def gelu(params, x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn, "relu", nn.gelu)
            return smooth().apply(params, x)

    other = jm.trace(gelu, params, x)
    for given, batches in ((other, shape), (graph, [x]), (graph, [2 * x])):
        with pytest.raises(ValueError, match="holds a run on another"):
            jm.score_ratios(params, given.only("d"), score, batches=batches, **options)


@pytest.mark.parametrize("method", ["spatial", "weight"])
def test_windows_that_change_the_size_are_counted_as_they_run(method):
    """Little padding, and inputs spread as transposed convolutions do."""

    class Resized(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(12, (5, 5), padding="VALID", name="valid")(x))
            x = nn.relu(nn.ConvTranspose(10, (4, 4), (2, 2), name="up")(x))
            return nn.Conv(3, (5, 5), padding="VALID", name="last")(x)

    model, keys = Resized(), jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 9, 9, 12))
    params = jax.jit(model.init)(keys[1], x)
    graph = jm.trace(model.apply, params, x)

    def macs(tree, name):
        table = jm.cost(tree, jm.trace(model.apply, tree, x), x[:1])
        return sum(r["macs"] for r in table if f"{r['layer']}/".startswith(f"{name}/"))

    def score(apply, params):
        return -jnp.mean(apply(params, x) ** 2)

    table = jm.score_ratios(
        params,
        graph,
        score,
        batches=jax.ShapeDtypeStruct(x.shape, x.dtype),
        method=method,
        ratios=(0.3, 0.6),
        progress=False,
    )
    for row in (row for row in table if row["ratio"] < 1):
        name, ratios = row["layer"], {row["layer"]: row["ratio"]}
        small = jm.factorize(params, graph, ratios=ratios, method=method)
        assert row["costs"][name]["macs"] == macs(small, name) <= macs(params, name)
        assert (row["kept"] == row["of"]) == (not len(jm.widths(small)))
    ratios = jm.select_ratios(table, 0.5)
    small = jm.factorize(params, graph, ratios=ratios, method=method)
    whole = [macs(tree, "(all)") for tree in (small, params)]
    assert whole[0] <= 0.5 * whole[1]
