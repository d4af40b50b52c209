"""Layers that a loop runs are rounded turn by turn, as those of the model written out."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm

W3 = jm.QuantConfig(weight_bits=3, activation_bits=32)
QUIET = {"key": jax.random.key(0), "progress": False}
DEPTH, WIDTH = 7, 16


def draws(seed=0):
    rng = np.random.default_rng(seed)
    return lambda *s: jnp.asarray(rng.normal(size=s) / np.sqrt(s[-2]), jnp.float32)


def dense(n, m, draw, depth=DEPTH):
    return {"w": draw(depth, n, m), "b": 0.1 * draw(depth, 1, m)[:, 0]}


def add(x, p):
    return x @ p["w"] + jnp.expand_dims(p["b"], tuple(range(x.ndim - 1)))


def residual(h, p):
    """x + Dense(relu(Dense(x)))"""
    return h + add(jax.nn.relu(add(h, p["up"])), p["down"])


def normed(h):
    mean = jnp.mean(h, -1, keepdims=True)
    return (h - mean) * lax.rsqrt(jnp.var(h, -1, keepdims=True) + 1e-5)


def transformer(h, p):
    """A pre-norm block with attention."""
    x = normed(h)
    q, k, v = (add(x, p[n]) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / 4)
    h = h + add(jnp.einsum("bts,bsd->btd", weights, v), p["o"])
    return h + add(jax.nn.gelu(add(normed(h), p["up"])), p["down"])


BLOCKS = {"residual": residual, "transformer": transformer}


@functools.cache
def model(name):
    """Parameters of a stack of blocks between two plain layers, and inputs."""
    draw = draws()
    hidden = {"up": dense(WIDTH, 32, draw), "down": dense(32, WIDTH, draw)}
    if name == "transformer":
        hidden |= {n: dense(WIDTH, WIDTH, draw) for n in "qkvo"}
    params = {"first": draw(12, WIDTH), "last": draw(WIDTH, 8), "layers": hidden}
    x = draw(64, 8, 12) if name == "transformer" else draw(512, 12)
    mix = draw(12, 12) * jnp.linspace(3, 0.1, 12)[:, None]
    return params, x @ mix, draw(*x.shape) @ mix


def scanned(block, p, x, **how):
    body = lambda h, own: (block(h, own), None)
    return lax.scan(body, x @ p["first"], p["layers"], **how)[0] @ p["last"]


def unrolled(block, p, x, reverse=False):
    """The same model; its tree is a list of layers."""
    h = x @ p["first"]
    for own in reversed(p["layers"]) if reverse else p["layers"]:
        h = block(h, own)
    return h @ p["last"]


def listed(params, depth=DEPTH):
    layers = params["layers"]
    return params | {
        "layers": [jax.tree.map(lambda v, i=i: v[i], layers) for i in range(depth)]
    }


def decibels(apply, params, quantizers, x, exact):
    y = jax.jit(jm.simulate(apply, quantizers))(params, x)
    return 10 * float(jnp.log10(jnp.sum(exact**2) / jnp.sum((y - exact) ** 2)))


def compared(apply, params, train, test, config=W3, **options):
    """SQNR of nearest rounding and of `adaround` on other data, and the report."""
    graph = jm.trace(apply, params, train)
    q = jm.calibrate(params, graph, [train], config, progress=False)
    exact, half = jax.jit(apply)(params, test), len(train) // 2 + 3
    new, after, report = jm.adaround(
        params, graph, q, [train[:half], train[half:]], **QUIET, **options, with_report=True
    )  # fmt: skip
    nearest = decibels(apply, params, q, test, exact)
    return nearest, decibels(apply, new, after, test, exact), report


METHODS = ["coordinate", "gptq", jm.Gram(iterations=200), jm.Adam(iterations=200)]


def check_alike(loop, flat, gain):
    """As much as the model written out, and several dB more than nearest rounding."""
    assert loop[0] == pytest.approx(flat[0], abs=0.01)
    assert loop[1] > flat[1] - 0.1
    assert loop[1] > loop[0] + gain


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=["coordinate", "gptq", "gram", "adam"])
@pytest.mark.parametrize("name", BLOCKS)
def test_as_good_as_the_model_written_out(name, method):
    params, train, test = model(name)
    both = (
        compared(functools.partial(run, BLOCKS[name]), tree, train, test, method=method)
        for run, tree in ((scanned, params), (unrolled, listed(params)))
    )
    check_alike(*both, gain=2)


def test_one_row_for_each_turn_and_gains_in_all_of_them():
    params, train, test = model("residual")
    apply = functools.partial(scanned, residual)
    nearest, found, report = compared(apply, params, train, test)
    assert found > nearest + 10
    layers = ["first", *["layers/up"] * DEPTH, *["layers/down"] * DEPTH, "last"]
    assert list(report["layer"]) == layers
    assert list(report["turn"]) == [None, *range(DEPTH), *range(DEPTH), None]
    assert max(report["ratio"]) < 0.5 and not any(report["note"])
    assert report.title.startswith(f"{2 * DEPTH + 2} of {2 * DEPTH + 2} weights")


@pytest.mark.slow
def test_a_loop_that_runs_backwards():
    params, train, test = model("residual")
    loop = compared(
        functools.partial(scanned, residual, reverse=True),
        params,
        train,
        test,
        store="host",
    )
    flat = functools.partial(unrolled, residual, reverse=True)
    check_alike(loop, compared(flat, listed(params), train, test), 10)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["weights", "both"])
def test_padding_and_quantized_activations(of):
    """Where values count is known for each turn, as are the scales of activations."""
    params, train, test = model("transformer")
    train = jnp.where(jnp.arange(8)[None, :, None] < 5, train, 40.0)
    mask = lambda x: np.broadcast_to(np.arange(8) < 5, x.shape[:2])
    config = jm.QuantConfig(weight_bits=3, activation_bits=8, placement="products")
    both = [
        compared(
            functools.partial(run, attending), tree, train, test, config,
            mask=mask, of=of,
        )
        for run, tree in ((scanned, params), (unrolled, listed(params)))
    ]  # fmt: skip
    check_alike(*both, gain=2)


def attending(h, p):
    """A block of which padding takes no part."""
    kept = jnp.arange(8) < 5
    x = normed(h)
    q, k, v = (add(x, p[n]) for n in "qkv")
    scores = jnp.einsum("btd,bsd->bts", q, k) / 4
    weights = jax.nn.softmax(jnp.where(kept[None, None], scores, -1e9))
    h = h + add(jnp.einsum("bts,bsd->btd", weights, v), p["o"])
    return h + add(jax.nn.gelu(add(normed(h), p["up"])), p["down"])


@pytest.mark.slow
@pytest.mark.parametrize("of", ["weights", "both", "float"])
def test_scales_of_each_turn_are_searched(of):
    params, train, test = model("residual")
    config = jm.QuantConfig(weight_bits=3, activation_bits=8, placement="products")
    found = []
    for run, tree in ((scanned, params), (unrolled, listed(params))):
        apply = functools.partial(run, residual)
        graph = jm.trace(apply, tree, train)
        q = jm.calibrate(tree, graph, [train], config, progress=False)
        q = jm.search_scales(tree, graph, q, [train], of=of, **QUIET)
        found.append(decibels(apply, tree, q, test, jax.jit(apply)(tree, test)))
    assert found[0] == pytest.approx(found[1], abs=0.1)


class Block(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, h, _):
        x = nn.relu(nn.Dense(self.hidden)(h))
        return h + nn.Dense(h.shape[-1])(x), None


class TwoStacks(nn.Module):
    """Two loops, of which the second begins where the first one ends."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        for hidden, length in ((24, 4), (40, 3)):
            stack = nn.scan(
                Block,
                variable_axes={"params": self.axis},
                split_rngs={"params": True},
                length=length,
            )
            x, _ = stack(hidden)(x, None)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_two_stacks_of_other_sizes(axis):
    """Also where the layers lie along another axis of the parameters than the first."""
    _, train, test = model("residual")
    net = TwoStacks(axis)
    params = net.init(jax.random.key(1), train)

    def written_out(p, x):
        for layer in p:
            h = nn.relu(x @ layer["Dense_0"]["kernel"] + layer["Dense_0"]["bias"][None])
            x = x + h @ layer["Dense_1"]["kernel"] + layer["Dense_1"]["bias"][None]
        return x

    stacks = (("ScanBlock_0", 4), ("ScanBlock_1", 3))
    layers = [
        jax.tree.map(lambda v, i=i: jnp.take(v, i, axis), params["params"][name])
        for name, length in stacks
        for i in range(length)
    ]
    loop = compared(net.apply, params, train, test, bias=axis == 0)
    flat = compared(written_out, layers, train, test, bias=axis == 0)
    if axis == 0:
        check_alike(loop, flat, 5)
    assert loop[1] > loop[0] + 5 and len(loop[2]["layer"]) == 14


