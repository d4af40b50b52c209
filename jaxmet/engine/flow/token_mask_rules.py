"""Where the values of a result count, by what each operation does to positions.

A mask is a boolean array of the rank of its value, with axes of the value's size or of size
one; None: all values count. What an equation moves, its mask moves by the same numbers: it
is sliced, transposed, gathered and concatenated like the value. What is combined counts where
all of it does. What is summed over an axis counts where any of it does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.nodes.pointwise import POINTWISE
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation, Value

Mask = jax.Array | None
Read = Callable[[Value], Any]
Rule = Callable[[Equation, list[Mask], Read], list[Mask]]


class LostError(Exception):
    """The positions of a result do not follow from those of the operands."""


def joined(masks: Sequence[Mask]) -> Mask:
    """Where all of these count; they broadcast."""
    known: list[jax.Array] = []
    for mask in masks:
        if mask is not None and not any(mask is other for other in known):
            known.append(mask)
    if not known:
        return None
    ndim = max(m.ndim for m in known)
    total = None
    for mask in known:
        mask = mask.reshape((1,) * ndim) if mask.ndim == 0 else mask
        total = mask if total is None else jnp.logical_and(total, mask)
    return total


def masks_of(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    """The masks of an equation's results; LostError where they are not known."""
    if all(mask is None for mask in masks):
        return [None for _ in equation.results]
    rule = RULES.get(equation.name)
    if rule is None:
        raise LostError(f"no rule for {equation.name}")
    return rule(equation, masks, read)


def _full(mask: Mask, shape: Sequence[int]) -> jax.Array:
    return jnp.ones(shape, bool) if mask is None else jnp.broadcast_to(mask, shape)


def _any(mask: jax.Array, axes: Sequence[int], *, keepdims: bool = False) -> jax.Array:
    axes = tuple(int(a) for a in axes)
    if all(mask.shape[a] == 1 for a in axes):
        return mask if keepdims else lax.squeeze(mask, axes)
    return jnp.any(mask, axis=axes, keepdims=keepdims)


