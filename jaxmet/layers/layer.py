"""The weight of a layer as matrices, and back.

Whatever a layer computes, it is (groups, rows, ins) times (groups, ins, outs): of a
convolution a row is the window under one output position, and groups are those of a grouped
one; of a dot groups are the axes that run along both operands. Between the parameter and the
product lie views (transposed, reshaped, flipped, cut into the layers of a loop), which only
move numbers; the layers of a loop are one more leading axis.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from jaxmet.engine.axes.views import CASTS, moved, moved_back
from jaxmet.engine.graph.node import Node
from jaxmet.layers.eligibility import why_no_matrix
from jaxmet.numerics import xp
from jaxmet.numerics.precision import wide
from jaxmet.tree.leaves import dense


def matrix_of(node: Node, weight: Any, lead: int = 0) -> Any:
    """A weight, as the product's equation reads it, as (layers · groups, ins, outs).

    `lead` axes before those of the equation run over the layers of a loop.
    """
    order, sizes, swapped = _plan(node, weight.shape[lead:])
    loops = weight.shape[:lead]
    weight = weight.transpose((*range(lead), *(lead + i for i in order)))
    weight = weight.reshape(*loops, *sizes)
    weight = weight.swapaxes(-1, -2) if swapped else weight
    return weight.reshape(-1, *weight.shape[-2:])


def matrix_sizes(node: Node, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(groups, ins, outs) of a weight of this shape, as the product's equation reads it."""
    _, (groups, *sizes), swapped = _plan(node, shape)
    ins, outs = reversed(sizes) if swapped else sizes
    return groups, ins, outs


def _plan(
    node: Node, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, int, int], bool]:
    """The order of axes that gives (groups, ins, outs), or with outs before ins."""
    conv, dot = node.convolution, node.dot
    if conv is not None:
        outs, ins, *window = conv.kernel_axes
        each = shape[outs] // conv.groups
        row = math.prod(shape[i] for i in (ins, *window))
        return (outs, *window, ins), (conv.groups, each, row), True
    assert dot is not None
    batched, summed = [w for _, w in dot.batched], [w for _, w in dot.summed]
    free = [i for i in range(len(shape)) if i not in (*batched, *summed)]
    groups, ins, outs = (
        math.prod(shape[i] for i in a) for a in (batched, summed, free)
    )
    return (*batched, *summed, *free), (groups, ins, outs), False


@dataclasses.dataclass(frozen=True)
class WeightMatrix:
    """Where the numbers of a parameter stand in the matrices of its layer."""

    node: Node
    shape: tuple[int, ...]  # of the parameter

    @staticmethod
    def of(node: Node, leaf: Any) -> "WeightMatrix | None":
        """None for a layer that reads only a part of a parameter, or some of it twice."""
        if node.weight is None or node.weight.name is None or why_no_matrix(node):
            return None
        found = WeightMatrix(node, tuple(dense(leaf).shape))
        read = moved(np.zeros(found.shape, np.int8), node.weight.moves)
        size = math.prod(found.shape)
        return found if read is not None and read[0].size == size else None

    def matrix(self, array: Any) -> Any:
        """The values of the parameter as (layers · groups, ins, outs)."""
        assert self.node.weight is not None
        found = moved(array, self.node.weight.moves)
        assert found is not None
        return matrix_of(self.node, *found)

    def leaf(self, matrix: Any) -> Any:
        """The values of the matrices in the shape of the parameter."""
        assert self.node.weight is not None
        found = moved(np.zeros(self.shape, np.int8), self.node.weight.moves)
        assert found is not None
        read, lead = found
        order, sizes, swapped = _plan(self.node, read.shape[lead:])
        groups, one, two = sizes
        loops = read.shape[:lead]
        matrix = matrix.reshape(
            *loops, groups, *((two, one) if swapped else (one, two))
        )
        matrix = matrix.swapaxes(-1, -2) if swapped else matrix
        matrix = matrix.reshape(*loops, *(read.shape[lead + i] for i in order))
        back = [order.index(i) for i in range(len(order))]
        matrix = matrix.transpose((*range(lead), *(lead + i for i in back)))
        return moved_back(matrix, self.node.weight.moves, self.shape)

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Layers times groups, inputs and outputs of one."""
        return self.matrix(np.zeros(self.shape, np.int8)).shape

    @functools.cached_property
    def index(self) -> np.ndarray:
        """The place of each entry in the flattened parameter, (layers · groups, ins, outs)."""
        size = math.prod(self.shape)
        return self.matrix(np.arange(size, dtype=np.int32).reshape(self.shape))

    @functools.cached_property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The parameter's axes along which inputs and outputs run; None where one has both.

        Axes of size one count to the inputs, the window of a convolution too.
        """
        outs = []
        for axis, entry in enumerate(np.unravel_index(self.index, self.shape)):
            by_row, by_column = (
                (entry == entry[:1, :, :1]).all(),
                (entry == entry[:, :1]).all(),
            )
            if not (by_row or by_column):
                return None
            if not by_row:
                outs.append(axis)
        ins = tuple(i for i in range(len(self.shape)) if i not in outs)
        return ins, tuple(outs)

    def row_order(self, axes: tuple[int, ...]) -> np.ndarray | None:
        """The number of each row among the entries of these axes of the parameter, (ins,).

        None where the columns of a row are not of one entry.
        """
        entries = np.unravel_index(self.index, self.shape)
        sizes = [self.shape[i] for i in axes]
        number = np.zeros(self.sizes, np.int64)
        for axis, size in zip(axes, sizes, strict=True):
            number = number * size + entries[axis]
        rows = number[0, :, 0]
        return rows if (number == rows[None, :, None]).all() else None


def kernel_axes(node: Node) -> tuple[int, ...] | None:
    """The parameter's axes of a convolution: outputs, inputs, window; None if reshaped."""
    assert node.convolution is not None and node.weight is not None
    axes = list(range(len(node.convolution.kernel_axes)))
    for move in node.weight.moves:
        if move.name == "transpose":
            axes = [axes[i] for i in move.to]
        elif move.name != "rev" and move.name not in CASTS:
            return None
    return tuple(axes[i] for i in node.convolution.kernel_axes)


def by_channel(node: Node, leaf: Any) -> Any:
    """A weight with axes (groups, ins, outs, window), in wide precision.

    Inputs and outputs follow each other as along the axes of the parameter.
    """
    weight = node.weight
    assert weight is not None
    array = xp.asarray(dense(leaf))
    groups, number, made, window = channel_sizes(node, array.shape)
    ins, outs = weight.in_axes, weight.out_axes
    rest = [i for i in range(array.ndim) if i not in (*ins, *outs)]
    array = xp.transpose(array, (*ins, *outs, *rest))
    array = array.reshape(number, groups, made, window)
    return xp.moveaxis(array.astype(wide(array.dtype)), 1, 0)


def channel_rows(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """An array as (channels, values), where channels run along these axes."""
    rest = [i for i in range(array.ndim) if i not in axes]
    channels = math.prod(array.shape[i] for i in axes)
    return np.transpose(array, (*axes, *rest)).reshape(channels, -1)


def channel_sizes(node: Node, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The shape that `by_channel` gives a weight of this shape."""
    weight, conv = node.weight, node.convolution
    assert weight is not None
    groups = conv.groups if conv is not None else 1
    number, made = (
        math.prod(shape[i] for i in axes) for axes in (weight.in_axes, weight.out_axes)
    )
    return groups, number, made // groups, math.prod(shape) // max(number * made, 1)
