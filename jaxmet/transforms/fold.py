r"""Batch norms folded into the products beside them.

A norm with stored statistics is $y = (x-\mu)\,g+\beta$. Its gain $g$ goes into the
product that makes $x$, or else into the products that read $y$; the norm stays in the
tree as the identity and a shift, with statistics that still are those of what it reads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.channels import Layout, Member, layout_size
from jaxmet.engine.graph import Graph, leaves_of
from jaxmet.engine.node import Node, Norm
from jaxmet.engine.once import run_once
from jaxmet.numerics.norm import gain_before, gain_behind
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.names import replace_leaves
from jaxmet.tree.table import Table

CALLER = "fold_batch_norm"
LOOPS = ("scan", "while", "cond")


@overload
def fold_batch_norm(
    params: Any, graph: Graph, *, with_report: Literal[False] = False
) -> Any: ...
@overload
def fold_batch_norm(
    params: Any, graph: Graph, *, with_report: Literal[True]
) -> tuple[Any, Table]: ...
def fold_batch_norm(params: Any, graph: Graph, *, with_report: bool = False) -> Any:
    r"""The same function with every batch norm an identity plus a shift.

    With $g = \gamma/\sqrt{\sigma^2+\varepsilon}$: where a norm alone reads a product,
    the kernel becomes $W g$ along its outputs and the product's bias $b g$; the norm
    keeps $\mu g$, $\sigma^2 g^2$, $\gamma' = \sqrt{\sigma^2 g^2+\varepsilon}$ and
    $\beta$. Without a scale the variance becomes $1-\varepsilon$. A norm that products
    alone read, directly, gives them its gain along their inputs and keeps $\mu$,
    $\sigma^2$, $\gamma' = \sqrt{\sigma^2+\varepsilon}$ and $\beta/g$: exact under zero
    padding, since no shift moves. Folding twice changes nothing. A channel whose gain
    cannot move without an overflow or a division by zero keeps it.

    With `with_report` also a Table: each norm, what it was folded into, from which
    `side` of that, or why it was left alone.

    Both the norm and the product must be selected in `graph`. Raises ValueError where
    the statistics of a norm are constants, come from the batch or are missing in
    `params`, and where a norm that `graph.only` named cannot be folded.

    >>> params = jm.fold_batch_norm(params, graph)
    """
    leaves = leaves_of(params, graph, CALLER)
    plans = [_plan(graph, node) for node in graph.nodes if node.kind == "norm"]
    for plan in plans:
        _check(graph, plan, leaves)
    used = {name: leaves[name] for p in plans if p.why is None for name in p.parameters}

    def solve(used: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        work, kept = _Work(used), {}
        for side in ("before", "behind"):
            for plan in plans:
                if plan.why is None and plan.side == side:
                    kept[plan.node.name] = _fold(work, plan)
        return work.results(), kept

    new, kept = run_once(solve, used)
    _check_overflow(new)
    for name in filter(lambda name: is_compressed(leaves[name]), new):
        new[name] = leaves[name].replace(weight=new[name])
    folded = replace_leaves(params, new, caller=CALLER)
    return (folded, _table(plans, kept)) if with_report else folded


# What can be folded into what


@dataclasses.dataclass(frozen=True)
class _Place:
    """A parameter and the axes of it that a norm's channels run along.

    With `groups`, the axis holds the inputs of one group; see `channels.Member`.
    """

    parameter: str
    axes: tuple[int, ...]
    groups: int = 1
    out_axis: int = -1


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What happens to one norm: which products take its gain, or why none does."""

    node: Node
    side: str = ""
    products: tuple[str, ...] = ()
    places: tuple[_Place, ...] = ()
    sizes: tuple[int, ...] = ()
    why: str | None = None

    @property
    def norm(self) -> Norm:
        assert self.node.norm is not None
        return self.node.norm

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those of the norm, and those that take its gain."""
        return (*_roles(self.norm).values(), *(p.parameter for p in self.places))


def _plan(graph: Graph, node: Node) -> _Plan:
    channels = _channels(graph, node)
    why = _unfit(node, channels)
    if why is not None or channels is None:
        return _Plan(node, why=why)
    plan = before = _before(graph, node, channels)
    if before.why is not None:
        plan = _behind(graph, node, channels)
    if plan.why is not None:
        return _Plan(node, why=f"{before.why}; {plan.why}")
    outside = [n for n in (node.name, *plan.products) if n not in graph.selected]
    why = f"{_listed(outside)} not selected" if outside else None
    sizes = tuple(map(layout_size, channels))
    return dataclasses.replace(plan, sizes=sizes, why=why)


def _channels(graph: Graph, node: Node) -> tuple[Layout, ...] | None:
    """What the axes of a norm's parameters are, None if they are not all the same."""
    assert node.norm is not None
    found = {
        tuple(m.layout for m in _members(graph, node, parameter))
        for parameter in _roles(node.norm).values()
    }
    return found.pop() if len(found) == 1 else None


