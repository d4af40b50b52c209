"""What `Compressed` leaves state about the equations around them.

Bounds of the clip after a product, channel by channel, what the padding of a convolution
holds instead of zero, where its inputs lost a constant, and how the input of a dense layer is
divided and rotated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.axes.views import moved
from jaxmet.engine.graph.node import Node
from jaxmet.numerics.hadamard import hadamard
from jaxmet.numerics.precision import wide
from jaxmet.tree.leaves import input_scale_of, input_signs_of, is_compressed


def bounds_of(
    nodes: Iterable[Node], leaves: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The bounds that compressed leaves state, by the product that carries them."""
    stated = {
        name: leaf
        for name, leaf in leaves.items()
        if is_compressed(leaf) and not (leaf.lower is None and leaf.upper is None)
    }
    if not stated:
        return {}
    nodes = tuple(nodes)
    carriers, layers = {node.carrier for node in nodes}, _layers_of(stated, nodes)
    found = {}
    for name, leaf in stated.items():
        mine = layers[name]
        if len(mine) != 1 or mine[0].name not in carriers:
            raise ValueError(
                f"jaxmet.lift: parameter {name!r} states bounds for the clip after it, but "
                "this model has none there. Run the model that the tree was made for."
            )
        found[mine[0].name] = (leaf.lower, leaf.upper)
    return found


