"""What the docstrings of public names say: arguments, results, errors, an example."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

import jaxmet as jm

KINDS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
CLASSES = {  # public methods that users call; the rest serves the library itself
    jm.Table: ("concat", "where", "to_pandas"),
    jm.Graph: ("only", "without", "of", "consumers", "table"),
    jm.Quantizers: ("owner", "activation", "set", "pin"),
}
CHECKS = re.compile(
    r"(check\w*|fitted|readable|key_of|config_of)$"
)  # they raise ValueError


def functions() -> Iterator[tuple[str, Any]]:
    for package, prefix in ((jm, "jm"), (jm.plot, "jm.plot")):
        for name, value in vars(package).items():
            if not name.startswith("_") and inspect.isfunction(value):
                yield f"{prefix}.{name}", value
    for owner, names in CLASSES.items():
        for name in names:
            method = inspect.getattr_static(owner, name)
            yield f"jm.{owner.__name__}.{name}", getattr(method, "__func__", method)


PUBLIC = dict(functions())
RECORDS = {  # classes that users make, by the names of what they are made of
    f"jm.{name}": value
    for name, value in vars(jm).items()
    if inspect.isclass(value) and value is not jm.Graph
}


def formulas() -> Iterator[tuple[str, Any]]:
    """The public functions of `jm.numerics`, where they are defined."""
    for info in pkgutil.walk_packages(jm.numerics.__path__, "jaxmet.numerics."):
        for name, value in vars(importlib.import_module(info.name)).items():
            inner = inspect.unwrap(value) if callable(value) else None
            if not inspect.isfunction(inner) or "_" in (name[0], inner.__name__[0]):
                continue
            if inner.__module__ == info.name:
                yield f"{info.name}.{name}", inner


FORMULAS = dict(formulas())


def section(doc: str, title: str) -> str:
    """The indented lines under a title."""
    found = re.search(rf"^{title}:\n((?:    .*\n?)+)", doc, re.MULTILINE)
    return found[1] if found else ""


def items(text: str) -> dict[str, str]:
    """The text of each name of a section."""
    pieces = re.split(r"^    (\*{0,2}\w+): ", text, flags=re.MULTILINE)[1:]
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def examples(doc: str) -> str:
    """The code after the prompts."""
    lines = re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", doc, re.MULTILINE)
    return "\n".join(lines)


def body_of(function: Any) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    found = ast.parse(source).body[0]
    assert isinstance(found, ast.FunctionDef)
    return found


def errors_of(function: Any) -> set[str]:
    """The errors that a function raises itself, or by a check that it calls."""
    raised = set()
    for node in ast.walk(body_of(function)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            raised.add(ast.unparse(node.exc.func))  # or a method that makes the error
        elif isinstance(node, ast.Call) and CHECKS.match(ast.unparse(node.func)):
            raised.add("ValueError")
    return {error for error in raised if error.endswith("Error")}


def test_public_names_are_found():
    assert len(PUBLIC) > 50 and {"jm.ptq", "jm.plot.save", "jm.Table.where"} <= {
        *PUBLIC
    }


@pytest.mark.parametrize("name", [*PUBLIC, *RECORDS])
def test_every_argument_is_explained(name):
    function = PUBLIC.get(name) or RECORDS[name]
    parameters = inspect.signature(function).parameters.values()
    wanted = [KINDS.get(p.kind, "") + p.name for p in parameters]
    wanted = [n for n in wanted if n not in ("self", "cls")]
    stated = items(section(inspect.getdoc(function) or "", "Args"))
    assert list(stated) == wanted
    assert all(len(text.split()) >= 3 for text in stated.values())


def test_formulas_explain_their_arguments_and_results():
    assert len(FORMULAS) >= 140
    for name, function in FORMULAS.items():
        doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
        stated = items(section(doc, "Args"))
        parameters = signature.parameters.values()
        assert [*stated] == [KINDS.get(p.kind, "") + p.name for p in parameters], name
        assert all(len(text.split()) >= 2 for text in stated.values()), name
        given = [p.name for p in parameters if p.default is not p.empty]
        assert all("default" in stated[parameter] for parameter in given), name
        returns = signature.return_annotation not in (None, "None")
        assert bool(section(doc, "Returns")) == returns, name


@pytest.mark.parametrize("name", FORMULAS)
def test_errors_of_formulas_are_named(name):
    stated = items(section(inspect.getdoc(FORMULAS[name]) or "", "Raises"))
    assert errors_of(FORMULAS[name]) <= {*stated}


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_returned_is_explained(name):
    returns = inspect.signature(PUBLIC[name]).return_annotation
    stated = section(inspect.getdoc(PUBLIC[name]) or "", "Returns")
    assert bool(stated) == (returns not in (None, "None"))


@pytest.mark.parametrize("name", PUBLIC)
def test_errors_are_named(name):
    stated = items(section(inspect.getdoc(PUBLIC[name]) or "", "Raises"))
    assert errors_of(PUBLIC[name]) <= {*stated}


@pytest.mark.parametrize("name", RECORDS)
def test_an_example_of_a_class_is_shown(name):
    assert ast.parse(examples(inspect.getdoc(RECORDS[name]) or "")).body


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_is_shown(name):
    code = examples(inspect.getdoc(PUBLIC[name]) or "")
    calls = {
        node.func.attr if isinstance(node.func, ast.Attribute) else ""
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
    }
    assert name.rpartition(".")[2] in calls


def test_examples_on_numbers_give_what_they_print():
    """Those that need no model are run; their results are printed beneath."""
    scope = {"jm": jm, "jnp": jnp}
    tried = 0
    for name, function in (PUBLIC | RECORDS).items():
        doc = inspect.getdoc(function) or ""
        test = doctest.DocTestParser().get_doctest(doc, dict(scope), name, None, None)
        if any(example.want for example in test.examples):
            tried += 1
            failed, _ = doctest.DocTestRunner().run(test)
            assert not failed, name
    assert tried >= 6
