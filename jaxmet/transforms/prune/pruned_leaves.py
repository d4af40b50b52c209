"""Leaves of which only some entries are left."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.numerics import xp
from jaxmet.transforms.prune.coupled_channels import axes_of
from jaxmet.tree.leaves import Compressed, dense, is_compressed
from jaxmet.tree.structures import Keep, Pruned


def without_channels(
    graph: Graph, leaves: Mapping[str, Any], masks: Mapping[int, np.ndarray]
) -> dict[str, Any]:
    """The leaves without what the masks take away."""
    layers = {n.weight.name: n for n in graph.nodes if n.weight is not None}
    found = {
        name: pruned(leaves[name], left, layers.get(name))
        for name, left in axes_of(graph.members, masks).items()
    }
    return {n: leaf for n, leaf in leaves.items() if n not in found} | found


def pruned(leaf: Any, left: Mapping[int, np.ndarray], node: Node | None) -> Compressed:
    """What is left of a leaf and of what it states along each axis."""
    array, keep = dense(leaf), []
    for axis, mask in sorted(left.items()):
        where = np.flatnonzero(mask)
        array = xp.take(array, where, axis=axis)
        keep.append(Keep(axis, mask.size, tuple(map(int, where))))
    part = array
    if is_compressed(leaf):
        part = leaf.replace(weight=array)
        weight = node.weight if node is not None else None
        if weight is not None and weight.out_axes:
            outs = left.get(weight.out_axes[0])
            part = part.replace(
                lower=_cut(leaf.lower, outs), upper=_cut(leaf.upper, outs)
            )
        if weight is not None and weight.in_axes:
            part = part.replace(input_scale=_cut_along(leaf.input_scale, left))
            part = part.replace(
                input_offset=_cut(leaf.input_offset, left.get(weight.in_axes[0]))
            )
    return Compressed(Pruned(part, tuple(keep)))


def _cut_along(scale: Any, left: Mapping[int, np.ndarray]) -> Any:
    """What is left of a scale with the rank of the weight."""
    for axis, mask in left.items():
        if scale is not None and scale.shape[axis] == mask.size > 1:
            scale = xp.take(scale, np.flatnonzero(mask), axis=axis)
    return scale


def _cut(vector: Any, mask: np.ndarray | None) -> Any:
    if vector is None or mask is None or np.ndim(vector) == 0:
        return vector
    return xp.asarray(vector)[np.flatnonzero(mask)]
