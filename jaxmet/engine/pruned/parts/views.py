"""Operations that look at an array differently, where a part of it is left."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation
from jaxmet.engine.pruned.parts.partial import Partial, Uniform, in_order
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
