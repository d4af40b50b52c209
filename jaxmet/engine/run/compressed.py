"""What `Compressed` leaves state about the equations around them.

Bounds of the clip after a product, channel by channel, what the padding of a convolution
holds instead of zero, where its inputs lost a constant, and what the input of a dense layer is
divided by.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.axes.views import moved
from jaxmet.engine.graph.node import Node
from jaxmet.tree.leaves import input_scale_of, is_compressed


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


class InputScale(NamedTuple):
    """A scale in the shape of a weight, as the equation of a layer reads it.

    Of a loop's layers, with their axis before those. Layers whose leaves hold the same array
    have one `key`.
    """

    values: Any
    key: tuple[Any, ...]


def scales_of(
    nodes: Iterable[Node], leaves: Mapping[str, Any]
) -> dict[str, InputScale]:
    """The input scales that compressed leaves state, by the dense layer that reads them."""
    stated = {n: x for n, x in leaves.items() if input_scale_of(x) is not None}
    if not stated:
        return {}
    layers, found = _layers_of(stated, nodes), {}
    for name, leaf in stated.items():
        mine, scale = layers[name], leaf.input_scale
        numbers = np if isinstance(scale, np.ndarray) else jnp
        read = None
        if len(mine) == 1 and mine[0].dot is not None and not mine[0].shared:
            assert mine[0].weight is not None
            scale = numbers.broadcast_to(scale, leaf.shape)
            read = moved(scale, mine[0].weight.moves)
        if read is None or read[1] > 1:
            raise ValueError(
                f"jaxmet.lift: parameter {name!r} states a scale of the inputs of its layer, but "
                "in this model it is not the weight of one dense layer. Run the model that the "
                "tree was made for."
            )
        key = id(leaf.input_scale), mine[0].dot, mine[0].weight and mine[0].weight.moves
        found[mine[0].name] = InputScale(read[0], key)
    return found


def divided(node: Node, x: Any, of: InputScale, iteration: Sequence[Any]) -> Any:
    """What a dense layer reads, over its input scale; in a loop, that of this turn."""
    assert node.dot is not None and node.weight is not None
    scale = of.values
    if node.weight.stacked:
        scale = scale[iteration[-1]]
    pairs = sorted(node.dot.summed)  # by the axes of the data
    along = sorted(weight for _, weight in pairs)
    scale = scale[tuple(slice(None) if i in along else 0 for i in range(scale.ndim))]
    scale = scale.transpose([along.index(weight) for _, weight in pairs])
    data = {axis for axis, _ in pairs}
    inverse = (1 / lax.stop_gradient(jnp.asarray(scale))).astype(x.dtype)
    return x * inverse.reshape([n if i in data else 1 for i, n in enumerate(x.shape)])


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
