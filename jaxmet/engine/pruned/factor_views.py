"""Two factors seen through the views that a model takes of their weight.

A transposed weight has transposed factors. A reshape that splits or joins inputs, or outputs,
does so in the factor that holds them; in the other these axes are the channels between the
factors, which stay one axis.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.axes.views import CASTS
from jaxmet.engine.program.program import Equation
from jaxmet.tree.structures import LowRank

Block = tuple[list[int], list[int]]


def viewed(equation: Equation, x: LowRank, first: Any, second: Any) -> LowRank | None:
    """The factors, given as arrays, of a view of their weight; None where it mixes axes."""
    params = equation.params
    match equation.name:
        case name if name in CASTS:
            dtype = params.get("new_dtype", x.dtype)
            one, two = jnp.asarray(first, dtype), jnp.asarray(second, dtype)
            return dataclasses.replace(x, first=one, second=two)
        case "transpose":
            return _transposed(x, first, second, params["permutation"])
        case "rev":
            # What lies there in the other factor are the channels between them.
            turned = params["dimensions"]
            one = jnp.flip(first, [i for i in turned if i not in x.out_axes])
            two = jnp.flip(second, [i for i in turned if i not in x.in_axes])
            return dataclasses.replace(x, first=one, second=two)
        case "reshape" if params.get("dimensions") is None:
            return _reshaped(x, first, second, params["new_sizes"])
        case "squeeze":
            gone = {d % len(x.shape) for d in params["dimensions"]}
            sizes = [n for i, n in enumerate(x.shape) if i not in gone]
            return _reshaped(x, first, second, sizes)
        case "broadcast_in_dim":
            to, sizes = params["broadcast_dimensions"], params["shape"]
            if math.prod(sizes) == math.prod(x.shape) and list(to) == sorted(to):
                return _reshaped(x, first, second, sizes)
    return None


def _transposed(x: LowRank, first: Any, second: Any, order: Sequence[int]) -> LowRank:
    where = {axis: i for i, axis in enumerate(order)}
    return dataclasses.replace(
        x,
        first=jnp.transpose(first, order),
        second=jnp.transpose(second, order),
        shape=tuple(x.shape[i] for i in order),
        in_axes=tuple(where[i] for i in x.in_axes),
        out_axes=tuple(where[i] for i in x.out_axes),
    )


def _reshaped(
    x: LowRank, first: Any, second: Any, sizes: Sequence[int]
) -> LowRank | None:
    blocks = aligned(x.shape, sizes)
    if blocks is None:
        return None
    ends = {"in": x.in_axes[-1], "out": x.out_axes[-1]}
    axes: dict[str, list[int]] = {"in": [], "out": []}
    last: dict[str, int] = {}
    shapes: dict[str, list[int]] = {"in": [], "out": []}
    for old, new in blocks:
        kind = _kind(x, old)
        if kind is None or (kind == "window" and len(old) != len(new)):
            return None
        for held, factor in (("in", first), ("out", second)):
            given = [np.shape(factor)[i] for i in old]
            if kind == "window":
                shapes[held] += given
            elif kind == held:
                shapes[held] += [sizes[i] for i in new]
            else:  # channels between the factors, or nothing
                shapes[held] += [1] * (len(new) - 1) + [math.prod(given)] * bool(new)
        if kind != "window":
            axes[kind] += new
            if ends[kind] in old:
                if not new:
                    return None
                last[kind] = new[-1]
    if set(last) != {"in", "out"}:
        return None
    ins, outs = (
        (*(i for i in axes[kind] if i != last[kind]), last[kind]) for kind in axes
    )
    return dataclasses.replace(
        x,
        first=jnp.reshape(first, shapes["in"]),
        second=jnp.reshape(second, shapes["out"]),
        shape=tuple(sizes),
        in_axes=ins,
        out_axes=outs,
    )


def _kind(x: LowRank, axes: Sequence[int]) -> str | None:
    """What the axes of a block are, one of which at least is not of size one."""
    ends = (x.in_axes[-1], x.out_axes[-1])
    wide = [i for i in axes if x.shape[i] != 1 or i in ends] or list(axes)
    kinds = {
        "in" if i in x.in_axes else "out" if i in x.out_axes else "window" for i in wide
    }
    return kinds.pop() if len(kinds) == 1 else None


def aligned(old: Sequence[int], new: Sequence[int]) -> list[Block] | None:
    """Runs of axes of two shapes that hold the same numbers, as short as they can be."""
    if math.prod(old) != math.prod(new) or 0 in old:
        return None
    blocks: list[Block] = []
    i = j = 0
    while i < len(old) and j < len(new):
        block: Block = ([i], [j])
        one, two = old[i], new[j]
        i, j = i + 1, j + 1
        while one != two:
            if one < two:
                one, block[0][len(block[0]) :] = one * old[i], [i]
                i += 1
            else:
                two, block[1][len(block[1]) :] = two * new[j], [j]
                j += 1
        blocks.append(block)
    if blocks:  # what is left is of size one
        blocks[-1][0].extend(range(i, len(old)))
        blocks[-1][1].extend(range(j, len(new)))
    return blocks
