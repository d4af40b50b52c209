"""Arithmetic on arrays of which a part is left: number by number, sums, dots, convolutions.

Nothing is multiplied by zero.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation
from jaxmet.engine.pruned.partial import (
    Partial,
    Uniform,
    in_order,
    number_of,
    number_under,
    parts,
    same_number,
    taken,
    whole,
)
from jaxmet.tree.structures import Keep


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


def meeting(a: Any, i: int, b: Any, j: int) -> tuple[Any, Any] | None:
    """Both operands cut to the entries of a shared axis where neither is known zero."""
    one = a.on(i) if isinstance(a, Partial) else None
    two = b.on(j) if isinstance(b, Partial) else None
    if one is None and two is None:
        return a, b
    size = (one or two).size  # type: ignore[union-attr]
    kept = set(range(size))
    for x, on in ((a, one), (b, two)):
        if on is not None and x.zero:
            kept &= set(on.indices)
    for on in (one, two):
        if on is not None and not kept <= set(on.indices):
            return None
    if not kept:
        return None
    return _only(a, i, sorted(kept)), _only(b, j, sorted(kept))


def _only(x: Any, axis: int, kept: Sequence[int]) -> Any:
    """The entries of an axis by their numbers in the whole array, the axis whole then."""
    on = x.on(axis) if isinstance(x, Partial) else None
    have = list(on.indices) if on is not None else range(np.shape(_array(x))[axis])
    if list(have) != list(kept):
        places = [list(have).index(n) for n in kept]
        part = taken(_array(x), [Keep(axis, len(have), tuple(places))])
    else:
        part = _array(x)
    return Partial(part, x.without(axis), x.fill) if isinstance(x, Partial) else part


def _array(x: Any) -> Any:
    return x.part if isinstance(x, Partial) else x


def _kept(x: Any, axis: int) -> Keep | None:
    return x.on(axis) if isinstance(x, Partial) else None


def _holds_zero(x: Any) -> bool:
    return not isinstance(x, Partial) or not x.keep or x.zero


def dot(equation: Equation, operands: list[Any]) -> list[Any] | None:
    lhs, rhs = map(_written, operands)
    (lc, rc), (lb, rb) = equation.params["dimension_numbers"]
    for i, j in zip((*lc, *lb), (*rc, *rb), strict=True):
        cut = meeting(lhs, i, rhs, j)
        if cut is None or (i in lb and (_kept(lhs, i) or _kept(rhs, j))):
            return None
        lhs, rhs = cut
    if not (_holds_zero(lhs) and _holds_zero(rhs)):
        return None
    part = compat.bind(equation.primitive, equation.params, [_array(lhs), _array(rhs)])[
        0
    ]
    free = [(lhs, i) for i in range(np.ndim(_array(lhs))) if i not in (*lc, *lb)]
    free += [(rhs, j) for j in range(np.ndim(_array(rhs))) if j not in (*rc, *rb)]
    return [_result(part, [_kept(x, i) for x, i in free], len(lb))]


def _written(x: Any) -> Any:
    return whole(x) if isinstance(x, Uniform) else x


def _result(part: Any, kept: Sequence[Keep | None], first: int) -> Any:
    keep = [
        Keep(first + n, k.size, k.indices) for n, k in enumerate(kept) if k is not None
    ]
    return Partial(part, in_order(keep)) if in_order(keep) else part


def conv(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, kernel = map(_written, operands[:2])
    p, numbers = dict(equation.params), equation.params["dimension_numbers"]
    (batch, feature, *_), (out, inside, *_) = numbers.lhs_spec, numbers.rhs_spec
    if p["batch_group_count"] != 1:
        return None
    if p["feature_group_count"] == 1:
        cut = meeting(x, feature, kernel, inside)
    else:
        cut = _depthwise(x, feature, kernel, out, inside, p)
    if cut is None:
        return None
    x, kernel = cut
    if not (_holds_zero(x) and _holds_zero(kernel)):
        return None
    part = compat.bind(equation.primitive, p, [_array(x), _array(kernel)])[0]
    keep = []
    for own, axis, to in (
        (x, batch, numbers.out_spec[0]),
        (kernel, out, numbers.out_spec[1]),
    ):
        on = _kept(own, axis)
        keep += [Keep(to, on.size, on.indices)] if on is not None else []
    own = [_kept(x, i) for i in numbers.lhs_spec[2:]]
    own += [_kept(kernel, i) for i in numbers.rhs_spec[2:]]
    if any(own):
        return None
    return [Partial(part, in_order(keep))] if keep else [part]


def _depthwise(
    x: Any, feature: int, kernel: Any, out: int, inside: int, p: dict[str, Any]
) -> tuple[Any, Any] | None:
    """Groups of which all outputs are gone are not computed."""
    groups, on = p["feature_group_count"], _kept(kernel, out)
    if _kept(kernel, inside) is not None or on is None:
        return None  # nothing is saved where the kernel is whole
    each = on.size // groups
    left = np.bincount(np.asarray(on.indices) // each, minlength=groups)
    alive = np.flatnonzero(left)
    if len(set(left[alive])) != 1:
        return None
    wide = np.shape(_array(kernel))[inside]
    wanted = [int(g * wide + k) for g in alive for k in range(wide)]
    have = _kept(x, feature)
    if have is not None and not set(wanted) <= set(have.indices):
        return None
    p["feature_group_count"] = len(alive)
    return _only(x, feature, wanted), kernel
