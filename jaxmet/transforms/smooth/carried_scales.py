"""Where nothing upstream can divide, the layers that read a value divide it themselves."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmet.engine.flow.scale_paths import ScalePath
from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.transformed_layers import carried_paths


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
