"""How labels pass through what moves, joins, pools or picks entries."""

import math
from collections.abc import Callable

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.labels import Axis
from jaxmet.engine.flow.axis_joins import freeze_all, join, join_labels, neutral
from jaxmet.engine.nodes.grouping import REDUCTIONS, WINDOWS
from jaxmet.engine.program.program import (
    CONST,
    DATA,
    NOISE,
    Equation,
)


def _slice(equation: Equation) -> None:
    source, out, p = equation.operands[0], equation.results[0], equation.params
    strides = p["strides"] or (1,) * source.ndim
    axes = []
    for i, axis in enumerate(source.axes):
        part = None
        if strides[i] == 1:
            part = lb.cut(axis, p["start_indices"][i], p["limit_indices"][i])
        if part is None:
            lb.freeze(axis, "sliced across")
            part = (
                axis
                if lb.carries_batch(axis)
                else lb.fresh(out.shape[i], "sliced across")
            )
        axes.append(part)
    out.axes = tuple(axes)


def _split(equation: Equation) -> None:
    source, axis = equation.operands[0], equation.params["axis"]
    offset = 0
    sizes = map(int, equation.params["sizes"])  # numpy integers, at times
    for out, n in zip(equation.results, sizes, strict=True):
        part = lb.cut(source.axes[axis], offset, offset + n)
        if part is None:
            lb.freeze(source.axes[axis], "split across")
            part = lb.fresh(n, "split across")
        out.axes = (*source.axes[:axis], part, *source.axes[axis + 1 :])
        offset += n


def _pad(equation: Equation) -> None:
    source, filler = equation.operands[:2]
    axes = list(source.axes)
    if not neutral(filler):
        freeze_all(source, "padded with a constant", fixed=False)
    for i, config in enumerate(equation.params["padding_config"]):
        low, high, inner = map(int, config)  # numpy integers, at times
        if (low, high, inner) == (0, 0, 0):
            continue
        n = source.shape[i]
        if inner or low < 0 or high < 0 or lb.carries_batch(axes[i]):
            lb.freeze(axes[i], "padded")
            axes[i] = lb.fresh(equation.results[0].shape[i], "padded")
        else:
            sizes = [k for k in (low, n, high) if k]
            parts = [lb.fresh_one(low)] * (low > 0) + [axes[i]]
            parts += [lb.fresh_one(high)] * (high > 0)
            axes[i] = lb.concatenate(parts, sizes)
    equation.results[0].axes = tuple(axes)


def _concatenate(equation: Equation) -> None:
    d, out = equation.params["dimension"], equation.results[0]
    operands = [v for v in equation.operands if v.kind not in (CONST, NOISE)]
    axes: list[Axis] = []
    for i in range(out.ndim):
        if i == d:
            every = [
                v.axes[i] if v.kind not in (CONST, NOISE) and len(v.axes) > i else ()
                for v in equation.operands
            ]
            axes.append(lb.concatenate(every, [v.shape[i] for v in equation.operands]))
            for v, axis in zip(equation.operands, every, strict=True):
                if v.kind in (CONST, NOISE) and not neutral(v):
                    lb.freeze(axes[-1], "concatenated with a constant", fixed=False)
                if lb.carries_batch(axis):
                    axes[-1] = axis
            continue
        known = [v.axes[i] for v in operands if v.axes[i]]
        for other in known[1:]:
            lb.unify(known[0], other)
        axes.append(known[0] if known else ())
    out.axes = tuple(axes)
    join(equation, equation.operands, (i for i in range(out.ndim) if i != d))


def _stack(equation: Equation) -> None:
    """A concatenation along an axis of its own, on which nothing else lies."""
    d, out = equation.params["axis"], equation.results[0]
    axes: list[Axis] = []
    for i in range(out.ndim - 1):
        labels = [v.axes[i] if v.axes else () for v in equation.operands]
        wide = [axis for axis in labels if axis]
        for other in wide[1:]:
            lb.unify(wide[0], other)
        join_labels(equation, equation.operands, labels)
        axes.append(wide[0] if wide else ())
    axes.insert(d, lb.fresh(out.shape[d], "stacked"))
    out.axes = tuple(axes)


def _unstack(equation: Equation) -> None:
    source, d = equation.operands[0], equation.params["axis"]
    lb.freeze(source.axes[d], "taken apart")
    for out in equation.results:
        out.axes = (*source.axes[:d], *source.axes[d + 1 :])


def _tile(equation: Equation) -> None:
    source, out = equation.operands[0], equation.results[0]
    axes = []
    for i, times in enumerate(equation.params["reps"]):
        axis = source.axes[i]
        if times != 1 and not lb.carries_batch(axis):
            lb.freeze(axis, "tiled")
            axis = lb.fresh(out.shape[i], "tiled")
        axes.append(axis)
    out.axes = tuple(axes)


def _reduce(equation: Equation) -> None:
    source, gone = equation.operands[0], set(equation.params["axes"])
    for i in gone:
        lb.freeze(source.axes[i], "summed over")
    equation.results[0].axes = tuple(
        a for i, a in enumerate(source.axes) if i not in gone
    )


def _window(equation: Equation) -> None:
    source, out, p = equation.operands[0], equation.results[0], equation.params
    axes = []
    if equation.name == "reduce_window":  # any function, from any start
        freeze_all(source, "pooled by a function of its own", fixed=False)
    for i, axis in enumerate(source.axes):
        idle = p["window_dimensions"][i] == 1 and source.shape[i] == out.shape[i]
        if not idle:
            lb.freeze(axis, "pooled over")
        axes.append(axis if idle else lb.fresh(out.shape[i], "pooled over"))
    out.axes = tuple(axes)


def _gather(equation: Equation) -> None:
    source, indices = equation.operands[:2]
    numbers, sizes = (
        equation.params["dimension_numbers"],
        equation.params["slice_sizes"],
    )
    out = equation.results[0]
    batching = getattr(numbers, "operand_batching_dims", ())
    filler = equation.params.get("fill_value")
    if filler is not None and filler != 0 and math.isfinite(filler):
        freeze_all(source, "filled with a constant", fixed=False)
    axes: list[Axis | None] = [None] * out.ndim
    kept = [
        i for i in range(source.ndim)
        if i not in numbers.collapsed_slice_dims and i not in batching
    ]  # fmt: skip
    source_axes = source.axes or ((),) * source.ndim
    for j, i in zip(numbers.offset_dims, kept, strict=True):
        whole = sizes[i] == source.shape[i]
        axes[j] = source_axes[i] if whole else lb.fresh(out.shape[j], "gathered")
        if not whole:
            lb.freeze(source_axes[i], "gathered")
    rest = [j for j in range(out.ndim) if j not in numbers.offset_dims]
    index_axes = list(indices.axes[:-1]) if indices.kind == DATA else []
    for k, j in enumerate(rest):
        known = k < len(index_axes) and indices.shape[k] == out.shape[j]
        axes[j] = index_axes[k] if known else lb.fresh(out.shape[j], "gathered")
    for i, axis in enumerate(source_axes):
        if i not in kept:
            lb.freeze(axis, "indexed")
    out.axes = tuple(a if a is not None else () for a in axes)


MOVE_RULES: dict[str, Callable[[Equation], None]] = {
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "gather": _gather,
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(WINDOWS, _window),
}
