"""Which layers can divide what they read themselves, and why the others cannot."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxmet.engine.flow.scale_paths import ScalePath, ScaleSource, ScaleTarget
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Edge, Node
from jaxmet.layers.eligibility import of, why_outside
from jaxmet.layers.entering_values import turns_made
from jaxmet.layers.layer import WeightMatrix
from jaxmet.layers.placement.residual_streams import entering
from jaxmet.layers.placement.target_rules import KEEPS_GRID
from jaxmet.transforms.smooth.eligible_paths import why_layer
from jaxmet.tree.config import QuantConfig

Reads = tuple[tuple[Edge, ...], tuple[str, ...], tuple[int, ...]]


def with_carried(
    graph: Graph, leaves: Mapping[str, Any], paths: Sequence[ScalePath]
) -> list[ScalePath]:
    """These paths, and of what they cannot divide those whose scale weights carry."""
    free = [path for path in paths if path.why is None]
    targets = {target.node for path in free for target in path.targets}
    carried = carried_paths(graph, leaves, targets)
    made = {s.node for path in carried if path.why is None for s in path.sources}
    for name in tuple(made):
        if graph[name].kind == "activation":
            made |= {e.node for e in graph[name].inputs if e.node is not None}
    kept = [p for p in paths if p.why is None or p.sources[0].node not in made]
    return [*kept, *carried]


def carried_paths(
    graph: Graph, leaves: Mapping[str, Any], done: Collection[str]
) -> list[ScalePath]:
    """A path for each value that dense layers read whose inputs no path before divides.

    Layers that read one value along the same axes have one scale.
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
        *(of(n.name, _why_layer(graph, n, leaves)) for n in layers),
        _why_value(graph, edges, layers, single),
        why_outside(graph, *(n.name for n in layers)),
    ]
    why = next(filter(None, whys), None)
    if why is not None:
        return ScalePath(sources, why=why, carried=True)
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


def _why_layer(graph: Graph, node: Node, leaves: Mapping[str, Any]) -> str | None:
    """Why a layer cannot divide its inputs and multiply its weight."""
    why = why_layer(graph, node, leaves)
    if why is not None:
        return why
    if node.kernel not in leaves:
        return None  # refused later, with the cure
    matrix = WeightMatrix.of(node, leaves[node.kernel])
    assert matrix is not None
    whole = matrix.axes is not None
    return None if whole else "its weight is reshaped across its inputs and outputs"
