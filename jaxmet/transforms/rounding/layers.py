"""Which weights are rounded, and each of them as matrices and back.

The way from a leaf to what its product reads (transposed, reshaped, cut into layers of a
loop) is that of the model itself, and only moves numbers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Run, evaluate
from jaxmet.layers.rows import matrix_of, why_no_rows
from jaxmet.numerics.rounding.levels import Grid
from jaxmet.tree.leaves import dense, with_weight
from jaxmet.tree.names import named_leaves, replace_leaves
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers


@dataclasses.dataclass(frozen=True)
class Layer:
    """A site whose weight is rounded, or `why` it is not."""

    node: Node
    why: str | None = None

    @property
    def parameter(self) -> str:
        """The name of its weight."""
        return self.node.kernel

    @property
    def loops(self) -> bool:
        """Whether it runs inside a loop, where no piece can end."""
        return "scan" in self.node.region


def find_layers(graph: Graph, quantizers: Quantizers, caller: str) -> tuple[Layer, ...]:
    """All sites, in the order in which they run.

    Raises ValueError for a site that `graph.only` named and whose weight cannot be rounded.
    """
    layers = tuple(Layer(site, _unfit(site, quantizers)) for site in graph.sites)
    for layer in layers:
        if layer.why is not None and layer.node.name in graph.named:
            raise ValueError(
                f"jaxmet.{caller}: the weight of {layer.node.name!r} cannot be chosen: "
                f"{layer.why}. Leave it out: graph.without({layer.node.name!r})."
            )
    return layers


def _unfit(site: Node, quantizers: Quantizers) -> str | None:
    if (why := why_no_rows(site) or site.why_kept(stacked=True)) is not None:
        return why
    assert site.weight is not None
    weight = site.weight
    quantizer = quantizers.weights.get(site.kernel)
    if quantizer is None or not quantizer.active:
        return "its weight is not quantized"
    if inside := [region for region in site.region if region in ("while", "cond")]:
        return f"inside a {inside[-1]}"
    if site.region.count("scan") > 1 or ("scan" in site.region) != weight.stacked:
        return "its weight is used again and again in a loop"
    return None


DIGIT = 256  # integers below are exact in every float that models compute in


class Views:
    """Where each number of a leaf stands in its matrix (groups, ins, outs), by site.

    Found by running the model on the digits of the leaves' own indices.
    """

    def __init__(
        self,
        graph: Graph,
        params: Any,
        layers: Sequence[Layer],
        batch: Any,
        /,  # the model may take keywords of these names
        **kwargs: Any,
    ) -> None:
        self.layers = {layer.node.name: layer for layer in layers}
        leaves = named_leaves(params)
        shapes = {n: dense(leaves[x.parameter]).shape for n, x in self.layers.items()}
        size = max((math.prod(s) for s in shapes.values()), default=1)
        digits = jax.jit(_reader(graph, params, self.layers, batch, kwargs))
        self.index: dict[str, np.ndarray] = {n: np.array(0) for n in self.layers}
        unit = 1
        while unit < size:
            given = {
                layer.parameter: np.arange(math.prod(shapes[n])).reshape(shapes[n])
                // unit
                % DIGIT
                for n, layer in self.layers.items()
            }
            for n, found in digits(given).items():
                found = np.asarray(found.astype(jnp.float32)).astype(np.int64)
                self.index[n] = self.index[n] + unit * found.reshape(
                    -1, *found.shape[-2:]
                )
            unit *= DIGIT
        self.whole = {
            n: np.array_equal(np.sort(i, axis=None), np.arange(math.prod(shapes[n])))
            for n, i in self.index.items()
        }

    def matrix(self, site: str, array: Any) -> np.ndarray:
        """What stands in a leaf, as the product reads it."""
        return np.asarray(array).reshape(-1)[self.index[site]]

    def leaf(self, site: str, matrix: Any, shape: Sequence[int]) -> np.ndarray:
        """What stands in a matrix, in the shape of the leaf."""
        found = np.empty(math.prod(shape), np.asarray(matrix).dtype)
        found[self.index[site].reshape(-1)] = np.asarray(matrix).reshape(-1)
        return found.reshape(tuple(shape))


def _reader(
    graph: Graph, params: Any, layers: Mapping[str, Layer], batch: Any, kwargs: Any
) -> Any:
    """`f({parameter: numbers}) -> {site: matrix}`; nothing of the data is computed."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    leaves = named_leaves(params)

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        if node.name not in layers:
            return run(*operands), None
        assert node.weight is not None
        return run(*operands), matrix_of(node, operands[node.weight.operand])

    def read(numbers: Mapping[str, Any]) -> dict[str, jax.Array]:
        new = {}
        for name, array in numbers.items():
            leaf = leaves[name]
            array = jnp.asarray(array).astype(dense(leaf).dtype)
            new[name] = with_weight(leaf, array)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        return evaluate(graph.apply, hook)(
            replace_leaves(params, new), *zeros, **kwargs
        )[1]

    return read


