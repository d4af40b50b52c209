"""What the equations say about a model, without values: nodes, edges, channel groups."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax

from jaxmet.engine.flow.scale_paths import ScalePath, find_scale_paths
from jaxmet.engine.frontends import check_apply, refuse_module
from jaxmet.engine.graph.analyse import Analysis, analyse_structure
from jaxmet.engine.graph.channel_groups import (
    Group,
    Member,
    find_channels,
    layout_size,
)
from jaxmet.engine.graph.describe import describe
from jaxmet.engine.graph.factor_names import same_nodes
from jaxmet.engine.graph.node import Node
from jaxmet.engine.graph.node_table import node_table, unread
from jaxmet.engine.program.bound_model import WithArguments as WithArguments
from jaxmet.engine.program.bound_model import bound
from jaxmet.engine.program.calls import Apply, is_array
from jaxmet.engine.pruned.expand import call_of
from jaxmet.tree.checks import check_finite, check_type
from jaxmet.tree.globs import select, suggestion
from jaxmet.tree.named_leaves import brief, is_structure, named_leaves, stored_forms
from jaxmet.tree.table import Table, noted, noted_html

KEPT = 8  # graphs of other trees that one holds: a recipe compresses a few times


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """The structure of one model: made by `jm.trace`, read by every transform.

    One graph serves every tree of its model: where a tree was factorized or pruned, each
    function reads the layers and the sizes of their channels from that tree (`graph.of`).

    `nodes` are all nodes in the order in which they run; `groups` and `members` say which
    axes of which parameters must be rescaled together, `scale_paths` where a scale of what a
    product or a norm over the data makes can be undone, across attention too. `selected` are
    the names that transforms may touch, `named` those that `only` asked for by their full
    names. `unread` lists parameters that no layer, bias or norm uses, and why. `called` are the
    inputs and keyword arguments that the model was traced with, arrays as shapes. `forms` are
    how the tree stores its parameters, `others` the graphs of other trees of the model.
    """

    apply: Apply
    nodes: tuple[Node, ...]
    groups: tuple[Group, ...]
    members: tuple[Member, ...]
    parameters: tuple[str, ...]
    unread: tuple[tuple[str, str], ...]
    selected: frozenset[str]
    named: frozenset[str] = frozenset()
    called: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    forms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    others: list["Graph"] = dataclasses.field(default_factory=list)
    scale_paths: tuple[ScalePath, ...] = ()

    @property
    def layers(self) -> tuple[Node, ...]:
        """The selected products and lookups, in the order in which they run."""
        return tuple(n for n in self.nodes if n.is_layer and n.name in self.selected)

    def __getitem__(self, name: str) -> Node:
        node = self._by_name.get(name)
        if node is None:
            raise ValueError(
                f"jaxmet.Graph: there is no node {name!r}. "
                f"{suggestion(name, self._by_name)}"
            )
        return node

    # Read at every node, so a scan of all nodes would make transforms quadratic.

    @cached_property
    def _by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in reversed(self.nodes)}

    @cached_property
    def _consumers(self) -> Mapping[str, tuple[Node, ...]]:
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(e.node for e in node.inputs):
                if name is not None:
                    found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def _members_of(self) -> Mapping[str, tuple[Member, ...]]:
        found: dict[str, list[Member]] = {}
        for member in self.members:
            found.setdefault(member.parameter, []).append(member)
        return {name: tuple(members) for name, members in found.items()}

    def only(self, *globs: str) -> "Graph":
        """A graph in which transforms touch nothing but these nodes.

        `*` crosses '/'; a name without a wildcard means that node and all below it.

        Args:
            *globs: names of nodes, with or without wildcards.

        Returns:
            The same graph with fewer selected nodes.

        Raises:
            ValueError: for a glob that matches nothing.

        >>> graph.only("block1", "head")
        """
        chosen = self._chosen("only", globs)
        named = frozenset(g for g in globs if g in chosen)
        return dataclasses.replace(self, selected=chosen & self.selected, named=named)

    def without(self, *globs: str) -> "Graph":
        """A graph in which transforms skip these nodes.

        Args:
            *globs: names of nodes, with or without wildcards.

        Returns:
            The same graph with fewer selected nodes.

        >>> graph.without("head")
        """
        chosen = self._chosen("without", globs)
        return dataclasses.replace(self, selected=self.selected - chosen)

    def _chosen(self, caller: str, globs: tuple[str, ...]) -> frozenset[str]:
        names = [n.name for n in self.nodes]
        return frozenset(select(globs, names, caller=f"Graph.{caller}"))

    def of(self, params: Any, caller: str = "Graph.of") -> "Graph":
        """The graph of a tree of this model, which may be factorized or pruned.

        Every function that takes a tree and a graph calls this first. A factorized layer
        `stem` is two layers here, `stem/in` and `stem/out`, and channels that were removed
        do not count. Both are selected where the layer was. A tree with the shapes of this
        graph has the graph itself; for another one the model is traced once more, with the
        inputs that `jm.trace` was given.

        Args:
            params: A tree that the model, or `jm.lift` of it, accepts.
            caller: The function that errors name.

        Returns:
            The graph; the same one for trees of the same shapes.

        Raises:
            ValueError: The model does not run with this tree.

        >>> print(graph.of(jm.factorize(params, graph, ratios=0.5)))
        """
        forms = stored_forms(params)
        if self._differs(forms) is None:
            return self
        found = next((g for g in self.others if g._differs(forms) is None), None)
        if found is None:
            inputs, kwargs = self.called
            try:
                call = call_of(self.apply, params, inputs, kwargs)
                analysis = analyse_structure(call)
            except Exception as error:  # whatever a model raises of another one's tree
                raise self._unlike(forms, error, caller) from error
            found = _graph_of(analysis, self.apply, params, inputs, kwargs)
            found = dataclasses.replace(found, others=self.others)
            self.others[:] = [found, *self.others[: KEPT - 1]]
        return self._selecting(found)

    def _differs(self, forms: Mapping[str, Any]) -> str | None:
        """A parameter that a tree stores in another form than that of this graph.

        What is neither a weight nor runs along channels (a cache, a state) may have any
        shape: it may follow the batch.
        """
        read = {m.parameter for m in self.members}
        read |= {n.weight.name for n in self.nodes if n.weight is not None}
        for name in {**self.forms, **forms}:
            mine, form = self.forms.get(name), forms.get(name)
            if mine == form or (name not in forms and not is_structure(mine)):
                continue
            if name in read or is_structure(mine) or is_structure(form):
                return name
        return None

    def _unlike(
        self, forms: Mapping[str, Any], error: Exception, caller: str
    ) -> ValueError:
        name = self._differs(forms) or ""
        reason = str(error).split("\n")[0].rstrip(".")
        mine, form = (brief(f.get(name)) for f in (self.forms, forms))
        return ValueError(
            f"jaxmet.{caller}: parameter {name!r} is stored as {form}, the graph was traced "
            f"with {mine}, and the model does not run with this tree: {reason}. Pass the whole "
            "tree of the model that was traced."
        )

    def _selecting(self, other: "Graph") -> "Graph":
        """The graph of another tree, which selects what this one does."""
        if len(self.selected) == len(self.nodes) and not self.named:
            return other
        mine = {n.name for n in self.nodes}
        same = {n.name: same_nodes(n.name, mine) for n in other.nodes}
        selected, named = (
            frozenset(name for name, of in same.items() if of and of <= which)
            for which in (self.selected, self.named)
        )
        return dataclasses.replace(other, selected=selected, named=named)

    def leaves(
        self, params: Any, caller: str, *, layers: bool = True
    ) -> dict[str, Any]:
        """The leaves of `params` by name, refused unless this graph can be of them.

        With `layers`, the weight and bias of every selected layer must be there.
        """
        leaves = named_leaves(params)
        if layers:
            wanted = [p for n in self.layers for p in n.parameters]
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
                    f"{tuple(leaf.shape)}, but there are {size} channels along axis "
                    f"{member.axis} of the tree that it goes with. Pass one that was "
                    "factorized and pruned in the same way."
                )
        check_finite(leaves, caller)
        return leaves

    def consumers(self, name: str) -> tuple[Node, ...]:
        """The nodes that read a node's result.

        Args:
            name: the name of a node.

        Returns:
            The nodes, in the order in which they run.

        >>> [node.name for node in graph.consumers("stem")]
        """
        return self._consumers.get(name, ())

    def members_of(self, parameter: str) -> tuple[Member, ...]:
        """The axes of a parameter that channel groups run along."""
        return self._members_of.get(parameter, ())

    def table(self) -> Table:
        """One row per node.

        Returns:
            The table that `print(graph)` shows.

        >>> graph.table().where(kind="norm")
        """
        return node_table(self)

    def _notes(self) -> dict[str, list[str]]:
        return {"no layer reads": [f"{name} ({why})" for name, why in self.unread]}

    def __repr__(self) -> str:
        return noted(self.table(), self._notes())

    def _repr_html_(self) -> str:
        return noted_html(self.table(), self._notes())


def fitted(
    params: Any, graph: Graph, caller: str, *, layers: bool = True
) -> tuple[Graph, dict[str, Any]]:
    """The graph of `params` and their named leaves: what every function begins with.

    Raises ValueError for what is no graph, and for a tree of another model.
    """
    graph = graph_of(params, graph, caller)
    return graph, graph.leaves(params, caller, layers=layers)


def graph_of(params: Any, graph: Graph, caller: str) -> Graph:
    """The graph of `params`, refused unless a graph of the model is given."""
    check_graph(graph, caller, TREE_FIRST)
    return graph.of(params, caller)


TREE_FIRST = "Pass the tree first and then what jm.trace returned."


def check_graph(graph: Any, caller: str, cure: str) -> None:
    """Raise unless `graph` is one."""
    check_type(caller, "the graph", graph, Graph, cure)


def trace(apply: Callable[..., Any], params: Any, *inputs: Any, **kwargs: Any) -> Graph:
    """Learn a model's structure from the equations of `apply(params, *inputs, **kwargs)`.

    `params` is whatever the model takes first; `inputs` may be arrays or
    `jax.ShapeDtypeStruct`s, axis 0 of each being its batch. Keyword arguments pass through;
    static ones (flags) stay with the graph. The graph holds no values and serves every batch
    and image size, and every tree of the model, factorized and pruned ones too: the model is
    traced with a batch size of the library's own where it runs at one, and at the given sizes
    where it does not.

    Args:
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        params: the parameter tree: arrays or `jax.ShapeDtypeStruct`s.
        *inputs: example inputs, arrays or `jax.ShapeDtypeStruct`s; axis 0 is the batch.
        **kwargs: keyword arguments for the model.

    Returns:
        The graph: nodes, layers, channel groups; no values.

    Raises:
        ValueError: for a model without a product of an input and a parameter (for example one
            whose parameters are closed over instead of passed), and for an nnx or equinox
            module in place of a function (`jm.functional` makes one).

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
    graph = _graph_of(analysis, apply, params, inputs, kwargs)
    if not any(node.is_layer for node in graph.nodes):
        raise ValueError(
            "jaxmet.trace: the equations hold no product of an input with a parameter "
            f"({len(analysis.leaves)} parameters, {len(analysis.inputs)} inputs). Pass the "
            "parameters as the first argument of apply instead of closing over them, and the "
            "inputs after them. Complex values are not quantized."
        )
    graph.others.append(graph)
    return graph


def _graph_of(
    analysis: Analysis, apply: Apply, params: Any, inputs: tuple, kwargs: dict[str, Any]
) -> Graph:
    nodes = describe(analysis)
    groups, members = find_channels(analysis, nodes)
    return Graph(
        bound(apply, kwargs),
        tuple(nodes.values()),
        groups,
        members,
        tuple(analysis.leaves),
        unread(analysis, tuple(nodes.values())),
        frozenset(n.name for n in nodes.values()),
        called=jax.tree.map(_shape, (inputs, kwargs)),
        forms=stored_forms(params),
        scale_paths=find_scale_paths(
            analysis.clusters, [c for c, n in nodes.items() if n.region]
        ),
    )


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x
