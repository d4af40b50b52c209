"""Which channels can be smoothed, and why the others cannot."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxmet.engine.flow.scale_paths import ScalePath, ScaleSource
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.eligibility import (
    DERIVED_BIAS,
    check_floats,
    check_named,
    of,
    why_outside,
    why_shared,
)
from jaxmet.layers.transformed_layers import why_in_loop, why_layer
from jaxmet.tree.leaves import dense


def judged(graph: Graph, path: ScalePath, leaves: Mapping[str, Any]) -> ScalePath:
    """The path, with the reason where nodes, loops or the tree forbid it."""
    whys = [path.why]
    nodes = [graph[s.node] for s in path.sources]
    if path.why is None:
        names = [n for n in _names(path) if graph[n].kind != "matmul"]
        alone = len(path.sources) == 1
        for source in path.sources:
            why = _why_source(graph, source, leaves)
            whys.append(why if alone else of(source.node, why))
        targets = [graph[t.node] for t in path.targets]
        layers = [node for node in targets if node.kind != "matmul"]
        whys += [of(n.name, why_layer(graph, n, leaves)) for n in layers]
        if len({(n.loops, n.layers) for n in (*nodes, *targets)}) > 1:
            whys.append("its consumers are in another loop")
        whys.append(why_outside(graph, *names))
    why = next(filter(None, whys), None)
    return dataclasses.replace(path, why=why)


def _why_source(
    graph: Graph, source: ScaleSource, leaves: Mapping[str, Any]
) -> str | None:
    """Why what a norm or a product makes cannot be divided."""
    node = graph[source.node]
    if node.norm is None:
        why = why_layer(graph, node, leaves)
        if why is not None:
            return why
        if node.derived_bias or (node.bias is None) != (source.bias is None):
            return DERIVED_BIAS
    elif node.norm.over != "data":
        return node.norm.why_kept()
    whys = (why_shared(node), why_in_loop(node))
    if (why := next(filter(None, whys), None)) is not None:
        return why
    for name, places in vectors(node, source):
        if name not in leaves:
            continue  # refused later, with the cure
        size = math.prod(dense(leaves[name]).shape)
        if size != len(places) * (node.layers or 1):
            return f"{name!r} is not one number for each channel of a layer"
    return None


def vectors(node: Node, source: ScaleSource) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters that are divided beside the weight of a product."""
    if source.gain is not None:
        yield source.gain, source.outputs
        if source.shift is not None:
            yield source.shift, source.outputs
    elif source.bias is not None and node.bias is not None:
        yield node.bias, source.bias


def check_paths(
    graph: Graph, paths: Sequence[ScalePath], leaves: Mapping[str, Any], caller: str
) -> None:
    """Refuse what was asked for by name, and a tree that lacks what has to change."""
    done = {n for p in paths if p.why is None for n in _names(p)}
    cure = "Leave the name out of only(), or select both sides of its channels."
    for path in paths:
        for name in (source.node for source in path.sources):
            if path.why is not None and name not in done:
                given = {"cure": cure}
                check_named(name, path.why, graph, caller, "be smoothed", **given)
        if path.why is None:
            every = [
                p for source in path.sources for p in graph[source.node].parameters
            ]
            every += [p for t in path.targets for p in graph[t.node].parameters]
            check_floats(leaves, every, caller, path.sources[0].node, "Smooth")


def _names(path: ScalePath) -> list[str]:
    return [one.node for one in (*path.sources, *path.targets)]
