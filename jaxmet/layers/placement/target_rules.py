"""What a target's table says of the nodes of a graph, and which values keep a quantizer."""

from collections.abc import Collection, Mapping

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Edge, Node
from jaxmet.tree.config_fields import Settings
from jaxmet.tree.targets.target import KEEPS as KEEPS_GRID
from jaxmet.tree.targets.target import Target

NO_NUMBERS = ("integers", "complex")
MOVES = (
    "reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice",
    "gather", "rev", "pad", "select_n", "concatenate", "split", "neg", "mul", "div", "add",
    "sub", "sort", "stack", "unstack", "tile", "dynamic_update_slice", "scatter",
)  # fmt: skip
VIEWS = MOVES[:11]
WRITES = ("dynamic_update_slice", "scatter")
"""Moves that put values into some places of others."""


def operation_of(node: Node) -> str:
    """What a target calls the operation of a node."""
    if node.kind == "product":
        return "dense" if node.convolution is None else "conv"
    return node.function if node.kind in ("activation", "pool") else node.kind


def fuses(node: Node, consumer: Node, device: Target) -> bool:
    """Whether a device computes both in one operation."""
    edges = [e for e in consumer.inputs if e.node == node.name]
    if all(e.moves for e in edges) or node.region != consumer.region:
        return False
    if consumer.kind == "norm":
        # a batch norm in training is traced for the device that runs the trained one
        over = consumer.norm.over if consumer.norm is not None else None
        if over not in ("stored", "constant", "batch"):
            return False
    return (operation_of(node), operation_of(consumer)) in device.fuses


def keeps_grid(edge: Edge) -> bool:
    """Whether a value on a grid is still on one after the moves of an edge."""
    return edge.node is not None and all(m in MOVES for m in edge.moves)


def grid_source(graph: Graph, name: str) -> str:
    """The node whose quantizer a node's result is on: pools that choose keep their input's."""
    node = graph[name]
    while node.function in KEEPS_GRID and node.inputs and node.inputs[0].node:
        if not keeps_grid(node.inputs[0]):
            break
        node = graph[node.inputs[0].node]
    return node.name


def fixed_ranges(
    graph: Graph, device: Target, activations: dict[str, Settings]
) -> dict[str, tuple[float, float]]:
    """The outputs whose range the target fixes; it does so at 8 bits."""
    ranges = {n: device.range_of(operation_of(graph[n])) for n in activations}
    return {n: r for n, r in ranges.items() if r and activations[n].bits == 8}


def requantized_products(
    graph: Graph,
    device: Target,
    quantized: Collection[str],
    on_grid: set[str],
) -> tuple[tuple[str, str, str], ...]:
    """The weight, input and output of each product, where the target limits their scales."""
    if not device.least_multiplier:
        return ()
    found = []
    for node in graph.nodes:
        sources = {grid_source(graph, e.node) for e in node.inputs if e.node}
        if node.kind != "product" or node.weight is None or len(sources) != 1:
            continue
        out = node
        while out.name not in on_grid and len(graph.consumers(out.name)) == 1:
            after = graph.consumers(out.name)[0]
            if not fuses(out, after, device):
                break
            out = after
        (source,) = sources
        if node.weight.name in quantized and {source, out.name} <= on_grid:
            found.append((str(node.weight.name), source, out.name))
    return tuple(found)


def target_notes(
    graph: Graph,
    device: Target | None,
    on_grid: set[str],
    fixed: Mapping[str, tuple[float, float]],
    left: dict[str, str],
) -> dict[str, str]:
    """What the target says of activations; what it does not know is computed in float."""
    if device is None:
        return {}
    notes = {
        n: f"range {r[0]:g} to {r[1]:g} on {device.name}" for n, r in fixed.items()
    }
    for node in graph.nodes:
        operation = operation_of(node)
        for move in dict.fromkeys(m for e in node.inputs for m in e.moves):
            if move not in MOVES and node.name in graph.selected:
                left.setdefault(
                    f"{move} before {node.name}",
                    f"computed in float: {device.name} has no integer form of it",
                )
        folds = operation == "norm" and any(
            e.node and fuses(graph[e.node], node, device) for e in node.inputs
        )
        if device.computes(operation) or folds:
            continue
        why = f"{operation} is computed in float on {device.name}"
        if node.name in on_grid:
            notes[node.name] = f"{why}; its output is quantized"
        else:
            left.setdefault(node.name, why)
    return notes