def _members(graph: Graph, node: Node, parameter: str, role: str = "") -> list[Member]:
    found = [
        m
        for m in graph.members
        if m.node == node.name and m.parameter == parameter and role in ("", m.role)
    ]
    return sorted(found, key=lambda m: m.axis)


def _roles(norm: Norm) -> dict[str, str]:
    names = {r: getattr(norm, r) for r in ("mean", "variance", "scale", "bias")}
    return {role: name for role, name in names.items() if name is not None}


def _unfit(node: Node, channels: tuple[Layout, ...] | None) -> str | None:
    """Why a norm cannot be folded into anything."""
    norm = node.norm
    assert norm is not None
    if norm.over != "stored":
        return {
            "data": "a norm over the data",
            "batch": "its statistics come from the batch",
            "constant": "its statistics are constants",
        }[norm.over]
    if not norm.plain:
        return "not of the form (x − mean)·scale/√(variance + epsilon) + bias"
    if inside := [name for name in node.region if name in LOOPS]:
        return f"inside a {inside[-1]}"
    if node.shared:
        return f"{node.shared[0]!r} is used elsewhere too"
    if channels is None:
        return "its parameters lie along different axes"
    return None


def _before(graph: Graph, node: Node, channels: tuple[Layout, ...]) -> _Plan:
    edge, norm = node.inputs[0], node.norm
    product = graph[edge.node] if edge.node else None
    if product is None or product.kind != "product" or norm is None:
        return _Plan(node, why="no product before it")
    name = product.name
    if edge.moves:
        return _Plan(node, why=f"{_listed(edge.moves)} between {name!r} and it")
    if product.only_readers != (node.name,):
        return _Plan(node, why=f"it is not alone in reading {name!r}")
    if why := _stiff(product):
        return _Plan(node, why=why)
    if norm.scale is None and norm.epsilon >= 1:
        return _Plan(node, why="no scale, and an epsilon of 1 or more")
    places = [_place(graph, product, channels, _kernel(product), "out")]
    if product.bias is not None:
        places.append(_place(graph, product, channels, product.bias, "shift"))
    known = tuple(p for p in places if p is not None)
    if len(known) < len(places) or not set(node.features) <= set(product.features):
        return _Plan(node, why=f"its channels are not those that {name!r} makes")
    return _Plan(node, "before", (name,), known)


def _behind(graph: Graph, node: Node, channels: tuple[Layout, ...]) -> _Plan:
    norm, places = node.norm, []
    assert norm is not None
    if not node.only_readers:
        return _Plan(node, why="more than the nodes behind it reads it")
    for name in node.only_readers:
        product = graph[name]
        if product.kind != "product":
            return _Plan(node, why=f"{name!r} behind it is no product")
        if why := _stiff(product):
            return _Plan(node, why=why)
        place = _place(graph, product, channels, _kernel(product), "in")
        if place is None or not set(node.features) <= set(product.in_features):
            return _Plan(node, why=f"its channels are not those that {name!r} reads")
        places.append(place)
    if norm.scale is None or norm.bias is None:
        missing = "scale" if norm.scale is None else "bias"
        return _Plan(node, why=f"it has no {missing} to take the gain from")
    return _Plan(node, "behind", node.only_readers, tuple(places))


