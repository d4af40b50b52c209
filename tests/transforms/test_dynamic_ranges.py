"""Ranges that are found at every call: of tensors, of the rows that products sum, of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

ROWS, TOKENS, HEADS, WIDTH = 6, 5, 2, 8


def apply(params, x):
    """Attention of two heads with all that a product may read: rows, heads, scores."""
    b, t, d = x.shape
    heads = lambda n: (x @ params[n]["kernel"]).reshape(b, t, HEADS, d // HEADS)
    q, k, v = map(heads, "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(2)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return jnp.einsum("bqhd,hdf->bqf", mixed, params["out"]["kernel"])


def drawn():
    rng = np.random.default_rng(0)
    array = lambda *s: jnp.asarray(rng.normal(size=s).astype(np.float32))
    params = {n: {"kernel": array(WIDTH, WIDTH)} for n in "qkv"}
    params["out"] = {"kernel": array(HEADS, WIDTH // HEADS, WIDTH)}
    # Tokens differ in size: with one scale for all of them the small ones are lost.
    sizes = 10.0 ** rng.uniform(-2, 0, size=(ROWS, TOKENS, 1)).astype(np.float32)
    return params, array(ROWS, TOKENS, WIDTH) * sizes


PARAMS, X = drawn()
GRAPH = jm.trace(apply, PARAMS, X[:2])
BATCHES = jm.batched(X, batch_size=3)
WEIGHTS = [jm.Rule("*", quantize_weights=False)]


def rounded(x, axes, block=None):
    """x with 8 bits for each row along `axes`, in NumPy and float64: from min to max, with 0."""
    x = np.asarray(x, np.float64)
    if block is not None:
        (axis,) = axes
        parts = np.split(x, range(block, x.shape[axis], block), axis)
        return np.concatenate([rounded(p, axes) for p in parts], axis)
    low = np.minimum(x.min(axes, keepdims=True), 0)
    high = np.maximum(x.max(axes, keepdims=True), 0)
    scale = np.where(high > low, (high - low) / 255, 1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def by_hand(block=None):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS)
    x = rounded(X, (2,), block)
    q, k, v = ((x @ p[n]["kernel"]).reshape(ROWS, TOKENS, HEADS, -1) for n in "qkv")
    q, k = rounded(q, (3,), block), rounded(k, (3,), block)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores = rounded(scores / scores.sum(-1, keepdims=True), (3,), block)
    mixed = np.einsum("bhqk,bkhd->bqhd", scores, rounded(v, (1,), block))
    # Two axes are summed over: a row is both of them, and is not cut into blocks.
    return np.einsum("bqhd,hdf->bqf", rounded(mixed, (2, 3)), p["out"]["kernel"])


def decibels(y, z):
    return 10 * np.log10(np.sum(y**2) / np.sum((y - z) ** 2))


@pytest.mark.parametrize(("dynamic", "block"), [("token", None), (3, 3)])
def test_against_numpy(dynamic, block):
    config = jm.QuantConfig(dynamic=dynamic, rules=WEIGHTS)
    wanted = by_hand(block)
    quantizers = jm.calibrate(PARAMS, GRAPH, BATCHES, config, progress=False)
    for given in (quantizers, jm.dynamic(config=config)):
        found = jax.jit(jm.simulate(apply, given))(PARAMS, X)
        assert np.mean(np.abs(found - wanted) < 1e-4 * np.abs(wanted).max()) > 0.9
        assert decibels(wanted, found) > 50
    assert decibels(wanted, apply(PARAMS, X)) < 46  # and rounding does something


def test_tokens_do_not_know_each_other():
    """The result for an example is the same in any batch; with a range a tensor it is not."""
    for dynamic, same in (("token", True), (4, True), ("tensor", False)):
        device = jm.dynamic(config=jm.QuantConfig(dynamic=dynamic))
        run = jax.jit(jm.simulate(apply, device))
        close = np.allclose(run(PARAMS, X)[:2], run(PARAMS, X[:2]), atol=1e-6)
        assert close is same, dynamic


def test_each_finer_range_is_better():
    def ratio(**config):
        config = jm.QuantConfig(rules=WEIGHTS, activation_bits=4, **config)
        found = jm.calibrate(PARAMS, GRAPH, BATCHES, config, progress=False)
        small = np.abs(X).max((1, 2)) < 1  # what one range for all of a batch loses
        y, z = apply(PARAMS, X), jax.jit(jm.simulate(apply, found))(PARAMS, X)
        return decibels(*(np.asarray(a)[small] for a in (y, z)))

    static, token, block = ratio(), ratio(dynamic="token"), ratio(dynamic=2)
    assert static + 3 < token < block - 1, (static, token, block)


def test_convolutions_have_a_range_for_each_example():
    def model(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    rng = np.random.default_rng(1)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)).astype(np.float32))}
    x = jnp.asarray(rng.normal(size=(4, 5, 5, 2)).astype(np.float32))
    x = x * jnp.asarray([1.0, 0.1, 10, 3], jnp.float32).reshape(4, 1, 1, 1)
    config = jm.QuantConfig(dynamic="token", rules=WEIGHTS)
    found = jax.jit(jm.simulate(model, jm.dynamic(config=config)))(params, x)
    wanted = model(params, jnp.asarray(rounded(x, (1, 2, 3)).astype(np.float32)))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_static_and_dynamic_mix_by_rule():
    rules = [*WEIGHTS, jm.Rule("*/softmax", dynamic=None)]
    config = jm.QuantConfig(dynamic="token", rules=rules)
    found = jm.calibrate(PARAMS, GRAPH, BATCHES, config, progress=False)
    (static,) = (n for n, q in found.activations.items() if not q.follows)
    assert static.endswith("softmax")
    table = jm.plan(PARAMS, GRAPH, config)
    per = {r["name"]: r["one scale per"] for r in table.where(kind="activation")}
    assert per.pop(static) == "tensor"
    assert set(per.values()) == {"token"}
    rules = [jm.Rule("v", dynamic=2)]
    one = jm.calibrate(
        PARAMS, GRAPH, BATCHES, jm.QuantConfig(rules=rules), progress=False
    )
    assert [n for n, q in one.activations.items() if q.follows] == ["v", "v/matmul"]


def test_behind_weights_that_were_rounded():
    """Bits of weights and activations apart, and adaround in front of dynamic ranges."""
    config = jm.QuantConfig(weight_bits=3, dynamic="token")
    nearest = jm.calibrate(PARAMS, GRAPH, BATCHES, config, progress=False)
    params, quantizers = jm.adaround(PARAMS, GRAPH, nearest, BATCHES, progress=False)
    y = apply(PARAMS, X)
    before = decibels(y, jax.jit(jm.simulate(apply, nearest))(PARAMS, X))
    after = decibels(y, jax.jit(jm.simulate(apply, quantizers))(params, X))
    assert after > before + 1, (before, after)
    assert all(q.per_token for q in quantizers.activations.values())


def test_no_data_is_read_where_no_range_needs_it(tmp_path):
    read = []

    class Batches:
        def __iter__(self):
            for x in (X[:3], X[3:]):
                read.append(x)
                yield x

    config = jm.QuantConfig(dynamic="token")
    found = jm.calibrate(PARAMS, GRAPH, Batches(), config, progress=False)
    assert len(read) <= 1  # the first batch is checked, and no pass is made
    assert len(found.activations) == 6
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    shown = jm.calibrate(PARAMS, GRAPH, shape, config, progress=False)
    assert shown.activations.keys() == found.activations.keys()
    jm.save(tmp_path / "q.npz", quantizers=found)
    again = jm.load(tmp_path / "q.npz")["quantizers"]
    outputs = [jax.jit(jm.simulate(apply, q))(PARAMS, X) for q in (found, again)]
    assert np.array_equal(*outputs)


def test_what_needs_a_scale_stays_in_float():
    config = jm.QuantConfig(dynamic="token", bias="int32")

    def model(params, x):
        return x @ params["kernel"] + params["bias"].reshape(1, -1)

    params = {"kernel": PARAMS["q"]["kernel"], "bias": jnp.ones(WIDTH, jnp.float32)}
    graph = jm.trace(model, params, X[0])
    found = jm.calibrate(params, graph, [X[0]], config, progress=False)
    assert "every call" in dict(found.skipped)["bias"]
    for wrong in ("row", 1, 0, True, -3, 2.5):
        with pytest.raises(ValueError, match=r"QuantConfig: dynamic is"):
            jm.QuantConfig(dynamic=wrong)