def nested(p, x):
    """A plain layer, and a loop that holds a layer and a loop of layers."""

    def outer(h, own):
        h = jnp.tanh(h @ own["w"])
        inner = lambda h, w: (h + 0.3 * jnp.tanh(h @ w), None)
        return lax.scan(inner, h, own["inner"])[0], None

    return lax.scan(outer, x @ p["first"], p["outer"])[0] @ p["last"]


def counted(p, x):
    """Layers that a loop picks by their number, after a loop over slices."""
    h = lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x @ p["first"], p["w"])[0]
    step = lambda i, h: h + 0.3 * jnp.tanh(h @ p["picked"][i])
    return lax.fori_loop(0, 3, step, h) @ p["last"]


@pytest.mark.parametrize("apply,kept", [
    (nested, {"outer/inner"}), (counted, {"picked/product"}),
], ids=["nested", "counted"])  # fmt: skip
@pytest.mark.one_in(2)
def test_what_no_turn_has_for_itself_is_rounded_to_nearest_and_said(apply, kept):
    draw = draws(3)
    _, train, test = model("residual")
    params = {
        "first": draw(12, WIDTH),
        "last": draw(WIDTH, 8),
        **({"outer": {"w": draw(3, WIDTH, WIDTH), "inner": draw(3, 2, WIDTH, WIDTH)}}
           if apply is nested else
           {"w": draw(3, WIDTH, WIDTH), "picked": draw(3, WIDTH, WIDTH)}),
    }  # fmt: skip
    nearest, found, report = compared(apply, params, train, test)
    assert found > nearest + 1
    notes = dict(zip(report["layer"], report["note"], strict=True))
    assert {n for n, why in notes.items() if why} == kept
    assert all("rounded to nearest" in notes[n] for n in kept)