def _kernel(product: Node) -> str:
    assert product.weight is not None and product.weight.name is not None
    return product.weight.name


def _stiff(product: Node) -> str | None:
    """Why a product cannot take a gain."""
    name, weight = product.name, product.weight
    if weight is None or weight.name is None:
        return f"the weight of {name!r} is computed from parameters"
    if weight.stacked:
        return f"the weight of {name!r} is stacked"
    if inside := [region for region in product.region if region in LOOPS]:
        return f"{name!r} runs inside a {inside[-1]}"
    if product.shared:
        return f"{product.shared[0]!r} is used elsewhere too"
    if product.derived_bias:
        return f"the bias of {name!r} is computed from parameters"
    return None


def _place(
    graph: Graph,
    product: Node,
    channels: tuple[Layout, ...],
    parameter: str,
    role: str,
) -> _Place | None:
    """Where the channels of a norm lie in a parameter, None if they do not."""
    members = _members(graph, product, parameter, role)
    if any(m.groups != 1 for m in members):
        (only,) = members
        place = _Place(parameter, (only.axis,), only.groups, only.out_axis)
        return place if channels == (only.layout,) else None
    hits = [[m.axis for m in members if m.layout == layout] for layout in channels]
    if any(len(axes) != 1 for axes in hits):
        return None
    return _Place(parameter, tuple(axis for (axis,) in hits))


# Refusals


def _check(graph: Graph, plan: _Plan, leaves: Mapping[str, Any]) -> None:
    name = plan.node.name
    if name in graph.selected:
        _check_statistics(graph, plan, leaves)
    involved = {name, *plan.products}
    if plan.why is None or not involved & graph.named:
        return
    cure = f"Leave it out: graph.without({name!r})."
    if plan.products:
        cure = f"Select both: graph.only({', '.join(map(repr, sorted(involved)))})."
    raise ValueError(
        f"jaxmet.{CALLER}: norm {name!r} cannot be folded: {plan.why}. {cure}"
    )


def _check_statistics(graph: Graph, plan: _Plan, leaves: Mapping[str, Any]) -> None:
    name, norm = plan.node.name, plan.norm
    if norm.over == "batch":
        raise ValueError(
            f"jaxmet.{CALLER}: norm {name!r} computes its statistics from the batch, "
            "as in training. Trace the model in inference mode, with train=False or "
            "use_running_average=True."
        )
    maker = plan.node.inputs[0].node
    layer = norm.scale or norm.bias or (maker and graph[maker].kind == "product")
    if norm.over == "constant" and layer:
        raise ValueError(
            f"jaxmet.{CALLER}: the statistics of norm {name!r} are constants that "
            "apply closes over, so what folding has to change is not in the tree. Trace "
            "a function of the whole variables, and pass those:\n"
            "    def apply(variables, x):\n"
            "        return model.apply(variables, x)\n"
            f"Or leave the norm alone: graph.without({name!r})."
        )
    if norm.over != "stored":
        return
    for role, parameter in _roles(norm).items():
        if parameter not in leaves:
            raise ValueError(
                f"jaxmet.{CALLER}: the tree has no {parameter!r}, the {role} of norm "
                f"{name!r}. Pass the whole variables that the graph was traced with "
                "({'params': …, 'batch_stats': …}), not the trained parameters alone."
            )


# Folding


