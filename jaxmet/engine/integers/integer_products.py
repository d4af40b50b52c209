r"""Dots and convolutions of int8 with sums in int32, zero points taken off.

$$\sum (x - z_x)(w - z_w) = \sum x w - z_x \sum w - z_w \sum x + n z_x z_w.$$

What a convolution pads with is the zero point. On CPU depthwise convolutions, those over
colours and those with a window of one are computed in an equal form that is faster there.
"""

import math
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.backend.cpu import integer_formulation
from jaxmet.engine.integers.integer_values import (
    Integers,
    Total,
    is_zero,
    number,
    times,
)
from jaxmet.engine.program import compat

PARTS = 16
"""In so many parts a sum is cut."""


def dot(a: Integers, b: Integers, params: dict[str, Any]) -> Total | None:
    """A `dot_general` in integers; None where scales change along what is summed."""
    (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]
    sides = ((a, contract_a, batch_a), (b, contract_b, batch_b))
    for x, contract, _ in sides:
        if not (x.small and _even(x, contract)):
            return None
    if _overflows(a, b, math.prod(a.shape[i] for i in contract_a)):
        return None
    rank_a, rank_b = (len(x.shape) - len(c) - len(n) for x, c, n in sides)

    def laid(array: Any, side: int) -> Any:
        """What belongs to an operand, contracted axes of size 1, where the result has it."""
        _, contract, batch = sides[side]
        free = [i for i in range(array.ndim) if i not in (*contract, *batch)]
        array = array.transpose((*batch, *free, *contract))
        kept = array.shape[: array.ndim - len(contract)]
        before, after = kept[: len(batch)], kept[len(batch) :]
        ones = (1,) * (rank_b if side == 0 else rank_a)
        free = (*after, *ones) if side == 0 else (*ones, *after)
        return array.reshape((*before, *free))

    kind = {"preferred_element_type": jnp.int32}
    sums = lax.dot_general(a.values, b.values, params["dimension_numbers"], **kind)
    zeros = [laid(x.zero_point, i) for i, (x, _, _) in enumerate(sides)]
    for i, (x, contract, _) in enumerate(sides):
        other = zeros[1 - i]
        if not is_zero(other):
            sums = sums - _int32(other) * laid(_sum(x.values, contract), i)
    if not any(map(is_zero, zeros)):
        many = np.int32(math.prod(a.shape[i] for i in contract_a))
        sums = sums + many * _int32(zeros[0]) * _int32(zeros[1])
    return Total(sums, times(laid(a.scale, 0), laid(b.scale, 1)))


def convolution(x: Integers, w: Integers, params: dict[str, Any]) -> Total | None:
    """A `conv_general_dilated` in integers; None where scales change along what is summed."""
    spec = params["dimension_numbers"]
    out, *summed = spec.rhs_spec
    plain = params["batch_group_count"] == 1 and params.get("out_sharding") is None
    if not (plain and x.small and w.small and x.uniform and _even(w, summed)):
        return None
    if _overflows(x, w, math.prod(w.shape[i] for i in summed)):
        return None

    def along(array: Any) -> Any:
        """What belongs to output channels, where the result has them."""
        sizes = [1] * len(spec.out_spec)
        sizes[spec.out_spec[1]] = array.shape[out]
        return array.reshape(sizes)

    inside = _padded(x, params)
    still = {**params, "padding": ((0, 0),) * (len(spec.rhs_spec) - 2)}
    still["lhs_dilation"] = (1,) * (len(spec.rhs_spec) - 2)
    scale = times(along(x.scale), along(w.scale))
    if not is_zero(w.zero_point):
        # No runtime has one here: slow, and right.
        shifted = inside.astype(jnp.int32) - _int32(x.zero_point)
        weight = w.values.astype(jnp.int32) - _int32(w.zero_point)
        return Total(_int32_convolution(shifted, weight, still), scale)
    sums = _int32_convolution(inside, w.values, still)
    if not is_zero(x.zero_point):
        total = _sum(w.values, summed)
        sums = sums - _int32(along(x.zero_point)) * along(total)
    return Total(sums, scale)


def _overflows(a: Integers, b: Integers, many: Any) -> bool:
    """Whether int32 may not hold a sum of so many products."""
    return many * _most(a) * _most(b) >= 2**31


def _most(x: Integers) -> int:
    """The largest |q - z| of a grid, as far as its zero points are known."""
    zero = number(x.zero_point)
    if zero is None:
        return x.high - x.low
    return int(max(x.high - zero.min(), zero.max() - x.low))


def _even(x: Integers, axes: Any) -> bool:
    """Whether scale and zero point do not change along some axes."""
    return all(a.shape[i] == 1 for a in (x.scale, x.zero_point) for i in axes)


def _sum(values: Any, axes: Any) -> Any:
    """A sum in int32; of known integers it is known: XLA would compute it slowly itself."""
    known = number(values)
    if known is not None:
        return known.sum(tuple(axes), np.int32, keepdims=True)
    values = jnp.asarray(values)
    axis = max(axes, key=lambda i: values.shape[i])
    each = values.shape[axis] // PARTS
    if each:
        # XLA:CPU would first write all values as int32: parts are added as they are read.
        cut = lambda i, j: lax.slice_in_dim(values, i, j, axis=axis).astype(jnp.int32)
        rest = cut(PARTS * each, values.shape[axis])
        values = reduce(jnp.add, (cut(i * each, (i + 1) * each) for i in range(PARTS)))
        values = jnp.concatenate([values, rest], axis) if rest.size else values
    return jnp.sum(values, axes, dtype=jnp.int32, keepdims=True)


def _int32(a: Any) -> Any:
    return jnp.asarray(a).astype(jnp.int32)


def _padded(x: Integers, params: dict[str, Any]) -> Any:
    """The input with its zero point around it and in between."""
    _, _, *space = params["dimension_numbers"].lhs_spec
    sides = [(0, 0, 0)] * len(x.shape)
    pairs = zip(space, params["padding"], params["lhs_dilation"], strict=True)
    for axis, (low, high), dilation in pairs:
        sides[axis] = (int(low), int(high), dilation - 1)
    if not any(any(side) for side in sides):
        return x.values
    zero = jnp.asarray(x.zero_point).reshape(()).astype(x.values.dtype)
    return lax.pad(x.values, zero, sides)


def _int32_convolution(x: Any, w: Any, params: dict[str, Any]) -> Any:
    params = {**params, "preferred_element_type": np.dtype(np.int32)}
    return _sums(x, w, params=tuple(params.items()))


@partial(jax.jit, static_argnames="params")
def _sums(x: Any, w: Any, *, params: tuple) -> Any:
    """Under `jit`, so that layers of one shape are traced and lowered once."""
    p = dict(params)

    def plain(x, w):
        return compat.bind(lax.conv_general_dilated_p, p, (x, w))[0]

    faster = integer_formulation(p, x, w)
    if faster is None:
        return plain(x, w)
    return lax.platform_dependent(x, w, cpu=partial(faster, p), default=plain)
