"""A graph as a table: one row per node, and the parameters that no layer reads."""

from typing import TYPE_CHECKING

from jaxmet.engine.graph.analyse import Analysis
from jaxmet.engine.graph.channel_groups import Member, indices_of
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.program import CONST, DATA, PRODUCTS
from jaxmet.tree.table import Table

if TYPE_CHECKING:
    from jaxmet.engine.graph.graph import Graph


def node_table(graph: "Graph") -> Table:
    """One row per node."""
    free = {g.index: g for g in graph.groups if g.free}
    made: dict[str, list[Member]] = {}
    for member in graph.members:
        if member.role == "out":
            made.setdefault(member.node, []).append(member)
    rows = []
    for node in graph.nodes:
        group = [
            free[g].name
            for m in made.get(node.name, ())
            for g in sorted(indices_of(m.layout))
            if g in free
        ]
        rows.append(
            {
                "node": node.name,
                "kind": _kind(node),
                "reads": ", ".join(e.node or "?" for e in node.inputs) or None,
                "weight": _weight(node),
                "channels": ", ".join(dict.fromkeys(group)) or None,
                "": None if node.name in graph.selected else "not selected",
            }
        )
    if len(graph.selected) == len(graph.nodes):
        rows = [{k: v for k, v in row.items() if k} for row in rows]
    columns = {k: [row[k] for row in rows] for k in rows[0]} if rows else {}
    return Table(columns, title=f"{len(graph.nodes)} nodes, {len(graph.layers)} layers")


def _kind(node: Node) -> str:
    if node.convolution is not None:
        c = node.convolution
        extra = [f"groups {c.groups}"] * (c.groups != 1)
        extra += [f"strides {c.strides}"] * any(s != 1 for s in c.strides)
        return ", ".join([node.function, *extra])
    if node.bounds is not None:
        return f"{node.function} {node.bounds[0]:g} to {node.bounds[1]:g}"
    if node.kind in ("product", "norm", "pool", "activation"):
        return node.function
    return node.kind


def _weight(node: Node) -> str | None:
    if node.weight is None:
        return None
    if node.weight.name is None:
        return "derived from " + ", ".join(node.weight.parameters)
    notes = ["stacked"] * node.weight.stacked + ["shared"] * node.weight.shared
    return node.weight.name + (f" ({', '.join(notes)})" if notes else "")


def unread(analysis: Analysis, nodes: tuple[Node, ...]) -> tuple[tuple[str, str], ...]:
    """Parameters that no node reads, and what does."""
    used = {name for node in nodes for name in node.parameters}
    rows = []
    for name, value in analysis.leaves.items():
        if name in used:
            continue
        consumers = sorted({u.name for u in value.uses if u is not None})
        why = f"used by {', '.join(consumers)}" if consumers else "unused"
        why = "complex values stay in float" if value.is_complex else why
        rows.append((name, why))
    for equation in analysis.region.walk():
        if equation.name in PRODUCTS and equation.node is None:
            kinds = {v.kind for v in equation.operands[:2]}
            if kinds == {CONST, DATA}:
                constant = next(v for v in equation.operands if v.kind == CONST)
                shape = "×".join(map(str, constant.shape))
                rows.append(
                    (f"constant {shape}", "closed over: its product is in float")
                )
    return tuple(rows)
