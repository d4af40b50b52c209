"""The layout of a weight's factors: matrices in, arrays with the weight's axes out."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.graph.operations import Work, works
from jaxmet.layers.layer import WeightMatrix, kernel_axes
from jaxmet.layers.once import run_once
from jaxmet.numerics import xp
from jaxmet.numerics.low_rank import Spectrum, low_rank, refit, spectrum
from jaxmet.numerics.precision import wide
from jaxmet.numerics.xp import Array
from jaxmet.tree.leaves import dense


@dataclasses.dataclass(frozen=True)
class Shape:
    """A weight by roles of its axes, and what a rank costs for one output position.

    `mine` are the window axes that the first factor holds, `others` those of the second.
    """

    method: str
    sizes: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    mine: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    groups: int = 1
    # How often the first runs for each output: strides of the axes of the second.
    strides: float = 1

    def size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.sizes[i] for i in axes)

    @property
    def ins(self) -> int:
        return self.size(self.in_axes)

    @property
    def outs(self) -> int:
        """Outputs of one group."""
        return self.size(self.out_axes) // self.groups

    @property
    def most(self) -> int:
        """The full rank."""
        return min(self.ins * self.size(self.mine), self.outs * self.size(self.others))

    @property
    def cost(self) -> int:
        """Multiplications of the weight itself."""
        taps = self.size(self.mine) * self.size(self.others)
        return self.groups * self.ins * self.outs * taps

    def cost_of(self, rank: int) -> float:
        """Multiplications of both factors."""
        return rank * (self.strides * self._first + self._second)

    def entries_of(self, rank: int) -> int:
        """Numbers that both factors hold."""
        return rank * (self._first + self._second)

    @property
    def _first(self) -> int:
        """Entries of the first factor for each rank."""
        return self.groups * self.ins * self.size(self.mine)

    @property
    def _second(self) -> int:
        return self.groups * self.outs * self.size(self.others)


def shape_of(
    node: Node,
    leaf: Any,
    method: str,
    extents: Mapping[int, tuple[int, int]] | None = None,
) -> Shape:
    """How a layer's weight would be factorized.

    `extents` are the sizes of input and output along each window axis. Where they are not
    known, outputs count as if padding kept the size of what is not strided or spread.
    """
    conv = node.convolution
    sizes = tuple(dense(leaf).shape)
    if conv is None:
        found = WeightMatrix.of(node, leaf)
        assert found is not None and found.axes is not None
        return Shape(method, sizes, *found.axes)
    axes = kernel_axes(node)
    assert axes is not None
    out, inside, *window = axes
    mine = (min(window),) if method == "spatial" and window else ()
    others = tuple(axis for axis in sorted(window) if axis not in mine)
    known = extents or dict(
        zip(window, zip(conv.strides, conv.input_dilation, strict=True), strict=True)
    )
    before, after = (math.prod(known[axis][i] for axis in others) for i in (0, 1))
    strides = before // after if before % after == 0 else before / after
    return Shape(method, sizes, (inside,), (out,), mine, others, conv.groups, strides)


def shapes_on(
    params: Any,
    graph: Graph,
    layers: Sequence[Node],
    leaves: Mapping[str, Any],
    method: str,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Shape]:
    """The shapes of layers with what inputs of these sizes cost, where sizes are numbers."""
    spread = any(n.convolution is not None for n in layers)
    found = works(graph, params, inputs, kwargs) if spread else []
    extents = {
        w.node.name: _of_parameter(w)
        for w in found
        if all(isinstance(size, int) for pair in w.extents.values() for size in pair)
    }
    return {
        n.name: shape_of(n, leaves[n.kernel], method, extents.get(n.name))
        for n in layers
    }


def _of_parameter(work: Work) -> dict[int, tuple[int, int]]:
    """Extents by the axis of the parameter, not by that of the kernel that is read."""
    conv = work.node.convolution
    axes = kernel_axes(work.node) if conv is not None else None
    if conv is None or axes is None:
        return {}
    return {
        axis: work.extents[own]
        for own, axis in zip(conv.kernel_axes[2:], axes[2:], strict=True)
        if own in work.extents
    }


def gram_of_parameter(node: Node, leaf: Any, shape: Shape, gram: Array) -> Array:
    """The Gram matrix of the inputs in the order of the parameter's axes."""
    found = WeightMatrix.of(node, leaf)
    assert found is not None
    rows = found.row_order((*shape.mine, *shape.others, *shape.in_axes))
    assert rows is not None
    back = np.argsort(rows)
    if np.array_equal(back, np.arange(back.size)):
        return gram
    return gram[:, back][:, :, back]


def factors_of(
    weight: Array, shape: Shape, rank: int, gram: Array | None
) -> tuple[Array, Array, Array]:
    """Both factors in the axes of the weight, and the relative error of what they make."""
    dtype = weight.dtype
    weight = weight.astype(wide(dtype))
    full = _full(weight, shape)
    groups, mine, others, ins, outs = full.shape
    matrix, inner = _problem(full, gram)
    first, second = low_rank(matrix, rank, inner)
    target = full.reshape(groups, -1, outs)
    if gram is not None and others > 1:
        start = second.reshape(groups, rank, others, outs)
        start = xp.transpose(start, (0, 2, 1, 3)).reshape(groups, -1, outs)
        better = refit(gram, target, _basis(first, mine, others, ins), start)
        second = better.reshape(groups, others, rank, outs)
        second = xp.transpose(second, (0, 2, 1, 3)).reshape(groups, rank, -1)
    made = xp.matmul(first, second, precision="highest")
    made = made.reshape(groups, mine, ins, others, outs)
    made = xp.transpose(made, (0, 1, 3, 2, 4)).reshape(target.shape)
    error = _energy(target - made, gram) / xp.maximum(_energy(target, gram), 1e-30)
    one = _placed(first.reshape(groups, mine, ins, rank), shape, first=True)
    two = _placed(second.reshape(groups, rank, others, outs), shape, first=False)
    return one.astype(dtype), two.astype(dtype), xp.sqrt(error)


