"""Pruning: the masked model computed with less work, chosen and refitted by oracles."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from by_hand import best_fit
from jaxmet import densify
from jaxmet.tree.leaves import dense, with_weight
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from zoo import CASES, model, traced


class Net(nn.Module):
    """A residual pair, a depthwise block, a concatenation, a flatten: all kinds of ties."""

    @nn.compact
    def __call__(self, x):
        norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)
        x = nn.relu(norm("stem_bn")(nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)))
        y = nn.relu(norm("a_bn")(nn.Conv(12, (3, 3), use_bias=False, name="a")(x)))
        x = nn.relu(x + norm("b_bn")(nn.Conv(8, (3, 3), use_bias=False, name="b")(y)))
        y = nn.silu(nn.Conv(10, (1, 1), name="expand")(x))
        y = nn.Conv(10, (3, 3), feature_group_count=10, name="depthwise")(y)
        y = nn.relu6(y)
        z = nn.relu(nn.Conv(6, (1, 1), name="side")(x))
        y = jnp.concatenate([nn.Conv(6, (1, 1), name="project")(y), z], -1)
        y = nn.max_pool(y, (2, 2), (2, 2))
        return nn.Dense(5, name="head")(y.reshape(y.shape[0], -1))


@pytest.fixture(scope="module")
def net():
    model, rng = Net(), np.random.default_rng(0)
    x = jax.device_put(np.float32(rng.normal(size=(24, 6, 6, 3))))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def drawn(leaf):
        if leaf.ndim == 1:
            values = np.abs(1 + 0.3 * rng.normal(size=leaf.shape))
        else:
            values = rng.normal(size=leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1])
        return jnp.asarray(values, leaf.dtype)

    params = jax.tree.map(drawn, shapes)
    return model.apply, params, x, jm.trace(model.apply, params, x)


def assert_masked(apply, small, inputs):
    found = jax.jit(jm.lift(apply))(small, *inputs)
    wanted = jax.jit(apply)(densify(small), *inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        found,
        wanted,
    )


def shapes(tree):
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}


@pytest.mark.slow
def test_every_member_of_a_group_loses_its_channels(net):
    apply, params, x, graph = net
    small, report = jm.prune(params, graph, 0.5, with_report=True)
    found = shapes(small)
    assert found["stem/kernel"] == (3, 3, 3, 4) and found["b/kernel"] == (3, 3, 6, 4)
    assert found["stem_bn/scale"] == found["stem_bn/mean"] == found["b_bn/var"] == (4,)
    assert found["a/kernel"] == (3, 3, 4, 6) and found["expand/kernel"] == (1, 1, 4, 5)
    assert found["depthwise/kernel"] == (3, 3, 1, 5) and found["depthwise/bias"] == (5,)
    assert found["project/kernel"] == (1, 1, 5, 3) and found["side/kernel"] == (
        1,
        1,
        4,
        3,
    )
    assert found["head/kernel"] == (9 * 6, 5) and found["head/bias"] == (5,)
    row = report.where(channels="stem")
    assert row["made by"] == ["stem, b"] and row["read by"] == ["a, expand, side"]
    assert (row["kept"], row["of"]) == ([4], [8])
    assert "skipped: an output" in report.where(channels="head")["note"][0]
    assert_masked(apply, small, (x,))
    whole = densify(small)
    assert shapes(whole) == shapes(params)
    gone = np.flatnonzero(
        np.all(np.asarray(whole["params"]["stem"]["kernel"]) == 0, (0, 1, 2))
    )
    assert np.all(np.asarray(whole["params"]["a"]["kernel"])[:, :, gone] == 0)
    assert len(gone) == 4
    assert np.all(np.asarray(whole["params"]["b"]["kernel"])[..., gone] == 0)


def test_work_falls_as_the_cost_says(net):
    apply, params, x, graph = net
    small = jm.prune(params, graph, 0.5)
    again = jm.trace(apply, small, x)
    assert [n.name for n in again.layers] == [n.name for n in graph.layers]
    before, after = jm.cost(params, graph, x), jm.cost(small, again, x)

    def macs(table, layer):
        return table.where(layer=layer)["macs"][0]

    assert macs(after, "stem") * 2 == macs(before, "stem")  # half of the outputs
    assert macs(after, "a") * 4 == macs(before, "a")
    assert macs(after, "depthwise") * 2 == macs(before, "depthwise")
    assert macs(after, "head") * 2 == macs(before, "head")

    def counted(tree):
        return jax.jit(jm.lift(apply)).lower(tree, x).compile().cost_analysis()["flops"]

    saved = counted(params) - counted(small)
    given = (
        before.where(layer="(all)")["flops"][0] - after.where(layer="(all)")["flops"][0]
    )
    assert saved == pytest.approx(given, rel=0.1)  # rectifiers and norms shrink too


PRUNED = (
    "conv_bn_relu", "inverted_residual", "residual", "concatenation", "flatten",
    "squeeze_excite", "pooling", "gelu_mlp", "remat", "jit", "slopes", "outputs_in_a_tree",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PRUNED if n in CASES])
def test_a_pruned_tree_is_the_masked_model(name):
    (apply, params, inputs), graph = model(name), traced(name)
    small, report = jm.prune(params, graph, 0.6, with_report=True)
    assert any(k < n for k, n in zip(report["kept"], report["of"], strict=True))
    assert_masked(apply, small, inputs)
    sizes = [sum(a.size for a in jax.tree.leaves(t)) for t in (small, params)]
    assert sizes[0] < sizes[1]


def test_channels_tied_by_additions_are_left_if_asked(net):
    apply, params, x, graph = net
    small, report = jm.prune(params, graph, 0.5, coupled=False, with_report=True)
    assert shapes(small)["stem/kernel"] == (3, 3, 3, 8)
    assert shapes(small)["a/kernel"] == (3, 3, 8, 6)
    assert "tied: stem, b" in report.where(channels="stem")["note"][0]
    assert_masked(apply, small, (x,))


def test_magnitude_keeps_what_is_read_with_large_weights(net):
    _, params, _, graph = net
    small = jm.prune(params, graph, {"b": 0.4})
    energy = np.sum(
        np.asarray(params["params"]["b"]["kernel"], np.float64) ** 2, (0, 1, 3)
    )
    kept = named_leaves(
        small,
    )["b/kernel"]
    (keep,) = small["params"]["b"]["kernel"].weight.keep
    assert keep.indices == tuple(sorted(np.argsort(energy)[-4:])) and kept.shape[2] == 4
    assert small["params"]["a"]["kernel"].weight.keep[0].indices == keep.indices
    assert small["params"]["stem"]["kernel"] is params["params"]["stem"]["kernel"]


def chain(seed=0, n=400):
    """Two dense layers whose hidden channels are correlated, and their inputs."""
    rng = np.random.default_rng(seed)
    params = {
        "a": {"kernel": rng.normal(size=(4, 6)), "bias": rng.normal(size=6)},
        "b": {"kernel": rng.normal(size=(6, 3)), "bias": rng.normal(size=3)},
    }
    params = jax.tree.map(lambda a: jax.device_put(np.float32(a)), params)
    x = jax.device_put(np.float32(rng.normal(size=(n, 4))))

    def apply(p, x):
        h = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"][None])
        return h @ p["b"]["kernel"] + p["b"]["bias"][None]

    kernel, bias = (np.asarray(params["a"][n], np.float64) for n in ("kernel", "bias"))
    hidden = np.maximum(np.asarray(x, np.float64) @ kernel + bias, 0)
    return apply, params, x, jm.trace(apply, params, x), hidden


def test_what_stays_is_refitted_by_least_squares_and_chosen_by_its_loss():
    apply, params, x, graph, hidden = chain()
    wanted = np.asarray(apply(params, x), np.float64)
    losses = {
        k: best_fit(hidden, wanted, k)[1] for k in itertools.combinations(range(6), 5)
    }
    best = min(losses, key=losses.__getitem__)
    small, report = jm.prune(
        params,
        graph,
        {"b": 5 / 6},
        batches=[x[:200], x[200:]],
        progress=False,
        with_report=True,
    )
    assert small["b"]["kernel"].weight.keep[0].indices == best
    fit, loss = best_fit(hidden, wanted, best)
    np.testing.assert_allclose(named_leaves(small)["b/kernel"], fit[:-1], atol=2e-3)
    np.testing.assert_allclose(small["b"]["bias"], fit[-1], atol=2e-3)
    error = np.asarray(jax.jit(jm.lift(apply))(small, x)) - wanted
    assert np.sum(error**2) == pytest.approx(loss, rel=1e-3)
    share = np.sqrt(loss / np.sum((wanted - wanted.mean(0)) ** 2))
    assert report.where(channels="a")["error"][0] == pytest.approx(share, rel=1e-2)


@pytest.mark.parametrize("selection", ["obs", "lasso"])
def test_data_choose_better_than_weights_alone(selection):
    gains = []
    for seed in range(3):
        apply, params, x, graph, _ = chain(seed)
        wanted = apply(params, x)

        def loss(tree, apply=apply, x=x, wanted=wanted):
            return float(jnp.sum((jm.lift(apply)(tree, x) - wanted) ** 2))

        blind = jm.prune(params, graph, {"b": 0.5})
        sighted = jm.prune(
            params, graph, {"b": 0.5}, batches=[x], selection=selection, progress=False
        )
        gains.append(loss(sighted) / loss(blind))
    assert max(gains) < 1 and np.median(gains) < 0.5


def test_a_layer_after_a_flatten_judges_whole_channels(net):
    apply, params, x, graph = net
    small = jm.prune(params, graph, {"head": 0.5}, batches=[x], progress=False)
    keep = {k.axis: k for k in small["params"]["head"]["kernel"].weight.keep}[0]
    kept = np.asarray(keep.indices).reshape(
        9, 6
    )  # nine places, the same channels in each
    assert np.all(kept - 12 * np.arange(9)[:, None] == kept[:1])
    assert_masked(apply, small, (x,))


def test_bounds_lose_the_channels_that_they_bound():
    apply, params, inputs = model("inverted_residual")
    graph = jm.trace(apply, params, *inputs)
    tree = jm.equalize(
        jm.fold_batch_norm(params, graph), graph, objective="range", progress=False
    )
    small = jm.prune(tree, graph, {"project": 0.5})
    leaves = named_leaves(small)
    assert (
        leaves["expand/kernel"].upper.shape
        == leaves["depthwise/kernel"].upper.shape
        == (4,)
    )
    (keep,) = small["params"]["project"]["kernel"].weight.keep
    new = {}
    for name, leaf in named_leaves(tree).items():  # the same by hand, with zeros
        if name.startswith(("expand", "depthwise")):
            mask = jnp.zeros(8).at[np.array(keep.indices)].set(1.0)
            zeroed = lambda a, m=mask: a * m.reshape((1,) * (a.ndim - 1) + (8,))
            new[name] = with_weight(leaf, zeroed(dense(leaf)))
    wanted = jax.jit(jm.lift(apply))(replace_leaves(tree, new), *inputs)
    np.testing.assert_allclose(
        jax.jit(jm.lift(apply))(small, *inputs), wanted, atol=1e-4
    )


@pytest.mark.slow
def test_pruned_twice_factorized_equalized_and_quantized(net):
    apply, params, x, graph = net
    small = jm.prune(params, graph, 0.8)
    small = jm.prune(small, jm.trace(apply, small, x), 0.8)
    small = jm.factorize(small, jm.trace(apply, small, x), ratios=0.7)
    assert_masked(apply, small, (x,))
    graph = jm.trace(apply, small, x)
    folded = jm.fold_batch_norm(small, graph)
    np.testing.assert_allclose(
        jax.jit(jm.lift(apply))(folded, x),
        jax.jit(jm.lift(apply))(small, x),
        rtol=1e-3,
        atol=1e-4,
    )
    equal = jm.equalize(folded, graph, objective="range", progress=False)
    np.testing.assert_allclose(
        jax.jit(jm.lift(apply))(equal, x),
        jax.jit(jm.lift(apply))(small, x),
        rtol=1e-3,
        atol=1e-3,
    )
    quantizers = jm.calibrate(equal, graph, [x], progress=False)
    noisy = jax.jit(jm.simulate(apply, quantizers))(equal, x)
    exact = jax.jit(jm.lift(apply))(equal, x)
    assert 0 < jnp.mean((noisy - exact) ** 2) < 1e-2 * jnp.mean(exact**2)


BAD = {
    "ratio": ({"ratios": 0.0}, "the ratio is 0"),
    "name": ({"ratios": {"stm": 0.5}}, "no selected layer 'stm'"),
    "first": ({"ratios": {"stem": 0.5}}, "'stem' cannot be compressed: .*no channels"),
    "selection": ({"ratios": 0.5, "selection": "luck"}, "selection is 'luck'"),
    "no data": ({"ratios": 0.5, "selection": "obs"}, "Give batches="),
    "tied": (
        {"ratios": {"a": 0.5}, "coupled": False},
        "'a' cannot be compressed: tied",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(net, case):
    _, params, _, graph = net
    options, message = BAD[case]
    with pytest.raises(ValueError, match=rf"(?s)jaxmet\.prune: .*{message}"):
        jm.prune(params, graph, **options)


def test_traced_parameters_are_refused(net):
    _, params, _, graph = net
    with pytest.raises(ValueError, match=r"jaxmet\.prune: parameter .* is traced"):
        jax.jit(lambda p: jm.prune(p, graph, 0.5))(params)
