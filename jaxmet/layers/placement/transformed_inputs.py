"""Values that dense layers divide by a scale that their weights carry.

What is quantized of such a value is what enters the product, the divided one: its quantizer
belongs there, and all else reads the value as it is.
"""

from collections.abc import Mapping
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.tree.leaves import input_scale_of

DIVIDED = (
    "layers divide it by scales, and what they read cannot be quantized as one value"
)


def scaled_inputs(
    graph: Graph, leaves: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """By node the layers that divide its result, where the range of what enters is found.

    Of layers with one scale between them the first is enough. The node itself is among them
    where a product reads it undivided.
    """
    found: dict[str, dict[Any, str]] = {}
    for node in graph.nodes:
        scale = _input_scale(node, leaves)
        for edge in node.inputs if scale is not None else ():
            if edge.node is not None and edge.operand == 0:
                same = id(scale), tuple(e for e in node.inputs if e.operand == 0)
                found.setdefault(edge.node, {}).setdefault(same, node.name)
    for name, layers in found.items():
        for node in graph.consumers(name):
            scaled = _input_scale(node, leaves) is not None
            operands = {e.operand for e in node.inputs if e.node == name}
            if node.is_product and not (scaled and operands == {0}):
                layers[name] = name
    return {name: tuple(layers.values()) for name, layers in found.items()}


def _input_scale(node: Node, leaves: Mapping[str, Any]) -> Any:
    name = node.weight.name if node.weight is not None else None
    return None if name is None else input_scale_of(leaves.get(name))
