"""What was done to each node of a model, in a few words."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.channel_groups import indices_of
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.folds.norm_parameters import statistics_weight
from jaxmet.plot.channel_ranges import leaves_by_name
from jaxmet.tree.leaves import dense, is_compressed, is_structured
from jaxmet.tree.named_leaves import flatten, parameter_names
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.structures import LowRank, Pruned, parts_of

SMALLER = "pruned or factorized"
WEIGHT = "quantized weight"
RESULT = "result on a grid"
FUSED = "fused or folded: nothing of its own is stored"
FLOAT = "float"
STATES = {
    WEIGHT: "#a9c8e4",
    RESULT: "#f6cf9f",
    SMALLER: "#bfe0c0",
    FUSED: "#eceff3",
    FLOAT: "#ffffff",
}
"""A node's state and its colour."""


def states_of(
    graph: Graph, params: Any, quantizers: Quantizers | None
) -> dict[str, dict[str, Any]]:
    """By node: its `state`, `what` it is, what was `done` to it, and its `channels`."""
    leaves = {} if params is None else leaves_by_name(params)
    smaller_ones = {} if params is None else structures_of(params)
    channels = _channels(graph)
    kinds = graph.table()["kind"]
    found = {}
    for node, kind in zip(graph.nodes, kinds, strict=True):
        entries = [kind]
        weight = _weight_bits(node, quantizers)
        result = _result_bits(node, quantizers)
        weight_name = node.weight.name if node.weight is not None else None
        smaller = smaller_ones.get(weight_name or "", [])
        folded = is_folded(node, leaves)
        entries += [f"weight {weight} bits"] if weight else []
        entries += [f"result {result} bits"] if result else []
        entries += smaller + (["folded"] if folded else []) + _stated(node, leaves)
        shared = channels.get(node.name)
        entries += [f"channels of {shared}"] if shared and shared != node.name else []
        found[node.name] = {
            "what": kind,
            "done": ", ".join(entries),
            "channels": shared,
            "state": _state(node, weight, result, smaller, folded, quantizers),
        }
    return found


def _state(
    node: Node, weight: Any, result: Any, smaller: Any, folded: bool, quantizers: Any
) -> str:
    if smaller:
        return SMALLER
    if weight:
        return WEIGHT
    if result:
        return RESULT
    reason = dict(quantizers.skipped).get(node.name) if quantizers is not None else None
    inner = node.kind in ("norm", "activation", "add") and quantizers is not None
    known = reason is None or node.kind == "norm"
    return FUSED if folded or (inner and known) else FLOAT


def _channels(graph: Graph) -> dict[str, str]:
    """The group of the channels that a layer makes, where they may be rescaled together."""
    free = {g.index: g.name for g in graph.groups if g.free}
    return {
        m.node: free[g]
        for m in graph.members
        if m.role == "out"
        for g in sorted(indices_of(m.layout))
        if g in free
    }


def _weight_bits(node: Node, quantizers: Quantizers | None) -> int | None:
    if quantizers is None or node.weight is None:
        return None
    found = quantizers.weights.get(node.weight.name or node.name)
    return found.bits if found is not None and found.active else None


def _result_bits(node: Node, quantizers: Quantizers | None) -> int | None:
    found = None if quantizers is None else quantizers.activation(node.name)
    return found.bits if found is not None and found.active else None


def structures_of(params: Any) -> dict[str, list[str]]:
    """By parameter, what was factorized or pruned: of whole leaves and of their parts."""
    whole = flatten(params, whole=True)[1]
    parts = iter(parameter_names(params))
    found: dict[str, list[str]] = {}
    for name, leaf in zip(parameter_names(params, whole=True), whole, strict=True):
        for entries in _described(leaf):
            part = next(parts)
            for key in dict.fromkeys((part, name)):
                found[key] = list(dict.fromkeys([*found.get(key, ()), *entries]))
    return found


def _described(leaf: Any, entries: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """What each part of a leaf is a part of, in the order of the parts."""
    if not is_structured(leaf):
        yield entries
        return
    weight = leaf.weight
    if isinstance(weight, LowRank):
        more = [f"rank {weight.rank} ({weight.method})"]
    else:
        more = [
            f"{len(k.indices)} of {k.size} along axis {k.axis}" for k in weight.keep
        ]
    for part in parts_of(weight).values():
        yield from _described(part, (*entries, *more))


def _stated(node: Node, leaves: Mapping[str, Any]) -> list[str]:
    leaf = leaves.get(node.weight.name or "") if node.weight is not None else None
    if leaf is None or not is_compressed(leaf):
        return []
    bounded = leaf.lower is not None or leaf.upper is not None
    entries = ["bounds by channel"] if bounded else []
    entries += ["padding by channel"] if leaf.input_offset is not None else []
    entries += ["inputs divided"] if leaf.input_scale is not None else []
    return entries + (["inputs rotated"] if leaf.input_signs is not None else [])


def _kept(leaf: Any) -> np.ndarray:
    """What is left of a vector."""
    while isinstance(stored := dense(leaf), Pruned):
        leaf = stored.part
    return np.asarray(stored, np.float64)


def is_folded(node: Node, leaves: Mapping[str, Any]) -> bool:
    """Whether a norm with stored statistics has gain 1: an identity and a shift."""
    norm = node.norm
    stored = None if norm is None else leaves.get(norm.variance or "")
    if norm is None or norm.over != "stored" or stored is None:
        return False
    weight = statistics_weight(norm, leaves, jnp.float32)
    variance = _kept(stored) * np.asarray(weight, np.float64)
    scale = leaves.get(norm.scale or "")
    gain = 1.0 if scale is None else _kept(scale)
    ratio = np.reshape(gain, -1) / np.sqrt(np.reshape(variance, -1) + norm.epsilon)
    return bool(np.allclose(ratio, 1.0, rtol=1e-4))
