"""Which weights are rounded, and how their scales lie in their matrices."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmet.engine.axes.views import CASTS, SLICE
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node, used_elsewhere
from jaxmet.layers.eligibility import (
    NOT_SELECTED,
    check_named,
    of,
    why_looped,
    why_no_matrix,
    why_unquantized,
)
from jaxmet.layers.layer import WeightMatrix
from jaxmet.numerics.rounding.levels import LevelGrid
from jaxmet.tree.host_rounding import grid_in_numpy, repeated
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose weight is rounded, or `why` it is not."""

    node: Node
    why: str | None = None

    @property
    def parameter(self) -> str:
        """The name of its weight."""
        return self.node.kernel


def find_layers(graph: Graph, quantizers: Quantizers, caller: str) -> tuple[Layer, ...]:
    """All layers, in the order in which they run.

    Raises ValueError for a layer that `graph.only` named and whose weight cannot be rounded.
    """
    layers = tuple(Layer(layer, _unfit(layer, quantizers)) for layer in graph.layers)
    for layer in layers:
        check_named(layer.node.name, layer.why, graph, caller, "be rounded")
    return layers


def _unfit(layer: Node, quantizers: Quantizers) -> str | None:
    why = why_no_matrix(layer) or layer.why_kept(stacked=True)
    why = why or why_unquantized(layer, quantizers)
    if why := why or why_looped(layer, ("while", "cond")):
        return why
    assert layer.weight is not None
    stacked = layer.weight.stacked
    if layer.region.count("scan") > 1 or ("scan" in layer.region) != stacked:
        return "its weight is used again and again in a loop"
    if stacked and loop_axis(layer) is None:
        return "its loop slices a view of its weight"
    return None


def loop_axis(layer: Node) -> int | None:
    """The axis of its weight along which the loop around a layer takes its slices.

    None where no axis of the parameter holds them in the order of the slices.
    """
    assert layer.weight is not None
    axis, moves = 0, layer.weight.moves
    for move in reversed(moves[: layer.weight.views.index(SLICE)]):
        if move.name == "transpose":
            axis = move.to[axis]
        elif move.name not in CASTS:
            return None
    return axis


def sharing_weight(graph: Graph, node: Node) -> tuple[Node, ...]:
    """The products that read the weight of a layer, itself among them."""
    products = (n for n in graph.nodes if n.kind == "product" and n.weight is not None)
    return tuple(n for n in products if n.weight and n.weight.name == node.kernel)


def why_bias_kept(graph: Graph, layers: Sequence[Layer], node: Node) -> str | None:
    """Why the bias of a layer cannot take the mean error of all that share it.

    Layers that share weight and bias are rounded together, and the mean error over all that
    they read is the best shift. Of layers that share only the bias, the first would be rounded
    before the shift is known; those that share only the weight have other mean errors each.
    """
    if node.bias is None:
        return None
    together = {n.name for n in sharing_weight(graph, node)}
    if {n.name for n in graph.nodes if n.bias == node.bias} != together:
        return used_elsewhere(node.bias if node.bias in node.shared else node.kernel)
    if node.bias in node.shared and not (node.layer and node.layer.tied_bias):
        return used_elsewhere(node.bias)
    rounded = {layer.node.name: layer.why for layer in layers}
    whys = (of(name, rounded.get(name, NOT_SELECTED)) for name in sorted(together))
    return next(filter(None, whys), None)


class LeafGrid(NamedTuple):
    """A quantizer's grid for a leaf: scale and zero point in their own shape."""

    scale: np.ndarray
    zero_point: np.ndarray
    ends: tuple[float, float]
    block: int | None = None

    @staticmethod
    def of(quantizer: Quantizer, leaf: Any) -> "LeafGrid":
        """The grid as it is now."""
        scale, zero_point = grid_in_numpy(quantizer, np.asarray(leaf))
        zero_point = np.broadcast_to(zero_point, scale.shape)
        low, high = map(float, quantizer.ends)
        return LeafGrid(scale, zero_point, (low, high), quantizer.block)


def spread(v: np.ndarray, shape: Sequence[int], block: int | None) -> np.ndarray:
    """What belongs to a leaf's channels or blocks, repeated to the shape of the leaf."""
    return np.broadcast_to(repeated(v, tuple(shape), block), tuple(shape))


def gathered(v: np.ndarray, shape: Sequence[int], block: int | None) -> np.ndarray:
    """The inverse of `spread`: the first of every channel or block."""
    if not shape:
        return v.reshape(-1)[0]
    pairs = zip(shape, v.shape, strict=True)
    steps = (m if n == 1 else 1 if n == m else block for n, m in pairs)
    return v[tuple(slice(None, None, step) for step in steps)]


class Sharing(NamedTuple):
    """Which weights of a matrix have one scale.

    `blocks` of `length` inputs to an output, of which the last may be shorter; `shared` are
    the axes of (groups, blocks, outs) along which there is one scale, None where the pattern
    is another.
    """

    length: int
    blocks: int
    shared: tuple[int, ...] | None


def sharing(matrix: WeightMatrix, grid: LeafGrid) -> Sharing:
    """How a leaf's scales lie in its matrix."""
    number = np.arange(grid.scale.size).reshape(grid.scale.shape)
    index = matrix.matrix(spread(number, matrix.shape, grid.block))
    ins = index.shape[1]
    if grid.scale.size == 1:
        return Sharing(ins, 1, (0, 1, 2))
    # A block can only end where a scale changes: at multiples of its length.
    changes = 1 + np.flatnonzero(np.any(index[:, 1:] != index[:, :-1], axis=(0, 2)))
    length = int(np.gcd.reduce(changes)) if changes.size else ins
    own = index[:, ::length]
    alone = np.unique(own).size == own.size
    return Sharing(length, own.shape[1], () if alone else None)


def grid_in_blocks(matrix: WeightMatrix, grid: LeafGrid, how: Sharing) -> LevelGrid:
    """The grid of a leaf as that of its matrix."""

    def own(v: np.ndarray) -> Any:
        wide = spread(v.astype(np.float32), matrix.shape, grid.block)
        return matrix.matrix(wide)[:, :: how.length]

    return LevelGrid(own(grid.scale), own(grid.zero_point), *grid.ends)


def grid_of_leaf(
    matrix: WeightMatrix, new: LevelGrid, old: LeafGrid, how: Sharing
) -> LeafGrid:
    """The grid of a matrix as that of its leaf."""
    ins = matrix.sizes[1]

    def back(v: Any) -> np.ndarray:
        v = np.asarray(v, np.float32)
        wide = np.repeat(v, how.length, axis=1)[:, :ins]
        return gathered(matrix.leaf(wide), old.scale.shape, old.block)

    return old._replace(scale=back(new.scale), zero_point=back(new.zero_point))