def test_scales_and_biases_that_all_turns_share():
    """Such scales stay what they are; such a bias takes no error, and the report says so."""
    draw = draws(2)
    _, train, test = model("residual")
    params = {"w": draw(4, 12, 12), "b": draw(1, 12)[0]}

    def apply(p, x):
        body = lambda h, w: (jnp.tanh(h @ w + p["b"][None]), None)
        return lax.scan(body, x, p["w"])[0]

    graph = jm.trace(apply, params, train)
    q = jm.calibrate(params, graph, [train], W3, progress=False)
    scale = jnp.max(jnp.abs(params["w"]), (0, 1), keepdims=True) / 3
    q = q.set("w", axis=(2,), scale=scale)
    new, after, report = jm.adaround(
        params, graph, q, [train], **QUIET, with_report=True
    )
    np.testing.assert_array_equal(after.weights["w"].scale, scale)
    np.testing.assert_array_equal(after.weights["w"](new["w"]), new["w"])
    np.testing.assert_array_equal(new["b"], params["b"])
    assert all("bias unchanged" in note for note in report["note"])
    exact = apply(params, test)
    gained = decibels(apply, new, after, test, exact)
    assert gained > decibels(apply, params, q, test, exact) + 1


@pytest.mark.slow
def test_a_loop_resumes_within_a_turn(tmp_path, monkeypatch):
    params, train, _ = model("residual")
    apply = functools.partial(scanned, residual)
    graph = jm.trace(apply, params, train)
    q = jm.calibrate(params, graph, [train], W3, progress=False)
    options = QUIET | {"method": "gptq"}
    whole = jm.adaround(params, graph, q, [train], **options, checkpoint=tmp_path)
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) == 2 * DEPTH + 2
    for file in files[6:]:
        file.unlink()
    again = jm.adaround(params, graph, q, [train], **options, checkpoint=tmp_path)
    plain = jm.adaround(params, graph, q, [train], **options)
    for other in (again, plain):
        assert jax.tree.all(jax.tree.map(np.array_equal, whole, other))


@pytest.mark.slow
def test_no_program_is_compiled_for_each_turn():
    """The number of a turn is data."""
    params, train, _ = model("residual")
    apply = functools.partial(scanned, residual)

    def programs(depth):
        tree = params | {"layers": jax.tree.map(lambda v: v[:depth], params["layers"])}
        graph = jm.trace(apply, tree, train)
        q = jm.calibrate(tree, graph, [train], W3, progress=False)
        compiled = []
        listen = lambda name, _, **__: compiled.append(name)
        jax.monitoring.register_event_duration_secs_listener(listen)
        jm.adaround(tree, graph, q, [train], **QUIET, method="gptq")
        jax.monitoring.unregister_event_duration_listener(listen)
        return sum("backend_compile" in name for name in compiled)

    programs(2)
    assert programs(6) < programs(3) + 6  # there are six steps more