def made_of(vector: Any, first: Array, shape: Shape) -> Array:
    """What the first factor makes of inputs that are the same all over its window."""
    order = (*shape.mine, *shape.others, *shape.in_axes, *shape.out_axes)
    weight = xp.transpose(first, order).reshape(
        shape.size(shape.mine), shape.ins, shape.groups, -1
    )
    weight = weight.astype(wide(first.dtype))  # NumPy's einsum knows no bfloat16
    inputs = xp.asarray(vector).reshape(shape.groups, shape.ins).astype(weight.dtype)
    made = xp.einsum("migr,gi->gr", weight, inputs, precision="highest")
    return made.reshape(-1).astype(first.dtype)


def spectrum_of(weight: Array, shape: Shape, gram: Array | None) -> Spectrum:
    """The decomposition that holds the products of the factors of all ranks."""

    def solve(weight: Array, gram: Array | None) -> Spectrum:
        weight = weight.astype(wide(weight.dtype))
        return spectrum(*_problem(_full(weight, shape), gram))

    return run_once(solve, weight, gram)


def placed_matrix(matrix: Array, shape: Shape) -> Array:
    """A product of factors with the axes of the weight, in its order."""
    mine, others = shape.size(shape.mine), shape.size(shape.others)
    sizes = (shape.groups, mine, shape.ins, others, shape.outs)
    split = xp.transpose(matrix.reshape(sizes), (1, 3, 2, 0, 4))
    order = (*shape.mine, *shape.others, *shape.in_axes, *shape.out_axes)
    array = split.reshape([shape.sizes[i] for i in order])
    return xp.transpose(array, [order.index(i) for i in range(len(order))])


def _problem(full: Array, gram: Array | None) -> tuple[Array, Array | None]:
    """The matrix that is cut, and the Gram matrix of what it reads."""
    groups, mine, others, ins, _ = full.shape
    matrix = xp.transpose(full, (0, 1, 3, 2, 4)).reshape(groups, mine * ins, -1)
    return matrix, None if gram is None else _inner(gram, mine, others, ins)


def _full(weight: Array, shape: Shape) -> Array:
    """(groups, window of the first, window of the second, ins, outs)."""
    order = (*shape.mine, *shape.others, *shape.in_axes, *shape.out_axes)
    sizes = (shape.size(shape.mine), shape.size(shape.others), shape.ins)
    split = xp.transpose(weight, order).reshape(*sizes, shape.groups, shape.outs)
    return xp.moveaxis(split, 3, 0)


def _inner(gram: Array, mine: int, others: int, ins: int) -> Array:
    """The Gram matrix of what the first factor reads, over all places of its window."""
    blocks = gram.reshape(gram.shape[0], mine, others, ins, mine, others, ins)
    return xp.einsum("gyximxj->gyimj", blocks).reshape(
        gram.shape[0], mine * ins, mine * ins
    )


def _basis(first: Array, mine: int, others: int, ins: int) -> Array:
    """What the first factor makes of a whole window, for each place of the second's."""
    groups, _, rank = first.shape
    apart = np.eye(others, dtype=first.dtype)
    first = first.reshape(groups, mine, ins, rank)
    spread = xp.einsum("gyir,xz->gyxizr", first, apart, precision="highest")
    return spread.reshape(groups, mine * others * ins, others * rank)


def _energy(matrix: Array, gram: Array | None) -> Array:
    if gram is None:
        return xp.sum(matrix**2)
    return xp.sum(matrix * xp.matmul(gram, matrix, precision="highest"))


def _placed(factor: Array, shape: Shape, *, first: bool) -> Array:
    """A factor with the axes of the weight, in its order."""
    sizes = list(shape.sizes)
    if first:  # (groups, mine, ins, rank) -> (mine, ins, groups * rank)
        groups, _, _, rank = factor.shape
        held, gone = (*shape.mine, *shape.in_axes), shape.others
        factor = xp.moveaxis(factor, 0, 2)
        channel, width, idle = shape.out_axes[-1], groups * rank, shape.out_axes[:-1]
        order = (*held, channel)
    else:  # (groups, rank, others, outs) -> (rank, others, groups * outs)
        _, rank, _, _ = factor.shape
        held, gone = (*shape.others, *shape.out_axes), shape.mine
        factor = xp.moveaxis(factor, 0, 2)
        channel, width, idle = shape.in_axes[-1], rank, shape.in_axes[:-1]
        order = (channel, *held)
    for axis in (*gone, *idle):
        sizes[axis] = 1
    sizes[channel] = width
    order = (*order, *gone, *idle)
    shaped = factor.reshape([sizes[i] for i in order])
    return xp.transpose(shaped, [order.index(i) for i in range(len(order))])