class _Work:
    """The leaves that change, in the precision of the arithmetic until the end."""

    def __init__(self, leaves: Mapping[str, Any]):
        self.leaves, self.values, self.dtypes = leaves, {}, {}
        arrays = [leaf for leaf in leaves.values() if _is_array(leaf)]
        wide = any(leaf.dtype == np.float64 for leaf in arrays)
        wide = wide and jnp.asarray(0.0).dtype == np.float64
        self.dtype = np.dtype(np.float64 if wide else np.float32)

    def read(self, name: str) -> jax.Array:
        """A parameter in the precision of the arithmetic."""
        if name not in self.values:
            leaf = self.leaves[name]
            array = leaf.weight if is_compressed(leaf) else leaf
            if not (_is_array(array) and jnp.issubdtype(array.dtype, jnp.floating)):
                raise ValueError(
                    f"jaxmet.{CALLER}: parameter {name!r} is a {type(array).__name__} "
                    f"of {leaf.dtype}, into which no gain can be folded. Fold before "
                    "factorizing and before quantizing to integers."
                )
            array = jnp.asarray(array)
            self.dtypes[name] = array.dtype
            self.values[name] = array.astype(self.dtype)
        return self.values[name]

    def write(self, name: str, value: jax.Array) -> None:
        """The new value of a parameter, in any shape of its size."""
        self.values[name] = value.reshape(self.leaves[name].shape)

    def results(self) -> dict[str, Any]:
        """The new arrays, in their own dtypes."""
        return {n: v.astype(self.dtypes[n]) for n, v in self.values.items()}


def _check_overflow(new: Mapping[str, Any]) -> None:
    for name, array in new.items():
        if is_concrete(array) and not np.all(np.isfinite(np.asarray(array))):
            raise ValueError(
                f"jaxmet.{CALLER}: parameter {name!r} overflows {array.dtype} with "
                "the gain of its norm folded in. Store it in float32, or leave the "
                "norm alone with graph.without."
            )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _fold(work: _Work, plan: _Plan) -> jax.Array:
    """Move the gain of one norm; which channels keep it."""
    norm, roles = plan.norm, _roles(plan.norm)
    old = {role: work.read(name).reshape(plan.sizes) for role, name in roles.items()}
    none = jnp.zeros_like(old["variance"])
    given: dict[str, Any] = {"mean": none, "scale": None, "bias": none, **old}
    variance = roles["variance"]
    stored = work.dtypes[variance], work.dtypes[roles.get("scale", variance)]
    move = gain_before if plan.side == "before" else gain_behind
    moved = move(**given, epsilon=norm.epsilon, stored=stored)
    for role, name in roles.items():
        work.write(name, getattr(moved, role))
    for place in plan.places:
        kernel = work.read(place.parameter)
        factor = _spread(moved.factor, place, kernel.shape)
        work.write(place.parameter, kernel * factor)
    return moved.kept


def _spread(factor: jax.Array, place: _Place, shape: tuple[int, ...]) -> jax.Array:
    """A factor for each channel, with the rank of the parameter that it multiplies."""
    sizes = [1] * len(shape)
    if place.groups == 1:
        for axis, n in zip(place.axes, factor.shape, strict=True):
            sizes[axis] = n
        order = sorted(range(factor.ndim), key=lambda i: place.axes[i])
        return jnp.transpose(factor, order).reshape(sizes)
    # The outputs of a group follow each other and read the same inputs.
    (axis,), outputs = place.axes, shape[place.out_axis]
    each = jnp.repeat(factor.reshape(place.groups, -1), outputs // place.groups, axis=0)
    sizes[place.out_axis] = outputs
    if axis < 0:
        return each.reshape(sizes)
    sizes[axis] = each.shape[1]
    return (each if place.out_axis < axis else each.T).reshape(sizes)


# The report


def _note(norm: Norm, kept: jax.Array) -> str | None:
    notes = []
    if norm.scale is None:
        notes.append("no scale: its variance became 1 − epsilon")
    if is_concrete(kept) and (count := int(jnp.sum(kept))):
        notes.append(f"{count} of {kept.size} channels keep their gain")
    return "; ".join(notes) or None


def _table(plans: Sequence[_Plan], kept: Mapping[str, jax.Array]) -> Table:
    rows = [
        (p.node.name, _listed(p.products), p.side, _note(p.norm, kept[p.node.name]))
        if p.why is None
        else (p.node.name, None, None, f"left alone: {p.why}")
        for p in plans
    ]
    columns = zip(*rows, strict=True) if rows else ((),) * 4
    names = ("norm", "into", "side", "note")
    return Table(
        dict(zip(names, columns, strict=True)),
        title=f"{len(kept)} of {len(plans)} norms folded",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
