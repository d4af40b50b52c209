"""Convolutions and dots of arrays of which a part is left: nothing is multiplied by zero."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation
from jaxmet.engine.pruned.parts.partial import Partial, Uniform, in_order, taken, whole
from jaxmet.tree.structures import Keep


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
