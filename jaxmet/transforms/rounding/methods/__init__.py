"""How weights are rounded: one method per file, and the table of their short names.

scale_search         nearest rounding on searched scales
coordinate_rounding  descent over the integers
gptq_rounding        GPTQ
annealing            what AdaRound's two forms share
gram_rounding        AdaRound on Gram matrices
row_rounding         AdaRound as published, on rows
"""

from collections.abc import Mapping
from typing import Any, Literal

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.arguments import misplaced
from jaxmet.transforms.rounding.methods.coordinate_rounding import Coordinate
from jaxmet.transforms.rounding.methods.gptq_rounding import Gptq
from jaxmet.transforms.rounding.methods.gram_rounding import Gram
from jaxmet.transforms.rounding.methods.row_rounding import Adam
from jaxmet.transforms.rounding.solvers import RoundingMethod

MethodName = Literal["coordinate", "gptq", "gram", "adam"]
METHODS: dict[MethodName, type[RoundingMethod]] = {
    "coordinate": Coordinate,
    "gptq": Gptq,
    "gram": Gram,
    "adam": Adam,
}

FORMER = {(Coordinate, "iterations"): "sweeps"}  # names that options of methods had

__all__ = [
    "METHODS",
    "Adam",
    "Coordinate",
    "Gptq",
    "Gram",
    "MethodName",
    "check_options",
    "method_of",
]


def method_of(method: Any, caller: str) -> RoundingMethod:
    """The method that was given, or the one with that short name and its defaults."""
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    if isinstance(method, RoundingMethod):
        return method
    shown = method.__name__ if isinstance(method, type) else repr(method)
    names = ", ".join(map(repr, METHODS))
    values = ", ".join(f"jm.{kind.__name__}(…)" for kind in METHODS.values())
    raise ValueError(
        f"jaxmet.{caller}: method is {shown}. Give one of {names}, or a value with "
        f"options: {values}."
    )


def check_options(
    kwargs: Mapping[str, Any],
    graph: Graph,
    params: Any,
    method: RoundingMethod,
    caller: str,
) -> None:
    """Refuse options of a method among the keyword arguments for the model."""
    inputs, called = graph.called
    kinds: tuple[Any, ...] = (type(method), *METHODS.values())
    options = {name for kind in kinds for name in kind.__match_args__}
    options |= {name for _, name in FORMER}
    given = {name: value for name, value in kwargs.items() if name not in called}
    found = misplaced(given, options, graph.apply, params, inputs)
    if not found:
        return

    def renamed(kind: Any) -> dict[str, Any]:
        """Those of the options that a method has, with the names that they have there."""
        known = kind.__match_args__
        pairs = ((FORMER.get((kind, n), n), value) for n, value in found.items())
        return {name: value for name, value in pairs if name in known}

    kind = max(kinds, key=lambda kind: len(renamed(kind)))  # the first of equals
    values = ", ".join(f"{name}={value!r}" for name, value in renamed(kind).items())
    raise ValueError(
        f"jaxmet.{caller}: {', '.join(found)} is an option of a method, but keyword "
        f"arguments go to the model, which does not take it. Write "
        f"method=jm.{kind.__name__}({values})."
    )
