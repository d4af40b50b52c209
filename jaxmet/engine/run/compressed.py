"""What `Compressed` leaves state about the equations around them.

Bounds of the clip after a product, channel by channel, and what the padding of a convolution
holds instead of zero, where its inputs lost a constant.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxmet.engine.graph.node import Node
from jaxmet.tree.leaves import is_compressed


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
    carriers, users = set(), {name: [] for name in stated}
    for node in nodes:
        carriers.add(node.carrier)
        if node.weight is not None and node.weight.name in stated:
            users[node.weight.name].append(node.name)
    found = {}
    for name, leaf in stated.items():
        producers = users[name]
        if len(producers) != 1 or producers[0] not in carriers:
            raise ValueError(
                f"jaxmet.lift: parameter {name!r} states bounds for the clip after it, but "
                "this model has none there. Run the model that the tree was made for."
            )
        found[producers[0]] = (leaf.lower, leaf.upper)
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
    producers: dict[str, list[Node]] = {}
    for node in nodes:
        if node.weight is not None and node.weight.name is not None:
            producers.setdefault(node.weight.name, []).append(node)
    found = {}
    for name, leaf in stated.items():
        mine = producers.get(name, [])
        if len(mine) != 1 or mine[0].convolution is None:
            raise ValueError(
                f"jaxmet.lift: parameter {name!r} states what the padding before it holds, "
                "but in this model it is not the kernel of one convolution. Run the model "
                "that the tree was made for."
            )
        found[mine[0].name] = leaf.input_offset
    return found


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
