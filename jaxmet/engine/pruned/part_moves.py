"""Views, slices, concatenations and padding of arrays of which a part is left."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation
from jaxmet.engine.pruned.partial import (
    Partial,
    Uniform,
    in_order,
    number_of,
    parts,
    same_number,
    whole,
)
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.structures import Keep


def broadcast(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, p = operands[0], equation.params
    aval = equation.operands[0].aval
    if compat.is_key(aval):
        return None
    if not isinstance(x, Partial | Uniform) and not aval.shape:
        dtype = aval.dtype  # a literal may have forgotten it
        number = np.asarray(x, dtype) if is_concrete(x) else x
        return [Uniform(number, equation.results[0].shape)]
    if isinstance(x, Uniform):
        return [Uniform(x.number, equation.results[0].shape)]
    if len(operands) > 1 or not isinstance(x, Partial):
        return None
    where = p["broadcast_dimensions"]
    keep = tuple(Keep(int(where[k.axis]), k.size, k.indices) for k in x.keep)
    shape = _reduced(equation.results[0].shape, keep)
    return [Partial(lax.broadcast_in_dim(x.part, shape, where), in_order(keep), x.fill)]


def _reduced(shape: Sequence[int], keep: Sequence[Keep]) -> tuple[int, ...]:
    sizes = list(shape)
    for axis, _, indices in keep:
        sizes[axis] = len(indices)
    return tuple(sizes)


def reshape(equation: Equation, operands: list[Any]) -> list[Any] | None:
    """Axes that are merged or cut, where what is kept is a box before and after."""
    x, out = operands[0], equation.results[0].shape
    if isinstance(x, Uniform):
        return [Uniform(x.number, out)]
    if len(operands) > 1 or equation.params.get("dimensions") is not None:
        return None
    keep: list[Keep] = []
    for before, after in _groups(x.shape, out):
        masks = [_mask(x, axis) for axis in before]
        mask = np.ones((), bool)
        for m in masks:
            mask = np.logical_and.outer(mask, m)
        mask = mask.reshape([out[j] for j in after])
        box = np.ones((), bool)
        for i, j in enumerate(after):
            others = tuple(k for k in range(len(after)) if k != i)
            along = mask.any(axis=others)
            box = np.logical_and.outer(box, along)
            keep.append(Keep(j, out[j], tuple(map(int, np.flatnonzero(along)))))
        if not np.array_equal(box, mask):
            return None
    kept = in_order(keep)
    return [Partial(x.part.reshape(_reduced(out, kept)), kept, x.fill)]


def _mask(x: Partial, axis: int) -> np.ndarray:
    mask, kept = np.ones(x.shape[axis], bool), x.on(axis)
    if kept is not None:
        mask = np.zeros(kept.size, bool)
        mask[list(kept.indices)] = True
    return mask


def _groups(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Runs of axes that hold the same elements on both sides of a reshape."""
    found, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        left, right, a, b = [], [], 1, 1
        while True:
            if a <= b and i < len(before) and (a != b or not left):
                a, left, i = a * before[i], [*left, i], i + 1
            elif j < len(after) and (a != b or not right):
                b, right, j = b * after[j], [*right, j], j + 1
            else:
                break
        found.append((left, right))
    return found


def transpose(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, order = operands[0], [int(i) for i in equation.params["permutation"]]
    if isinstance(x, Uniform):
        return [Uniform(x.number, equation.results[0].shape)]
    keep = [Keep(order.index(k.axis), k.size, k.indices) for k in x.keep]
    return [Partial(lax.transpose(x.part, order), in_order(keep), x.fill)]


def squeeze(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, out = operands[0], equation.results[0].shape
    if isinstance(x, Uniform):
        return [Uniform(x.number, out)]
    gone = {int(d) % len(x.shape) for d in equation.params["dimensions"]}
    if any(k.axis in gone for k in x.keep):
        return None
    stay = [i for i in range(len(x.shape)) if i not in gone]
    keep = [Keep(stay.index(k.axis), k.size, k.indices) for k in x.keep]
    return [Partial(lax.squeeze(x.part, sorted(gone)), in_order(keep), x.fill)]


def reverse(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, axes = operands[0], equation.params["dimensions"]
    if isinstance(x, Uniform):
        return [x]
    if any(k.axis in axes for k in x.keep):
        return None
    return [Partial(lax.rev(x.part, axes), x.keep, x.fill)]


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
