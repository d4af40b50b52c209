"""Sums, extremes and pooling of arrays of which a part is left."""

from typing import Any

from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation
from jaxmet.engine.pruned.parts.partial import Partial, in_order
from jaxmet.tree.structures import Keep


def reduction(equation: Equation, operands: list[Any]) -> list[Any] | None:
    """Sums and extremes along axes; a sum runs over what is zero as well."""
    x, gone = operands[0], set(equation.params["axes"])
    if not isinstance(x, Partial):
        return None
    sums = equation.name == "reduce_sum"
    if not (sums and x.zero):
        if sums or any(k.axis in gone for k in x.keep):
            return None
    part = compat.bind(equation.primitive, equation.params, [x.part])[0]
    stay = [i for i in range(len(x.shape)) if i not in gone]
    keep = [
        Keep(stay.index(k.axis), k.size, k.indices) for k in x.keep if k.axis in stay
    ]
    return [Partial(part, in_order(keep), x.fill)] if keep else [part]


def window(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, p = operands[0], equation.params
    if not isinstance(x, Partial) or len(operands) != 1:
        return None
    if equation.name == "reduce_window_sum" and not x.zero:
        return None
    shape = equation.results[0].shape
    idle = all(
        p["window_dimensions"][k.axis] == 1 and shape[k.axis] == k.size for k in x.keep
    )
    if not idle:
        return None
    part = compat.bind(equation.primitive, p, [x.part])[0]
    return [Partial(part, x.keep, x.fill)]
