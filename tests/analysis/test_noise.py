"""The noise that is predicted, against Jacobians written out and errors really measured."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

import jaxmet as jm
from jaxmet.tree.batches import as_batches
from jaxmet.tree.examples import some_examples


def plain(p, x):
    x = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"][None])
    return x @ p["b"]["kernel"]


@pytest.fixture(scope="module")
def net():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": {
            "kernel": jax.random.normal(keys[0], (5, 6)),
            "bias": jax.random.normal(keys[1], (6,)),
        },
        "b": {"kernel": jax.random.normal(keys[2], (6, 3))},
    }
    x = jax.random.normal(keys[3], (1500, 5))
    graph = jm.trace(plain, params, x[:2])
    batches = jm.batched(x, batch_size=100)
    config = jm.QuantConfig(weight_bits=6, activation_bits=6)
    quantizers = jm.calibrate(params, graph, batches, config, progress=False)
    return params, graph, quantizers, batches, x


def test_it_is_the_jacobian_times_the_error(net):
    """In expectation over signs: many examples, so that chance is small."""
    params, graph, quantizers, batches, x = net
    table = jm.noise(params, graph, quantizers, batches, examples=1500, progress=False)
    y = jax.vmap(lambda x: plain(params, x[None])[0])
    energy = float(jnp.sum(y(x) ** 2))
    kernels = {n: params[n]["kernel"] for n in "ab"}

    def with_kernels(kernels, x):
        tree = {n: dict(params[n], kernel=kernels[n]) for n in "ab"}
        return plain(tree, x[None])[0]

    slopes = jax.jit(jax.vmap(jax.jacobian(with_kernels), (None, 0)))(kernels, x)
    for name in "ab":
        error = quantizers.weights[f"{name}/kernel"](kernels[name]) - kernels[name]
        expected = jnp.sum(jnp.sum(slopes[name] * error[None, None], axis=(2, 3)) ** 2)
        ratio = 10 * np.log10(energy / float(expected))
        (row,) = table.where(tensor=f"{name}/kernel")
        assert row["SQNR (dB)"] == pytest.approx(ratio, abs=0.8)  # four sigma
        assert row["layer"] == name and row["kind"] == "weight" and row["bits"] == 6

    hidden = jax.nn.relu(x @ kernels["a"] + params["a"]["bias"][None])
    (name,) = [n for n in table["tensor"] if n.startswith("a/") and "kernel" not in n]
    error = quantizers.activations[name](hidden) - hidden
    expected = jnp.sum((error @ kernels["b"]) ** 2)
    (row,) = table.where(tensor=name)
    ratio = 10 * np.log10(energy / float(expected))
    assert row["SQNR (dB)"] == pytest.approx(ratio, abs=0.8) and row["clipped"] == 0
    powers = 10 ** (-np.array(table["SQNR (dB)"]) / 10)
    shares = powers[:-1] / powers[:-1].sum()
    assert np.array(table["share"])[:-1] == pytest.approx(shares, rel=1e-5)
    exact = plain(params, x)
    measured = decibel(exact, jax.jit(jm.simulate(plain, quantizers))(params, x))
    assert table["SQNR (dB)"][-1] == pytest.approx(measured, abs=0.8)


@pytest.mark.parametrize("bits", [3, 8])
def test_other_widths_are_those_of_quantizers_set_to_them(net, bits):
    params, graph, quantizers, batches, _ = net
    table = jm.noise(params, graph, quantizers, batches, progress=False)
    other = jm.noise(
        params, graph, quantizers.set("*", bits=bits), batches, progress=False
    )
    for one, two in list(zip(table, other))[:-1]:
        # Of one rounding, where the column is what to expect of any.
        assert one[f"{bits} bits"] == pytest.approx(two["SQNR (dB)"], abs=4)
        assert two["SQNR (dB)"] == pytest.approx(two[f"{bits} bits"], abs=1e-3)


def test_what_is_clipped_stands_beside_it(net):
    params, graph, quantizers, batches, _ = net
    (name,) = [n for n in quantizers.activations if n.startswith("a/")]
    assert jm.noise(params, graph, quantizers, batches, progress=False).where(
        tensor=name
    )["clipped"] == [0.0]
    q = quantizers.activations[name]
    narrow = quantizers.set(name, scale=q.scale / 2)
    (row,) = jm.noise(params, graph, narrow, batches, progress=False).where(tensor=name)
    assert 0.9 < row["clipped"] < 1
    # Clipping stays however fine the quantizer is, and so does what it costs.
    assert row["16 bits"] - row["SQNR (dB)"] < 0.5


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="a")(x))
        x = x + nn.relu(nn.Conv(8, (3, 3), name="b")(x))
        x = nn.relu(nn.Conv(12, (3, 3), strides=(2, 2), name="c")(x))
        return nn.Dense(10, name="d")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def convolutions():
    model, x = Net(), jax.random.normal(jax.random.key(0), (128, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(1), x[:1])
    graph = jm.trace(model.apply, params, x[:1])
    batches = jm.batched(x, batch_size=32)
    return model.apply, params, graph, batches, x


def decibel(exact, other):
    return 10 * np.log10(float(jnp.sum(exact**2) / jnp.sum((exact - other) ** 2)))


@pytest.mark.slow
def test_the_total_is_what_is_measured_and_the_order_that_of_sensitivity(convolutions):
    apply, params, graph, batches, x = convolutions
    quantizers = jm.calibrate(params, graph, batches, progress=False)
    table = jm.noise(params, graph, quantizers, batches, progress=False)
    exact = apply(params, x)
    measured = decibel(exact, jax.jit(jm.simulate(apply, quantizers))(params, x))
    assert table["SQNR (dB)"][-1] == pytest.approx(measured, abs=1.5)
    assert f"{table['SQNR (dB)'][-1]:.1f} dB predicted" in table.title

    def score(apply, params):
        noise = jnp.sum((apply(params, x) - exact) ** 2)
        return 10 * jnp.log10(jnp.sum(exact**2) / jnp.maximum(noise, 1e-9))

    truth = jm.sensitivity(params, graph, quantizers, score, progress=False)
    assert truth["tensor"][:-3] == table["tensor"][:-1]
    ranks = spearmanr(truth["only this"][:-3], table["SQNR (dB)"][:-1])
    assert ranks.statistic > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", (0, 3, 5, 6))
def test_a_damaged_layer_comes_first(convolutions, seed):
    """What its weights show is as before: the damage is in the quantizer, over the same range."""
    layer, kind = "abcd"[seed % 4], ("weights", "activations")[seed // 4]
    apply, params, graph, batches, x = convolutions
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    params = jax.tree.unflatten(
        tree, [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)]
    )
    quantizers = jm.calibrate(params, graph, batches, progress=False)
    what = f"{layer}/kernel" if kind == "weights" else result_of(quantizers, layer)
    group = dict(getattr(quantizers, kind))
    group[what] = group[what].set(bits=3)
    damaged = dataclasses.replace(quantizers, **{kind: group})
    table = jm.noise(params, graph, damaged, batches, examples=16, progress=False)
    assert max(zip(table["share"][:-1], table["tensor"]))[1] == what
    exact = apply(params, x[:32])
    score = lambda apply, p: -jnp.mean((apply(p, x[:32]) - exact) ** 2)
    scores = jm.sensitivity(params, graph, damaged, score, progress=False)
    rows = list(scores)[:-3]
    assert min(rows, key=lambda row: row["only this"])["tensor"] == what
    assert max(rows, key=lambda row: row["all but this"])["tensor"] == what


def result_of(quantizers, layer):
    """The quantizer that holds a layer's own result, after its activation where it has one."""
    (name,) = [
        n
        for n in quantizers.activations
        if n == layer or (n.startswith(f"{layer}/") and "relu" in n)
    ]
    return name


