"""One bias that several layers add: the correction that is best for all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

import jaxmet as jm

correct = functools.partial(jm.correct_bias, progress=False)


def drawn(seed=0, **shapes):
    rng = np.random.default_rng(seed)
    return {
        k: jax.device_put(np.float32(rng.normal(size=s))) for k, s in shapes.items()
    }


def conv(x, w, stride=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def along(b, ndim):
    return b.reshape((1,) * (ndim - 1) + (-1,))


def heads(p, x):
    """Two kernels with one bias, on 64 positions and on 16."""
    h = jax.nn.relu(conv(x, p["a"]) + along(p["ab"], 4))
    y, z = conv(h, p["v"]) + along(p["b"], 4), conv(h, p["w"], 2) + along(p["b"], 4)
    return y, z


def pyramid(p, x):
    """One kernel and bias on two sizes of the image."""
    h = jax.nn.relu(conv(x, p["a"]) + along(p["ab"], 4))
    small = h[:, ::2, ::2]
    return tuple(conv(v, p["v"]) + along(p["b"], 4) for v in (h, small))


def siamese(p, x):
    """Dense layers with one bias, of one position and of sixty-four."""
    h = jax.nn.relu(conv(x, p["a"]) + along(p["ab"], 4))
    return h @ p["d"] + along(p["b"], 4), h.mean((1, 2)) @ p["e"] + along(p["b"], 2)


MODELS = (heads, pyramid, siamese)


def network():
    params = drawn(
        a=(3, 3, 3, 4), ab=(4,), v=(3, 3, 4, 5), w=(3, 3, 4, 5), d=(4, 5), e=(4, 5)
    ) | drawn(1, b=(5,))
    x = jax.device_put(
        np.float32(np.random.default_rng(2).normal(0.3, 1, (12, 8, 8, 3)))
    )
    return params, x


def quantizers_of(graph, bits=3, **fields):
    return jm.Quantizers(
        {n.kernel: jm.Quantizer(bits=bits, **fields) for n in graph.layers}
    )


def results(apply, params, x, names):
    """What nodes make, as rows of channels in float64."""

    def hook(node, run, operands):
        y = run(*operands)
        return y, y if node.name in names else None

    found = jm.evaluate(apply, hook)(params, x)[1]
    return [np.float64(found[n]).reshape(-1, found[n].shape[-1]) for n in names]


def best(exact, noisy):
    """The d that brings all rows of noisy − d nearest to exact, searched for."""

    def loss(d):
        return sum(np.sum((b - d - a) ** 2) for a, b in zip(exact, noisy, strict=True))

    start = np.zeros(exact[0].shape[1])
    gradient = lambda d: (
        2 * sum(np.sum(d - (b - a), 0) for a, b in zip(exact, noisy, strict=True))
    )
    found = optimize.minimize(loss, start, jac=gradient, tol=1e-12)
    return found.x


@pytest.mark.one_in(4)
@pytest.mark.parametrize("apply", MODELS)
@pytest.mark.parametrize("sizes", [(12,), (5, 7)], ids=["whole", "batches"])
def test_the_correction_is_the_best_single_one(apply, sizes):
    """Against a search over d in float64 for the outputs of all layers that share it."""
    params, x = network()
    graph = jm.trace(apply, params, x[:1])
    quantizers = quantizers_of(graph)
    batches = np.split(np.asarray(x), np.cumsum(sizes)[:-1])
    new, report = correct(params, graph, quantizers, batches, with_report=True)
    names = [n.name for n in graph.layers if n.bias == "b"]
    assert len(names) == 2
    before = jm.round_weights({**new, "b": params["b"]}, quantizers)
    exact, noisy = (results(apply, tree, x, names) for tree in (params, before))
    d = best(exact, noisy)
    one, two = (np.mean(b - a, 0) for a, b in zip(exact, noisy, strict=True))
    assert np.abs(one - two).max() > 0.05  # neither layer's own error is the best
    np.testing.assert_allclose(params["b"] - new["b"], d, atol=2e-5)
    rows = {r["layer"]: r for r in report}
    assert all(rows[n]["into"] == "b" and rows[n]["note"] is None for n in names)
    shifts = [rows[n]["largest shift"] for n in names]
    np.testing.assert_allclose(shifts, np.abs(d).max(), atol=2e-5)
    assert report.title == "bias corrected at 3 of 3 layers"


def test_each_use_counts_as_often_as_the_mask_says():
    """Padding counts for no layer, and of the first tokens there is less of it."""

    def apply(p, x):
        return x @ p["v"] + along(p["b"], 3), x[:, :3] @ p["w"] + along(p["b"], 3)

    params = drawn(v=(3, 5), w=(3, 5), b=(5,))
    x = drawn(3, x=(6, 9, 3))["x"] + 1
    mask = np.arange(9)[None] < np.array([9, 2, 3, 1, 5, 4])[:, None]
    x = jnp.where(mask[..., None], x, 100.0)  # what padding holds says nothing
    graph = jm.trace(apply, params, x)
    quantizers = quantizers_of(graph)
    new = correct(params, graph, quantizers, [x], mask=lambda batch: mask)
    rounded = jm.round_weights(params, quantizers)
    pairs = zip(apply(params, x), apply(rounded, x), (mask, mask[:, :3]), strict=True)
    errors = [np.float64(b - a)[where] for a, b, where in pairs]
    assert [len(e) for e in errors] == [24, 15]
    d = best([np.zeros_like(e) for e in errors], errors)
    np.testing.assert_allclose(params["b"] - new["b"], d, atol=2e-5)


def test_layers_after_one_another_and_what_comes_after_them():
    """A layer that runs twice, by hand, and a head whose mean is right afterwards."""

    def apply(p, x):
        h = x
        for _ in range(2):
            h = jax.nn.relu(h @ p["w"] + along(p["b"], 2))
        return h @ p["z"] + along(p["c"], 2)

    params = drawn(w=(6, 6), b=(6,), z=(6, 3), c=(3,))
    x = jax.device_put(np.float32(np.random.default_rng(5).normal(0.4, 1, (40, 6))))
    graph = jm.trace(apply, params, x)
    quantizers = quantizers_of(graph)
    new = correct(params, graph, quantizers, jm.batched(x, 16))
    p, q = (
        {k: np.float64(v) for k, v in tree.items()}
        for tree in (params, jm.round_weights(params, quantizers))
    )
    exact, noisy, errors = np.float64(x), np.float64(x), []
    for _ in range(2):
        exact, noisy = exact @ p["w"] + p["b"], noisy @ q["w"] + p["b"]
        errors.append((noisy - exact).mean(0))
        # what enters a layer has no mean error before the first relu
        exact, noisy = np.maximum(exact, 0), np.maximum(noisy - errors[-1], 0)
    d = np.mean(errors, 0)
    assert np.abs(errors[0] - errors[1]).max() > 0.05
    np.testing.assert_allclose(params["b"] - new["b"], d, atol=2e-5)
    # The head is corrected in the network as it is, not in one of two biases.
    after = np.float64(apply(jm.round_weights(new, quantizers), x))
    moved = np.mean(after - np.float64(apply(params, x)), 0)
    np.testing.assert_allclose(moved, 0, atol=2e-5)


def normed(p, x, tail):
    h = conv(x, p["a"]) - along(p["mean"], 4)
    gain = along(p["scale"], 4) * jax.lax.rsqrt(along(p["var"], 4) + 1e-3)
    return tail(p, jax.nn.relu(h * gain + along(p["beta"], 4)))


def interior(x, w, stride=1):
    """Without padding, of which data-free means know nothing."""
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("size", [9, 15])
def test_without_data_positions_are_those_of_the_traced_inputs(size):
    """Against a weighted least-squares fit of one d to both layers' mean errors."""
    p = drawn(
        a=(3, 3, 3, 4),
        mean=(4,),
        scale=(4,),
        beta=(4,),
        v=(3, 3, 4, 5),
        w=(3, 3, 4, 5),
        b=(5,),
    )
    p["var"] = jnp.exp(drawn(7, var=(4,))["var"])
    tail = lambda p, h: (
        interior(h, p["v"]) + along(p["b"], 4),
        interior(h, p["w"], 2) + along(p["b"], 4),
    )
    apply = lambda p, x, how, shift: normed(
        p, x + shift, tail if how == "well" else None
    )
    x = jnp.ones((2, size, size, 3))
    graph = jm.trace(apply, p, x, how="well", shift=jnp.float32(1))
    quantizers = quantizers_of(graph)
    new, report = correct(p, graph, quantizers, with_report=True)
    rounded = jm.round_weights(p, quantizers)
    share = np.float64(p["var"]) / (np.float64(p["var"]) + 1e-3)
    beta, sigma = np.float64(p["beta"]), np.abs(np.float64(p["scale"])) * share**0.5
    mean = beta * stats.norm.cdf(beta / sigma) + sigma * stats.norm.pdf(beta / sigma)
    errors = [
        np.einsum("hwio,i->o", np.float64(rounded[k]) - np.float64(p[k]), mean)
        for k in ("v", "w")
    ]
    counts = [2 * (size - 2) ** 2, 2 * ((size - 3) // 2 + 1) ** 2]
    root = np.sqrt(np.array(counts, np.float64))
    d = np.linalg.lstsq(root[:, None], root[:, None] * np.stack(errors))[0][0]
    assert np.abs(d - np.mean(errors, 0)).max() > 0.01
    np.testing.assert_allclose(p["b"] - new["b"], d, atol=1e-5)
    rows = {r["layer"]: r for r in report}
    assert rows["v"]["into"] == rows["w"]["into"] == "b"
    shifts = [rows[n]["largest shift"] for n in "vw"]
    np.testing.assert_allclose(shifts, np.abs(d).max(), atol=1e-5)


def test_without_data_one_layer_whose_inputs_are_unknown_is_enough_to_skip_all():
    p = drawn(a=(3, 3, 3, 4), mean=(4,), scale=(4,), beta=(4,), v=(4, 5), w=(3, 5))
    p |= {"var": jnp.ones(4), "b": jnp.ones(5), "z": jnp.ones((4, 2)), "c": jnp.ones(2)}

    def apply(p, x):
        tail = lambda p, h: (
            h @ p["v"] + along(p["b"], 4),
            h @ p["z"] + along(p["c"], 4),
            x @ p["w"] + along(p["b"], 4),
        )
        return normed(p, x, tail)

    graph = jm.trace(apply, p, jnp.ones((2, 5, 5, 3)))
    new, report = correct(p, graph, quantizers_of(graph), with_report=True)
    np.testing.assert_array_equal(new["b"], p["b"])
    notes = {r["layer"]: r["note"] for r in report}
    assert notes["z"] is None
    assert notes["v"].startswith("skipped: 'b' is used elsewhere too; w: ")
    assert notes["w"].startswith("skipped: ") and "used elsewhere" not in notes["w"]


def penalized(p, x):
    return *heads(p, x), jnp.sum(p["b"] ** 2) * jnp.ones((x.shape[0], 1))


def normed_too(p, x):
    """One of the layers has a norm of its own after it."""
    y, z = heads(p, x)
    gain = along(p["g"] * jax.lax.rsqrt(p["s"] + 1e-3), 4)
    return y, (z - along(p["m"], 4)) * gain + along(p["t"], 4)


@pytest.mark.parametrize(
    ("apply", "change", "notes"),
    [
        (
            heads,
            lambda g, q: (g.without("w"), q),
            {"v": "'b' is used elsewhere too; w: not selected"},
        ),
        (
            heads,
            lambda g, q: (g, q.set("w", enabled=False)),
            {
                "v": "'b' is used elsewhere too; w: its weight is not quantized",
                "w": "its weight is not quantized",
            },
        ),
        (
            penalized,
            lambda g, q: (g, q),
            dict.fromkeys("vw", "'b' is used elsewhere too; no norm alone reads it"),
        ),
        (
            normed_too,
            lambda g, q: (g, q),
            {"v": "'b' is used elsewhere too; w: ", "w": None},
        ),
    ],
    ids=["not selected", "not quantized", "penalized", "another's norm"],
)
def test_what_cannot_be_corrected_for_all_is_skipped(apply, change, notes):
    params, x = network()
    params |= drawn(4, m=(5,), g=(5,), t=(5,)) | {"s": jnp.ones(5)}
    whole = jm.trace(apply, params, x[:1])
    graph, quantizers = change(whole, quantizers_of(whole))
    new, report = correct(params, graph, quantizers, [x], with_report=True)
    np.testing.assert_array_equal(new["b"], params["b"])
    found = {r["layer"]: r["note"] for r in report if r["layer"] in "vw"}
    assert set(found) == set(notes)
    for name, why in notes.items():
        assert found[name] == why or found[name].startswith(f"skipped: {why}")
    with pytest.raises(ValueError, match=r"'v' cannot be corrected: 'b' is used"):
        correct(params, graph.only("v"), quantizers, [x])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", ["weights", "both"])
@pytest.mark.parametrize("store", ["device", "host"])
def test_however_values_are_kept_the_result_is_the_same(of, store):
    params, x = network()
    graph = jm.trace(heads, params, x[:1])
    quantizers = jm.calibrate(params, graph, [x], progress=False)
    new, wanted = (
        correct(params, graph, quantizers, jm.batched(x, n), of=of, store=s)
        for n, s in ((5, store), (12, "device"))
    )
    for name, leaf in wanted.items():
        np.testing.assert_allclose(new[name], leaf, atol=1e-5)


def test_32_bits_change_nothing():
    params, x = network()
    graph = jm.trace(heads, params, x[:1])
    new = correct(params, graph, quantizers_of(graph, bits=32), [x])
    for name, leaf in params.items():
        np.testing.assert_array_equal(new[name], leaf)
