"""What is refused before any work: options among the model's keywords, keys, whole batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

X = jnp.linspace(-1.0, 1.0, 15).reshape(5, 3)
PARAMS = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}


def apply(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


class Reads:
    """Batches that may be looked at once and not read through."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        self.count += 1
        yield X
        raise AssertionError("the data is read")


def quantizers(graph):
    return jm.calibrate(PARAMS, graph, [X], progress=False)


def calls(graph, q, batches):
    """Every function that passes keywords to the model and knows quantizers."""
    key: Any = jax.random.key(0)
    on = (PARAMS, graph)
    return {
        "calibrate": lambda **kw: jm.calibrate(*on, batches, **kw),
        "ptq": lambda **kw: jm.ptq(apply, PARAMS, batches, **kw),
        "adaround": lambda **kw: jm.adaround(
            *on, q, batches, **dict[str, Any](key=key) | kw
        ),
        "search_scales": lambda **kw: jm.search_scales(*on, q, batches, **kw),
        "correct_bias": lambda **kw: jm.correct_bias(*on, q, batches, **kw),
        "reestimate_batch_norm": lambda **kw: jm.reestimate_batch_norm(
            *on, batches, **kw
        ),
        "noise": lambda **kw: jm.noise(*on, q, batches, **kw),
        "compare": lambda **kw: jm.compare(*on, q, X, **kw),
    }


def test_options_among_the_models_keywords_are_named():
    graph = jm.trace(apply, PARAMS, X)
    q = quantizers(graph)
    for caller, call in calls(graph, q, Reads()).items():
        for given, written in (
            ({"weight_bits": 4}, r"config=jm\.QuantConfig\(weight_bits=4\)"),
            ({"block": 2, "percentile": 99}, r"QuantConfig\(block=2, percentile=99\)"),
            ({"quantize": False}, r"rules=\[jm\.Rule\('\*', quantize=False\)\]"),
        ):
            said = rf"jaxmet\.{caller}: {next(iter(given))}.* option.*model.*{written}"
            with pytest.raises(ValueError, match=said):
                call(**given)
    with pytest.raises(ValueError, match="weight_bits is an option"):
        jm.calibrate(PARAMS, graph, weight_bits=4)  # no data, so no model runs


def test_a_model_may_take_a_keyword_of_that_name():
    def model(params, x, *, bias=0.0, **rest):
        del rest
        return apply(params, x + bias)

    class Wrapped:  # its signature says nothing, as that of linen's apply
        def __call__(self, params, x, **kwargs):
            return model(params, x, **kwargs) * kwargs.get("block", 1)

    for call in (model, Wrapped()):
        graph = jm.trace(call, PARAMS, X)
        found = jm.calibrate(PARAMS, graph, [X], bias=3.0, progress=False)
        plain = jm.calibrate(PARAMS, graph, [X], progress=False)
        name = list(found.activations)[-1]
        assert found.activations[name].scale != plain.activations[name].scale
    jm.calibrate(PARAMS, jm.trace(Wrapped(), PARAMS, X, block=2), [X], progress=False)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (3, "a int, 3"),
        (np.int32(3), r"of shape \(\)"),
        ("seed", "a str, 'seed'"),
        (np.zeros(2, np.int32), r"of shape \(2,\)"),
        (np.zeros(3, np.uint32), r"of shape \(3,\)"),
        (jax.random.split(jax.random.key(0)), r"of shape \(2,\)"),
        (jax.random.split(jax.random.PRNGKey(0)), r"of shape \(2, 2\)"),
    ],
)
def test_a_wrong_key_is_refused_before_any_work(key, what):
    graph = jm.trace(apply, PARAMS, X)
    batches = Reads()
    every = calls(graph, quantizers(graph), batches)
    for caller in ("adaround", "search_scales", "ptq"):
        said = rf"jaxmet\.{caller}: the key is .*{what}.*key=jax\.random\.key\(0\)"
        with pytest.raises(ValueError, match=said):
            every[caller](key=key)
    assert batches.count <= 1  # ptq looks at the first batch


