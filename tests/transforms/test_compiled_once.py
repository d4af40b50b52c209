"""What layer-by-layer transforms compile: little at first, and nothing in a second call."""

import contextlib

import jax
import numpy as np
import pytest
from jax import lax

import jaxmet as jm
from jaxmet.transforms.rounding import size_classes

QUIET = {"progress": False}
W4 = jm.QuantConfig(weight_bits=4)
FEW = jm.Coordinate(sweeps=2)  # the programs of all sweeps


@contextlib.contextmanager
def compilations():
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def network(blocks, seed=0):
    """Depthwise and pointwise convolutions around additions, and a matrix after them."""
    rng, width, form = np.random.default_rng(seed), 12, ("NHWC", "HWIO", "NHWC")
    draw = lambda *shape: jax.device_put(np.float32(rng.normal(size=shape) / 3))

    def conv(p, x, groups):
        y = lax.conv_general_dilated(
            x,
            p["w"],
            (1, 1),
            "SAME",
            dimension_numbers=form,
            feature_group_count=groups,
        )
        return y + p["b"][None, None, None]

    def apply(params, x):
        for p in params["blocks"]:
            y = jax.nn.relu(conv(p["first"], x, 1))
            x = x + conv(p["last"], jax.nn.relu(conv(p["middle"], y, 20)), 1)
        return x.mean((1, 2)) @ params["head"]["w"] + params["head"]["b"][None]

    one = lambda: {
        "first": {"w": draw(1, 1, width, 20), "b": draw(20)},
        "middle": {"w": draw(3, 3, 1, 20), "b": draw(20)},
        "last": {"w": draw(1, 1, 20, width), "b": draw(width)},
    }
    params = {"blocks": [one() for _ in range(blocks)]}
    params["head"] = {"w": draw(width, 10), "b": draw(10)}
    batches = [
        jax.device_put(np.float32(rng.normal(size=(n, 6, 6, width)))) for n in (8, 5)
    ]
    return apply, params, batches


def prepared(blocks=2, config=W4):
    apply, params, batches = network(blocks)
    graph = jm.trace(apply, params, batches[0][:1])
    quantizers = jm.calibrate(params, graph, batches, config, **QUIET)
    return params, graph, quantizers, batches


CALLS = {
    **{
        name: lambda p, g, q, b, m=method: jm.adaround(p, g, q, b, method=m, **QUIET)
        for name, method in (("coordinate", FEW), ("gptq", "gptq"))
    },
    "gram": lambda p, g, q, b: jm.adaround(
        p, g, q, b, method=jm.Gram(iterations=40), **QUIET
    ),
    "adam": lambda p, g, q, b: jm.adaround(
        p, g, q, b, method=jm.Adam(iterations=40, batch=16), **QUIET
    ),
    "activations quantized": lambda p, g, q, b: jm.adaround(
        p, g, q, b, of="both", **QUIET
    ),
    "kept on the host": lambda p, g, q, b: jm.adaround(
        p, g, q, b, store="host", **QUIET
    ),
    "search_scales": lambda p, g, q, b: jm.search_scales(p, g, q, b, **QUIET),
    "correct_bias": lambda p, g, q, b: jm.correct_bias(p, g, q, b, **QUIET),
    "correct_bias, both": lambda p, g, q, b: jm.correct_bias(
        p, g, q, b, of="both", **QUIET
    ),
}


@pytest.fixture(scope="module")
def two_blocks():
    return prepared()


QUICK = ("coordinate", "search_scales", "correct_bias, both")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CALLS],
)
def test_a_second_call_compiles_nothing(name, two_blocks):
    params, graph, quantizers, batches = two_blocks
    other = jax.tree.map(lambda a: a * 1.01, (params, quantizers, batches))
    first = CALLS[name](params, graph, quantizers, batches)
    with compilations() as found:
        again = CALLS[name](other[0], graph, *other[1:])
    assert not found
    alike = jax.tree.map(np.array_equal, first, again)
    assert not jax.tree.all(alike)  # other numbers went in, and not the first ones


def test_a_graph_of_another_trace_compiles_nothing_either(two_blocks):
    params, _, quantizers, batches = two_blocks
    for _ in range(2):
        graph = jm.trace(network(2)[0], params, batches[0][:1])
        with compilations() as found:
            jm.adaround(params, graph, quantizers, batches, method=FEW, **QUIET)
    assert not found


@pytest.mark.slow  # what other tests compiled has to go first
@pytest.mark.parametrize("name", ["coordinate", "correct_bias"])
def test_equal_blocks_share_programs(name):
    counts = []
    for blocks in (2, 4):
        given = prepared(blocks)
        jax.clear_caches()
        with compilations() as found:
            CALLS[name](*given)
        counts.append(len(found))
    assert counts[1] <= counts[0]


CONFIGS = {
    "channels": W4,
    "tensor": jm.QuantConfig(weight_bits=4, per_channel=False),
    "asymmetric": jm.QuantConfig(weight_bits=4, symmetric_weights=False),
    "blocks": jm.QuantConfig(weight_bits=4, block=5),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "damping"),
    [("channels", 0.01), ("tensor", 0.2), ("asymmetric", 0.2), ("blocks", 0.01)],
)
def test_filling_up_changes_nothing(config, damping, monkeypatch):
    """Layers solved at their own sizes, in one part, against those of a few sizes."""
    given = prepared(1, CONFIGS[config])
    monkeypatch.setattr(size_classes, "TOGETHER", 7)  # several parts of outputs
    found = jm.adaround(*given, damping=damping, with_report=True, **QUIET)
    monkeypatch.setattr(size_classes, "parts_of", lambda problem, kind: [problem])
    wanted = jm.adaround(*given, damping=damping, with_report=True, **QUIET)
    apart = [
        np.abs(one - two) > 1e-4 * (1 + np.abs(two))
        for one, two in zip(*map(jax.tree.leaves, (found[0], wanted[0])), strict=True)
    ]
    # Where two integers are equally good, the last bit decides, and later ones follow.
    assert np.mean(np.concatenate([a.reshape(-1) for a in apart])) < 0.02
    for column in ("loss", "nearest loss", "inherited"):
        one, two = (np.array(r[2][column], float) for r in (found, wanted))
        np.testing.assert_allclose(one, two, rtol=0.02, atol=1e-3 * two.max())
