"""Values that dense layers divide or rotate before they read them, as their weights say.

What is quantized of such a value is what enters the product: its quantizer belongs there, and all
else reads the value as it is.
"""

from collections.abc import Mapping
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.tree.leaves import input_scale_of, input_signs_of

TRANSFORMED = (
    "layers divide or rotate it, and what they read cannot be quantized as one value"
)


def transformed_inputs(
    graph: Graph, leaves: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """By node the layers that divide or rotate its result, where the range of what enters is found.

    Of layers that do the same to it the first is enough. The node itself is among them
    where a product reads it as it is.
    """
    found: dict[str, dict[Any, str]] = {}
    for node in graph.nodes:
        stated = _stated(node, leaves)
        for edge in node.inputs if stated is not None else ():
            if edge.node is not None and edge.operand == 0:
                same = stated, tuple(e for e in node.inputs if e.operand == 0)
                found.setdefault(edge.node, {}).setdefault(same, node.name)
    for name, layers in found.items():
        for node in graph.consumers(name):
            stated = _stated(node, leaves)
            operands = {e.operand for e in node.inputs if e.node == name}
            if node.is_product and (stated is None or operands != {0}):
                layers[name] = name
    return {name: tuple(layers.values()) for name, layers in found.items()}


def _stated(node: Node, leaves: Mapping[str, Any]) -> tuple[int, int] | None:
    """What the weight of a layer says of its inputs: the same for those that hold one array."""
    leaf = leaves.get(node.weight.name or "") if node.weight is not None else None
    scale, signs = input_scale_of(leaf), input_signs_of(leaf)
    return None if scale is None and signs is None else (id(scale), id(signs))