def test_keys_of_both_kinds():
    graph = jm.trace(apply, PARAMS, X)
    q = quantizers(graph)
    every = [jax.random.key(1), jax.random.PRNGKey(1), np.asarray([0, 1], np.uint32)]
    found = [jm.adaround(PARAMS, graph, q, [X], key=k, progress=False) for k in every]
    for one in found[1:]:
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_dict_batch_lists_its_keys():
    graph = jm.trace(apply, PARAMS, X)
    batch = {"image": X, "label": jnp.arange(5)}
    for call in (
        lambda: jm.calibrate(PARAMS, graph, [batch], progress=False),
        lambda: jm.calibrate(PARAMS, graph, jm.batched(batch, 2), progress=False),
        lambda: jm.ptq(apply, PARAMS, [batch], progress=False),
        lambda: jm.calibrate(PARAMS, graph, [batch | {"label": "cat"}]),
    ):
        with pytest.raises(ValueError, match="'image', 'label'.*inputs=lambda batch"):
            call()
    with pytest.raises(
        ValueError, match=r"of type dict with the keys 'image', 'label'"
    ):
        jm.calibrate(PARAMS, graph, batch)


def test_arguments_of_another_kind_are_named():
    graph, no, key = jm.trace(apply, PARAMS, X), Reads(), jax.random.key(0)
    q = quantizers(graph)
    other = {"z": jnp.ones((3, 4))}
    others = jm.calibrate(
        other, jm.trace(lambda p, x: x @ p["z"], other, X), [X], progress=False
    )
    some: Any = jm.QuantConfig()
    wrong: list[tuple[str, Any]] = [
        ("ptq: config is of type Quantizers", lambda: jm.ptq(apply, PARAMS, no, q)),
        ("calibrate: config is of type", lambda: jm.calibrate(PARAMS, graph, no, {})),
        ("plan: config is of type dict", lambda: jm.plan(PARAMS, graph, {})),
        ("equalize: config is of type", lambda: jm.equalize(PARAMS, graph, config=0)),
        ("round_weights: quantizers is of", lambda: jm.round_weights(q, PARAMS)),
        ("grids: quantizers is of type", lambda: jm.grids(some)),
        (
            "fold_batch_norm: quantizers is of type",
            lambda: jm.fold_batch_norm(PARAMS, graph, quantizers=some),
        ),
        (
            "fold_batch_norm: the quantizers have one for 'z'",
            lambda: jm.fold_batch_norm(PARAMS, graph, quantizers=others),
        ),
        (
            "correct_bias: the quantizers have one for 'z'",
            lambda: jm.correct_bias(PARAMS, graph, others, no),
        ),
        ("segments: the graph is of", lambda: jm.segments(PARAMS, graph, X, cuts="w")),
        ("calibrate: inputs is 0", lambda: jm.calibrate(PARAMS, graph, no, inputs=0)),
        (
            "adaround: method is Adam",
            lambda: jm.adaround(PARAMS, graph, q, no, method=jm.Adam),  # type: ignore
        ),
        (
            "adaround: checkpoint is 3",
            lambda: jm.adaround(PARAMS, graph, q, [X], key=key, checkpoint=3),
        ),
        (
            "calibrate: a batch has no examples",
            lambda: jm.calibrate(PARAMS, graph, [X, X[:0]], progress=False),
        ),
    ]
    for said, call in wrong:
        with pytest.raises(ValueError, match=rf"jaxmet\.{said}"):
            call()
    assert not no.count


def test_trace_says_what_it_called_where_the_model_did_not_run():
    for given in (((1, 3),), (), ({"x": X},)):
        with pytest.raises(TypeError) as found:
            jm.trace(apply, PARAMS, *given)
        assert any("jax.ShapeDtypeStruct" in n for n in found.value.__notes__)
