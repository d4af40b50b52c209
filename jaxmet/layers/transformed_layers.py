"""Which dense layers can transform what they read themselves, and why the others cannot.

A weight can state that its inputs are divided by a scale or rotated: `smooth` and `rotate` ask for
the layers here. What such layers read must have a quantizer that is theirs alone.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jaxmet.engine.flow.scale_paths import ScalePath, ScaleSource, ScaleTarget
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Edge, Node
from jaxmet.layers.eligibility import of, why_looped, why_outside, why_shared
from jaxmet.layers.entering_values import turns_made
from jaxmet.layers.layer import WeightMatrix
from jaxmet.layers.placement.residual_streams import entering
from jaxmet.layers.placement.target_rules import KEEPS_GRID
from jaxmet.tree.config import QuantConfig

Reads = tuple[tuple[Edge, ...], tuple[str, ...], tuple[int, ...]]


def carried_paths(
    graph: Graph, leaves: Mapping[str, Any], done: Collection[str]
) -> list[ScalePath]:
    """A path for each value that dense layers read, of layers that are not `done`.

    Layers that read one value along the same axes are one path.
    """
    groups: dict[Reads, list[Node]] = {}
    for node in graph.nodes:
        if node.kind == "product" and node.dot is not None and node.name not in done:
            edges = tuple(e for e in node.inputs if e.operand == 0)
            axes = tuple(data for data, _ in node.dot.summed)
            groups.setdefault((edges, node.region, axes), []).append(node)
    settings = QuantConfig().resolve("", "activation")
    every = {node.name: settings for node in graph.nodes}
    single = entering(graph, every.keys(), every)
    return [
        _path(graph, leaves, edges, axes, layers, single)
        for (edges, _, axes), layers in groups.items()
    ]


def _path(
    graph: Graph,
    leaves: Mapping[str, Any],
    edges: tuple[Edge, ...],
    axes: tuple[int, ...],
    layers: list[Node],
    single: Collection[str],
) -> ScalePath:
    names = dict.fromkeys(e.node or layers[0].name for e in edges)
    sources = tuple(map(ScaleSource, names or [layers[0].name]))
    whys = [
        *(of(n.name, _why_weight(graph, n, leaves)) for n in layers),
        _why_value(graph, edges, layers, single),
        why_outside(graph, *(n.name for n in layers)),
    ]
    why = next(filter(None, whys), None)
    if why is not None:
        targets = tuple(ScaleTarget(n.name, 0, axes, ()) for n in layers)
        return ScalePath(sources, targets, why=why, carried=True)
    matrix = WeightMatrix.of(layers[0], leaves[layers[0].kernel])
    assert matrix is not None
    size = matrix.sizes[1]
    places = tuple(range(size))
    targets = tuple(ScaleTarget(n.name, 0, axes, places) for n in layers)
    return ScalePath(sources, targets, size, carried=True)


def _why_value(
    graph: Graph, edges: tuple[Edge, ...], layers: list[Node], single: Collection[str]
) -> str | None:
    """Why what these layers read has no quantizer that is theirs alone."""
    if not edges or any(e.node is None for e in edges):
        return "no single node makes what it reads"
    for edge in edges:
        source = graph[edge.node or ""]
        if source.kind == "input":
            return "an input of the model"
        if source.name not in single or source.function in KEEPS_GRID:
            return "it cannot be quantized at products alone"
        for other, reads in _other_products(graph, source.name, layers):
            mine = turns_made(graph, layers[0].name, edge)
            if mine & turns_made(graph, other, reads):
                return f"{other} reads it too"
    return None


def _other_products(
    graph: Graph, source: str, layers: list[Node]
) -> Iterator[tuple[str, Edge]]:
    names = {node.name for node in layers}
    for node in graph.consumers(source):
        for edge in node.inputs if node.is_product else ():
            if edge.node == source and (node.name not in names or edge.operand != 0):
                yield node.name, edge


def _why_weight(graph: Graph, node: Node, leaves: Mapping[str, Any]) -> str | None:
    """Why a layer cannot transform its inputs and undo it in its weight."""
    why = why_layer(graph, node, leaves)
    if why is not None:
        return why
    if node.kernel not in leaves:
        return None  # refused later, with the cure
    matrix = WeightMatrix.of(node, leaves[node.kernel])
    assert matrix is not None
    whole = matrix.axes is not None
    return None if whole else "its weight is reshaped across its inputs and outputs"


def why_layer(graph: Graph, node: Node, leaves: Mapping[str, Any]) -> str | None:
    """Why the weight of a product cannot be scaled along inputs or outputs."""
    whys = (node.why_kept(stacked=True), why_shared(node), why_in_loop(node))
    if (why := next(filter(None, whys), None)) is not None:
        return why
    if node.dot is None or node.dot.batched:
        return "no dense layer on its channels"
    if node.weight is not None and node.weight.rotated:
        return node.weight.why_mixed
    if node.kernel not in leaves:
        return None  # refused later, with the cure
    matrix = WeightMatrix.of(node, leaves[node.kernel])
    if matrix is None:
        return "it reads a part of its weight"
    same = matrix.sizes[0] == (node.layers or 1)
    return None if same else "its weight is not stacked by its loop alone"


def why_in_loop(node: Node) -> str | None:
    """Why the layers of a loop have no scales of their own."""
    stacked = node.loops == ("scan",) and node.layers is not None
    return None if stacked else why_looped(node)