class Loader:
    """Data that starts again whenever it is iterated, and has no length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("size", [3, 10, 64])
@pytest.mark.parametrize("source", ["list", "generator", "batched", "loader"])
def test_examples_come_from_all_over_the_data(source, size):
    x = np.arange(150, dtype=np.float32)[:, None]
    parts = [x[i : i + size] for i in range(0, 150, size)]
    given = {
        "list": lambda: parts,
        "generator": lambda: iter(parts),
        "batched": lambda: jm.batched(x, batch_size=size),
        "loader": lambda: Loader(parts),
    }[source]()
    (found,) = some_examples(as_batches(given, "noise"), 20)
    found = np.asarray(found).ravel()
    assert found.size == len(np.unique(found)) == 20
    assert np.ptp(found) > 110 and np.diff(np.sort(found)).max() < 30
    some = some_examples(
        as_batches(given if source != "generator" else parts, "noise"), 999
    )
    assert len(some[0]) >= (128 if source == "batched" and size == 64 else 150)


def test_examples_that_cannot_be_picked_are_whole_batches_or_of_one_shape():
    x = np.arange(10, dtype=np.float32)[:, None]
    whole = [(x, np.float32(3)), (x + 10, np.float32(3))]
    found, scalar = some_examples(as_batches(whole, "noise"), 16)
    assert found.shape == (1, 10, 1) and scalar.shape == (1,)
    short = [x[:4], x[:4], x[:4].repeat(2, axis=1)]
    (found,) = some_examples(as_batches(short, "noise"), 16)
    assert found.shape == (8, 1, 1)


@pytest.mark.parametrize("case", ["scanned", "derived", "shared"])
def test_loops_and_derived_and_shared_grids(case):
    x = jax.random.normal(jax.random.key(0), (64, 6))
    w = jax.random.normal(jax.random.key(1), (3, 6, 6)) / 3

    def scanned(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    def derived(p, x):
        kernel = p["v"] / jnp.sqrt(jnp.sum(p["v"] ** 2, 0, keepdims=True))
        return jnp.tanh(x @ kernel) @ p["u"]

    def shared(p, x):
        parts = [x @ p["u"], x @ p["v"]]
        return jnp.concatenate(parts, -1) @ jnp.concatenate([p["u"], p["v"]], 0)

    apply, params = {
        "scanned": (scanned, {"w": w}),
        "derived": (derived, {"u": w[0], "v": w[1]}),
        "shared": (shared, {"u": w[0], "v": w[1]}),
    }[case]
    graph = jm.trace(apply, params, x)
    quantizers = jm.calibrate(params, graph, [x], progress=False)
    table = jm.noise(params, graph, quantizers, [x], progress=False)
    measured = decibel(
        apply(params, x), jax.jit(jm.simulate(apply, quantizers))(params, x)
    )
    # Few weights, whose errors are not many draws.
    assert table["SQNR (dB)"][-1] == pytest.approx(measured, abs=3)
    assert set(table["tensor"]) >= {*quantizers.activations, *quantizers.weights}
    assert all(np.isfinite(table["SQNR (dB)"]))


def test_a_smaller_graph_has_fewer_rows_of_the_same_whole(net):
    params, graph, quantizers, batches, _ = net
    whole = jm.noise(params, graph, quantizers, batches, progress=False)
    part = jm.noise(params, graph.only("b"), quantizers, batches, progress=False)
    assert "a/kernel" not in part["tensor"] and "b/kernel" in part["tensor"]
    share = [t.where(tensor="b/kernel")["share"] for t in (whole, part)]
    assert share[0] == pytest.approx(share[1])


def test_what_cannot_be_predicted_is_refused(net):
    params, graph, quantizers, batches, x = net
    with pytest.raises(ValueError, match="examples is 0"):
        jm.noise(params, graph, quantizers, batches, examples=0, progress=False)
    with pytest.raises(ValueError, match="no quantizer of the selected nodes"):
        jm.noise(params, graph, quantizers.set("*", bits=32), batches, progress=False)
    rounded = lambda p, x: jnp.round(plain(p, x))
    other = jm.trace(rounded, params, x[:2])
    found = jm.calibrate(params, other, batches, progress=False)
    with pytest.raises(ValueError, match="no gradient reaches"):
        jm.noise(params, other, found, batches, progress=False)
    with pytest.raises(
        ValueError, match="noise: the quantizers have one for 'b/round'"
    ):
        jm.noise(params, graph, found, batches, progress=False)
    classes = lambda p, x: jnp.argmax(plain(p, x), -1)
    other = jm.trace(classes, params, x[:2])
    with pytest.raises(ValueError, match="are integers or booleans.*to its logits"):
        jm.noise(params, other, jm.calibrate(params, other, batches), batches)
    with pytest.raises(ValueError, match="noise: the model did not accept.*inputs=lam"):
        jm.noise(params, graph, quantizers, [(x, x)], progress=False)
    with pytest.raises(ValueError, match="noise: the parameters are traced"):
        jax.jit(lambda p: len(jm.noise(p, graph, quantizers, batches)))(params)
    with pytest.raises(ValueError, match="shapes and no numbers"):
        jm.noise(params, graph, quantizers, jax.ShapeDtypeStruct((2, 5), jnp.float32))


def pooled(params, x):
    return plain(params, x).sum(0)


def centred(params, x):
    y = plain(params, x)
    return y - y.mean(0, keepdims=True)


def against_the_mean(params, x):
    """A bias that every example gets from all of its batch."""
    y = plain(params, x)
    return y + 3 * jax.nn.relu(y).mean(0, keepdims=True)


def similarities(params, x):
    y = plain(params, x)
    return y @ y.T


def neighbours(params, x):
    return plain(params, x) + jnp.roll(plain(params, x), 1, axis=0)


def standardized(params, x):
    """A batch norm by hand, before a layer."""
    y = x @ params["a"]["kernel"]
    y = (y - y.mean(0, keepdims=True)) / jnp.sqrt(y.var(0, keepdims=True) + 1e-3)
    return jax.nn.relu(y) @ params["b"]["kernel"]


def one_by_one(params, x):
    """Axes leave open whether examples meet, and they do not."""
    return jax.lax.map(lambda row: plain(params, row[None])[0], x)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "model", [pooled, centred, against_the_mean, similarities, neighbours, standardized]
)
def test_a_model_of_a_whole_batch_is_measured_on_the_batch(net, model):
    params, x = net[0], net[-1][:16]
    graph = jm.trace(model, params, x)
    # Errors of weights are known, those of activations would depend on each other.
    config = jm.QuantConfig(activation_bits=32)
    q = jm.calibrate(params, graph, [x], config, progress=False)
    table = jm.noise(params, graph, q, [x], examples=512, progress=False)
    exact, noisy = model(params, x), jax.jit(jm.simulate(model, q))(params, x)
    # The first order, its signs drawn 512 times: 6 / sqrt(512) dB are one deviation.
    measured = decibel(exact, noisy)
    assert table["SQNR (dB)"][-1] == pytest.approx(measured, abs=1.0)


@pytest.mark.parametrize("model", [plain, one_by_one])
def test_examples_that_do_not_meet_come_from_all_batches(net, model):
    """The first batch alone is zero, and would be refused."""
    params, _, _, _, x = net
    batches = [x[:4] * 0.0, x[4:8]]
    graph = jm.trace(model, params, x[:4])
    q = jm.calibrate(params, graph, batches, progress=False)
    table = jm.noise(params, graph, q, batches, examples=8, progress=False)
    assert np.isfinite(table["SQNR (dB)"][-1])


def test_outputs_that_are_zero_are_refused(net):
    params, _, _, _, x = net
    graph = jm.trace(centred, params, x[:8])
    q = jm.calibrate(params, graph, [x], progress=False)
    with pytest.raises(ValueError, match="equalize: .*constant for a single example"):
        jm.equalize(params, graph, batches=[x], progress=False)
    zero = lambda p, x: plain(p, x) * 0.0
    graph = jm.trace(zero, params, x[:8])
    q = jm.calibrate(params, graph, [x], progress=False)
    with pytest.raises(ValueError, match="noise: .*zero on these examples. Check the"):
        jm.noise(params, graph, q, [x], examples=4, progress=False)
