"""Channels that can only be removed together, and every parameter axis they run along.

Additions tie channels in the graph's groups already. A gate goes with the channels that it
scales. A depthwise convolution ties what it reads to what it makes.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmet.engine.graph.channel_groups import Group, Layout, Member, Span, indices_of
from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.channels import ChannelIndex
from jaxmet.layers.eligibility import of, why_looped, why_outside


@dataclasses.dataclass(frozen=True)
class CoupledChannels:
    """Groups with one fate; `why` says what forbids to remove a channel.

    `through` are the depthwise convolutions between those that make and those that read.
    Two bundles may have one name: pieces of what one layer makes.
    """

    groups: tuple[Group, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    through: tuple[str, ...]
    why: str | None

    @property
    def index(self) -> int:
        """Its number: no other bundle has it."""
        return self.groups[0].index

    @property
    def name(self) -> str:
        return self.groups[0].name

    @property
    def size(self) -> int:
        return int(self.groups[0].size)

    @property
    def indices(self) -> set[int]:
        return {g.index for g in self.groups}


def bundles_of(graph: Graph) -> list[CoupledChannels]:
    """All bundles, those that a layer makes first first."""
    groups = {g.index: g for g in graph.groups}
    parent = {index: index for index in groups}

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for group in groups.values():
        for index in map(root, group.scales):
            a = root(group.index)
            parent[max(a, index)] = min(a, index)
    fixed: dict[int, str] = {}
    depthwise = set()
    looped = {n.name: why for n in graph.nodes if (why := of(n.name, why_looped(n)))}
    for member in graph.members:
        for index in indices_of(member.layout) if member.node in looped else ():
            fixed.setdefault(index, looped[member.node])
        if member.groups == 1 or member.role != "in":
            continue
        outs = [m for m in graph.members if m.node == member.node and m.role == "out"]
        both = [_single(m.layout) for m in (member, *outs)]
        known = [span for span in both if span is not None]
        if len(known) == 2 and known[0].size == known[1].size == member.groups:
            a, b = (root(s.group) for s in known if s.group is not None)
            parent[max(a, b)] = min(a, b)
            depthwise.add(member.node)
            continue
        for m in (member, *outs):
            for index in indices_of(m.layout):
                fixed.setdefault(index, f"{member.node}: a grouped convolution")
    found = []
    for index in groups:
        if root(index) == index:
            own = tuple(g for i, g in groups.items() if root(i) == index)
            found.append(_bundle(graph, own, fixed, depthwise))
    return [bundle for bundle in found if bundle.producers]


def _single(layout: Layout) -> Span | None:
    """The one group along an axis."""
    only = layout[0] if len(layout) == 1 else None
    return only if isinstance(only, Span) and only.group is not None else None


def _bundle(
    graph: Graph,
    groups: tuple[Group, ...],
    fixed: Mapping[int, str],
    depthwise: set[str],
) -> CoupledChannels:
    def names(field: str, *, through: bool = False) -> tuple[str, ...]:
        every = (n for g in groups for n in getattr(g, field))
        return tuple(dict.fromkeys(n for n in every if (n in depthwise) == through))

    producers, consumers = names("producers"), names("consumers")
    through = names("consumers", through=True)
    why = next((fixed[g.index] for g in groups if g.index in fixed), None)
    for group in groups:
        alone = group.fixed in ("no layer makes it", "no layer reads it")
        why = why or (None if alone else group.fixed)
    why = why or ("no layer reads it" if not consumers else None)
    why = why or why_outside(graph, *producers)
    return CoupledChannels(groups, producers, consumers, through, why)


def refused(bundle: CoupledChannels, coupled: bool) -> str | None:
    """Why none of the channels may go, None where some may."""
    tied = len(bundle.producers) > 1 and not coupled
    return bundle.why or (f"tied: {', '.join(bundle.producers)}" if tied else None)


def left_along(layout: Layout, masks: Mapping[int, np.ndarray]) -> np.ndarray:
    """Which entries of an axis are left, where masks of groups say what is left of them."""
    here = {g: masks[g] for g in indices_of(layout) if g in masks}
    places = ChannelIndex.of(layout, {g: mask.size for g, mask in here.items()})
    left = np.concatenate([*here.values(), np.ones(1, bool)])
    return np.all(left[places.index], axis=0)


def channel_along(layout: Layout, indices: set[int]) -> np.ndarray:
    """For each entry of an axis the channel of a bundle that it belongs to, −1 for none."""
    places = ChannelIndex.within(layout, indices)
    return np.where(places.index == places.none, -1, places.index).max(axis=0)


def axes_of(
    members: Sequence[Member], masks: Mapping[int, np.ndarray]
) -> dict[str, dict[int, np.ndarray]]:
    """By parameter and axis, which entries are left, where any is removed."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for member in members:
        if member.groups != 1:
            continue  # the groups follow each other along its outputs
        left = left_along(member.layout, masks)
        if not left.all():
            found.setdefault(member.parameter, {})[member.axis] = left
    return found
