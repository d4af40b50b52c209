"""Equations that only look at an array differently, and where each axis goes."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.labels import Axis
from jaxmet.engine.program.program import Equation, Value

CASTS = (
    "convert_element_type",
    "copy",
    "copy_p",
    "stop_gradient",
    "reduce_precision",
    "optimization_barrier",
    "sharding_constraint",
)


def view(equation: Equation) -> None:
    """Give a view's result its labels."""
    source, out = equation.operands[0], equation.results[0]
    axes = VIEW_RULES[equation.name](equation, source.axes)
    if axes is None:
        why = "a reshape that cuts a channel axis"
        for axis in source.axes:
            lb.freeze(axis, why)
        axes = [
            source.axes[i]
            if i < source.ndim
            and source.shape[i] == n
            and lb.carries_batch(source.axes[i])
            else lb.fresh(n, why)
            for i, n in enumerate(out.shape)
        ]
    out.axes = tuple(axes)


def follow(axes: Iterable[Axis], chain: Iterable[Equation | None]) -> list[Axis]:
    """Labels after a chain of views; None stands for the slice that a loop takes."""
    current = list(axes)
    for equation in chain:
        if equation is None:
            current = current[1:]
            continue
        result = VIEW_RULES[equation.name](equation, tuple(current))
        if result is None:
            return [lb.fresh_one(n) for n in equation.results[0].shape]
        current = list(result)
    return current


def numbered(value: Value) -> list[Axis]:
    """One new atom an axis, those of size one too."""
    return [(lb.Atom(n),) for n in value.shape]


def holding(axes: Iterable[Axis], wanted: Iterable[Axis]) -> tuple[int, ...]:
    """Positions of the axes all of whose atoms are among those of the wanted ones."""
    atoms = {atom for axis in wanted for atom in lb.expand(axis)}
    found = []
    for i, axis in enumerate(axes):
        own = lb.expand(axis)
        if own and all(atom in atoms for atom in own):
            found.append(i)
    return tuple(found)


def _broadcast(equation: Equation, axes: tuple[Axis, ...]) -> list[Axis]:
    source, out = equation.operands[0], equation.results[0]
    found: list[Axis] = [() for _ in out.shape]
    for i, j in enumerate(equation.params["broadcast_dimensions"]):
        if source.shape[i] == out.shape[j]:
            found[j] = axes[i]
    return found


def _reshape(equation: Equation, axes: tuple[Axis, ...]) -> list[Axis] | None:
    source, out = equation.operands[0], equation.results[0]
    if 0 in source.shape:
        return None
    return lb.regroup(axes, source.shape, out.shape)


def _transpose(equation: Equation, axes: tuple[Axis, ...]) -> list[Axis]:
    return [axes[i] for i in equation.params["permutation"]]


def _squeeze(equation: Equation, axes: tuple[Axis, ...]) -> list[Axis]:
    gone = {d % equation.operands[0].ndim for d in equation.params["dimensions"]}
    return [a for i, a in enumerate(axes) if i not in gone]


def _reverse(equation: Equation, axes: tuple[Axis, ...]) -> list[Axis]:
    """A reversed axis has another order; a flipped kernel window is what meets it."""
    found = list(axes)
    for i in equation.params["dimensions"]:
        lb.freeze(axes[i], "reversed")
        found[i] = lb.fresh(equation.results[0].shape[i], "reversed")
    return found


def _cast(equation: Equation, axes: tuple[Axis, ...]) -> list[Axis]:
    del equation
    return list(axes)


VIEW_RULES: dict[str, Callable[[Equation, tuple[Axis, ...]], list[Axis] | None]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "rev": _reverse,
    **dict.fromkeys(CASTS, _cast),
}


class Move(NamedTuple):
    """A view of one equation, or of a loop, without the arrays: `to` says where numbers go."""

    name: str
    to: tuple[Any, ...] = ()
    shape: tuple[Any, ...] = ()


SAID_BY = {
    "broadcast_in_dim": "broadcast_dimensions",
    "transpose": "permutation",
    "squeeze": "dimensions",
    "rev": "dimensions",
}
"""Which parameter of an equation is the `to` of its move."""


def move_of(equation: Equation | None) -> Move:
    """The view that an equation is; None stands for the slice that a loop takes."""
    if equation is None:
        return Move("slice of a loop")
    said = equation.params.get(SAID_BY.get(equation.name, ""), ())
    return Move(equation.name, tuple(said), tuple(equation.results[0].shape))


def moved(array: np.ndarray, moves: Iterable[Move]) -> np.ndarray | None:
    """An array of indices as it is read through views, None where a loop slices it."""
    for move in moves:
        if move.name in CASTS:
            continue
        if move.name == "transpose":
            array = np.transpose(array, move.to)
        elif move.name == "rev":
            array = np.flip(array, move.to)
        elif move.name in ("reshape", "squeeze"):
            array = array.reshape(move.shape)
        elif move.name == "broadcast_in_dim":
            sizes = [1] * len(move.shape)
            for axis, size in zip(move.to, array.shape, strict=True):
                sizes[axis] = size
            array = np.broadcast_to(array.reshape(sizes), move.shape)
        else:
            return None
    return array
