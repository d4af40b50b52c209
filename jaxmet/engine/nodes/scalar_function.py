"""An activation as a function of numbers: its own equations without their shapes."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.axes.views import VIEW_RULES
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.nodes.pointwise import POINTWISE
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation, Value, flatten
from jaxmet.numerics.xp import Array

PIECE = 2**14

Step = tuple[str, tuple[int, ...], float]
Formula = tuple[Step, ...]
"""Steps that each add a value to a row whose first one is the argument: what to do, the
places in the row that it reads, and a number. The last one is the result."""

RENAMED = {"and": "bitwise_and", "or": "bitwise_or", "not": "bitwise_not"}


def formula_of(cluster: Cluster) -> Formula | None:
    """What an activation does to each number.

    None where the equations use parameters, closed-over arrays, or more than one number at
    a time.
    """
    assert cluster.entry is not None
    return formula_between(cluster.entry, cluster.exit, cluster.equations)


def formula_between(
    entry: Value, exit: Value, equations: Iterable[Equation] = ()
) -> Formula | None:
    """What the equations from one value to another do to each number, if they do only that."""
    recipe = _Recipe(entry)
    try:
        for equation in equations:  # in order, so that no look-up goes deep
            recipe.place(equation.results[0])
        last = recipe.place(exit)
    except _NotElementwiseError:
        return None
    return (*recipe.steps, ("the same", (last,), 0.0))


def compute(formula: Formula, x: Array) -> Array:
    """The formula's value for an array of any shape, in the array's precision.

    Of a NumPy array piece by piece, each of one size: that is one small program a formula,
    whatever shapes it is computed for.
    """
    if isinstance(x, jax.Array):
        return _computed(x, formula)
    pieces = -(-x.size // PIECE)
    flat = np.zeros(pieces * PIECE, x.dtype)
    flat[: x.size] = x.reshape(-1)
    found = [np.asarray(_compiled(p, formula)) for p in flat.reshape(-1, PIECE)]
    return np.concatenate([flat[:0], *found])[: x.size].reshape(x.shape)


def _computed(x: jax.Array, formula: Formula) -> jax.Array:
    row: list[Any] = [x]
    for what, places, number in formula:
        given = [row[i] for i in places]
        if what in NUMBERS:
            row.append(jnp.full(x.shape, number, NUMBERS[what] or x.dtype))
        elif what in CASTS:
            row.append(given[0].astype(CASTS[what] or x.dtype))
        elif what == "the same":
            row.append(given[0])
        elif what == "integer_pow":
            row.append(lax.integer_pow(given[0], int(number)))
        elif what == "round":
            row.append(lax.round(given[0], lax.RoundingMethod(int(number))))
        else:
            row.append(getattr(lax, RENAMED.get(what, what))(*given))
    return row[-1]


_compiled = jax.jit(_computed, static_argnames="formula")

NUMBERS: dict[str, Any] = {"number": None, "integer": jnp.int32, "truth": jnp.bool_}
CASTS: dict[str, Any] = {
    "to number": None,
    "to integer": jnp.int32,
    "to truth": jnp.bool_,
}


def _kind(value: Value) -> str:
    if value.inexact:
        return "number"
    return "truth" if value.aval.dtype == jnp.bool_ else "integer"


class _NotElementwiseError(Exception):
    """The equations are not those of a function of one number."""


class _Recipe:
    """The steps of a formula, and where each value stands."""

    def __init__(self, entry: Value):
        self.places: dict[Value, int] = {}
        self.steps: list[Step] = []
        # A count comes as a number of the precision in which the formula is computed.
        counts = not entry.inexact
        self.places[entry] = self.add(f"to {_kind(entry)}", 0) if counts else 0

    def place(self, value: Value) -> int:
        """Where a value stands in the row."""
        if value.is_complex:
            raise _NotElementwiseError
        if value not in self.places:
            self.places[value] = self.make(value)
        return self.places[value]

    def add(self, what: str, *places: int, number: float = 0.0) -> int:
        self.steps.append((what, places, number))
        return len(self.steps)

    def make(self, value: Value) -> int:
        equation = value.producer
        if value.constant is not None and not compat.is_key(value.aval):
            number = value.scalar()
            if number is not None:
                return self.add(_kind(value), number=number)
        if equation is None:
            raise _NotElementwiseError
        if equation.name in compat.CUSTOM:
            return self.custom(equation, value)
        if equation.name == "convert_element_type":
            return self.cast(equation.operands[0], value)
        if equation.name in VIEW_RULES and len(equation.operands) == 1:
            return self.place(equation.operands[0])
        if equation.name not in POINTWISE or len(equation.results) != 1:
            raise _NotElementwiseError
        number = equation.params.get("y", equation.params.get("rounding_method", 0))
        places = [self.place(v) for v in equation.operands]
        name = "add" if equation.name == "add_any" else equation.name
        return self.add(name, *places, number=float(number))

    def cast(self, before: Value, after: Value) -> int:
        place = self.place(before)
        if before.inexact and after.inexact:
            return place  # the argument's own precision all the way
        return self.add(f"to {_kind(after)}", place)

    def custom(self, equation: Equation, value: Value) -> int:
        body = flatten(compat.call_body(equation.params))
        for inside, outside in zip(body.inputs, equation.operands, strict=True):
            self.places[inside] = self.place(outside)
        for inner in body.equations:
            self.place(inner.results[0])
        return self.place(body.outputs[equation.results.index(value)])
