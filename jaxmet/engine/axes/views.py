"""Equations that only look at an array differently, and where each axis goes."""

from collections.abc import Callable, Iterable, Sequence
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

CHOOSES = {
    "select_n": slice(1, None),
    "gather": slice(0, 1),
    "dynamic_slice": slice(0, 1),
    "dynamic_update_slice": slice(0, 2),
    "scatter": slice(0, None, 2),
}
"""Equations whose result holds numbers of these operands; the others say which."""


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


SLICE = "slice of a loop"
"""The move of a loop over stacked layers."""

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
        return Move(SLICE)
    numbers = equation.params.get(SAID_BY.get(equation.name, ""), ())
    return Move(equation.name, tuple(numbers), tuple(equation.results[0].shape))


def moved(array: Any, moves: Iterable[Move]) -> tuple[Any, int] | None:
    """An array as it is read through views, and how many leading axes loops slice.

    None where numbers are read more than once. Any array with NumPy's methods will do.
    """
    lead = 0
    for move in moves:
        if move.name in CASTS:
            continue
        if move.name == SLICE:
            lead += 1
        elif move.name == "transpose":
            array = array.transpose((*range(lead), *(lead + i for i in move.to)))
        elif move.name == "rev":
            array = _flipped(array, [lead + i for i in move.to])
        elif move.name in ("reshape", "squeeze", "broadcast_in_dim"):
            shape = (*array.shape[:lead], *move.shape)
            if move.name == "broadcast_in_dim" and not _is_reshape(array, lead, move):
                return None
            array = array.reshape(shape)
        else:
            return None
    return array, lead


def moved_back(array: Any, moves: Sequence[Move], shape: tuple[int, ...]) -> Any:
    """The array of this shape that is read like that through views."""
    steps, current = [], np.zeros(shape, np.int8)
    lead = 0
    for move in moves:
        steps.append((move, current.shape, lead))
        found = moved(current, [*[Move(SLICE)] * lead, move])
        assert found is not None
        current, lead = found
    for move, before, lead in reversed(steps):
        if move.name == "transpose":
            back = np.argsort(move.to)
            array = array.transpose((*range(lead), *(lead + int(i) for i in back)))
        elif move.name == "rev":
            array = _flipped(array, [lead + i for i in move.to])
        else:
            array = array.reshape(before)
    return array


def _flipped(array: Any, axes: Sequence[int]) -> Any:
    back = slice(None, None, -1)
    return array[tuple(back if i in axes else slice(None) for i in range(array.ndim))]


def _is_reshape(array: Any, lead: int, move: Move) -> bool:
    """Whether a broadcast only adds axes of size one, and keeps the order of the others."""
    sizes = [1] * len(move.shape)
    for axis, size in zip(move.to, array.shape[lead:], strict=True):
        sizes[axis] = size
    return tuple(sizes) == tuple(move.shape) and list(move.to) == sorted(move.to)
