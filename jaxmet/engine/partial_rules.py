"""How each operation runs on arrays of which only some channels are left."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine import compat
from jaxmet.engine.partial import (
    Partial,
    Rule,
    Uniform,
    number_under,
    same_number,
    taken,
    whole,
)
from jaxmet.engine.pointwise import POINTWISE
from jaxmet.engine.program import Equation
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.structures import Keep


def parts(operands: Sequence[Any]) -> list[Partial]:
    return [x for x in operands if isinstance(x, Partial)]


# Elementwise


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
    return [Uniform(_number(equation, [_number_of(x) for x in operands]), shape)]


def _number_of(x: Any) -> Any:
    if isinstance(x, Partial):
        return x.fill
    return x.number if isinstance(x, Uniform) else x


def _number(equation: Equation, numbers: Sequence[Any]) -> Any:
    dtypes = [v.aval.dtype for v in equation.operands]
    return number_under(equation.primitive, equation.params, numbers, dtypes)


def _fill(equation: Equation, operands: list[Any], full: list[int]) -> Any:
    """What the entries that are gone become, None if they become different numbers."""
    name = equation.name
    if not full:
        return _number(equation, [_number_of(x) for x in operands])
    if name == "mul" or (name == "div" and full == [1]):
        zero = any(isinstance(x, Partial) and x.zero for x in operands)
        return np.zeros((), equation.results[0].aval.dtype) if zero else None
    if name == "select_n" and full == [0]:
        cases = [_number_of(x) for x in operands[1:]]
        same = all(same_number(cases[0], c) for c in cases[1:])
        return cases[0] if same else None
    return None


# Views


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
    return [Partial(lax.broadcast_in_dim(x.part, shape, where), _sorted(keep), x.fill)]


def _reduced(shape: Sequence[int], keep: Sequence[Keep]) -> tuple[int, ...]:
    sizes = list(shape)
    for axis, _, indices in keep:
        sizes[axis] = len(indices)
    return tuple(sizes)


def _sorted(keep: Sequence[Keep]) -> tuple[Keep, ...]:
    return tuple(sorted(k for k in keep if len(k.indices) < k.size))


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
    kept = _sorted(keep)
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
    return [Partial(lax.transpose(x.part, order), _sorted(keep), x.fill)]


def squeeze(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, out = operands[0], equation.results[0].shape
    if isinstance(x, Uniform):
        return [Uniform(x.number, out)]
    gone = {int(d) % len(x.shape) for d in equation.params["dimensions"]}
    if any(k.axis in gone for k in x.keep):
        return None
    stay = [i for i in range(len(x.shape)) if i not in gone]
    keep = [Keep(stay.index(k.axis), k.size, k.indices) for k in x.keep]
    return [Partial(lax.squeeze(x.part, sorted(gone)), _sorted(keep), x.fill)]


def reverse(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, axes = operands[0], equation.params["dimensions"]
    if isinstance(x, Uniform):
        return [x]
    if any(k.axis in axes for k in x.keep):
        return None
    return [Partial(lax.rev(x.part, axes), x.keep, x.fill)]


# Pieces


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
    keep = _sorted((*x.without(axis), Keep(axis, stop - start, indices)))
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
    keep = _sorted((*other, Keep(axis, offset, tuple(kept))))
    return [Partial(lax.concatenate(arrays, axis), keep, fill)]


def pad(equation: Equation, operands: list[Any]) -> list[Any] | None:
    x, value = operands
    if not isinstance(x, Partial):
        return None
    widths = equation.params["padding_config"]
    if any(tuple(map(int, widths[k.axis])) != (0, 0, 0) for k in x.keep):
        return None
    if not same_number(x.fill, _number_of(value)):
        return None
    value = _number_of(value)
    part = lax.pad(x.part, jnp.asarray(value, x.part.dtype), widths)
    return [Partial(part, x.keep, x.fill)]


# Sums and windows


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
    return [Partial(part, _sorted(keep), x.fill)] if keep else [part]


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


# Products


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
    return Partial(part, _sorted(keep)) if _sorted(keep) else part


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
    return [Partial(part, _sorted(keep))] if keep else [part]


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


REDUCE = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or")
WINDOW = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
RULES: dict[str, Rule] = {
    **dict.fromkeys((*POINTWISE, "add_any"), elementwise),
    **dict.fromkeys(REDUCE, reduction),
    **dict.fromkeys(WINDOW, window),
    "broadcast_in_dim": broadcast,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "rev": reverse,
    "slice": slices,
    "split": split,
    "concatenate": concatenate,
    "pad": pad,
    "dot_general": dot,
    "conv_general_dilated": conv,
}
