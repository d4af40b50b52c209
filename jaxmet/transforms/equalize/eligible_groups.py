"""What is rescaled, what is skipped and why, and what is refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jaxmet.engine.graph.channel_groups import Group, indices_of
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.eligibility import (
    NO_CARRIER,
    NOT_SELECTED,
    SEVERAL_AXES,
    check_floats,
    check_named,
    of,
    skipped,
    why_outside,
)
from jaxmet.tree.checks import check_choices, check_numbers
from jaxmet.tree.table import Table

Clip = Literal["exact", "skip", "relu"]
CLIPS = get_args(Clip)
Objective = Literal["noise", "range"]
OBJECTIVES = get_args(Objective)
COLUMNS = (
    "group",
    "producers",
    "consumers",
    "channels",
    "scale min",
    "scale max",
    "residual",
    "clip",
    "note",
)


@dataclasses.dataclass(frozen=True)
class EligibleGroups:
    """The groups that are rescaled, and for the others and some layers why not."""

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
        """One row per group, then one per layer that has none."""
        rows = [_row(g) | outcomes[g.index] for g in self.free]
        rows += [_row(g) | {"note": skipped(why)} for g, why in self.left]
        rows += [
            {"group": n.name, "producers": n.name, "note": skipped(why)}
            for n, why in self.alone
        ]
        return Table({c: [row.get(c) for row in rows] for c in COLUMNS}, title)


def _row(group: Group) -> dict[str, Any]:
    return {
        "group": group.name,
        "producers": ", ".join(group.producers) or None,
        "consumers": ", ".join(group.consumers) or None,
        "channels": group.size,
    }


def make_plan(graph: Graph, clip: str) -> EligibleGroups:
    """Which groups can be rescaled, and why the others cannot."""
    free, left = [], []
    for group in graph.groups:
        why = _why_left(graph, group, clip)
        if why is None:
            free.append(group)
        elif group.producers:
            left.append((group, why))
    inside = {
        n for g in (*free, *(g for g, _ in left)) for n in (*g.producers, *g.consumers)
    }
    alone = [(n, _why_alone(n)) for n in graph.layers if n.name not in inside]
    return EligibleGroups(graph, clip, tuple(free), tuple(left), tuple(alone))


def _why_left(graph: Graph, group: Group, clip: str) -> str | None:
    if group.frozen is not None:
        return group.frozen
    if (why := why_outside(graph, *group.producers, *group.consumers)) is not None:
        return why
    for name in group.clips:
        why = NOT_SELECTED if name not in graph.selected else None
        why = "clip='skip'" if clip == "skip" else why or _why_unbounded(graph, name)
        if why is not None:
            return of(name, why)
    return None


def _why_unbounded(graph: Graph, clip: str) -> str | None:
    """Why no leaf can state the bounds of a clip channel by channel."""
    node = graph[clip]
    if node.carrier is None:
        return NO_CARRIER
    weight = graph[node.carrier].weight
    one = weight is not None and len(weight.out_axes) == len(node.features) == 1
    return None if one else SEVERAL_AXES


def _why_alone(node: Node) -> str:
    return node.why_kept() or "no channels that anything ties"


# Refusals


def check_options(clip: str, objective: str, max_scale: float) -> None:
    """Raise unless every option is known."""
    check_choices("equalize", clip=(clip, CLIPS), objective=(objective, OBJECTIVES))
    check_numbers("equalize", max_scale=(max_scale, 1))
    if not max_scale > 1:
        raise ValueError(
            f"jaxmet.equalize: max_scale is {max_scale!r}. Give a number above 1: no "
            "channel's scale leaves 1/max_scale … max_scale."
        )


def check_plan(graph: Graph, plan: EligibleGroups) -> None:
    """Refuse what `only()` spelled out and nothing can be done for."""
    done = {name for g in plan.free for name in (*g.producers, *g.consumers)}
    for node in graph.layers:
        if node.name in done:
            continue
        whys = [w for g, w in plan.left if node.name in (*g.producers, *g.consumers)]
        whys += [w for n, w in plan.alone if n.name == node.name]
        check_named(
            node.name,
            "; ".join(whys),
            graph,
            "equalize",
            "be rescaled",
            cure="Name the layers on both sides of its channels too, or leave it out.",
        )


def check_leaves(plan: EligibleGroups, leaves: Mapping[str, Any]) -> None:
    """Refuse a tree in which something that must follow is missing or an integer."""
    free = {g.index for g in plan.free}
    for member in plan.graph.members:
        if indices_of(member.layout) & free:
            before = "Equalize"
            check_floats(leaves, [member.parameter], "equalize", member.node, before)
