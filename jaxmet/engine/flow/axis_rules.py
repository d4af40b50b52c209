"""How labels pass through equations, and what ends the freedom to rescale a channel.

A channel may be rescaled where everything it meets is positively homogeneous or has a
parameter that can follow. What is not known to be so freezes the channel and says why.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.labels import Axis
from jaxmet.engine.axes.views import VIEW_RULES, view
from jaxmet.engine.nodes.activations import HOMOGENEOUS, number_of
from jaxmet.engine.nodes.cluster import LINEAR, Cluster
from jaxmet.engine.nodes.grouping import REDUCTIONS, WINDOWS
from jaxmet.engine.nodes.pointwise import POINTWISE
from jaxmet.engine.nodes.records import StoredNorm
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import (
    CONST,
    DATA,
    NOISE,
    PARAM,
    Equation,
    Region,
    Value,
    body_operands,
    carried,
)

FOLLOWED = ("norm", "activation")
JOINS = ("add", "sub", "add_any", "max", "min", "select_n")


def label_inputs(region: Region) -> None:
    """Fresh labels for parameters; axis 0 of every model input is its batch."""
    for value in region.inputs:
        if value.kind == PARAM:
            value.axes = tuple(lb.fresh(n) for n in value.shape)
        elif value.kind == DATA and not compat.is_key(value.aval):
            axes = [lb.fresh(n, "an input of the model") for n in value.shape]
            if axes:
                why = "the batch axis"
                axes[0] = (lb.Atom(value.shape[0], batch=True, frozen=why, fixed=why),)
            value.axes = tuple(axes)


def label(region: Region) -> None:
    """Labels for every value of a region whose inputs have theirs."""
    for equation in region.equations:
        cluster = equation.node
        if equation.bodies:
            _regions(equation)
        elif cluster is not None and cluster.kind in FOLLOWED:
            if equation.kind == PARAM and equation.name in VIEW_RULES:
                view(equation)
            elif equation.kind == PARAM and cluster.kind == "norm":
                _align(
                    equation.operands, equation.results[0]
                )  # e.g. variance + epsilon
            elif equation.results[0] is cluster.exit:
                _followed(cluster)
        else:
            _apply(equation)
        for value in equation.results:
            if len(value.axes) != value.ndim:
                value.axes = tuple(() for _ in range(value.ndim))


def _apply(equation: Equation) -> None:
    if equation.kind in (CONST, NOISE):
        return
    if equation.name in VIEW_RULES:
        view(equation)
    elif equation.name in RULES:
        RULES[equation.name](equation)
    elif equation.name in POINTWISE or equation.name == "add_any":
        _elementwise(equation)
    else:
        _opaque(equation)


def _neutral(value: Value) -> bool:
    """Whether a value is the same once its channels are scaled: 0, ±∞ or NaN all over."""
    number, numbers = number_of(value), value.numbers()
    if number is not None:
        return number == 0 or not math.isfinite(number)
    if numbers is None:
        return False
    return bool(((numbers == 0) | ~np.isfinite(numbers)).all())


def _join(equation: Equation, operands: Sequence[Value], axes: Iterable[int]) -> None:
    """Freeze channels that one value has along an axis where it meets another without them.

    What joins by addition, selection or concatenation must follow the scale of a channel,
    position for position. Only zero follows any, and parameters where a node carries them.
    """
    out = equation.results[0]
    for i in axes:
        if out.shape[i] == 1:
            continue
        labels = [
            v.axes[i] if v.ndim == out.ndim and v.axes and v.shape[i] != 1 else ()
            for v in operands
        ]
        _meet(equation, operands, labels)


def _meet(
    equation: Equation, operands: Sequence[Value], labels: Sequence[Axis]
) -> None:
    """`_join` along one axis that has these labels in the operands."""
    node, wide = equation.node, [axis for axis in labels if axis]
    follows = node is not None and node.kind in ("add", "concat", "product", "norm")
    for value, known in zip(operands, labels, strict=True) if wide else ():
        if known and (value.kind != PARAM or follows):
            continue
        if value.kind == PARAM or not _neutral(value):
            why = f"{equation.name}: what joins there cannot be rescaled with it"
            for axis in wide:
                lb.freeze(axis, why, fixed=False)


def _freeze(value: Value, why: str, *, fixed: bool = True) -> None:
    for axis in value.axes:
        lb.freeze(axis, why, fixed=fixed)


def _opaque(equation: Equation, why: str | None = None) -> None:
    """An unknown operation: nothing may be rescaled; the batch is kept where it fits."""
    why = why or f"{equation.name}: no rule"
    for value in equation.operands:
        _freeze(value, why, fixed=False)  # it gets whole arrays
    for result in equation.results:
        like = next((v for v in equation.data if v.shape == result.shape), None)
        if like is not None:
            result.axes = like.axes
            continue
        axes = [lb.fresh(n, why) for n in result.shape]
        for value in equation.data:
            for i, axis in enumerate(value.axes[: len(axes)]):
                if lb.carries_batch(axis) and value.shape[i] == result.shape[i]:
                    axes[i] = axis
        result.axes = tuple(axes)


# Elementwise


def _elementwise(equation: Equation) -> None:
    out = equation.results[0]
    if equation.name in ("mul", "div") and len(equation.data) == 2:
        _scaled_by(equation)
        return
    _align(equation.operands, out)
    if why := _inhomogeneous(equation):
        for value in (out, *equation.operands):
            _freeze(value, why, fixed=equation.kind == PARAM)
    elif equation.kind == DATA and equation.name in JOINS:
        cases = equation.operands[equation.name == "select_n" :]
        _join(equation, cases, range(out.ndim))


def _scaled_by(equation: Equation) -> None:
    """A product of two activations: one keeps its scale, the other is a gate that has none.

    The channels of both are the same ones, so both lose a channel that is removed.
    """
    out, (one, two) = equation.results[0], equation.operands
    divides = equation.name == "div"
    swaps = not divides and any(map(lb.frozen, one.axes)) and not _frozen_channels(two)
    kept, gate = (two, one) if swaps else (one, two)
    axes: list[Axis] = []
    for a, b in zip(_along(kept, out), _along(gate, out), strict=True):
        axes.append(a or b)
        if not (a and b):
            if b:
                lb.freeze(b, "a gate", fixed=False)
        elif lb.carries_batch(a) or lb.carries_batch(b):
            lb.unify(a, b)
        elif lb.meet(a, b):
            lb.unify(a, b)
            lb.freeze(a, "a product of two activations", fixed=False)
        else:
            lb.freeze(b, "a gate", fixed=False)
            out.tied.append((a, b))
    out.axes = tuple(axes)


def _along(value: Value, out: Value) -> list[Axis]:
    """The labels of an operand along the axes of the result, none where it is spread."""
    if value.ndim != out.ndim or not value.axes:
        return [()] * out.ndim
    pairs = zip(value.axes, value.shape, out.shape, strict=True)
    return [axis if n == m else () for axis, n, m in pairs]


def _frozen_channels(value: Value) -> bool:
    """Whether no axis but the batch is left to rescale."""
    own = [a for a in value.axes if a and not lb.carries_batch(a)]
    return all(lb.frozen(axis) for axis in own)


def _align(operands: list[Value], out: Value) -> None:
    axes: list[Axis] = [() for _ in out.shape]
    for value in operands:
        if value.kind in (CONST, NOISE) or value.ndim != out.ndim:
            continue
        for i, axis in enumerate(value.axes):
            if value.shape[i] == out.shape[i] and axis:
                if axes[i]:
                    lb.unify(axes[i], axis)
                else:
                    axes[i] = axis
    out.axes = tuple(axes)


def _inhomogeneous(equation: Equation) -> str | None:
    """Why f(s·x) is not s·f(x), or None."""
    name, operands = equation.name, equation.operands
    if equation.kind == PARAM:
        return None if name in LINEAR else "computed from parameters"
    if name in LINEAR or name in ("abs", "max", "min") and len(equation.data) == 2:
        return None
    if name in ("mul", "div"):
        return "a division" if name == "div" and operands[1].kind == DATA else None
    if name in ("add", "sub", "add_any"):
        constants = [v for v in operands if v.kind in (CONST, NOISE)]
        return None if all(map(_neutral, constants)) else "a constant is added"
    if name == "select_n":
        return None
    return name


def _followed(cluster: Cluster) -> None:
    """Norms and activations, taken as one operation of their entry."""
    entry, exit = cluster.entry, cluster.exit
    assert entry is not None
    params = [v for e in cluster.equations for v in e.operands if v.kind == PARAM]
    wide = [v for v in params if v.ndim == exit.ndim]
    if entry.shape == exit.shape:
        _align([entry, *wide], exit)
    elif entry.ndim == exit.ndim:
        exit.axes = entry.axes
    if isinstance(cluster.record, StoredNorm):
        for equation in cluster.equations:
            if equation.name in ("add", "sub") and equation.kind == DATA:
                whole = [exit, *(v for v in equation.operands if v.kind != DATA)]
                _join(equation, whole, range(exit.ndim))
        return
    over_data = cluster.kind == "norm"
    if over_data:
        why = "a norm over the data"
    elif cluster.function in HOMOGENEOUS or cluster.function == "clip":
        return
    else:
        why = f"{cluster.function} is not homogeneous"
    for value in (exit, entry, *wide):
        _freeze(value, why, fixed=over_data)


# Shapes


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
    if not _neutral(filler):
        _freeze(source, "padded with a constant", fixed=False)
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
                if v.kind in (CONST, NOISE) and not _neutral(v):
                    lb.freeze(axes[-1], "concatenated with a constant", fixed=False)
                if lb.carries_batch(axis):
                    axes[-1] = axis
            continue
        known = [v.axes[i] for v in operands if v.axes[i]]
        for other in known[1:]:
            lb.unify(known[0], other)
        axes.append(known[0] if known else ())
    out.axes = tuple(axes)
    _join(equation, equation.operands, (i for i in range(out.ndim) if i != d))


def _stack(equation: Equation) -> None:
    """A concatenation along an axis of its own, on which nothing else lies."""
    d, out = equation.params["axis"], equation.results[0]
    axes: list[Axis] = []
    for i in range(out.ndim - 1):
        labels = [v.axes[i] if v.axes else () for v in equation.operands]
        wide = [axis for axis in labels if axis]
        for other in wide[1:]:
            lb.unify(wide[0], other)
        _meet(equation, equation.operands, labels)
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
        _freeze(source, "pooled by a function of its own", fixed=False)
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
        _freeze(source, "filled with a constant", fixed=False)
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


# Products


def _dot(equation: Equation) -> None:
    lhs, rhs = equation.operands[:2]
    (lc, rc), (lb_, rb) = equation.params["dimension_numbers"]
    weighted = {lhs.kind, rhs.kind} == {DATA, PARAM}

    def axis(value: Value, i: int) -> Axis:
        return value.axes[i] if value.axes else ()

    for i, j in zip((*lc, *lb_), (*rc, *rb), strict=True):
        lb.unify(axis(lhs, i), axis(rhs, j))
        if not (axis(lhs, i) and axis(rhs, j)):
            lb.freeze((*axis(lhs, i), *axis(rhs, j)), "summed with one weight for all")
    fixed = [axis(lhs, i) for i in lb_]
    free_l = [axis(lhs, i) for i in range(lhs.ndim) if i not in (*lc, *lb_)]
    free_r = [axis(rhs, i) for i in range(rhs.ndim) if i not in (*rc, *rb)]
    out = equation.results[0]
    both = zip((*fixed, *free_l, *free_r), out.shape, strict=True)
    out.axes = tuple(a or lb.fresh(n, "a product with constants") for a, n in both)
    if lb_:
        for a in fixed:
            lb.freeze(a, "a batched product")
    if DATA in (lhs.kind, rhs.kind) and {lhs.kind, rhs.kind} & {CONST, NOISE}:
        for i, j in zip(lc, rc, strict=True):
            lb.freeze((*axis(lhs, i), *axis(rhs, j)), "summed with constants")
    elif not weighted:
        why = "a product of two activations" if equation.kind == DATA else "derived"
        for value in (lhs, rhs):
            _freeze(value, why)


def _conv(equation: Equation) -> None:
    lhs, rhs, p = *equation.operands[:2], equation.params
    numbers, out = p["dimension_numbers"], equation.results[0]
    groups, batch_groups = p["feature_group_count"], p["batch_group_count"]
    axes: list[Axis] = [lb.fresh(n, "a window") for n in out.shape]
    axes[numbers.out_spec[0]] = lhs.axes[numbers.lhs_spec[0]]
    for i in numbers.lhs_spec[2:]:
        lb.freeze(lhs.axes[i], "a window")
    if rhs.kind != PARAM or batch_groups != 1 or lhs.kind != DATA:
        _freeze(lhs, "a convolution without a parameter")
        _freeze(rhs, "a convolution without a parameter")
        out.axes = tuple(axes)
        return
    for i in numbers.rhs_spec[2:]:
        lb.freeze(rhs.axes[i], "a window")
    axes[numbers.out_spec[1]] = rhs.axes[numbers.rhs_spec[0]]
    inputs, inside = lhs.axes[numbers.lhs_spec[1]], rhs.axes[numbers.rhs_spec[1]]
    if groups == 1:
        lb.unify(inputs, inside)
    else:
        lb.freeze(inside, "input channels of a group")
    out.axes = tuple(axes)


# Regions


def _regions(equation: Equation) -> None:
    loop = equation.name in ("scan", "while")
    skip = compat.scan_arity(equation.params) if equation.name == "scan" else (0, 0)
    loops = {inside for inside, _ in carried(equation)}
    for body, outer in zip(equation.bodies, body_operands(equation), strict=True):
        for i, (inside, outside) in enumerate(zip(body.inputs, outer, strict=True)):
            axes = outside.axes or tuple(lb.fresh(n) for n in outside.shape)
            if equation.name == "scan" and i >= sum(skip):
                axes = axes[1:]
            if inside in loops:  # the batch reaches a first state of zeros from behind
                pairs = zip(axes, inside.shape, strict=True)
                axes = tuple(a or lb.fresh_one(n) for a, n in pairs)
            inside.axes = axes
            if inside.kind == CONST:
                inside.axes = tuple(lb.fresh(n) for n in inside.shape)
        label(body)
    for inside, outside in carried(equation):
        for a, b in zip(inside.axes, outside.axes, strict=True):
            lb.unify(a, b)
    _region_results(equation, sum(skip))
    if loop or equation.name == "cond":
        why = "crosses a loop" if loop else "crosses a branch"
        for body in equation.bodies:
            for value in (*body.inputs, *body.outputs):
                _freeze(value, why)
        for value in (*equation.operands, *equation.results):
            _freeze(value, why)


def _region_results(equation: Equation, skip: int) -> None:
    body = equation.bodies[-1]
    carry = len(carried(equation))
    for i, result in enumerate(equation.results):
        inside = body.outputs[i]
        axes = inside.axes or tuple(lb.fresh(n) for n in inside.shape)
        if equation.name == "scan" and i >= carry:
            xs = equation.operands[skip:]
            leading = next((v.axes[0] for v in xs if v.axes and v.axes[0]), None)
            axes = (leading or lb.fresh(result.shape[0]), *axes)
        result.axes = axes
    if equation.name == "cond":
        for other in equation.bodies[:-1]:
            for mine, theirs in zip(body.outputs, other.outputs, strict=True):
                for a, b in zip(mine.axes, theirs.axes, strict=False):
                    lb.unify(a, b)


RULES: dict[str, Callable[[Equation], None]] = {
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "gather": _gather,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(WINDOWS, _window),
}
