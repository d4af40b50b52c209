"""Slices and concatenations of arrays of which a part is left, and padding."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxmet.engine.program.program import Equation
from jaxmet.engine.pruned.parts.partial import (
    Partial,
    Uniform,
    in_order,
    number_of,
    parts,
    same_number,
    whole,
)
from jaxmet.tree.structures import Keep


def piece(x: Partial, axis: int, start: int, stop: int) -> Any:
    """The entries from `start` to `stop` along one axis."""
    kept = x.on(axis)
    if kept is None:
        return Partial(lax.slice_in_dim(x.part, start, stop, axis=axis), x.keep, x.fill)
    places = [i for i, n in enumerate(kept.indices) if start <= n < stop]
    shape = list(x.shape)
    shape[axis] = stop - start
    if not places:
        return Uniform(x.fill, tuple(shape))
    part = lax.slice_in_dim(x.part, places[0], places[-1] + 1, axis=axis)
    indices = tuple(kept.indices[i] - start for i in places)
    keep = in_order((*x.without(axis), Keep(axis, stop - start, indices)))
    return Partial(part, keep, x.fill)


def slices(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, p = operands[0], equation.params
    if isinstance(x, Uniform):
        return [Uniform(x.number, equation.results[0].shape)]
    strides = p["strides"] or (1,) * len(x.shape)
    begin, end = p["start_indices"], p["limit_indices"]
    result: Any = x
    for axis, (start, stop, stride) in enumerate(zip(begin, end, strides, strict=True)):
        if (start, stop, stride) == (0, x.shape[axis], 1):
            continue
        if stride != 1 and x.on(axis) is not None:
            return None
        if isinstance(result, Uniform):
            break
        if stride == 1:
            result = piece(result, axis, start, stop)
        else:
            part = lax.slice_in_dim(result.part, start, stop, stride, axis)
            result = Partial(part, result.keep, result.fill)
    if isinstance(result, Uniform):
        return [Uniform(result.number, equation.results[0].shape)]
    return [result]


def split(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, axis = operands[0], equation.params["axis"]
    if isinstance(x, Uniform):
        return [Uniform(x.number, v.shape) for v in equation.results]
    found, start = [], 0
    for size in map(int, equation.params["sizes"]):
        found.append(piece(x, axis, start, start + size))
        start += size
    return found


def concatenate(equation: Equation, operands: list[Any]) -> list[Any] | None:
    axis = equation.params["dimension"]
    found = parts(operands)
    if not found:
        return None
    other, fill = found[0].without(axis), found[0].fill
    arrays, kept, offset = [], [], 0
    for x in operands:
        if isinstance(x, Partial):
            if x.without(axis) != other or not same_number(x.fill, fill):
                return None
            on = x.on(axis)
            indices = range(x.shape[axis]) if on is None else on.indices
            arrays.append(x.part)
        elif other:
            return None
        else:
            array = whole(x)
            indices = range(array.shape[axis])
            arrays.append(array)
        kept += [offset + i for i in indices]
        offset += equation.operands[len(arrays) - 1].shape[axis]
    keep = in_order((*other, Keep(axis, offset, tuple(kept))))
    return [Partial(lax.concatenate(arrays, axis), keep, fill)]


def pad(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, value = operands
    if not isinstance(x, Partial):
        return None
    widths = equation.params["padding_config"]
    if any(tuple(map(int, widths[k.axis])) != (0, 0, 0) for k in x.keep):
        return None
    if not same_number(x.fill, number_of(value)):
        return None
    value = number_of(value)
    part = lax.pad(x.part, jnp.asarray(value, x.part.dtype), widths)
    return [Partial(part, x.keep, x.fill)]
