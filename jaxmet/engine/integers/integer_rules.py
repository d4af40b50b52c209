"""What each equation does to integers on a grid.

A rule returns what the equation makes, or None: then it runs in float.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.axes.views import CHOOSES
from jaxmet.engine.integers.integer_products import convolution, dot
from jaxmet.engine.integers.integer_values import (
    Floats,
    Held,
    Integers,
    Joint,
    Origin,
    Total,
    computed,
    is_zero,
    number,
    times,
)
from jaxmet.engine.program import compat

Rule = Callable[[Any, str, list[Held]], Held | None]
INT32 = 1.5 * 2.0**30  # a larger bias leaves no room for the sum


def product(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """A dot or convolution of two values on grids."""
    a, b = values
    if not (isinstance(a, Integers) and isinstance(b, Integers)) or a.fixed and b.fixed:
        return None
    wide = equation.params.get("preferred_element_type")
    if wide is not None and wide != np.float32:
        return None
    kind = equation.primitive.name
    run = dot if kind == "dot_general" else convolution
    found = run(a, b, equation.params)
    if found is None:
        return None
    return replace(found, origin=Origin(layer, kind, (a, b), equation.params))


def addition(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """A bias into a sum, or two values on grids."""
    a, b = values
    if equation.primitive.name == "sub":
        return _with_bias(a, b, -1.0) if isinstance(a, Total) else None
    if isinstance(a, Integers) and isinstance(b, Integers):
        alike = a.shape == b.shape and a.uniform and b.uniform
        if not alike or a.fixed or b.fixed:
            return None
        return Joint((a, b), origin=Origin(layer, "add", (a, b), {}))
    if isinstance(b, Total):
        a, b = b, a
    return _with_bias(a, b, 1.0) if isinstance(a, Total) else None


def _with_bias(total: Total, bias: Held, sign: float) -> Total | None:
    """Constants join a sum as int32; where that is too small for one, it stays beside."""
    if not isinstance(bias, Floats) or not bias.fixed or total.bounds:
        return None
    if not _fits(bias.stored, total) or not _is_one(total.divisor):
        return None

    def parts() -> tuple[Any, Any]:
        array = jnp.asarray(bias.stored) * np.float32(sign)
        steps = jnp.rint(array / jnp.asarray(total.scale))
        held = jnp.abs(steps) < INT32
        beside = jnp.where(held, np.float32(0), array)
        return jnp.where(held, steps, 0).astype(jnp.int32), beside

    whole, beside = computed(parts, bias.stored, total.scale)
    rest = total.rest
    if not is_zero(beside):
        rest = beside if rest is None else rest + beside
    origin = total.origin
    if origin is not None:
        before = 0 if origin.bias is None else origin.bias
        origin = replace(origin, bias=before + whole)
    return replace(total, sums=total.sums + whole, rest=rest, origin=origin)


def _fits(array: Any, value: Held) -> bool:
    """Whether an array is of the rank of a value, with size 1 where it does not change."""
    sizes = jnp.shape(array)
    pairs = zip(sizes, value.shape, strict=False)
    return len(sizes) == len(value.shape) and all(n in (1, m) for n, m in pairs)


def _is_one(a: Any) -> bool:
    return isinstance(a, float) and a == 1.0


def bound(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """`max` and `min` with a constant, and `clamp` between two."""
    del layer
    name = equation.primitive.name
    if name == "clamp":
        low, value, high = values
        limits = [("max", low), ("min", high)]
    else:
        a, b = values
        value, limit = (b, a) if isinstance(a, Floats) else (a, b)
        limits = [(name, limit)]
    if not isinstance(value, Total | Joint):
        return None
    found = []
    for kind, limit in limits:
        if not isinstance(limit, Floats) or not limit.fixed:
            return None
        stored = limit.stored
        if jnp.ndim(stored) == 0:
            stored = jnp.reshape(stored, (1,) * len(value.shape))
        if not _fits(stored, value):
            return None
        found.append((kind, stored))
    return replace(value, bounds=(*value.bounds, *found))


def scaled(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """A sum times or over a number that is not zero."""
    del layer
    a, b = values
    divides = equation.primitive.name == "div"
    if isinstance(b, Total) and not divides:
        a, b = b, a
    if not isinstance(a, Total) or not isinstance(b, Floats) or not b.fixed:
        return None
    by = number(b.stored)
    if by is None or a.bounds or a.rest is not None or not by.all():
        return None
    if by.ndim == 0:
        by = by.reshape((1,) * len(a.shape))
    if not _fits(by, a) or (by < 0).any():
        return None
    if divides:
        return replace(a, divisor=np.float32(1) * a.divisor * by)
    return replace(a, scale=times(a.scale, by))


def total_of(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """Sums along axes or windows: what means and average pools begin with."""
    (x,) = values
    if not isinstance(x, Integers) or x.fixed:
        return None
    whole = x.values.astype(jnp.int32) - jnp.asarray(x.zero_point).astype(jnp.int32)
    params = equation.params
    if equation.primitive.name == "reduce_sum":
        axes = params["axes"]
        if any(x.scale.shape[i] != 1 for i in axes):
            return None
        many = math.prod(x.shape[i] for i in axes)
        if _is_large(many, x):
            return None
        side = x.scale.reshape(
            [n for i, n in enumerate(x.scale.shape) if i not in axes]
        )
        origin = Origin(layer, "reduce_sum", (x,), params)
        return Total(jnp.sum(whole, axes), side, origin=origin)
    if not x.uniform or _is_large(math.prod(params["window_dimensions"]), x):
        return None
    (sums,) = compat.bind(equation.primitive, params, (whole,))
    origin = Origin(layer, "reduce_window_sum", (x,), params)
    return Total(sums, x.scale, origin=origin)


def _is_large(many: Any, x: Integers) -> bool:
    """Whether int32 may not hold a sum of so many."""
    return not isinstance(many, int) or many * (x.high - x.low) >= 2**31


def extreme(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """The largest or smallest along axes or in windows."""
    del layer
    (x,) = values
    if not isinstance(x, Integers) or not x.uniform:
        return None
    (found,) = compat.bind(equation.primitive, equation.params, (x.values,))
    return moved_to(x, found)


def moved_to(x: Integers, values: Any) -> Integers:
    """The same grid, one for all, with other values on it."""
    ones = (1,) * values.ndim
    sides = {"scale": x.scale.reshape(ones), "zero_point": x.zero_point.reshape(ones)}
    return replace(x, values=values, **sides)


def move(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """Values go to other places and stay what they are."""
    del layer
    x, *others = values
    if any(not isinstance(v, Floats) for v in others):
        return None
    # What lies outside is NaN among floats, and no integer says that.
    if equation.params.get("mode") == lax.GatherScatterMode.FILL_OR_DROP:
        return None
    operands = [v.array for v in others if isinstance(v, Floats)]
    to = lambda a: compat.bind(equation.primitive, equation.params, (a, *operands))[0]
    if isinstance(x, Integers) and x.uniform:
        return moved_to(x, to(x.values))
    side = SIDES.get(equation.primitive.name)
    if side is None:
        return None
    if isinstance(x, Integers):
        sides = [side(equation, a) for a in (x.scale, x.zero_point)]
        if any(a is None for a in sides):
            return None
        return replace(x, values=to(x.values), scale=sides[0], zero_point=sides[1])
    if isinstance(x, Total) and not x.bounds and x.rest is None:
        scale = side(equation, x.scale)
        if scale is None or not _is_one(x.divisor):
            return None
        return replace(x, sums=to(x.sums), scale=scale)
    return None


def _transposed(equation: Any, a: Any) -> Any:
    return a.transpose(equation.params["permutation"])


def _squeezed(equation: Any, a: Any) -> Any:
    gone = equation.params["dimensions"]
    return a.reshape([n for i, n in enumerate(a.shape) if i not in gone])


def _reshaped(equation: Any, a: Any) -> Any:
    """One number for all, or along axes that stay as they are at the end."""
    new = equation.outvars[0].aval.shape
    if a.size == 1:
        return a.reshape((1,) * len(new))
    old = equation.invars[0].aval.shape
    kept = 0
    while kept < min(len(old), len(new)) and old[-1 - kept] == new[-1 - kept]:
        kept += 1
    if any(n != 1 for n in a.shape[: a.ndim - kept]):
        return None
    return a.reshape((*((1,) * (len(new) - kept)), *a.shape[a.ndim - kept :]))


def _spread(equation: Any, a: Any) -> Any:
    sizes = [1] * len(equation.params["shape"])
    for i, n in zip(equation.params["broadcast_dimensions"], a.shape, strict=True):
        sizes[i] = n
    return a.reshape(sizes)


SIDES = {
    "transpose": _transposed,
    "squeeze": _squeezed,
    "reshape": _reshaped,
    "broadcast_in_dim": _spread,
}


def joined(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """A concatenation of values on one grid."""
    del layer
    first = values[0]
    parts = [v for v in values if isinstance(v, Integers) and v.uniform]
    if not isinstance(first, Integers) or len(parts) < len(values):
        return None
    if not all(_same_grid(first, v) for v in parts):
        return None
    (found,) = compat.bind(
        equation.primitive, equation.params, [v.values for v in parts]
    )
    fixed = all(v.fixed for v in parts)
    return replace(moved_to(first, found), fixed=fixed)


def written(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """Values that are put into some places of others, on one grid."""
    del layer
    chosen = CHOOSES[equation.primitive.name]
    parts = [v for v in values[chosen] if isinstance(v, Integers) and v.uniform]
    if len(parts) != 2 or not _same_grid(*parts):
        return None
    given: list[Any] = [v.stored if isinstance(v, Floats) else None for v in values]
    given[chosen] = [v.values for v in parts]
    if any(v is None for v in given):
        return None
    (found,) = compat.bind(equation.primitive, equation.params, given)
    return replace(moved_to(parts[0], found), fixed=False)


def _same_grid(a: Integers, b: Integers) -> bool:
    pairs = ((a.scale, b.scale), (a.zero_point, b.zero_point))
    known = [(number(x), number(y)) for x, y in pairs]
    ends = (a.low, a.high, a.offset) == (b.low, b.high, b.offset)
    return ends and all(
        x is not None
        and y is not None
        and x.size == y.size == 1
        and x.item() == y.item()
        for x, y in known
    )


def padded(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """Zeros around values become zero points; what lies below the grid its lowest integer."""
    del layer
    x, filling = values
    if not isinstance(x, Integers) or not isinstance(filling, Floats) or not x.uniform:
        return None
    value = number(filling.stored)
    if value is None:
        return None
    if value == 0:
        new = jnp.asarray(x.zero_point).reshape(()).astype(x.values.dtype)
    elif value == -np.inf:
        new = np.asarray(x.low, x.values.dtype)
    else:
        return None
    config = equation.params["padding_config"]
    return moved_to(x, lax.pad(x.values, new, config))


def same(equation: Any, layer: str, values: list[Held]) -> Held | None:
    """A cast to the dtype that it has."""
    del layer
    kind = equation.outvars[0].aval.dtype == equation.invars[0].aval.dtype == np.float32
    return values[0] if kind else None


def spread_constant(equation: Any, values: list[Held]) -> Held | None:
    """A constant that is repeated along axes keeps size 1 there."""
    (x,) = values
    if not isinstance(x, Floats) or not x.fixed or jnp.ndim(x.stored) != len(x.shape):
        return None
    shape = tuple(equation.params["shape"])
    spread = lambda: [_spread(equation, jnp.asarray(x.stored))]
    return Floats(computed(spread, x.stored)[0], True, shape)


RULES: dict[str, Rule] = {
    "dot_general": product,
    "conv_general_dilated": product,
    "add": addition,
    "sub": addition,
    "max": bound,
    "min": bound,
    "clamp": bound,
    "mul": scaled,
    "div": scaled,
    "reduce_sum": total_of,
    "reduce_window_sum": total_of,
    "reduce_max": extreme,
    "reduce_min": extreme,
    "reduce_window_max": extreme,
    "reduce_window_min": extreme,
    "concatenate": joined,
    "dynamic_update_slice": written,
    "scatter": written,
    "pad": padded,
    "convert_element_type": same,
    "copy": same,
    **dict.fromkeys(
        (
            "transpose", "reshape", "squeeze", "broadcast_in_dim", "slice",
            "rev", "dynamic_slice", "gather",
        ),
        move,
    ),
}  # fmt: skip
