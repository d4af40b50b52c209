"""How labels pass through arithmetic: number by number, norms, activations, products.

A channel may be rescaled where everything it meets is positively homogeneous or has a
parameter that can follow.
"""

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.labels import Axis
from jaxmet.engine.flow.axis_joins import freeze_all, join, neutral
from jaxmet.engine.nodes.activations import HOMOGENEOUS
from jaxmet.engine.nodes.cluster import LINEAR, Cluster
from jaxmet.engine.nodes.records import StoredNorm
from jaxmet.engine.program.program import (
    CONST,
    DATA,
    NOISE,
    PARAM,
    Equation,
    Value,
)

JOINS = ("add", "sub", "add_any", "max", "min", "select_n")


# Elementwise


def elementwise(equation: Equation) -> None:
    out = equation.results[0]
    if equation.name in ("mul", "div") and len(equation.data) == 2:
        _scaled_by(equation)
        return
    align(equation.operands, out)
    if why := _inhomogeneous(equation):
        for value in (out, *equation.operands):
            freeze_all(value, why, fixed=equation.kind == PARAM)
    elif equation.kind == DATA and equation.name in JOINS:
        cases = equation.operands[equation.name == "select_n" :]
        join(equation, cases, range(out.ndim))


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


def align(operands: list[Value], out: Value) -> None:
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
        return None if all(map(neutral, constants)) else "a constant is added"
    if name == "select_n":
        return None
    return name


def followed_through(cluster: Cluster) -> None:
    """Norms and activations, taken as one operation of their entry."""
    entry, exit = cluster.entry, cluster.exit
    assert entry is not None
    params = [v for e in cluster.equations for v in e.operands if v.kind == PARAM]
    wide = [v for v in params if v.ndim == exit.ndim]
    if entry.shape == exit.shape:
        align([entry, *wide], exit)
    elif entry.ndim == exit.ndim:
        exit.axes = entry.axes
    if isinstance(cluster.record, StoredNorm):
        for equation in cluster.equations:
            if equation.name in ("add", "sub") and equation.kind == DATA:
                whole = [exit, *(v for v in equation.operands if v.kind != DATA)]
                join(equation, whole, range(exit.ndim))
        return
    over_data = cluster.kind == "norm"
    if over_data:
        why = "a norm over the data"
    elif cluster.function in HOMOGENEOUS or cluster.function == "clip":
        return
    else:
        why = f"{cluster.function} is not homogeneous"
    for value in (exit, entry, *wide):
        freeze_all(value, why, fixed=over_data)


# Products


def dot(equation: Equation) -> None:
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
            freeze_all(value, why)


def conv(equation: Equation) -> None:
    lhs, rhs, p = *equation.operands[:2], equation.params
    numbers, out = p["dimension_numbers"], equation.results[0]
    groups, batch_groups = p["feature_group_count"], p["batch_group_count"]
    axes: list[Axis] = [lb.fresh(n, "a window") for n in out.shape]
    axes[numbers.out_spec[0]] = lhs.axes[numbers.lhs_spec[0]]
    for i in numbers.lhs_spec[2:]:
        lb.freeze(lhs.axes[i], "a window")
    if rhs.kind != PARAM or batch_groups != 1 or lhs.kind != DATA:
        freeze_all(lhs, "a convolution without a parameter")
        freeze_all(rhs, "a convolution without a parameter")
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
