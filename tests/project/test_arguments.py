"""What is refused before any work: options among the model's keywords, keys, whole batches."""

import collections.abc
import dataclasses
import inspect
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmet as jm
from jaxmet.layers.collect import collect
from jaxmet.transforms.rounding.methods import method_of
from jaxmet.tree.batches import as_batches

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
            stated = (
                rf"jaxmet\.{caller}: {next(iter(given))}.* option.*model.*{written}"
            )
            with pytest.raises(ValueError, match=stated):
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
        stated = rf"jaxmet\.{caller}: the key is .*{what}.*key=jax\.random\.key\(0\)"
        with pytest.raises(ValueError, match=stated):
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
    for stated, call in wrong:
        with pytest.raises(ValueError, match=rf"jaxmet\.{stated}"):
            call()
    assert not no.count


def test_trace_says_what_it_called_where_the_model_did_not_run():
    for given in (((1, 3),), (), ({"x": X},)):
        with pytest.raises(TypeError) as found:
            jm.trace(apply, PARAMS, *given)
        assert any("jax.ShapeDtypeStruct" in n for n in found.value.__notes__)


# Every keyword of a kind, by the signatures


def wrong_values(hint):
    """Values that a parameter of this annotation must refuse."""
    union = get_origin(hint) in (Union, types.UnionType)
    parts = set(get_args(hint)) if union else {hint}
    optional, parts = type(None) in parts, parts - {type(None)}
    absent = [] if optional else [None]
    if bool in parts:
        return ["no", "", 0, 1, *absent]
    if parts == {int}:
        return ["3", 0, -1, 2.5, True, *absent]
    if parts in ({float}, {int, float}):
        return ["3", float("nan"), True, *absent]
    kinds = {get_origin(p) or p for p in parts}
    if Literal in kinds:
        return ["other", 3, ["noise"], *absent]
    if kinds == {collections.abc.Callable}:
        return [3, "apply", *absent]
    if kinds & {jm.Graph, jm.Quantizers, jm.QuantConfig, jm.Table}:
        return [3, {}, "graph", *absent]
    return []


def usual(graph, q, table):
    """Arguments of every public function with which it would run."""
    on = {"params": PARAMS, "graph": graph}
    data = {"batches": Reads()}
    score: Any = lambda apply, params: jnp.sum(apply(params, X))
    return {
        "absorb_bias": on,
        "adaround": on | data | {"quantizers": q, "key": jax.random.key(0)},
        "calibrate": on | data,
        "compare": on | {"quantizers": q, "batch": X},
        "correct_bias": on | data | {"quantizers": q},
        "cost": on | {"inputs": X},
        "densify": {"params": PARAMS},
        "dynamic": {},
        "equalize": on | data,
        "evaluate": {"apply": apply, "hook": lambda node, run, x: (run(*x), None)},
        "factorize": on | data | {"ratios": 0.5},
        "fake_quant": {"x": X, "scale": 1.0, "zero_point": 0, "low": -8, "high": 7},
        "fold_batch_norm": on,
        "functional": {"module": nnx.Linear(2, 2, rngs=nnx.Rngs(0))},
        "grids": {"quantizers": q},
        "lift": {"apply": apply},
        "load": {"path": "absent.npz"},
        "noise": on | data | {"quantizers": q},
        "optimizer_labels": on,
        "plan": on,
        "prune": on | data | {"ratios": 0.5},
        "ptq": {"apply": apply, "params": PARAMS} | data,
        "quantize": on | {"quantizers": q},
        "rebuild": {"params": PARAMS},
        "reestimate_batch_norm": on | data,
        "report": on | {"path": "report.html"},
        "rotate": on,
        "round_weights": {"params": PARAMS, "quantizers": q},
        "save": {"path": "absent.npz", "params": PARAMS},
        "score_ratios": on | data | {"score": score},
        "search_scales": on | data | {"quantizers": q},
        "segments": {"graph": graph, "params": PARAMS, "inputs": X, "cuts": ["w"]},
        "select_ratios": {"table": table, "target": 0.5},
        "sensitivity": on | {"quantizers": q, "score": score},
        "simulate": {"apply": apply, "quantizers": q},
        "smooth": on | data,
        "batched": {"inputs": X},
        "trace": {"apply": apply, "params": PARAMS, "inputs": X},
        "widths": {"params": PARAMS},
    }