class LeafGrid(NamedTuple):
    """A quantizer's grid for a leaf: scale and zero point in their own shape."""

    scale: np.ndarray
    zero_point: np.ndarray
    ends: tuple[float, float]
    block: int | None = None

    @staticmethod
    def of(quantizer: Quantizer, leaf: Any) -> "LeafGrid":
        """The grid as it is now."""
        scale, zero_point = quantizer.grid(jnp.asarray(leaf))
        zero_point = jnp.broadcast_to(zero_point, scale.shape)
        low, high = map(float, quantizer.ends)
        return LeafGrid(
            np.asarray(scale), np.asarray(zero_point), (low, high), quantizer.block
        )


def spread(v: np.ndarray, shape: Sequence[int], block: int | None) -> np.ndarray:
    """What belongs to a leaf's channels or blocks, repeated to the shape of the leaf."""
    if v.ndim:
        for axis, (n, m) in enumerate(zip(v.shape, shape, strict=True)):
            if n not in (1, m):
                assert block is not None
                v = np.repeat(v, block, axis=axis).take(range(m), axis=axis)
    return np.broadcast_to(v, tuple(shape))


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


def sharing(views: Views, site: str, grid: LeafGrid, shape: Sequence[int]) -> Sharing:
    """How a leaf's scales lie in its matrix."""
    number = np.arange(grid.scale.size).reshape(grid.scale.shape)
    index = views.matrix(site, spread(number, shape, grid.block))
    ins = index.shape[1]
    if grid.scale.size == 1:
        return Sharing(ins, 1, (0, 1, 2))
    # A block can only end where a scale changes: at multiples of its length.
    changes = 1 + np.flatnonzero(np.any(index[:, 1:] != index[:, :-1], axis=(0, 2)))
    length = int(np.gcd.reduce(changes)) if changes.size else ins
    own = index[:, ::length]
    alone = np.unique(own).size == own.size
    return Sharing(length, own.shape[1], () if alone else None)


def grid_in_blocks(
    views: Views, site: str, grid: LeafGrid, shape: Sequence[int], how: Sharing
) -> Grid:
    """The grid of a leaf as that of its matrix."""

    def own(v: np.ndarray) -> Any:
        m = views.matrix(site, spread(v.astype(np.float32), shape, grid.block))
        return m[:, :: how.length]

    return Grid(own(grid.scale), own(grid.zero_point), *grid.ends)


def grid_of_leaf(
    views: Views,
    site: str,
    new: Grid,
    old: LeafGrid,
    shape: Sequence[int],
    how: Sharing,
) -> LeafGrid:
    """The grid of a matrix as that of its leaf."""
    index = views.index[site]
    ins = index.shape[1]

    def back(v: Any) -> np.ndarray:
        v = np.asarray(v, np.float32)
        wide = np.repeat(v, how.length, axis=1)[:, :ins]
        return gathered(views.leaf(site, wide, shape), old.scale.shape, old.block)

    return old._replace(scale=back(new.scale), zero_point=back(new.zero_point))
