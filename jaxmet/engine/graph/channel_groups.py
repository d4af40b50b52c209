"""Channels that must be scaled together, and every parameter axis they run along.

A group is a set of atoms that additions, concatenations and shared axes tie; its members
are the layers that make the channels, those that read them, and the biases and norms in
between. A group that something forbids to rescale says what.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from functools import cached_property

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.graph.analyse import Analysis
from jaxmet.engine.graph.node import Node
from jaxmet.engine.nodes.cluster import Cluster, leaf_of
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import PARAM, Value


@dataclasses.dataclass(frozen=True)
class Span:
    """A factor of an axis: the channels of a group, or `size` other things."""

    group: int | None
    size: int


@dataclasses.dataclass(frozen=True)
class Joined:
    """A factor of an axis that is a concatenation of axes.

    A part that is a concatenation itself stands there as its own parts.
    """

    parts: tuple["Layout", ...]

    # Members of one axis share this object: of long concatenations each is counted once.

    @cached_property
    def size(self) -> int:
        """The number of things along it."""
        return sum(layout_size(part) for part in self.parts)

    @cached_property
    def groups(self) -> frozenset[int]:
        """The groups that appear in it."""
        return frozenset().union(*(indices_of(part) for part in self.parts))


Layout = tuple[Span | Joined, ...]


@dataclasses.dataclass(frozen=True)
class Member:
    """One axis of one parameter that a group runs along.

    `role` is 'out' or 'in' for a weight, 'shift' for what is added (biases, means),
    'variance' and 'scale' for a norm. Where `groups` is not 1, `axis` holds the input
    channels of one group of a grouped convolution and `layout` lays out all of them;
    `out_axis` is then the axis along which the groups follow each other.
    """

    parameter: str
    axis: int
    role: str
    layout: Layout
    node: str
    groups: int = 1
    out_axis: int = -1


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels with one scale each.

    `frozen` says why they may not be rescaled, `fixed` why none may be removed. `scales`
    are the numbers of the groups that this one, a gate, multiplies: both lose the same channels.
    """

    name: str
    index: int
    size: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    clips: tuple[str, ...]
    frozen: str | None
    fixed: str | None = None
    scales: tuple[int, ...] = ()

    @property
    def free(self) -> bool:
        return self.frozen is None


def find_channels(
    analysis: Analysis, nodes: dict[Cluster, Node]
) -> tuple[tuple[Group, ...], tuple[Member, ...]]:
    """The channel groups of a model and the parameter axes that follow them."""
    return _ChannelFinder(analysis, nodes).find()