def call(function, arguments):
    """The function with arguments by name, positional ones too."""
    given, rest = [], dict(arguments)
    parameters = inspect.signature(function).parameters.values()
    star = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    for p in parameters if star else ():
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL):
            given.append(rest.pop(p.name))
    return function(*given, **rest)


FREE = {
    ("fake_quant", "block"): "numerics trust their annotations",
}


def test_a_keyword_of_a_kind_refuses_what_is_not_of_the_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graph = jm.trace(apply, PARAMS, X)
    columns = {"layer": ["w", "(all)"], "ratio": [0.5, 1.0], "score": [1.0, 1.0]}
    table = jm.Table(columns | {"macs": [1.0, 2.0], "parameters": [1.0, 2.0]})
    every = usual(graph, quantizers(graph), table)
    public = {n for n in dir(jm) if inspect.isfunction(getattr(jm, n))}
    assert public == set(every), "a new public function needs a line in `usual`"
    tried, wrong = 0, []
    for name, arguments in every.items():
        function = getattr(jm, name)
        hints = get_type_hints(function)
        for option in inspect.signature(function).parameters:
            if (name, option) in FREE:
                continue
            for value in wrong_values(hints.get(option)):
                tried += 1
                try:
                    call(function, arguments | {option: value})
                except ValueError as error:
                    if not re.match(rf"jaxmet\.{name}: .*\b{option}\b", str(error)):
                        wrong.append((name, option, value, str(error)))
                except Exception as error:
                    wrong.append((name, option, value, repr(error)))
                else:
                    wrong.append((name, option, value, "accepted"))
    assert not wrong, "\n".join(map(str, wrong))
    assert tried > 300
    assert not [*tmp_path.iterdir()]


LEAST = {"sweeps": 0, "iterations": 0}  # 0 rounds to nearest


def test_methods_of_adaround_check_their_own_options():
    tried, wrong = 0, []
    methods = {n: getattr(jm, n) for n in ("Coordinate", "Gptq", "Gram", "Adam")}
    assert {type(method_of(n.lower(), "x")) for n in methods} == {*methods.values()}
    for name, kind in methods.items():
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            kind(**{field.name: field.default})
            values = wrong_values(hints[field.name])
            if field.name == "beta_range":
                values = [3, (1.0,), ("a", 1.0), (float("nan"), 1.0), None]
            for value in values:
                if value == LEAST.get(field.name) and type(value) is int:
                    kind(**{field.name: value})
                    continue
                tried += 1
                stated = rf"jaxmet\.{name}: {field.name} is"
                try:
                    kind(**{field.name: value})
                except ValueError as error:
                    if not re.match(stated, str(error)):
                        wrong.append((name, field.name, value, str(error)))
                else:
                    wrong.append((name, field.name, value, "accepted"))
    assert not wrong, "\n".join(map(str, wrong))
    assert tried > 60


# Batches without a batch axis


KERNEL = {"k": jnp.linspace(-1, 1, 18).reshape(3, 3, 1, 2), "v": jnp.ones((2, 3))}
IMAGES = jnp.linspace(-1.0, 1.0, 4 * 36).reshape(4, 6, 6, 1)


