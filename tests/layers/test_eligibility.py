"""One wording of why something is skipped, and one refusal of what was asked for by name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from folds import affine

QUIET = {"progress": False}


def normed(p, x):
    """A batch norm with stored statistics, between two products, then the part at hand."""
    return jax.nn.relu(affine(p["norm"], x @ p["one"])) @ p["two"]


def derived(p, x):
    return normed(p, x) @ (p["v"] * p["g"][None])


def shared(p, x):
    return normed(p, x) @ p["v"] + jnp.sum(jnp.sin(p["v"]))


def stacked(p, x):
    return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), normed(p, x), p["s"])[
        0
    ]


def branched(p, x):
    h = normed(p, x)
    return jax.lax.cond(h[0, 0] > 0, lambda: h @ p["v"], lambda: h)


def looked_up(p, x):
    return p["table"][x] @ p["one"] @ p["two"]


def over_data(p, x):
    h = normed(p, x)
    return (
        (h - h.mean(1, keepdims=True))
        * jax.lax.rsqrt(h.var(1, keepdims=True) + 1e-3)
        @ p["v"]
    )


def looped_norm(p, x):
    step = lambda h, _: (affine(p["norm"], h @ p["v"]), None)
    return jax.lax.scan(step, x @ p["one"], None, length=2)[0] @ p["two"]


def shared_norm(p, x):
    h = affine(p["norm"], x @ p["one"])
    return jax.nn.relu(affine(p["norm"], h @ p["v"])) @ p["two"]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jax.device_put(np.float32(rng.normal(size=shape)))
    norm = {"scale": draw(6), "bias": draw(6), "mean": draw(6)}
    square = {"one": draw(6, 6), "two": draw(6, 6), "v": draw(6, 6), "s": draw(2, 6, 6)}
    return square | {
        "g": draw(6),
        "table": draw(9, 6),
        "norm": norm | {"var": jnp.exp(draw(6))},
    }


def quantizers(graph):
    return jm.Quantizers(
        {n.weight.name or n.name: jm.Quantizer(bits=4) for n in graph.layers},
        derived=tuple(n.name for n in graph.layers if n.weight.name is None),
    )


def with_quantizers(transform, **more):
    def run(params, graph, x, q):
        return transform(params, graph, q, [x], with_report=True, **QUIET, **more)

    return run


def plain(transform, **more):
    def run(params, graph, x, q):
        given = {"batches": [x]} if transform is jm.reestimate_batch_norm else {}
        return transform(params, graph, with_report=True, **given, **more)

    return run


# How each transform is called, what it says that it cannot do, and the names of its rows.
TRANSFORMS = {
    "adaround": (with_quantizers(jm.adaround), "be rounded", "layer"),
    "correct_bias": (with_quantizers(jm.correct_bias), "be corrected", "layer"),
    "factorize": (plain(jm.factorize, ratios=0.5), "be compressed", "layer"),
    "equalize": (plain(jm.equalize, objective="range"), "be rescaled", "group"),
    "fold_batch_norm": (plain(jm.fold_batch_norm), "be folded", "norm"),
    "reestimate_batch_norm": (
        plain(jm.reestimate_batch_norm, **QUIET),
        "be measured",
        "norm",
    ),
}
WEIGHTS = [
    (derived, "its weight is computed from parameters"),
    (shared, "'v' is used elsewhere too"),
    (looked_up, "a lookup sums nothing"),
]
NORMS = [
    (over_data, "a norm over the data"),
    (looped_norm, "inside a scan"),
    (shared_norm, "'norm/var' is used elsewhere too"),
]
STACKED = (stacked, "its weight is stacked by a loop")
BRANCHED = (branched, "inside a cond")
EXPECTED = {
    "adaround": [*WEIGHTS, BRANCHED],
    "correct_bias": [*WEIGHTS[2:], BRANCHED],  # it changes no weight
    "factorize": [*WEIGHTS, STACKED, BRANCHED],
    "equalize": [*WEIGHTS, STACKED],
    "fold_batch_norm": NORMS,
    "reestimate_batch_norm": NORMS,
}
CASES = [
    pytest.param(name, *case, id=f"{name} {case[0].__name__}")
    for name, cases in EXPECTED.items()
    for case in cases
]


def the_node(apply, graph, kind):
    """The node at hand: of a case of norms the last norm, else what reads its own weight."""
    if kind == "norm":
        return [n.name for n in graph.nodes if n.kind == "norm"][-1]
    own = [n for n in graph.layers if {"v", "s", "table"} & set(n.weight.parameters)]
    return own[-1].name


@pytest.mark.parametrize(("name", "apply", "why"), CASES)
def test_every_transform_gives_the_same_reason(name, apply, why, params):
    run, cannot, column = TRANSFORMS[name]
    x = jnp.ones((4, 6)) if apply is not looked_up else jnp.arange(4)
    graph = jm.trace(apply, params, x)
    kind = "norm" if column == "norm" else "layer"
    node = the_node(apply, graph, kind)
    q = quantizers(graph)
    # Skipped and said where nobody asked for it,
    report = run(params, graph, x, q)[-1]
    [note] = report.where(**{column: node})["note"]
    assert why in note
    # refused in the same words where somebody did.
    with pytest.raises(ValueError) as refused:
        run(params, graph.only(node), x, q)
    stated = (
        rf"jaxmet\.{name}: {kind} '{re.escape(node)}' cannot {cannot}: "
        rf".*{re.escape(why)}.*\. It was asked for by name\. [A-Z].+\."
    )
    assert re.fullmatch(stated, str(refused.value)), refused.value
    # A pattern asks for what can be done.
    run(params, graph.only(f"{node}*"), x, q)


def test_what_another_node_forbids_has_its_name(params):
    """Everywhere the same words: whichever of two nodes is named, and by what."""
    x = jnp.ones((4, 6))
    graph = jm.trace(normed, params, x)
    q = quantizers(graph)
    lost = "one: not selected"
    expected = [
        ("fold_batch_norm", "norm", f"norm 'norm' cannot be folded: {lost}. It"),
        ("fold_batch_norm", "one", "norm 'norm' cannot be folded: not selected. 'one'"),
        ("equalize", "two", f"layer 'two' cannot be rescaled: {lost}"),
        ("correct_bias", "one", "'one' cannot be corrected: no bias; norm: not select"),
    ]
    for name, only, stated in expected:
        with pytest.raises(ValueError, match=rf"jaxmet\.{name}: .*{re.escape(stated)}"):
            TRANSFORMS[name][0](params, graph.only(only), x, q)
    stated = (
        "activation 'one/relu' cannot give anything: two: not selected. It was asked"
    )
    with pytest.raises(ValueError, match=re.escape(stated)):
        jm.absorb_bias(params, graph.only("one/relu", "norm"))
    stated = "layer 'two' cannot be compressed: one: not selected. It was asked"
    for only, ratios in ((("two",), 0.5), (("t*",), {"two": 0.5})):
        with pytest.raises(ValueError, match=re.escape(stated)):
            jm.prune(params, graph.only(*only), ratios)
