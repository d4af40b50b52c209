"""What the equations say about a model, without values: nodes, edges, channel groups."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxmet.engine.frontends import check_apply, refuse_module
from jaxmet.engine.graph.analyse import Analysis, analyse_structure
from jaxmet.engine.graph.channels import (
    Group,
    Member,
    find_channels,
    indices_of,
    layout_size,
)
from jaxmet.engine.graph.describe import describe
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply, is_array
from jaxmet.engine.program.program import CONST, DATA, PRODUCTS
from jaxmet.engine.pruned.expand import call_of
from jaxmet.tree.checks import check_finite, check_type
from jaxmet.tree.leaves import flatten
from jaxmet.tree.names import named_leaves, select, suggestion
from jaxmet.tree.table import Table, noted, noted_html


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """The structure of one model: made by `jm.trace`, read by every transform.

    `nodes` are all nodes in the order in which they run; `groups` and `members` say which
    axes of which parameters must be rescaled together. `selected` are the names that
    transforms may touch, `named` those that `only` asked for by their full names.
    `left` lists parameters that no site, bias or norm uses, and why. `called` are the inputs
    and keyword arguments that the model was traced with, arrays as shapes.
    """

    apply: Apply
    nodes: tuple[Node, ...]
    groups: tuple[Group, ...]
    members: tuple[Member, ...]
    parameters: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    selected: frozenset[str]
    named: frozenset[str] = frozenset()
    called: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @property
    def sites(self) -> tuple[Node, ...]:
        """The selected products and lookups, in the order in which they run."""
        return tuple(n for n in self.nodes if n.is_site and n.name in self.selected)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        names = [n.name for n in self.nodes]
        raise ValueError(
            f"jaxmet.Graph: there is no node {name!r}. {suggestion(name, names)}"
        )

    def only(self, *globs: str) -> "Graph":
        """A graph in which transforms touch nothing but these nodes.

        `*` crosses '/'; a name without a wildcard means that node and all below it. Raises
        ValueError for a glob that means nothing.

        >>> graph.only("block1", "head")
        """
        chosen = self._chosen("only", globs)
        named = frozenset(g for g in globs if g in chosen)
        return dataclasses.replace(self, selected=chosen & self.selected, named=named)

    def without(self, *globs: str) -> "Graph":
        """A graph in which transforms leave these nodes alone.

        >>> graph.without("head")
        """
        chosen = self._chosen("without", globs)
        return dataclasses.replace(self, selected=self.selected - chosen)

    def _chosen(self, caller: str, globs: tuple[str, ...]) -> frozenset[str]:
        names = [n.name for n in self.nodes]
        return frozenset(select(globs, names, caller=f"Graph.{caller}"))

    def leaves(self, params: Any, caller: str, *, sites: bool = True) -> dict[str, Any]:
        """The leaves of `params` by name, refused unless this graph can be of them.

        With `sites`, the weight and bias of every selected site must be there.
        """
        leaves = named_leaves(params)
        if sites:
            wanted = [p for n in self.sites for p in n.parameters]
            missing = [name for name in wanted if name not in leaves]
            if missing:
                raise ValueError(
                    f"jaxmet.{caller}: the tree has no parameter {missing[0]!r}, which the "
                    f"graph's node reads. {suggestion(missing[0], leaves)} Pass the tree that "
                    "the graph was traced with, or trace again."
                )
        for member in self.members:
            leaf = leaves.get(member.parameter)
            if leaf is None or member.groups != 1:
                continue
            size = layout_size(member.layout)
            if len(leaf.shape) <= member.axis or leaf.shape[member.axis] != size:
                raise ValueError(
                    f"jaxmet.{caller}: parameter {member.parameter!r} has shape "
                    f"{tuple(leaf.shape)}, but the graph was traced with {size} along axis "
                    f"{member.axis}. Trace the model again with this tree."
                )
        check_finite(leaves, caller)
        return leaves

    def readers(self, name: str) -> tuple[Node, ...]:
        """The nodes that read a node's result."""
        return tuple(n for n in self.nodes if any(e.node == name for e in n.inputs))

    def table(self) -> Table:
        """One row a node."""
        free = {g.index: g for g in self.groups if g.free}
        rows = []
        for node in self.nodes:
            group = [
                free[g].name
                for m in self.members
                if m.node == node.name and m.role == "out"
                for g in _indices(m)
                if g in free
            ]
            rows.append(
                {
                    "node": node.name,
                    "kind": _kind(node),
                    "reads": ", ".join(e.node or "?" for e in node.inputs) or None,
                    "weight": _weight(node),
                    "channels": ", ".join(dict.fromkeys(group)) or None,
                    "": None if node.name in self.selected else "not selected",
                }
            )
        if len(self.selected) == len(self.nodes):
            rows = [{k: v for k, v in row.items() if k} for row in rows]
        columns = {k: [row[k] for row in rows] for k in rows[0]} if rows else {}
        return Table(columns, title=f"{len(self.nodes)} nodes, {len(self.sites)} sites")

    def _notes(self) -> dict[str, list[str]]:
        return {"no site reads": [f"{name} ({why})" for name, why in self.left]}

    def __repr__(self) -> str:
        return noted(self.table(), self._notes())

    def _repr_html_(self) -> str:
        return noted_html(self.table(), self._notes())


