"""Operations that take numbers one by one, on arrays of which a part is left."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation
from jaxmet.engine.pruned.parts.partial import (
    Partial,
    Uniform,
    number_of,
    number_under,
    parts,
    same_number,
    taken,
)


def elementwise(equation: Equation, operands: list[Any]) -> list[Any] | None:
    """Every operand has the shape of the result, or is a number."""
    found = parts(operands)
    if not found or len(equation.results) != 1:
        return _of_uniform(equation, operands)
    keep, ndim = found[0].keep, equation.results[0].ndim
    if any(x.keep != keep for x in found):
        return None
    full = [i for i, x in enumerate(operands) if _is_full(x, ndim)]
    fill = _fill(equation, operands, full)
    if fill is None:
        return None
    arrays = []
    for i, x in enumerate(operands):
        if isinstance(x, Partial):
            arrays.append(x.part)
        elif isinstance(x, Uniform):
            dtype = equation.operands[i].aval.dtype
            arrays.append(jnp.full(found[0].part.shape, x.number, dtype))
        else:
            arrays.append(taken(x, keep) if i in full else x)
    result = compat.bind(equation.primitive, equation.params, arrays)[0]
    return [Partial(result, keep, fill)]


def _is_full(x: Any, ndim: int) -> bool:
    return not isinstance(x, Partial | Uniform) and np.ndim(x) == ndim > 0


def _of_uniform(equation: Equation, operands: list[Any]) -> list[Any] | None:
    shape = equation.results[0].shape
    if any(_is_full(x, len(shape)) for x in operands):
        return None
    return [Uniform(_number(equation, [number_of(x) for x in operands]), shape)]


def _number(equation: Equation, numbers: Sequence[Any]) -> Any:
    dtypes = [v.aval.dtype for v in equation.operands]
    return number_under(equation.primitive, equation.params, numbers, dtypes)


def _fill(equation: Equation, operands: list[Any], full: list[int]) -> Any:
    """What the entries that are gone become, None if they become different numbers."""
    name = equation.name
    if not full:
        return _number(equation, [number_of(x) for x in operands])
    if name == "mul" or (name == "div" and full == [1]):
        zero = any(isinstance(x, Partial) and x.zero for x in operands)
        return np.zeros((), equation.results[0].aval.dtype) if zero else None
    if name == "select_n" and full == [0]:
        cases = [number_of(x) for x in operands[1:]]
        same = all(same_number(cases[0], c) for c in cases[1:])
        return cases[0] if same else None
    return None