def _layers_of(names: Iterable[str], nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """The layers whose weight is each of these parameters."""
    found: dict[str, list[Node]] = {name: [] for name in names}
    for node in nodes:
        if node.weight is not None and node.weight.name in found:
            found[node.weight.name].append(node)
    return found


def clip(node: Node, x: Any, lower: Any, upper: Any) -> Any:
    """A clip with one bound per channel where the leaf states one."""
    assert node.bounds is not None

    def bound(stated: Any, own: float) -> Any:
        if stated is None:
            return jnp.asarray(own, x.dtype)
        shape = [x.shape[i] if i in node.features else 1 for i in range(x.ndim)]
        return jnp.reshape(stated, shape).astype(x.dtype)

    return jnp.minimum(
        jnp.maximum(x, bound(lower, node.bounds[0])), bound(upper, node.bounds[1])
    )


def offsets_of(nodes: Iterable[Node], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The input offsets that compressed leaves state, by the convolution that pads."""
    stated = {
        name: leaf
        for name, leaf in leaves.items()
        if is_compressed(leaf) and leaf.input_offset is not None
    }
    if not stated:
        return {}
    layers, found = _layers_of(stated, nodes), {}
    for name, leaf in stated.items():
        mine = layers[name]
        if len(mine) != 1 or mine[0].convolution is None:
            raise ValueError(
                f"jaxmet.lift: parameter {name!r} states what the padding before it holds, "
                "but in this model it is not the kernel of one convolution. Run the model "
                "that the tree was made for."
            )
        found[mine[0].name] = leaf.input_offset
    return found


class InputTransform(NamedTuple):
    """What a dense layer reads is divided by `scale` and rotated with `signs`.

    Both in the shape of the weight as the equation of the layer reads it, those of a loop's
    layers with their axis before; None where nothing is done. `order` is the number of each
    input as the leaf stores them, in the same shape. Layers whose leaves hold the same arrays
    have one `key`.
    """

    scale: Any
    signs: Any
    order: np.ndarray
    key: tuple[Any, ...]


def input_transforms(
    nodes: Iterable[Node], leaves: Mapping[str, Any]
) -> dict[str, InputTransform]:
    """What compressed leaves state of the inputs of dense layers, by the layer."""
    stated = {
        name: leaf
        for name, leaf in leaves.items()
        if input_scale_of(leaf) is not None or input_signs_of(leaf) is not None
    }
    if not stated:
        return {}
    layers, found = _layers_of(stated, nodes), {}
    for name, leaf in stated.items():
        mine = layers[name]
        fields = leaf.input_scale, leaf.input_signs
        one = len(mine) == 1 and mine[0].dot is not None and not mine[0].shared
        read = [_as_read(mine[0], x, leaf.shape) if one else None for x in fields]
        order = _as_read(mine[0], _numbered(leaf), leaf.shape) if one else None
        if order is None:
            raise ValueError(
                f"jaxmet.lift: parameter {name!r} states what is done to the inputs of its layer, "
                "but in this model it is not the weight of one dense layer. Run the model that "
                "the tree was made for."
            )
        moves = mine[0].weight and mine[0].weight.moves
        key = *map(id, fields), mine[0].dot, moves
        found[mine[0].name] = InputTransform(read[0], read[1], order, key)
    return found


def _as_read(node: Node, stated: Any, shape: tuple[int, ...]) -> Any:
    """What a leaf states of its inputs as the equation reads the weight, if it does."""
    if stated is None or node.weight is None:
        return None
    numbers = np if isinstance(stated, np.ndarray) else jnp
    read = moved(numbers.broadcast_to(stated, shape), node.weight.moves)
    return None if read is None or read[1] > 1 else read[0]


def _numbered(leaf: Any) -> np.ndarray:
    """The number of each input of a leaf, along the axes that its signs or scale run along."""
    signs, scale = leaf.input_signs, leaf.input_scale
    shape = signs.shape if signs is not None else scale.shape
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def transformed(
    node: Node, x: Any, of: InputTransform, iteration: Sequence[Any]
) -> Any:
    """What a dense layer reads, divided and rotated; in a loop, as in this turn."""
    assert node.dot is not None and node.weight is not None
    pairs = sorted(node.dot.summed)  # by the axes of the data
    along = sorted(weight for _, weight in pairs)
    stacked = node.weight.stacked

    def inputs(values: Any, turn: Any) -> Any:
        """One number for each input, in the order of the axes of the data."""
        values = values[turn] if stacked else values
        values = values[
            tuple(slice(None) if i in along else 0 for i in range(values.ndim))
        ]
        return values.transpose([along.index(weight) for _, weight in pairs])

    data = [axis for axis, _ in pairs]
    if of.scale is not None:
        scale = inputs(of.scale, iteration[-1] if stacked else None)
        inverse = (1 / lax.stop_gradient(jnp.asarray(scale))).astype(x.dtype)
        here = [n if i in data else 1 for i, n in enumerate(x.shape)]
        x = x * inverse.reshape(here)
    if of.signs is None:
        return x
    # The leaf has one row of signs for all turns, and its inputs in an order of its own.
    order = np.argsort(inputs(of.order, 0).reshape(-1))
    signs = lax.stop_gradient(jnp.asarray(inputs(of.signs, 0))).reshape(-1)
    last = range(x.ndim - len(data), x.ndim)
    x = jnp.moveaxis(x, data, last)
    shape, identity = x.shape, np.arange(order.size)
    rows = x.reshape(*shape[: -len(data)], -1).astype(wide(x.dtype))
    rows = rows * signs.astype(rows.dtype).reshape((1,) * (rows.ndim - 1) + (-1,))
    alike = np.array_equal(order, identity)
    rows = hadamard(rows if alike else rows[..., order])
    rows = rows if alike else rows[..., np.argsort(order)]
    return jnp.moveaxis(rows.reshape(shape).astype(x.dtype), last, data)


def padded(params: dict[str, Any], x: Any, offset: Any) -> tuple[dict[str, Any], Any]:
    """A convolution's equation without padding, and its input with the offset around it."""
    spec = params["dimension_numbers"].lhs_spec
    if any(d != 1 for d in params["lhs_dilation"]):
        raise ValueError(
            "jaxmet.lift: a convolution with a dilated input states what its padding "
            "holds. Run the model that the tree was made for."
        )
    widths, here, channels = [(0, 0, 0)] * x.ndim, [1] * x.ndim, [1] * x.ndim
    channels[spec[1]] = x.shape[spec[1]]
    for axis, (low, high) in zip(spec[2:], params["padding"], strict=True):
        widths[axis], here[axis] = (low, high, 0), x.shape[axis]
    inside = lax.pad(jnp.ones(here, bool), jnp.zeros((), bool), widths)
    around = lax.stop_gradient(jnp.reshape(offset, channels)).astype(x.dtype)
    x = jnp.where(inside, lax.pad(x, jnp.zeros((), x.dtype), widths), around)
    return {**params, "padding": tuple((0, 0) for _ in params["padding"])}, x