def _indices(member: Member) -> list[int]:
    return sorted(indices_of(member.layout))


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


def check_graph(graph: Any, caller: str, cure: str) -> None:
    """Raise unless `graph` is one."""
    check_type(caller, "the graph", graph, Graph, cure)


def leaves_of(
    params: Any, graph: Graph, caller: str, *, sites: bool = True
) -> dict[str, Any]:
    """The named leaves of `params`, refused unless `graph` is a graph and can be theirs."""
    check_graph(graph, caller, "Pass the tree first and then what jm.trace returned.")
    return graph.leaves(params, caller, sites=sites)


def trace(apply: Callable[..., Any], params: Any, *inputs: Any, **kwargs: Any) -> Graph:
    """Learn a model's structure from the equations of `apply(params, *inputs, **kwargs)`.

    `params` is whatever the model takes first; `inputs` may be arrays or
    `jax.ShapeDtypeStruct`s, axis 0 of each being its batch. Keyword arguments pass through;
    static ones (flags) stay with the graph. The graph holds no values and serves every batch
    and image size: the model is traced with a batch size of the library's own where it runs
    at one, and at the given sizes where it does not.

    Raises ValueError for a model without a product of an input and a parameter (for example
    one whose parameters are closed over instead of passed), and for an nnx or equinox module
    in place of a function (`jm.functional` makes one).

    >>> graph = jm.trace(model.apply, variables, images[:1])
    >>> print(graph)
    """
    refuse_module(apply, params, "trace")
    check_apply(apply, "trace")
    try:
        analysis = analyse_structure(call_of(apply, params, inputs, kwargs))
    except (TypeError, KeyError, AttributeError) as error:
        error.add_note(
            "jaxmet.trace called apply(params, *inputs, **kwargs). Pass what the model takes: "
            "its parameters first, then arrays or jax.ShapeDtypeStruct((1, 224, 224, 3), "
            "jnp.float32) in place of each input."
        )
        raise
    nodes = describe(analysis)
    if not any(node.is_site for node in nodes.values()):
        raise ValueError(
            "jaxmet.trace: the equations hold no product of an input with a parameter "
            f"({len(analysis.leaves)} parameters, {len(analysis.inputs)} inputs). Pass the "
            "parameters as the first argument of apply instead of closing over them, and the "
            "inputs after them. Complex values are not quantized."
        )
    groups, members = find_channels(analysis, nodes)
    return Graph(
        bound(apply, kwargs),
        tuple(nodes.values()),
        groups,
        members,
        tuple(analysis.leaves),
        _left(analysis, tuple(nodes.values())),
        frozenset(n.name for n in nodes.values()),
        called=jax.tree.map(_shape, (inputs, kwargs)),
    )


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x


def bound(apply: Apply, kwargs: dict[str, Any]) -> Apply:
    """The model with its static keyword arguments filled in."""
    static = {
        k: v for k, v in kwargs.items() if not any(is_array(a) for a in flatten(v)[1])
    }
    if not static:
        return apply

    def with_arguments(params: Any, *inputs: Any, **more: Any) -> Any:
        return apply(params, *inputs, **{**static, **more})

    return with_arguments


def _left(analysis: Analysis, nodes: tuple[Node, ...]) -> tuple[tuple[str, str], ...]:
    """Parameters that no node reads, and what does."""
    used = {name for node in nodes for name in node.parameters}
    rows = []
    for name, value in analysis.leaves.items():
        if name in used:
            continue
        readers = sorted({u.name for u in value.uses if u is not None})
        why = f"used by {', '.join(readers)}" if readers else "unused"
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