class _ChannelFinder:
    def __init__(self, analysis: Analysis, nodes: dict[Cluster, Node]):
        self.analysis, self.nodes = analysis, nodes
        self.indices: dict[lb.Atom, int] = {}
        self.uses = Counter(p for n in nodes.values() for p in n.parameters)
        self.members: list[tuple[str, int, str, lb.Axis, str, int, int]] = []
        self.tied: list[tuple[int, int]] = []
        self.joined: dict[lb.Atom, Joined] = {}

    def find(self) -> tuple[tuple[Group, ...], tuple[Member, ...]]:
        for value in self.analysis.region.outputs:
            self.freeze(value.axes, "an output of the model")
        for cluster, node in self.nodes.items():
            if node.kind == "product":
                self.product(cluster, node)
            elif node.kind == "ragged":
                weight, (rows, _, *_) = cluster.weighted.weight, cluster.operands
                why = f"{node.name}: {node.why_kept()}"
                self.freeze((*weight.axes, *rows.axes, *cluster.exit.axes), why)
            elif node.kind == "lookup":
                self.freeze(cluster.exit.axes, "made by a lookup")
            elif node.kind == "norm" and node.norm is not None:
                self.norm(cluster, node)
            elif node.kind in ("add", "concat"):
                for value in cluster.operands:
                    if value.kind == PARAM:
                        self.shift(value, node.name)
        ties = self.ties()
        seen: set[lb.Atom] = set()
        for _, _, _, axis, *_ in self.members:
            for atom in lb.leaves(axis, seen):
                self.indices.setdefault(atom, len(self.indices))
        for pair in ties:
            self.tie(*pair)
        members = tuple(
            Member(p, a, role, self.layout(axis), n, groups, out)
            for p, a, role, axis, n, groups, out in self.members
        )
        return self.groups(members), members

    def ties(self) -> list[tuple[lb.Atom, lb.Atom]]:
        """Channels and their gates, atom by atom; those that do not line up stay whole."""
        found = []
        for equation in self.analysis.region.walk():
            for one, two in (pair for v in equation.results for pair in v.tied):
                for x, y in lb.paired(one, two):
                    inside = [list(lb.leaves((atom,))) for atom in (x, y)]
                    if [a.size for a in inside[0]] == [a.size for a in inside[1]]:
                        found += zip(*inside, strict=True)
                    else:
                        for axis in inside:
                            lb.fix(
                                tuple(axis), "gated in other pieces than it is made of"
                            )
        return found

    def tie(self, one: lb.Atom, two: lb.Atom) -> None:
        """Two groups that lose the same channels, or none where one cannot."""
        pair = one.root(), two.root()
        first, second = (self.indices.get(atom) for atom in pair)
        why = pair[0].fixed or pair[1].fixed
        if first is not None and second is not None:
            self.tied.append((first, second))
        else:
            why = why or "tied to channels that no layer makes"
        if why is not None:
            for atom in pair:
                lb.fix((atom,), why)

    def freeze(self, axes: Iterable[lb.Axis], why: str) -> None:
        for axis in axes:
            lb.freeze(axis, why)

    def add(
        self, name: str, axis: int, role: str, label: lb.Axis, node: str, *more
    ) -> None:
        groups, out_axis = more or (1, -1)
        self.members.append((name, axis, role, label, node, groups, out_axis))

    def product(self, cluster: Cluster, node: Node) -> None:
        equation, operand = cluster.weighted.equation, cluster.weighted.weight
        weight = node.weight
        data = next(v for v in equation.operands[:2] if v is not operand)
        inputs = [data.axes[i] for i in node.in_features]
        assert weight is not None
        why = node.why_kept()
        if why is not None:
            why = f"{node.name}: {why}"
            self.freeze((*operand.axes, *inputs, *cluster.exit.axes), why)
            return
        assert weight.name is not None
        if weight.why_mixed is not None:  # no single channel has a row of it
            self.freeze(inputs, f"{node.name}: {weight.why_mixed}")
        labels = self.analysis.leaf_atoms[weight.name]
        for axis in weight.out_axes:
            self.add(weight.name, axis, "out", labels[axis], node.name)
        groups = node.convolution.groups if node.convolution else 1
        if groups == 1:
            for axis in weight.in_axes:
                self.add(weight.name, axis, "in", labels[axis], node.name)
        elif len(weight.in_axes) <= 1 and len(weight.out_axes) == 1:
            axis = weight.in_axes[0] if weight.in_axes else -1
            out = weight.out_axes[0]
            self.add(weight.name, axis, "in", inputs[0], node.name, groups, out)
        if cluster.weighted.bias is not None:
            self.shift(cluster.weighted.bias, node.name)

    def shift(self, value: Value, node: str, role: str = "shift") -> None:
        leaf = leaf_of(value)
        name = leaf.value.name if leaf is not None else None
        if name is None or leaf is None or leaf.stacked or self.is_shared(name):
            self.freeze(value.axes, f"{node}: what is added there cannot be rescaled")
            return
        for axis, label in enumerate(self.analysis.leaf_atoms[name]):
            if label:
                self.add(name, axis, role, label, node)

    def is_shared(self, name: str) -> bool:
        """Whether something reads it that does not change with it."""
        if self.uses[name] <= 1:
            return False
        users = [n for n in self.nodes.values() if name in n.parameters]
        biases = (
            n.weight is not None and n.weight.tied and n.bias == name for n in users
        )
        return not all(biases)

    def norm(self, cluster: Cluster, node: Node) -> None:
        norm = node.norm
        assert norm is not None
        if (why := norm.why_kept()) is not None:
            self.freeze(cluster.exit.axes, f"{node.name}: {why}")
            return
        if inside := [name for name in node.region if name not in compat.REMAT]:
            self.freeze(cluster.exit.axes, f"{node.name}: inside a {inside[-1]}")
            return
        roles = {
            "mean": "shift",
            "bias": "shift",
            "variance": "variance",
            "scale": "scale",
        }
        for field, role in roles.items():
            name = getattr(norm, field)
            if name is None:
                continue
            for axis, label in enumerate(self.analysis.leaf_atoms[name]):
                if label:
                    self.add(name, axis, role, label, node.name)

    def layout(self, axis: lb.Axis) -> Layout:
        out: list[Span | Joined] = []
        for atom in lb.expand(axis):
            if atom.parts is not None:
                out.append(self.join(atom))
            else:
                out.append(Span(self.indices.get(atom), atom.size))
        return tuple(out)

    def join(self, atom: lb.Atom) -> Joined:
        """The layout of a concatenation, those inside it first: they may go deep."""
        stack = [atom]
        while stack:
            top = stack[-1]
            parts = top.parts or ()
            inner = [a for part in parts for a in lb.expand(part) if a.parts]
            inner = [a for a in inner if a not in self.joined]
            if inner:
                stack += inner
                continue
            stack.pop()
            if top not in self.joined:
                found: list[Layout] = []
                for part in map(self.layout, parts):
                    first = part[0] if len(part) == 1 else None
                    found += first.parts if isinstance(first, Joined) else [part]
                self.joined[top] = Joined(tuple(found))
        return self.joined[atom]

    def groups(self, members: tuple[Member, ...]) -> tuple[Group, ...]:
        clips = self.clips()
        groups = []
        along: dict[int, list[Member]] = {}
        for member in members:
            for index in indices_of(member.layout):
                along.setdefault(index, []).append(member)
        for atom, index in self.indices.items():
            mine = along.get(index, [])
            producers = tuple(dict.fromkeys(m.node for m in mine if m.role == "out"))
            consumers = tuple(dict.fromkeys(m.node for m in mine if m.role == "in"))
            alone = "no layer makes it" if not producers else None
            alone = "no layer reads it" if producers and not consumers else alone
            why = atom.frozen or alone
            name = (
                producers[0]
                if producers
                else consumers[0]
                if consumers
                else mine[0].node
            )
            groups.append(
                Group(
                    name,
                    index,
                    atom.size,
                    producers,
                    consumers,
                    clips.get(index, ()),
                    why,
                    atom.fixed or alone,
                    tuple(sorted({kept for kept, gate in self.tied if gate == index})),
                )
            )
        return tuple(groups)

    def clips(self) -> dict[int, tuple[str, ...]]:
        """For each group the clips that its channels run through."""
        found: dict[int, list[str]] = {}
        for cluster, node in self.nodes.items():
            if node.bounds is None:
                continue
            for axis in cluster.exit.axes:
                for atom in lb.leaves(axis):
                    if atom in self.indices:
                        found.setdefault(self.indices[atom], []).append(node.name)
        return {k: tuple(dict.fromkeys(v)) for k, v in found.items()}


def indices_of(layout: Layout) -> set[int]:
    """The groups that appear in a layout."""
    found: set[int] = set()
    for item in layout:
        if isinstance(item, Joined):
            found |= item.groups
        elif item.group is not None:
            found.add(item.group)
    return found


def layout_size(layout: Layout) -> int:
    """The number of things along an axis."""
    return math.prod(item.size for item in layout)
