"""Which activations have a quantizer, and which of them share one."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.eligibility import NOT_SELECTED
from jaxmet.layers.placement.cached_values import Cache
from jaxmet.layers.placement.residual_streams import (
    DYNAMIC,
    STREAM,
    UNREAD,
    entering,
    is_data_norm,
)
from jaxmet.layers.placement.rule_targets import says_float
from jaxmet.layers.placement.target_rules import (
    KEEPS_GRID,
    MOVES,
    NO_NUMBERS,
    fuses,
    grid_source,
    keeps_grid,
    operation_of,
)
from jaxmet.layers.placement.transformed_inputs import TRANSFORMED
from jaxmet.tree.config import QuantConfig
from jaxmet.tree.config_fields import Settings
from jaxmet.tree.targets.target import UNSTATED, Target


def placed_activations(
    graph: Graph,
    config: QuantConfig,
    wanted: Collection[str],
    streams: Collection[str],
    scaled: Set[str],
    left: dict[str, str],
) -> tuple[dict[str, Settings], frozenset[str]]:
    """What is quantized of what is wanted, and of that what only products read on its grid.

    Those are what has its range at products, residual streams in float, and what layers divide
    by a scale (`scaled`).
    """
    activations: dict[str, Settings] = {}
    floats: dict[str, str] = {}
    for node in graph.nodes:
        if node.name not in wanted:
            continue
        settings = config.resolve(node.name, "activation")
        norm = is_data_norm(node) and settings.residual_bits == 32
        if settings.at_products:
            floats[node.name] = DYNAMIC
        elif node.name in streams and settings.residual_bits != 32:
            settings = dataclasses.replace(settings, bits=settings.residual_bits)
        elif node.name in streams or norm:
            floats[node.name] = STREAM if node.name in streams else UNREAD
        if node.name in scaled:
            floats[node.name] = TRANSFORMED
        if node.in_float is not None:
            left[node.name] = node.in_float
        elif node.name not in graph.selected:
            left[node.name] = NOT_SELECTED
        elif not settings.quantize:
            left[node.name] = says_float(config, node.name, "activation")
        elif settings.bits == 32:
            left[node.name] = "32 bits"
        else:
            activations[node.name] = settings
    floats = {n: why for n, why in floats.items() if n in activations}
    read = product_inputs(graph)
    for name in floats.keys() - read:
        left[name] = floats[name]
        del activations[name]
    entered = entering(graph, floats.keys() & read, activations)
    for name in (scaled & activations.keys()) - entered:
        left[name] = TRANSFORMED  # a grid of the value itself is none of what enters
        del activations[name]
    return activations, entering(graph, entered, activations)


def stored_results(graph: Graph, device: Target) -> set[str]:
    """The nodes whose results a device would store, groups of operations fused."""
    counts = Counter(name for n in graph.nodes for name in {e.node for e in n.inputs})
    return {
        node.name
        for node in graph.nodes
        if node.kind != "output"
        and node.function not in KEEPS_GRID
        and node.function not in NO_NUMBERS
        and not (
            counts[node.name] == 1
            and fuses(node, graph.consumers(node.name)[0], device)
        )
    }


def product_inputs(graph: Graph) -> set[str]:
    """The nodes whose results enter a product, or a matmul of activations."""
    wanted: set[str] = set()
    for node in graph.nodes:
        if node.is_product and node.name in graph.selected:
            edges = [e for e in node.inputs if keeps_grid(e) and e.node is not None]
            wanted |= {grid_source(graph, e.node) for e in edges if e.node is not None}
    return {name for name in wanted if graph[name].function not in NO_NUMBERS}


def shared_quantizers(
    graph: Graph,
    device: Target,
    activations: dict[str, Settings],
    fixed: Mapping[str, Any],
    cached: Collection[Cache],
) -> dict[str, str]:
    """What an operation with shared scales reads uses that operation's quantizer.

    So does a cache that of what is written into it.
    """
    owner: dict[str, str] = {}
    demands = device is not UNSTATED

    def last(name: str) -> str:
        while name in owner:
            name = owner[name]
        return name

    for node in reversed(graph.nodes):
        if operation_of(node) not in device.shares or node.name not in activations:
            continue
        mine = last(node.name)
        for edge in node.inputs:
            source = grid_source(graph, edge.node) if edge.node else None
            if source is None or source not in activations or not keeps_grid(edge):
                continue
            if source in fixed:  # the runtime requantizes it
                continue
            if demands:  # a value that two of them read ties both
                source, mine = last(source), last(mine)
            if source not in owner and source != mine:  # a loop's carry may be its own
                owner[source] = mine
    for cache in cached:
        *others, mine = [n for n in cache.written if n in activations] or [cache.name]
        for name in (cache.name, *others):
            source, mine = last(name), last(mine)
            if name in activations and source != mine and source not in fixed:
                owner[source] = mine
    return {name: last(name) for name in owner}


def empty_at_first(
    graph: Graph, cached: Collection[Cache], shared: Mapping[str, str]
) -> Iterator[str]:
    """What holds zeros where nothing was written yet: caches, and what they are joined to."""
    for cache in cached:
        if cache.name in shared:
            yield cache.name
            yield from (n for n in cache.written if graph[n].kind == "concat")


def has_sliced_quantizer(graph: Graph, cache: Cache, shared: Mapping[str, str]) -> bool:
    owner = shared.get(cache.name)
    return cache.sliced and owner is not None and bool(graph[owner].layers)


def explain_float_inputs(graph: Graph, on_grid: set[str], left: dict[str, str]) -> None:
    """Say which products compute on a value that has no quantizer."""
    for node in graph.nodes:
        if not node.is_product or node.name not in graph.selected:
            continue
        for edge in node.inputs:
            source = grid_source(graph, edge.node) if edge.node else None
            if source in on_grid and keeps_grid(edge):
                continue
            if edge.node is not None and not keeps_grid(edge):
                bad = next(m for m in edge.moves if m not in MOVES)
                why = f"{edge.node!r} comes through {bad}"
            elif edge.node is None:
                why = f"it comes through {', '.join(edge.moves) or 'no named node'}"
            else:
                why = f"{edge.node!r} has no quantizer"
            left.setdefault(f"input of {node.name}", f"stays in float: {why}")
