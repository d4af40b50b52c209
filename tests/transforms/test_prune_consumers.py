"""Channels as those who read them see them: weights in any form, pieces, several consumers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from by_hand import best_fit
from jaxmet.tree import plain_arrays
from zoo import model, traced

densify = jax.jit(plain_arrays.densify)  # one program a tree, not one an operation

# How a weight of so many axes reads eight channels, in some as two axes of two and four.
FORMS = {
    "right": ((8, 5), lambda h, w: h @ w),
    "left": ((5, 8), lambda h, w: (w @ h.T).T),
    "transposed": ((5, 8), lambda h, w: h @ w.T),
    "reshaped": ((2, 4, 5), lambda h, w: h @ w.reshape(8, 5)),
    "turned": ((5, 4, 2), lambda h, w: h @ w.transpose(2, 1, 0).reshape(8, 5)),
    "cast": ((8, 5), lambda h, w: h @ w.astype(jnp.bfloat16).astype(h.dtype)),
    "heads": (
        (2, 4, 5),
        lambda h, w: jnp.einsum("nij,ijo->no", h.reshape(-1, 2, 4), w),
    ),
}


def drawn(seed, *shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def form(name):
    shape, use = FORMS[name]
    a, b, x = drawn(0, (6, 8), shape, (200, 6))
    params = {"a": a, "b": b}
    if name == "cast":
        params["b"] = params["b"].astype(jnp.bfloat16).astype(jnp.float32)

    def apply(p, x):
        return use(jax.nn.relu(x @ p["a"]), p["b"])

    return apply, params, x, jm.trace(apply, params, x)


def matrix(name, weight):
    """The values of a weight, one row per channel."""
    return FORMS[name][1](jnp.eye(8), weight)


def kept_columns(small):
    return np.flatnonzero(np.any(np.asarray(densify(small)["a"]) != 0, axis=0))


IN_TWO = ("reshaped", "turned", "heads")


@pytest.mark.parametrize("name", [n for n in FORMS if n not in IN_TWO])
def test_channels_that_are_read_with_zeros_go_first(name):
    apply, params, x, graph = form(name)
    dead = np.array([0, 3, 4, 6])
    shown = np.asarray(matrix(name, jnp.arange(40.0).reshape(params["b"].shape)))
    places = shown[dead].astype(int).ravel()  # where those rows stand in the weight
    params |= {"b": params["b"].ravel().at[places].set(0).reshape(params["b"].shape)}
    assert not np.any(np.asarray(matrix(name, params["b"]))[dead])
    small = jm.prune(params, graph, 0.5)
    np.testing.assert_array_equal(kept_columns(small), [1, 2, 5, 7])
    np.testing.assert_allclose(
        jax.jit(jm.lift(apply))(small, x), apply(params, x), atol=1e-5
    )


@pytest.mark.parametrize("name", FORMS)
def test_data_choose_and_refit_a_weight_of_any_form(name):
    apply, params, x, graph = form(name)
    wanted, hidden = apply(params, x), jax.nn.relu(x @ params["a"])
    small, report = jm.prune(
        params, graph, 7 / 8, batches=[x], progress=False, with_report=True
    )
    kept = kept_columns(small)
    if name in IN_TWO:  # 3 of 4 for the one of 2 that stays: the roots of 7/8 of both
        assert len(kept) == 3
    else:
        losses = [
            best_fit(hidden, wanted, np.delete(np.arange(8), i), bias=False)[1]
            for i in range(8)
        ]
        np.testing.assert_array_equal(kept, np.delete(np.arange(8), np.argmin(losses)))
    fit, loss = best_fit(hidden, wanted, kept, bias=False)
    tight = {"rtol": 2e-2, "atol": 5e-2} if name == "cast" else {"atol": 2e-3}
    made = jax.jit(jm.lift(apply))(small, x)
    np.testing.assert_allclose(made, np.asarray(hidden)[:, kept] @ fit, **tight)
    share = np.sqrt(loss / np.sum(np.asarray(wanted, np.float64) ** 2))
    errors = [e for e in report["error"] if e is not None]
    assert errors[0] == pytest.approx(share, rel=2e-2)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.9])
def test_a_ratio_is_shared_by_the_axes_that_a_layer_sums_over(ratio):
    def apply(p, x):
        h = jax.nn.relu(jnp.einsum("ni,ihd->nhd", x, p["a"]))
        return jnp.einsum("nhd,hdo->no", h, p["b"])

    a, b, x = drawn(0, (6, 20, 30), (20, 30, 5), (32, 6))
    params = {"a": a, "b": b}
    graph, wanted = jm.trace(apply, params, x), apply(params, x)
    small = jm.prune(params, graph, {"b": ratio})
    (heads, each) = small["b"].weight.part.shape[:2]
    assert 0.85 * ratio < heads * each / 600 <= ratio
    np.testing.assert_allclose(
        jax.jit(jm.lift(apply))(small, x), apply(densify(small), x), atol=1e-3
    )
    table = jm.score_ratios(
        params, graph, lambda run, tree: -jnp.mean((run(tree, x) - wanted) ** 2),
        batches=jax.ShapeDtypeStruct(x.shape, x.dtype), method="prune",
        ratios=(ratio,), progress=False,
    )  # fmt: skip
    row = next(r for r in table if r["ratio"] < 1)
    made = -jnp.mean((jax.jit(jm.lift(apply))(small, x) - wanted) ** 2)
    assert row["score"] == pytest.approx(float(made), rel=1e-3)
    after = jm.cost(small, jm.trace(apply, small, x), x[:1])["macs"][-1]
    assert row["macs"] == pytest.approx(after, abs=2)


def test_consumers_that_are_no_one_matrix_are_judged_by_their_weights():
    """A product for each entry of an axis: channels are chosen, but nothing is refitted."""

    def apply(p, x):
        h = jax.nn.relu(jnp.einsum("ngi,gio->ngo", x, p["a"]))
        return jnp.einsum("ngi,gio->ngo", h, p["b"])

    a, b, x = drawn(0, (3, 4, 8), (3, 8, 5), (20, 3, 4))
    params = {"a": a, "b": b.at[:, 2:6].set(0)}
    graph = jm.trace(apply, params, x)
    for batches in (None, [x]):
        small, report = jm.prune(
            params, graph, 0.5, batches=batches, progress=False, with_report=True
        )
        rows = [r for r in report if r["kept"] < r["of"]]
        assert [(r["kept"], r["of"]) for r in rows] == [(4, 8)]
        assert (rows[0]["note"] is None) == (batches is None)
        np.testing.assert_allclose(
            jax.jit(jm.lift(apply))(small, x), apply(params, x), atol=1e-5
        )
    assert "not refitted: 'b'" in rows[0]["note"]


def pieces():
    """One layer whose outputs two others read, a part each."""
    *weights, x = drawn(1, (6, 16), (12, 5), (4, 5), (64, 6))
    params = dict(zip("abc", weights, strict=True))

    def apply(p, x):
        h = jax.nn.relu(x @ p["a"])
        return h[:, :12] @ p["b"] + jnp.tanh(h[:, 12:] @ p["c"])

    return apply, params, x, jm.trace(apply, params, x)


@pytest.mark.parametrize("sighted", [False, True])
def test_pieces_of_what_a_layer_makes_are_pruned_each_for_itself(sighted):
    apply, params, x, graph = pieces()
    options = {"batches": [x] if sighted else None, "progress": False}
    both = jm.prune(params, graph, 0.5, **options)
    shapes = {r["parameter"]: r["stored"] for r in jm.widths(both)}
    assert shapes == {"a": [(6, 8)], "b": [(6, 5)], "c": [(2, 5)]}
    wanted = apply(densify(both), x)
    np.testing.assert_allclose(jax.jit(jm.lift(apply))(both, x), wanted, atol=1e-4)
    one = jm.prune(params, graph, {"c": 0.5}, **options)
    assert one["b"] is params["b"]
    (keep,) = one["a"].weight.keep
    assert set(range(12)) < set(keep.indices) and len(keep.indices) == 14


def read_twice(p, x):
    h = jax.nn.relu(x @ p["a"])
    return h @ p["b"] + h @ p["c"]


def test_a_layer_that_is_left_out_makes_all_its_channels():
    *weights, x = drawn(2, (6, 8), (8, 5), (8, 5), (50, 6))
    params = dict(zip("abc", weights, strict=True))
    graph = jm.trace(read_twice, params, jnp.ones((2, 6)))
    # Of what 'c' reads with 'b' it loses what 'b' loses.
    for given in (graph, graph.without("c")):
        small = jm.prune(params, given, 0.5)
        assert jm.widths(small)["parameter"] == ["a", "b", "c"]
    left = graph.without("a")
    small, report = jm.prune(params, left, 0.5, with_report=True)
    assert len(jm.widths(small)) == 0
    assert "a: not selected" in report.where(channels="a")["note"][0]
    with pytest.raises(ValueError, match="'b' cannot be compressed: a: not selected"):
        jm.prune(params, left, {"b": 0.5})
    # A consumer without weights says nothing; the other one decides.
    for batches in (None, [x]):
        given = params | {"b": params["b"].at[2:6].set(0), "c": 0 * params["c"]}
        small = jm.prune(given, graph, 0.5, batches=batches, progress=False)
        assert small["a"].weight.keep[0].indices == (0, 1, 6, 7)


def test_the_report_says_what_gets_whole_arrays():
    def apply(p, x):
        return jnp.sort(jax.nn.silu(x @ p["a"]), axis=0) @ p["b"]

    params = {"a": jnp.ones((6, 8)), "b": jnp.ones((8, 5))}
    graph = jm.trace(apply, params, jnp.ones((4, 6)))
    small, report = jm.prune(params, graph, 0.5, with_report=True)
    assert report.where(channels="a")["note"] == ["whole arrays before sort"]
    assert jm.widths(small)["stored"] == [[(6, 4)], [(4, 5)]]
    # Static keywords stay with the graph; without the sort nothing is noted.
    through = lambda p, x, how, deep: jax.nn.silu(x @ p["a"]) @ p["b"] * len(how)
    graph = jm.trace(through, params, jnp.ones((4, 6)), how="well", deep=[True])
    assert jm.prune(params, graph, 0.5, with_report=True)[1]["note"][0] is None


@pytest.mark.parametrize(("name", "loop"), [("rnn", "scan"), ("cond", "cond")])
def test_nothing_is_cut_inside_loops_and_branches(name, loop):
    (_, params, inputs), graph = model(name), traced(name)
    options = {"batches": [inputs], "progress": False, "with_report": True}
    small, report = jm.prune(params, graph, 0.5, **options)
    assert len(jm.widths(small)) == 0
    assert any(f"inside a {loop}" in (note or "") for note in report["note"])
    small, report = jm.factorize(params, graph, ratios=0.5, **options)
    inside = [n.name for n in graph.layers if n.loops]
    for row in report:
        stated = f"inside a {loop}" in (row["note"] or "")
        assert stated == (row["layer"] in inside)
    assert jm.widths(small)["parameter"] == ["head/kernel"]
    with pytest.raises(ValueError, match=f"'{inside[0]}' cannot .*inside a {loop}"):
        jm.factorize(params, graph, ratios={inside[0]: 0.5})
