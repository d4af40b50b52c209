"""Rescale channels so that one grid a tensor fits them all; the function stays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.channels import Group, indices_of
from jaxmet.engine.graph import Graph
from jaxmet.engine.node import Node
from jaxmet.numerics.scaling import balance
from jaxmet.transforms.equalize.channels import (
    Channels,
    find_weights,
    layers_of,
    rescaled,
    scales_along,
    stacks,
    with_bounds,
)
from jaxmet.tree.config import QuantConfig
from jaxmet.tree.names import replace_leaves
from jaxmet.tree.table import Table

CLIPS = ("exact", "skip", "relu")
OBJECTIVES = ("noise", "range")
MAX_SCALE = 1e6


@overload
def equalize(
    params: Any,
    graph: Graph,
    *,
    clip: str = ...,
    objective: str = ...,
    config: QuantConfig | None = ...,
    batches: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    max_scale: float = ...,
    progress: bool = ...,
    with_report: Literal[False] = ...,
) -> Any: ...
@overload
def equalize(
    params: Any,
    graph: Graph,
    *,
    clip: str = ...,
    objective: str = ...,
    config: QuantConfig | None = ...,
    batches: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    max_scale: float = ...,
    progress: bool = ...,
    with_report: Literal[True],
) -> tuple[Any, Table]: ...
def equalize(
    params: Any,
    graph: Graph,
    *,
    clip: str = "exact",
    objective: str = "noise",
    config: QuantConfig | None = None,
    batches: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    max_scale: float = MAX_SCALE,
    progress: bool = True,
    with_report: bool = False,
) -> Any:
    """Divide every channel by a scale of its own and let what reads it multiply it back."""
    _check_options(clip, objective, max_scale)
    leaves = graph.leaves(params, "equalize")
    plan = make_plan(graph, clip)
    _check_named(graph, plan)
    _check_leaves(plan, leaves)
    channels = Channels(graph, plan.free)
    if not plan.free:
        report = plan.table({}, "Equalized: nothing")
        return (params, report) if with_report else params
    weights = find_weights(channels)
    touched = {m.parameter for m in graph.members if channels.touched(m)}
    touched |= {w.parameter for w in weights}

    def run(old: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        every = stacks(weights, old)
        layers = layers_of(every, [s.matrix(old) for s in every], channels.size)
        start = jnp.zeros(channels.size + 1, layers.log_ranges[0].dtype)
        found = balance(layers, start, limit=max_scale)
        new = rescaled(channels, old, found.x)
        for node in plan.clips:
            new |= _bounded(channels, node, old | new, found.x, clip)
        return new, found

    new, found = jax.jit(run)({name: leaves[name] for name in sorted(touched)})
    result = replace_leaves(params, new, caller="equalize")
    if not with_report:
        return result
    title = f"Equalized: objective='range', {int(found.sweeps)} sweeps"
    outcomes = _outcomes(channels, clip, found.x, found.gap, max_scale)
    return result, plan.table(outcomes, title)


def _outcomes(
    channels: Channels, clip: str, x: Any, gap: Any, max_scale: float
) -> dict[int, dict[str, Any]]:
    """What a report says of each group that was rescaled."""
    x, gap = np.asarray(x, np.float64), np.abs(np.asarray(gap))
    found = {}
    for group in channels.free:
        start = channels.starts[group.index]
        mine = slice(start, start + group.size)
        held = np.abs(x[mine]).max() > np.log(max_scale) * (1 - 1e-6)
        found[group.index] = {
            "scale min": float(np.exp(x[mine].min())),
            "scale max": float(np.exp(x[mine].max())),
            "residual": float(gap[mine].max()),
            "clip": clip if group.clips else None,
            "note": f"held by max_scale={max_scale:g}" if held else None,
        }
    return found


def _bounded(
    channels: Channels, clip: Node, leaves: Mapping[str, Any], x: jax.Array, mode: str
) -> dict[str, Any]:
    """The carrier of a clip with the bounds that its channels have now."""
    weight = channels.graph[clip.carrier or ""].weight
    assert weight is not None and weight.name is not None and clip.bounds is not None
    out = next(
        m
        for m in channels.graph.members
        if m.node == clip.carrier and m.role == "out" and m.parameter == weight.name
    )
    factor = scales_along(channels, out.layout, jnp.exp(x))
    upper = np.inf if mode == "relu" and clip.bounds[0] == 0 else None
    return {weight.name: with_bounds(clip, leaves[weight.name], factor, upper)}


# What is rescaled and what is left alone


@dataclasses.dataclass(frozen=True)
class Plan:
    """The groups that are rescaled, and for the others and some sites why not."""

    graph: Graph
    clip: str
    free: tuple[Group, ...]
    left: tuple[tuple[Group, str], ...]
    alone: tuple[tuple[Node, str], ...]

    @property
    def clips(self) -> tuple[Node, ...]:
        """The clips whose bounds must follow."""
        names = dict.fromkeys(c for g in self.free for c in g.clips)
        return tuple(self.graph[name] for name in names)

    def table(self, outcomes: Mapping[int, dict[str, Any]], title: str) -> Table:
        """One row a group, then one a site that has none."""
        rows = [_row(g) | outcomes[g.index] for g in self.free]
        rows += [_row(g) | {"note": why} for g, why in self.left]
        rows += [
            {"group": n.name, "makers": n.name, "note": why} for n, why in self.alone
        ]
        return Table({c: [row.get(c) for row in rows] for c in COLUMNS}, title)


COLUMNS = (
    "group",
    "makers",
    "readers",
    "channels",
    "scale min",
    "scale max",
    "residual",
    "clip",
    "note",
)


def _row(group: Group) -> dict[str, Any]:
    return {
        "group": group.name,
        "makers": ", ".join(group.makers) or None,
        "readers": ", ".join(group.readers) or None,
        "channels": group.size,
    }


def make_plan(graph: Graph, clip: str) -> Plan:
    free, left = [], []
    for group in graph.groups:
        why = _why_left(graph, group, clip)
        if why is None:
            free.append(group)
        elif group.makers:
            left.append((group, why))
    inside = {
        n for g in (*free, *(g for g, _ in left)) for n in (*g.makers, *g.readers)
    }
    alone = [(n, _why_alone(n)) for n in graph.sites if n.name not in inside]
    return Plan(graph, clip, tuple(free), tuple(left), tuple(alone))


def _why_left(graph: Graph, group: Group, clip: str) -> str | None:
    if group.frozen is not None:
        return group.frozen
    for name in (*group.makers, *group.readers):
        if name not in graph.selected:
            return f"{name} is not selected"
    for name in group.clips:
        node = graph[name]
        if clip == "skip":
            return f"{name}: clip='skip'"
        if name not in graph.selected:
            return f"{name} is not selected"
        if node.carrier is None:
            return f"{name}: no single product can carry its bounds"
        weight = graph[node.carrier].weight
        if weight is None or len(weight.out_axes) != 1 or len(node.features) != 1:
            return f"{name}: its bounds would run along several axes"
    return None


def _why_alone(node: Node) -> str:
    weight = node.weight
    if node.kind == "lookup":
        return "a lookup"
    if weight is not None and weight.name is None:
        return "its weight is computed from several parameters"
    if weight is not None and weight.stacked:
        return "its weight is stacked"
    if weight is not None and weight.shared:
        return "its weight is used more than once"
    return "no channels that anything ties"


# Refusals


def _check_options(clip: str, objective: str, max_scale: float) -> None:
    for name, value, known in (
        ("clip", clip, CLIPS),
        ("objective", objective, OBJECTIVES),
    ):
        if value not in known:
            raise ValueError(
                f"jaxmet.equalize: {name} is {value!r}. It is one of "
                f"{', '.join(map(repr, known))}."
            )
    if not max_scale > 1:
        raise ValueError(
            f"jaxmet.equalize: max_scale is {max_scale!r}. Give a number above 1: no "
            "channel's scale leaves 1/max_scale … max_scale."
        )


def _check_named(graph: Graph, plan: Plan) -> None:
    """What `only()` spelled out and nothing can be done for."""
    done = {name for g in plan.free for name in (*g.makers, *g.readers)}
    for node in graph.sites:
        if node.name not in graph.named or node.name in done:
            continue
        whys = [w for g, w in plan.left if node.name in (*g.makers, *g.readers)]
        whys += [w for n, w in plan.alone if n.name == node.name]
        raise ValueError(
            f"jaxmet.equalize: {node.name!r} was asked for by name and no group of its "
            f"channels can be rescaled: {'; '.join(whys)}. Name the layers on both sides "
            "of the channels, or leave the name out of only()."
        )


def _check_leaves(plan: Plan, leaves: Mapping[str, Any]) -> None:
    free = {g.index for g in plan.free}
    for member in plan.graph.members:
        if not indices_of(member.layout) & free:
            continue
        leaf = leaves.get(member.parameter)
        if leaf is None:
            raise ValueError(
                f"jaxmet.equalize: the tree has no {member.parameter!r}, which has to "
                f"follow the scale of {member.node!r}. Pass the whole variables with "
                "the norms' statistics, not the trained parameters alone."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"jaxmet.equalize: {member.parameter!r} has dtype {leaf.dtype}. Equalize "
                "the float tree, before its weights become integers."
            )
