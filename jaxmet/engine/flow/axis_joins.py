"""What may be rescaled where values meet: in sums, selections and concatenations."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.labels import Axis
from jaxmet.engine.nodes.activations import number_of
from jaxmet.engine.program.program import (
    PARAM,
    Equation,
    Value,
)


def neutral(value: Value) -> bool:
    """Whether a value is the same once its channels are scaled: 0, ±∞ or NaN all over."""
    number, numbers = number_of(value), value.numbers()
    if number is not None:
        return number == 0 or not math.isfinite(number)
    if numbers is None:
        return False
    return bool(((numbers == 0) | ~np.isfinite(numbers)).all())


def join(equation: Equation, operands: Sequence[Value], axes: Iterable[int]) -> None:
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
        join_labels(equation, operands, labels)


def join_labels(
    equation: Equation, operands: Sequence[Value], labels: Sequence[Axis]
) -> None:
    """`join` along one axis that has these labels in the operands."""
    node, wide = equation.node, [axis for axis in labels if axis]
    follows = node is not None and node.kind in ("add", "concat", "product", "norm")
    for value, known in zip(operands, labels, strict=True) if wide else ():
        if known and (value.kind != PARAM or follows):
            continue
        if value.kind == PARAM or not neutral(value):
            why = f"{equation.name}: what joins there cannot be rescaled with it"
            for axis in wide:
                lb.freeze(axis, why, fixed=False)


def freeze_all(value: Value, why: str, *, fixed: bool = True) -> None:
    for axis in value.axes:
        lb.freeze(axis, why, fixed=fixed)