def _elementwise(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    del read
    mask = joined(masks)
    ndim = equation.results[0].ndim
    if mask is not None and mask.ndim != ndim:
        mask = mask.reshape((1,) * ndim)
    return [mask for _ in equation.results]


def _each(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    del read
    return masks[: len(equation.results)]


def _one(function: Callable[[Equation, jax.Array], jax.Array]) -> Rule:
    """A rule for what moves the values of its first operand."""

    def rule(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
        del read
        first = masks[0]
        return [None if first is None else function(equation, first)]

    return rule


def _broadcast(equation: Equation, mask: jax.Array) -> jax.Array:
    sizes = [1] * equation.results[0].ndim
    for i, j in enumerate(equation.params["broadcast_dimensions"]):
        sizes[j] = mask.shape[i]
    return mask.reshape(sizes)


def _reshape(equation: Equation, mask: jax.Array) -> jax.Array:
    """Axes that are regrouped together are written out, the others stay unchanged."""
    old, new = equation.operands[0].shape, equation.results[0].shape
    if math.prod(old) == 0:
        return jnp.ones((1,) * len(new), bool)
    written, sizes = list(mask.shape), list(new)
    i = j = 0
    while i < len(old) or j < len(new):
        left, right, a, b = 1, 1, [], []
        if i < len(old):
            left, a, i = old[i], [i], i + 1
        if j < len(new):
            right, b, j = new[j], [j], j + 1
        while left != right:
            if left < right:
                left, a, i = left * old[i], [*a, i], i + 1
            else:
                right, b, j = right * new[j], [*b, j], j + 1
        if all(mask.shape[k] == 1 for k in a):
            for k in b:
                sizes[k] = 1
        else:
            for k in a:
                written[k] = old[k]
    return jnp.broadcast_to(mask, written).reshape(sizes)


def _slice(equation: Equation, mask: jax.Array) -> jax.Array:
    p, source = equation.params, equation.operands[0]
    strides = p["strides"] or (1,) * source.ndim
    each = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    cut = tuple(
        slice(start, stop, step) if mask.shape[i] != 1 else slice(None)
        for i, (start, stop, step) in enumerate(each)
    )
    return mask[cut]


def _pad(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    del read
    mask = masks[0]
    if mask is None:
        return [None]
    widths = [
        (0, 0, 0) if mask.shape[i] == 1 else (int(low), int(high), int(inner))
        for i, (low, high, inner) in enumerate(equation.params["padding_config"])
    ]
    return [lax.pad(mask, np.True_, widths)]


def _concatenate(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    del read
    d, first = equation.params["dimension"], masks[0]
    same = first is not None and all(m is first for m in masks)
    if same and first is not None and first.shape[d] == 1:
        return [first]
    rest = np.max([m.shape for m in masks if m is not None], axis=0)
    parts = []
    for value, mask in zip(equation.operands, masks, strict=True):
        shape = [int(n) for n in rest]
        shape[d] = value.shape[d]
        parts.append(_full(mask, shape))
    return [lax.concatenate(parts, d)]


def _split(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    del read
    mask, axis = masks[0], equation.params["axis"]
    if mask is None or mask.shape[axis] == 1:
        return [mask for _ in equation.results]
    sizes = [int(n) for n in equation.params["sizes"]]
    return [*lax.split(mask, sizes, axis)]


def _reduce(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    del read
    mask = joined(masks)
    found = None if mask is None else _any(mask, equation.params["axes"])
    return [found for _ in equation.results]


def _gather(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    source, indices = equation.operands[:2]
    numbers, ndim = equation.params["dimension_numbers"], equation.results[0].ndim
    of_source, of_indices = masks[:2]
    if of_source is not None:
        at = read(indices)
        if at is None:
            raise LostError("indices that are computed inside of an operation")
        params = {**equation.params, "mode": lax.GatherScatterMode.CLIP}
        params["fill_value"] = None
        whole = _full(of_source, source.shape)
        of_source = compat.bind(equation.primitive, params, (whole, at))[0]
    if of_indices is not None:
        of_indices = _any(of_indices, (of_indices.ndim - 1,))
        rest = [j for j in range(ndim) if j not in numbers.offset_dims]
        sizes = [1] * ndim
        for j, n in zip(rest, of_indices.shape, strict=True):
            sizes[j] = n
        of_indices = of_indices.reshape(sizes)
    return [joined([of_source, of_indices])]


def _dynamic_slice(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    mask = masks[0]
    if mask is None:
        return [None]
    sizes, starts = equation.params["slice_sizes"], _starts(equation, 1, mask, read)
    taken = [1 if mask.shape[i] == 1 else n for i, n in enumerate(sizes)]
    return [lax.dynamic_slice(mask, starts, taken)]


def _update(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    (old, new), sizes = masks[:2], [v.shape for v in equation.operands[:2]]
    mine = old.shape if old is not None else (1,) * len(sizes[0])
    other = new.shape if new is not None else (1,) * len(sizes[0])
    idle = [
        a == b == 1 and n == m
        for a, b, n, m in zip(mine, other, *sizes, strict=True)
    ]  # fmt: skip
    whole, part = ([1 if i else n for i, n in zip(idle, s, strict=True)] for s in sizes)
    mask = _full(old, whole)
    starts = _starts(equation, 2, mask, read)
    return [lax.dynamic_update_slice(mask, _full(new, part), starts)]


def _starts(equation: Equation, skip: int, mask: jax.Array, read: Read) -> list[Any]:
    found = []
    for i, value in enumerate(equation.operands[skip:]):
        start = np.int32(0) if mask.shape[i] == 1 else read(value)
        if start is None:
            raise LostError("a start that is computed inside of an operation")
        found.append(start)
    kind = jnp.result_type(*found) if found else jnp.int32
    return [jnp.asarray(start, kind) for start in found]


def _dot(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    """A sum over an axis counts where any of it does: that of what is left of each side."""
    del read
    (lc, rc), (lb, rb) = equation.params["dimension_numbers"]
    left, right = (v.ndim for v in equation.operands[:2])
    free = left - len(lc) - len(lb), right - len(rc) - len(rb)
    sides = zip(masks[:2], (lc, rc), (lb, rb), (0, 1), strict=True)
    found: list[Mask] = []
    for mask, summed, batch, side in sides:
        if mask is None:
            continue
        rest = [i for i in range(mask.ndim) if i not in (*summed, *batch)]
        mask = jnp.transpose(mask, (*batch, *rest, *summed))
        mask = _any(mask, range(mask.ndim - len(summed), mask.ndim))
        shape = list(mask.shape)
        at = len(batch) if side else len(shape)
        shape[at:at] = [1] * free[1 - side]
        found.append(mask.reshape(shape))
    return [joined(found)]


def _ragged(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    del read
    if (
        masks[0] is None
        or equation.operands[0].ndim != 2
        or any(m is not None for m in masks[1:])
    ):
        raise LostError(f"no rule for this {equation.name}")
    return [_any(masks[0], (1,), keepdims=True)]


def _conv(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    del read
    p, mask = equation.params, masks[0]
    numbers, out = p["dimension_numbers"], equation.results[0]
    if mask is None or masks[1] is not None or p["batch_group_count"] != 1:
        raise LostError("a convolution with something other than weights")
    space = numbers.lhs_spec[2:]
    mask = jnp.transpose(mask, (numbers.lhs_spec[0], *space, numbers.lhs_spec[1]))
    mask = _any(mask, (mask.ndim - 1,))
    if any(n != 1 for n in mask.shape[1:]) and any(d != 1 for d in p["lhs_dilation"]):
        raise LostError("a transposed convolution")
    window = [equation.operands[1].shape[i] for i in numbers.rhs_spec[2:]]
    mask = windowed(
        mask,
        [1, *(equation.operands[0].shape[i] for i in space)],
        [1, *((n - 1) * d + 1 for n, d in zip(window, p["rhs_dilation"], strict=True))],
        [1, *p["window_strides"]],
        [(0, 0), *p["padding"]],
        [1, *(out.shape[i] for i in numbers.out_spec[2:])],
    )
    sizes = [1] * out.ndim
    for i, n in zip(
        (numbers.out_spec[0], *numbers.out_spec[2:]), mask.shape, strict=True
    ):
        sizes[i] = n
    order = np.argsort([numbers.out_spec[0], *numbers.out_spec[2:]]).tolist()
    return [jnp.transpose(mask, order).reshape(sizes)]


def _pool(equation: Equation, masks: list[Mask], read: Read) -> list[Mask]:
    del read
    p, mask = equation.params, joined(masks)
    assert mask is not None
    ndim = mask.ndim
    base = p.get("base_dilation") or (1,) * ndim
    inner = p.get("window_dilation") or (1,) * ndim
    if any(d != 1 and mask.shape[i] != 1 for i, d in enumerate(base)):
        raise LostError("a dilated pool")
    spans = zip(p["window_dimensions"], inner, strict=True)
    found = windowed(
        mask,
        equation.operands[0].shape,
        [(n - 1) * d + 1 for n, d in spans],
        p["window_strides"],
        p["padding"],
        equation.results[0].shape,
    )
    return [found for _ in equation.results]


def windowed(
    mask: jax.Array,
    sizes: Sequence[int],
    spans: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    outs: Sequence[int],
) -> jax.Array:
    """Where all that a window reads counts, but for what padding would hold.

    So a sequence has as many outputs that count as it would have by itself.
    """
    widths, steps, pads = [], [], []
    shape = list(mask.shape)
    for i, (n, span, step) in enumerate(zip(sizes, spans, strides, strict=True)):
        if shape[i] == 1:
            widths, steps, pads = [*widths, 1], [*steps, 1], [*pads, (0, 0)]
            continue
        width = span - sum(map(int, padding[i]))
        widths.append(max(width, 1))
        steps.append(int(step))
        pads.append((0, max(1 - width, 0)))
        if (n + pads[-1][1] - widths[-1]) // steps[-1] + 1 != outs[i]:
            raise LostError("windows that are not those of the sequence")
    if all(
        w == s == 1 and p == (0, 0) for w, s, p in zip(widths, steps, pads, strict=True)
    ):
        return mask
    return lax.reduce_window(mask, np.True_, lax.bitwise_and, widths, steps, pads)


RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, _elementwise),
    **dict.fromkeys(
        (
            "add_any", "atan2", "nextafter", "xor", "real", "imag", "conj", "complex",
            "population_count", "clz", "shift_left", "shift_right_logical",
            "shift_right_arithmetic", "igamma", "igammac", "bessel_i0e", "bessel_i1e",
            "regularized_incomplete_beta", "polygamma", "zeta",
            "random_gamma", "fake_quant", "fake_quant_tangent", "cumsum", "cumprod",
            "cummax", "cummin", "cumlogsumexp",
        ),
        _elementwise,
    ),
    **dict.fromkeys(
        (
            "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and",
            "reduce_or", "reduce_xor", "argmax", "argmin",
        ),
        _reduce,
    ),
    **dict.fromkeys(
        ("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window"),
        _pool,
    ),
    "optimization_barrier": _each,
    "broadcast_in_dim": _one(_broadcast),
    "reshape": _one(_reshape),
    "transpose": _one(lambda e, m: jnp.transpose(m, e.params["permutation"])),
    "squeeze": _one(lambda e, m: lax.squeeze(m, e.params["dimensions"])),
    "rev": _one(lambda e, m: lax.rev(m, e.params["dimensions"])),
    "slice": _one(_slice),
    "split": _split,
    "pad": _pad,
    "concatenate": _concatenate,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _update,
    "dot_general": _dot,
    "ragged_dot": _ragged,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
}  # fmt: skip
