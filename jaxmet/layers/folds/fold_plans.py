"""What can be folded into what: each norm, and the products that take its gain."""

import dataclasses
from collections.abc import Sequence

from jaxmet.engine.graph.channel_groups import Joined, Layout, Member, layout_size
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node, Norm
from jaxmet.layers.channels import ChannelAxes
from jaxmet.layers.eligibility import (
    DERIVED_BIAS,
    NOT_SELECTED,
    of,
    why_frozen,
    why_looped,
    why_outside,
    why_shared,
)
from jaxmet.layers.folds.norm_parameters import roles_of


@dataclasses.dataclass(frozen=True)
class FoldPlan:
    """What happens to one norm: which products take its gain, or why none does."""

    node: Node
    side: str = ""
    products: tuple[str, ...] = ()
    places: tuple[ChannelAxes, ...] = ()
    sizes: tuple[int, ...] = ()
    why: str | None = None

    @property
    def norm(self) -> Norm:
        assert self.node.norm is not None
        return self.node.norm

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those of the norm, and those that take its gain."""
        norm = self.norm
        count = () if norm.debias is None else (norm.debias.count,)
        places = (p.parameter for p in self.places)
        return (*roles_of(norm).values(), *count, *places)


def plan_of(graph: Graph, node: Node) -> FoldPlan:
    channels = _channels(graph, node)
    why = _unfit(node, channels)
    if why is not None or channels is None:
        return FoldPlan(node, why=why)
    plan = before = _before(graph, node, channels)
    if before.why is not None:
        plan = _after(graph, node, channels)
    if plan.why is not None:
        return FoldPlan(node, why=f"{before.why}; {plan.why}")
    own = None if node.name in graph.selected else NOT_SELECTED
    why = own or why_outside(graph, *plan.products)
    sizes = tuple(map(layout_size, channels))
    return dataclasses.replace(plan, sizes=sizes, why=why)


def _channels(graph: Graph, node: Node) -> tuple[Layout, ...] | None:
    """What the axes of a norm's parameters are, None if they are not all the same."""
    assert node.norm is not None
    found = {
        tuple(m.layout for m in _members(graph, node, parameter))
        for parameter in roles_of(node.norm).values()
    }
    return found.pop() if len(found) == 1 else None


def _members(graph: Graph, node: Node, parameter: str, role: str = "") -> list[Member]:
    found = [
        m
        for m in graph.members_of(parameter)
        if m.node == node.name and role in ("", m.role)
    ]
    return sorted(found, key=lambda m: m.axis)


def _unfit(node: Node, channels: tuple[Layout, ...] | None) -> str | None:
    """Why a norm cannot be folded into anything."""
    assert node.norm is not None
    why = node.norm.why_kept() or why_looped(node) or why_shared(node)
    unlike = "its parameters lie along different axes"
    return why or (unlike if channels is None else None)


def _before(graph: Graph, node: Node, channels: tuple[Layout, ...]) -> FoldPlan:
    norm, places = node.norm, []
    assert norm is not None
    made = _products_before(graph, node, channels)
    if isinstance(made, str):
        return FoldPlan(node, why=made)
    if norm.scale is None and norm.epsilon >= 1:
        return FoldPlan(node, why="no scale, and an epsilon of 1 or more")
    for product, layouts, part in made:
        if why := _stiff(product):
            return FoldPlan(node, why=why)
        found = [_place(graph, product, layouts, product.kernel, "out")]
        if product.bias is not None:
            found.append(_place(graph, product, layouts, product.bias, "shift"))
        same = set(node.features) <= set(product.features)
        if not same or any(place is None for place in found):
            return FoldPlan(
                node, why=f"its channels are not those that {product.name!r} makes"
            )
        places += [dataclasses.replace(p, part=part) for p in found if p is not None]
    return FoldPlan(node, "before", tuple(p.name for p, _, _ in made), tuple(places))


Made = tuple[Node, tuple[Layout, ...], tuple[int, int] | None]


def _products_before(
    graph: Graph, node: Node, channels: tuple[Layout, ...]
) -> list[Made] | str:
    """The products that make what a norm reads, with their part of its channels; or why not.

    One product, or several that are concatenated along the channels: each takes the gain of
    the channels that it makes.
    """
    edge = node.inputs[0]
    producer = graph[edge.node] if edge.node else None
    if producer is None or producer.kind not in ("product", "concat"):
        return "no product before it"
    if edge.moves:
        return f"{listed(edge.moves)} between {producer.name!r} and it"
    if producer.only_consumers != (node.name,):
        return f"it is not alone in reading {producer.name!r}"
    if producer.kind == "product":
        return [(producer, channels, None)]
    joined = channels[0][0] if len(channels) == 1 and len(channels[0]) == 1 else None
    if not isinstance(joined, Joined) or len(joined.parts) != len(producer.inputs):
        return f"its channels are not those that {producer.name!r} joins"
    made: list[Made] = []
    start = 0
    for edge, layout in zip(producer.inputs, joined.parts, strict=True):
        product = graph[edge.node] if edge.node else None
        if product is None or product.kind != "product" or edge.moves:
            return f"{producer.name!r} before it joins more than products"
        if product.only_consumers != (producer.name,) or product.name in [
            p.name for p, _, _ in made
        ]:
            return (
                f"{producer.name!r} before it is not alone in reading {product.name!r}"
            )
        stop = start + layout_size(layout)
        made.append((product, (layout,), (start, stop)))
        start = stop
    return made


def _after(graph: Graph, node: Node, channels: tuple[Layout, ...]) -> FoldPlan:
    norm, places = node.norm, []
    assert norm is not None
    if not node.only_consumers:
        return FoldPlan(node, why="more than the nodes after it reads it")
    for name in node.only_consumers:
        product = graph[name]
        if product.kind != "product":
            return FoldPlan(node, why=f"{name!r} after it is no product")
        mixed = product.weight and product.weight.why_mixed
        if why := _stiff(product) or of(name, mixed):
            return FoldPlan(node, why=why)
        place = _place(graph, product, channels, product.kernel, "in")
        if place is None or not set(node.features) <= set(product.in_features):
            return FoldPlan(node, why=f"its channels are not those that {name!r} reads")
        places.append(place)
    if norm.scale is None or norm.bias is None:
        missing = "scale" if norm.scale is None else "bias"
        return FoldPlan(node, why=f"it has no {missing} to take the gain from")
    return FoldPlan(node, "after", node.only_consumers, tuple(places))


def _stiff(product: Node) -> str | None:
    """Why a product cannot take a gain."""
    derived = DERIVED_BIAS if product.derived_bias else None
    return of(product.name, why_frozen(product) or derived)


def _place(
    graph: Graph,
    product: Node,
    channels: tuple[Layout, ...],
    parameter: str,
    role: str,
) -> ChannelAxes | None:
    """Where the channels of a norm lie in a parameter, None if they do not."""
    members = _members(graph, product, parameter, role)
    if any(m.groups != 1 for m in members):
        (only,) = members
        return ChannelAxes.of(only) if channels == (only.layout,) else None
    hits = [[m.axis for m in members if m.layout == layout] for layout in channels]
    if any(len(axes) != 1 for axes in hits):
        return None
    return ChannelAxes(parameter, tuple(axis for (axis,) in hits))


def listed(names: Sequence[str]) -> str:
    return ", ".join(names)
