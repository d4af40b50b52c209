"""What a type checker sees in code of users: wrong words, and trees that keep their type."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import jax.numpy as jnp
import pytest

import jaxmet as jm

ROOT = Path(__file__).parents[2]

USER = """\
from functools import partial
from typing import Any, NamedTuple, assert_type

import jax
import jaxmet as jm


class Params(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def apply(params: Params, x: jax.Array) -> jax.Array:
    return x @ params.kernel + params.bias


def right(params: Params, x: jax.Array, flag: bool) -> None:
    graph = jm.trace(apply, params, x)
    assert_type(jm.fold_batch_norm(params, graph), Params)
    assert_type(jm.equalize(params, graph, clip="skip", objective="range"), Params)
    assert_type(jm.equalize(params, graph, with_report=True), tuple[Params, jm.Table])
    jm.equalize(params, graph, with_report=flag)
    assert_type(jm.absorb_bias(params, graph), Params)
    assert_type(jm.reestimate_batch_norm(params, graph, [x], store="device"), Params)
    quantizers = jm.calibrate(params, graph, [x], jm.QuantConfig(weight_range="mse"))
    folded = jm.fold_batch_norm(params, graph, quantizers=quantizers)
    assert_type(folded, tuple[Params, jm.Quantizers])
    assert_type(jm.correct_bias(params, graph, quantizers, [x], of="both"), Params)
    assert_type(jm.factorize(params, graph, ratios=0.5, method="weight"), Params)
    pruned = jm.prune(params, graph, 0.5, selection="obs", with_report=True)
    assert_type(pruned, tuple[Params, jm.Table])
    method = jm.Coordinate(sweeps=5, scales="refit")
    rounded = jm.adaround(params, graph, quantizers, [x], key=jax.random.key(0), method=method)
    assert_type(rounded, tuple[Params, jm.Quantizers])
    jm.adaround(params, graph, quantizers, [x], method="gptq")
    for value in (jm.Gptq(scales="search"), jm.Gram(iterations=5), jm.Adam(batch=8)):
        told = jm.adaround(params, graph, quantizers, [x], method=value, with_report=True)
        assert_type(told, tuple[Params, jm.Quantizers, jm.Table])
    jm.search_scales(params, graph, quantizers, [x], of="float", store="host")
    assert_type(jm.round_weights(params, quantizers), Params)
    assert_type(jm.densify(params), Params)
    assert_type(jm.quantize(params, graph, quantizers), Params)
    assert_type(jm.ptq(apply, params, [x]), tuple[Params, jm.Quantizers, jm.Table])
    fold = partial(jm.fold_batch_norm, graph=graph)
    cle = partial(jm.equalize, graph=graph)
    assert_type(cle(fold(params)), Params)
    table = jm.score_ratios(params, graph, lambda apply, params: 0.0, batches=[x], method="prune")
    jm.select_ratios(table, 0.5, method="greedy", budget="parameters")
    jm.Quantizer(learn="minmax")
    unknown: Any = params
    jm.equalize(unknown, graph)


def wrong(params: Params, x: jax.Array, quantizers: jm.Quantizers) -> None:
    graph = jm.trace(apply, params, x)
    key = jax.random.key(0)
    jm.equalize(params, graph, objective="nosie")  # wrong
    jm.equalize(params, graph, clip="exactly")  # wrong
    jm.correct_bias(params, graph, quantizers, [x], of="float")  # wrong
    jm.correct_bias(params, graph, quantizers, [x], store="disk")  # wrong
    jm.reestimate_batch_norm(params, graph, [x], store="hots")  # wrong
    jm.factorize(params, graph, ratios=0.5, method="svd")  # wrong
    jm.prune(params, graph, 0.5, selection="random")  # wrong
    jm.adaround(params, graph, quantizers, [x], key=key, method="adm")  # wrong
    jm.adaround(params, graph, quantizers, [x], key=key, method=jm.Adam)  # wrong
    jm.Coordinate(scales="searched")  # wrong
    jm.Coordinate(iterations=3)  # wrong
    jm.Gptq(scales="refit")  # wrong
    jm.search_scales(params, graph, quantizers, [x], of="weight")  # wrong
    jm.score_ratios(params, graph, lambda a, p: 0.0, batches=[x], method="spatail")  # wrong
    table = jm.cost(params, graph, x)
    jm.select_ratios(table, 0.5, method="best")  # wrong
    jm.select_ratios(table, 0.5, budget="flops")  # wrong
    jm.Quantizer(learn="lqs")  # wrong
    jm.equalize(params, graph).weight  # wrong
    jm.ptq(apply, params, [x])[0].weight  # wrong
"""
CONFIG = """

def halved(values: Any, target: Any) -> tuple[Any, Any]:
    return values.left[0] / 2, values.right[-1] / 2


def configured() -> None:
    jm.QuantConfig(weight_range="mse", activation_range="entropy", bias="int32")
    jm.Rule("stem", weight_range="minmax")
    jm.QuantConfig(weight_range=halved, activation_range=lambda values, target: (0, 1))
    jm.QuantConfig(weight_range="mze")  # wrong
    jm.QuantConfig(placement="product")  # wrong
    jm.QuantConfig(weight_range=lambda values: values)  # wrong
    jm.Rule("stem", activation_range="entropie")  # wrong
"""
QUANTIZERS = "quantizers"
# What each function takes after the parameters and the graph, and its words.
WORDS = {
    jm.equalize: ((), ("clip", "objective")),
    jm.correct_bias: ((QUANTIZERS,), ("of", "store")),
    jm.reestimate_batch_norm: (([],), ("store",)),
    jm.factorize: ((), ("method",)),
    jm.prune: ((0.5,), ("selection",)),
    jm.adaround: ((QUANTIZERS, []), ("method", "of", "store")),
    jm.search_scales: ((QUANTIZERS, []), ("of", "store")),
    jm.score_ratios: ((lambda apply, params: 0.0,), ("method",)),
    jm.select_ratios: (None, ("method", "budget")),
}
MORE = {
    jm.factorize: {"ratios": 0.5},
    jm.score_ratios: {"batches": []},
}
FREE = {(jm.report, "path"), (jm.report, "title")}


def words_of(annotation) -> set[str]:
    """The words that an annotation allows."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*map(words_of, get_args(annotation)))


def test_there_is_a_marker_of_types():
    assert (ROOT / "jaxmet" / "py.typed").is_file()


@pytest.mark.parametrize("function", WORDS, ids=lambda f: f.__name__)
def test_the_words_of_the_type_are_those_of_the_check(function):
    """A wrong word raises before any work, and the message names all that the type does."""
    params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    x = jnp.ones((2, 3))
    graph = jm.trace(
        lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"][None], params, x
    )
    quantizers = jm.calibrate(params, graph, [x], progress=False)
    positional, options = WORDS[function]
    if positional is None:
        columns = {"layer": ["dense", "(all)"]}
        columns |= dict.fromkeys(("ratio", "score", "macs", "parameters"), [1.0, 1.0])
        arguments = [jm.Table(columns), 0.5]
    else:
        given = [quantizers if isinstance(p, str) else p for p in positional]
        arguments = [params, graph, *given]
    hints = get_type_hints(function)
    for option in options:
        words = words_of(hints[option])
        default = inspect.signature(function).parameters[option].default
        assert len(words) >= 2 and (default is None or default in words)
        with pytest.raises(ValueError, match=option) as refused:
            function(*arguments, **MORE.get(function, {}), **{option: "other"})
        assert words <= set(re.findall(r"'(\w+)'", str(refused.value)))
        assert "jaxmet." + function.__name__ in str(refused.value)


def test_no_public_function_takes_a_word_as_any_string():
    for name in dir(jm):
        function = getattr(jm, name)
        if inspect.isfunction(function):
            hints = get_type_hints(function)
            texts = [n for n, hint in hints.items() if hint in (str, str | None)]
            assert not [n for n in texts if (function, n) not in FREE], name


@pytest.mark.slow
def test_pyright_sees_wrong_words_and_keeps_the_type_of_trees(tmp_path):
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright missing: pip install '.[dev]'")
    text = USER
    if words_of(get_type_hints(jm.QuantConfig)["weight_range"]):
        text += CONFIG
    (tmp_path / "user.py").write_text(text)
    paths = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(paths))
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    command += ["--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    errors = [
        (found["range"]["start"]["line"], found["message"])
        for found in json.loads(done.stdout)["generalDiagnostics"]
        if found["severity"] == "error"
    ]
    marked = {i for i, line in enumerate(text.splitlines()) if line.endswith("# wrong")}
    assert {line for line, _ in errors} == marked, errors
    assert len(errors) == len(marked) >= 16
