"""Residual streams stay in float, and are quantized where products read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

WIDTH, DEPTH, ROWS = 32, 3, 16


def along(a, x):
    return a.reshape((1,) * (x.ndim - 1) + a.shape)


def norm(p, x):
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
    return x * along(p["scale"], x) + along(p["bias"], x)


def dense(p, x):
    return x @ p["kernel"] + along(p["bias"], x)


def after(p, x):
    """A block whose norm stands after the addition, as of BERT."""
    return norm(p["norm"], x + dense(p["down"], jax.nn.gelu(dense(p["up"], x))))


def before(p, x):
    """A block whose norm stands in front of its products, as of GPT-2."""
    return x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["norm"], x))))


def unrolled(block):
    def apply(params, x):
        x = norm(params["first"], dense(params["stem"], x))
        for i in range(DEPTH):
            p = jax.tree.map(lambda a, i=i: a[i], params["blocks"])
            x = block(p, x)
        return dense(params["head"], norm(params["last"], x))

    return apply


def written_out(block):
    """The same with a tree of its own for each block."""

    def apply(params, x):
        x = norm(params["first"], dense(params["stem"], x))
        for i in range(DEPTH):
            x = block(params[f"block{i}"], x)
        return dense(params["head"], norm(params["last"], x))

    return apply


def scanned(block):
    def apply(params, x):
        x = norm(params["first"], dense(params["stem"], x))
        x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["blocks"])
        return dense(params["head"], norm(params["last"], x))

    return apply


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    array = lambda *s: jnp.asarray(rng.normal(size=s).astype(np.float32))
    one = lambda *n: {"kernel": array(*n, WIDTH, WIDTH) / 6, "bias": array(*n, WIDTH)}
    scale = lambda *n: {"scale": 1 + array(*n, WIDTH) / 9, "bias": array(*n, WIDTH) / 9}
    blocks = {"norm": scale(DEPTH), "up": one(DEPTH), "down": one(DEPTH)}
    # A channel much larger than the others, of which the norm makes little.
    down, gain = blocks["down"], blocks["norm"]["scale"]
    down["kernel"] = down["kernel"].at[..., 0].multiply(30)
    blocks["norm"]["scale"] = gain.at[:, 0].divide(30)
    params = {"first": scale(), "stem": one(), "last": scale(), "head": one()}
    own = {f"block{i}": jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(DEPTH)}
    x = array(ROWS, 5, WIDTH)
    return params | {"blocks": blocks}, params | own, x


def calibrated(apply, params, x, **config):
    graph = jm.trace(apply, params, x[:2])
    config = jm.QuantConfig(**config)
    batches = jm.batched(x, batch_size=8)
    return graph, jm.calibrate(params, graph, batches, config, progress=False)


def decibels(y, z):
    return float(10 * jnp.log10(jnp.sum(y**2) / jnp.sum((y - z) ** 2)))


PLACES = {
    after: {
        "stem": None, "first": "products", "block0/up": None,
        "block0/up/gelu": "output", "block0/down": None, "block0/down/add": None,
        "block0/norm": "products", "block2/norm": None, "last": "products",
        "head": "output",
    },
    before: {
        "stem": None, "first": None, "block0/norm": "products", "block0/up": None,
        "block0/up/gelu": "output", "block0/down": None, "block0/down/add": None,
        "block2/down/add": None, "last": "products", "head": "output",
    },
}  # fmt: skip


@pytest.mark.parametrize("block", [after, before])
def test_where_quantizers_lie(block):
    _, params, x = drawn()
    graph, quantizers = calibrated(written_out(block), params, x)
    names = {n.name for n in graph.nodes}
    for name, where in PLACES[block].items():
        assert name in names, (name, names)
        q = quantizers.activation(name)
        found = None if q is None else "products" if q.products_only else "output"
        expected = where
        if name == "stem":  # a norm reads it, and no sum: a device stores it
            expected = "output"
        assert found == expected, name


def rounded(x, q):
    """x on a grid, in NumPy and float64."""
    scale, zero = np.float64(q.scale), np.float64(q.zero_point)
    low, high = q.ends
    return (np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale


def test_against_numpy():
    """A post-norm block in float64: the stream as it is, products on grids."""
    _, params, x = drawn()
    graph, quantizers = calibrated(written_out(after), params, x)
    simulated = jax.jit(jm.simulate(graph.apply, quantizers))(params, x)
    q = {n: quantizers.activation(n) for n in ("input", "stem", "first")}
    p = jax.tree.map(np.float64, jm.round_weights(params, quantizers))

    def one(p, x):
        mean = x.mean(-1, keepdims=True)
        y = (x - mean) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * p["scale"] + p["bias"]

    gelu = lambda x: np.asarray(jax.nn.gelu(jnp.asarray(x.astype(np.float32))))
    layer = lambda p, x: x @ p["kernel"] + p["bias"]
    value = rounded(layer(p["stem"], rounded(np.float64(x), q["input"])), q["stem"])
    stream, grid = one(p["first"], value), q["first"]
    for i in range(DEPTH):
        b = p[f"block{i}"]
        inside = gelu(layer(b["up"], rounded(stream, grid)))
        inside = rounded(inside, quantizers.activation(f"block{i}/up/gelu"))
        stream = one(b["norm"], stream + layer(b["down"], inside))
        grid = quantizers.activation(f"block{i}/norm")
    value = rounded(one(p["last"], stream), quantizers.activation("last"))
    value = rounded(layer(p["head"], value), quantizers.activation("head"))
    # A value near the middle of two steps may go either way.
    assert np.mean(np.abs(value - simulated) < 1e-4) > 0.9
    assert decibels(value, simulated) > 35


@pytest.mark.one_in(2)
@pytest.mark.parametrize("block", [after, before])
def test_eight_bits_lose_the_stream_and_float_keeps_it(block):
    _, params, x = drawn()
    apply = written_out(block)
    y = apply(params, x)
    found = {}
    for bits in (None, 32, 16):
        _, quantizers = calibrated(apply, params, x, residual_bits=bits)
        found[bits] = decibels(y, jax.jit(jm.simulate(apply, quantizers))(params, x))
    assert found[32] > found[None] + 3, found
    assert found[16] > found[None] + 3, found


@pytest.mark.one_in(3)
@pytest.mark.parametrize("block", [after, before])
@pytest.mark.parametrize("placement", ["operations", "products"])
def test_scanned_and_written_out(block, placement):
    """The first turn reads what stands before the loop, the others the turn before."""
    stacked, params, x = drawn()
    outputs, ratios, sums = [], [], []
    for apply, tree in ((written_out(block), params), (scanned(block), stacked)):
        graph, quantizers = calibrated(apply, tree, x, placement=placement)
        outputs.append(jax.jit(jm.simulate(apply, quantizers))(tree, x))
        batches = jm.batched(x, batch_size=8)
        table = jm.noise(tree, graph, quantizers, batches, progress=False)
        ratios.append(table["SQNR (dB)"][-1])
        one = jm.correct_bias(tree, graph, quantizers, batches, progress=False)
        sums.append(jax.jit(jm.simulate(apply, quantizers))(one, x))
    assert decibels(*outputs) > 40
    assert abs(ratios[0] - ratios[1]) < 0.1
    assert decibels(*sums) > 40


def test_noise_foresees_what_products_read():
    """Only what products read is rounded: predicted and measured agree."""
    _, params, x = drawn()
    apply = written_out(after)
    rules = [jm.Rule("*", quantize_weights=False)]
    graph, quantizers = calibrated(apply, params, x, rules=rules)
    for name in quantizers.activations:
        if not quantizers.activations[name].products_only:
            quantizers = quantizers.set(name, enabled=False)
    batches = jm.batched(x, batch_size=8)
    table = jm.noise(params, graph, quantizers, batches, progress=False)
    measured = decibels(
        apply(params, x), jax.jit(jm.simulate(apply, quantizers))(params, x)
    )
    assert abs(table["SQNR (dB)"][-1] - measured) < 1.5, (table, measured)


def test_grids_override_and_files_keep(tmp_path):
    _, params, x = drawn()
    apply = written_out(after)
    graph, quantizers = calibrated(apply, params, x)
    jm.save(tmp_path / "q.npz", quantizers=quantizers)
    loaded = jm.load(tmp_path / "q.npz")["quantizers"]
    assert loaded.activations["first"].products_only
    simulated = jax.jit(jm.simulate(apply, loaded))(params, x)
    assert np.array_equal(simulated, jax.jit(jm.simulate(apply, quantizers))(params, x))
    off = quantizers.set("first", enabled=False)
    grids = jm.grids(off)
    by_data = jax.jit(jm.simulate(apply, quantizers, grids=grids))(params, x)
    assert np.array_equal(by_data, jax.jit(jm.simulate(apply, off))(params, x))
    assert not np.array_equal(by_data, simulated)


def test_rules_give_bits_to_single_sums():
    _, params, x = drawn()
    rules = [jm.Rule("block1/down/add", residual_bits=16)]
    _, quantizers = calibrated(written_out(before), params, x, rules=rules)
    assert quantizers.activation("block1/down/add").bits == 16
    assert quantizers.activation("block0/down/add") is None
    graph = jm.trace(written_out(before), params, x[:2])
    for rule in (
        jm.Rule("block1/down/add", activation_bits=16),
        jm.Rule("block1/down/add", symmetric_activations=True),
    ):
        with pytest.raises(ValueError, match="in a residual stream.*residual_bits=16"):
            jm.plan(params, graph, jm.QuantConfig(rules=[rule]))
    table = jm.plan(params, graph)
    (note,) = table.where(name="block1/down/add")["note"]
    assert note.startswith("a residual stream")
    for bits in (1, 17, "8"):
        with pytest.raises(ValueError, match="residual_bits"):
            jm.QuantConfig(residual_bits=bits)


def test_a_loop_that_hides_its_turns_is_quantized_whole():
    """In a loop that runs backwards it is not followed which turn a value is of."""

    def apply(params, x):
        x = norm(params["first"], dense(params["stem"], x))
        body = lambda x, p: (after(p, x), None)
        x, _ = jax.lax.scan(body, x, params["blocks"], reverse=True)
        return dense(params["head"], norm(params["last"], x))

    stacked, _, x = drawn()
    _, quantizers = calibrated(apply, stacked, x)
    assert not quantizers.activation("blocks/norm").products_only
    y = jax.jit(jm.simulate(apply, quantizers))(stacked, x)
    assert np.all(np.isfinite(y))


def test_convolutions_are_as_before():
    """A sum that a rectifier and a convolution read is stored with the bits of activations."""

    def apply(params, x):
        y = jax.nn.relu(dense(params["stem"], x))
        return dense(params["head"], jax.nn.relu(y + dense(params["up"], y)))

    rng = np.random.default_rng(0)
    params = {
        n: {
            "kernel": jnp.asarray(rng.normal(size=(4, 4)).astype(np.float32)),
            "bias": jnp.zeros(4, jnp.float32),
        }
        for n in ("stem", "up", "head")
    }
    x = jnp.asarray(rng.normal(size=(16, 4)).astype(np.float32))
    _, quantizers = calibrated(apply, params, x)
    assert not any(q.products_only for q in quantizers.activations.values())
    assert [*quantizers.activations] == ["input", "stem/relu", "up", "up/relu", "head"]


@pytest.mark.parametrize("form", [scanned, written_out])
def test_a_norm_that_gives_zeros_stays_in_float(form):
    """A loop reads it at its first turn, and other norms that have quantizers after it."""
    stacked, own, x = drawn()
    params = stacked if form is scanned else own
    params["first"] = jax.tree.map(jnp.zeros_like, params["first"])
    apply = form(after)
    _, quantizers = calibrated(apply, params, x)
    why = dict(quantizers.skipped)
    first = "blocks/up" if form is scanned else "block0/up"
    assert "zero" in why["first"] and "'first'" in why[f"input of {first}"]
    found = jm.simulate(apply, quantizers)(params, x)
    assert decibels(apply(params, x), found) > 15