def convolution(params, x):
    y = jax.lax.conv_general_dilated(
        x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(y).mean((1, 2)) @ params["v"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("model", "params", "x"), [(convolution, KERNEL, IMAGES), (apply, PARAMS, X)]
)
def test_an_unbatched_example_is_named_with_both_shapes_and_the_cure(model, params, x):
    graph = jm.trace(model, params, x)
    q = jm.calibrate(params, graph, [x], progress=False)
    on, one = (params, graph), [x[0]]
    found, traced = (re.escape(str(a.shape)) for a in (x[0], x))
    stated = rf"batch are {found}, .*traced inputs {traced}.*batch axis is missing: .*x\[None\]"
    takes_one = [
        ("equalize", lambda b: jm.equalize(*on, batches=b, progress=False)),
        ("noise", lambda b: jm.noise(*on, q, b, examples=2, progress=False)),
    ]
    takes_batches = [
        ("calibrate", lambda b: jm.calibrate(*on, b, progress=False)),
        ("prune", lambda b: jm.prune(*on, 0.5, batches=b, progress=False)),
        ("search_scales", lambda b: jm.search_scales(*on, q, b, progress=False)),
        ("compare", lambda b: jm.compare(*on, q, b[0])),
        ("cost", lambda b: jm.cost(*on, b[0])),
    ]
    for caller, run in takes_one + takes_batches:
        if model is apply and (caller, run) in takes_batches:
            run(one)  # a product takes any number of leading axes
            continue
        with pytest.raises(ValueError, match=rf"jaxmet\.{caller}: .*{stated}") as error:
            run(one)
        assert "inputs=" not in str(error.value)
        run([x[-1:]])
    if model is convolution:
        stated = rf"jaxmet\.ptq: .*batch are {found}\..*x\[None\]"
        with pytest.raises(ValueError, match=stated):
            jm.ptq(model, params, one, progress=False)


def test_a_model_without_a_batch_axis_is_said_to_have_none():
    def flat(params, x):  # one image, and nothing else
        return apply(params, x.reshape(3))

    for model, why, cure in (
        (flat, "the model has no batch axis", r"jax\.vmap"),
        (
            apply,
            "axis 0 of the batch is no batch axis",
            r"Trace the model with x\[None\]",
        ),
    ):
        graph = jm.trace(model, PARAMS, X[0])
        q = jm.calibrate(PARAMS, graph, [X[0]], progress=False)
        calls: Any = {
            "equalize": lambda b, g=graph: jm.equalize(PARAMS, g, batches=b),
            "noise": lambda b, g=graph, q=q: jm.noise(PARAMS, g, q, b),
        }
        for caller, run in calls.items():
            stated = rf"jaxmet\.{caller}: {why}, .*takes \(3,\) and not \(1,\).*{cure}"
            with pytest.raises(ValueError, match=stated) as error:
                run([X[0]])
            assert "inputs=" not in str(error.value)
    batched = jax.vmap(flat, in_axes=(None, 0))  # the cure that the message names
    graph = jm.trace(batched, PARAMS, X[:1])
    jm.equalize(PARAMS, graph, batches=[X], progress=False)


def test_an_error_that_the_batch_did_not_cause_passes_unchanged():
    def hook(node, run, operands):
        raise TypeError("of the hook itself")

    graph = jm.trace(apply, PARAMS, X)
    batches = as_batches([X], "caller")
    with pytest.raises(TypeError, match="of the hook itself"):
        collect(
            graph, PARAMS, batches, hook, lambda a, b: a, caller="x", progress=False
        )


# Trees, files, pieces


def test_pinning_and_rounding_refuse_a_tree_without_the_parameters():
    graph = jm.trace(apply, PARAMS, X)
    q = quantizers(graph)
    wrong: list[Any] = [graph, q, {"z": PARAMS["w"]}, {"w": PARAMS["w"]}, {}, None, 3]
    wrong += [{"w": "text", "v": PARAMS["v"]}]
    for tree in wrong:
        for caller, run in (
            ("Quantizers.pin", q.pin),
            ("round_weights", lambda tree: jm.round_weights(tree, q)),
        ):
            with pytest.raises(ValueError, match=rf"jaxmet\.{caller}: .*'[wv]'.*Pass"):
                run(tree)
    assert not q.pin(PARAMS).weights["w"].follows

    def derived(params, x):
        both = jnp.concatenate([params["gates"]["i"], params["gates"]["o"]], 1)
        return apply({"w": both, "v": params["v"]}, x)

    halves = {"i": PARAMS["w"][:, :2], "o": PARAMS["w"][:, 2:]}
    params = {"gates": halves, "v": PARAMS["v"]}
    found = jm.calibrate(params, jm.trace(derived, params, X), [X], progress=False)
    assert found.derived
    found.pin(params)  # its weight is no parameter of the tree


def test_an_environment_without_a_value_is_refused():
    graph = jm.trace(apply, PARAMS, X)
    pieces = jm.segments(graph, PARAMS, X, cuts=["w/relu"])
    first = pieces.begin(X)
    second = pieces[0](PARAMS, first)
    wrong: list[tuple[str, Any]] = [
        (r"Segments\.finish: .*no 'v'.*the keys 'w/relu'.*last", lambda: second),
        (r"Segments\.finish: .*no 'v'.*no keys", dict),
        (r"Segments\.finish: .*of type list", list),
    ]
    for stated, environment in wrong:
        with pytest.raises(ValueError, match=rf"jaxmet\.{stated}"):
            pieces.finish(environment())
    with pytest.raises(ValueError, match=r"Segment: .*no 'w/relu'.*'input 0'.*before"):
        pieces[1](PARAMS, first)
    with pytest.raises(ValueError, match=r"Segment: .*no parameter 'v'"):
        pieces[1]({"w": PARAMS["w"]}, second)
    out = pieces.finish(pieces[1](PARAMS, second))
    np.testing.assert_allclose(out, apply(PARAMS, X), rtol=1e-6)
    with pytest.raises(ValueError, match="the graph is of type dict"):
        jm.segments({}, PARAMS, X, cuts=["w"])  # pyright: ignore[reportArgumentType]


def test_fields_of_quantizers_are_checked():
    q = quantizers(jm.trace(apply, PARAMS, X))
    for name in ("enabled", "symmetric", "signed", "narrow"):
        with pytest.raises(ValueError, match=rf"Quantizers\.set: {name} is 'no'.*True"):
            q.set("w", **{name: "no"})


def test_names_of_another_kind_are_refused():
    graph = jm.trace(apply, PARAMS, X)
    q = quantizers(graph)
    wrong: Any
    for wrong in (3, {}, ["w", None], {"w": 1}):
        calls: dict[str, Any] = {
            "Graph.only": lambda w=wrong: graph.only(w),
            "Graph.without": lambda w=wrong: graph.without("v", w),
            "Quantizers.set": lambda w=wrong: q.set(w, bits=4),
            "segments": lambda w=wrong: jm.segments(graph, PARAMS, X, cuts=w),
        }
        for caller, run in calls.items():
            with pytest.raises(
                ValueError, match=rf"jaxmet\.{caller}.*Give names as texts"
            ):
                run()
    assert len(jm.segments(graph, PARAMS, X, cuts=())) == 1


def test_switches_and_widths_of_grids_are_numbers():
    q = quantizers(jm.trace(apply, PARAMS, X))
    bad: Any
    for bad in ("no", [1], (True,)):
        with pytest.raises(
            ValueError, match="grids: the switch of 'w' is.*True or False"
        ):
            jm.grids(q, weights=bad)
        with pytest.raises(ValueError, match="grids: bits is"):
            jm.grids(q, weight_bits=bad)
    with pytest.raises(ValueError, match="grids: the switch of 'w' is"):
        jm.grids(q, weights={"w": "no"})
    assert not jm.grids(q, weights=np.bool_(0)).weights["w"].enabled
