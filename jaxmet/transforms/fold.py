r"""Batch norms folded into the products beside them.

A norm with stored statistics is $y = (x-\mu)\,g+\beta$. Its gain $g$ goes into the product
that makes $x$, or else into the products that read $y$; the norm stays in the tree as the
identity and a shift, with statistics that still are those of what it reads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.channels import Layout, Member, layout_size
from jaxmet.engine.graph import Graph
from jaxmet.engine.node import Node, Norm
from jaxmet.numerics.norm import folded_statistics, norm_gain, unit_scale
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.names import replace_leaves
from jaxmet.tree.table import Table

CALLER = "fold_batch_norm"
SMALLEST = 1e-30  # a variance plus epsilon below this is not divided by
FAINT = 2.0**-20  # a scale this much below its bias is lost beside it in float32
REMAT = ("remat2", "remat", "checkpoint")


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

    With $g = \gamma/\sqrt{\sigma^2+\varepsilon}$: where a norm alone reads a product, the
    kernel becomes $W g$ along its outputs and the product's bias $b g$; the norm keeps
    $\mu g$, $\sigma^2 g^2$, $\gamma' = \sqrt{\sigma^2 g^2+\varepsilon}$ and $\beta$. Without
    a scale leaf the variance becomes $1-\varepsilon$. A norm that only products read
    directly gives them its gain along their inputs and keeps $\mu$, $\sigma^2$,
    $\gamma' = \sqrt{\sigma^2+\varepsilon}$ and $\beta/g$: exact under zero padding, since
    no shift moves. Folding twice changes nothing. A channel whose gain cannot move without
    an overflow or a division by zero keeps it. With `with_report` a Table of what was
    folded into what, and what was left alone and why.

    Both the norm and the product must be selected in `graph`. Raises ValueError where the
    norm's statistics are constants, come from the batch or are missing in `params`, and
    where a norm that `graph.only` named cannot be folded.

    >>> params = jm.fold_batch_norm(params, graph)
    """
    leaves = graph.leaves(params, CALLER)
    plans = [_plan(graph, node) for node in graph.nodes if node.kind == "norm"]
    for plan in plans:
        _check(graph, plan, leaves)
    work, notes = _Work(leaves), {}
    for how, step in (("before", _into_before), ("behind", _into_behind)):
        for plan in plans:
            if plan.how == how and plan.why is None:
                notes[plan.node.name] = step(work, plan)
    folded = replace_leaves(params, work.results(), caller=CALLER)
    return (folded, _table(plans, notes)) if with_report else folded


# What can be folded into what


@dataclasses.dataclass(frozen=True)
class _Place:
    """A parameter and the axes of it that a norm's channels run along."""

    parameter: str
    axes: tuple[int, ...]
    groups: int = 1
    out_axis: int = -1


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What happens to one norm; `why` says why nothing does."""

    node: Node
    how: str = ""
    products: tuple[str, ...] = ()
    places: tuple[_Place, ...] = ()
    sizes: tuple[int, ...] = ()
    why: str | None = None

    @property
    def norm(self) -> Norm:
        assert self.node.norm is not None
        return self.node.norm


def _plan(graph: Graph, node: Node) -> _Plan:
    channels = _channels(graph, node)
    why = _unfit(node, channels)
    if why is not None or channels is None:
        return _Plan(node, why=why)
    before, behind = _before(graph, node, channels), _behind(graph, node, channels)
    plan = before if before.why is None else behind
    if plan.why is not None:
        return _Plan(node, why=f"{before.why}; {behind.why}")
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


def _members(graph: Graph, node: Node, parameter: str, *roles: str) -> list[Member]:
    found = [
        m
        for m in graph.members
        if m.node == node.name and m.parameter == parameter
        if not roles or m.role in roles
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
        }.get(norm.over, "its statistics are constants")
    if not norm.plain:
        return "not of the form (x − mean)·scale/√(variance + epsilon) + bias"
    if loops := [r for r in node.region if r not in REMAT]:
        return f"inside a {loops[-1]}"
    if node.shared:
        return f"{node.shared[0]!r} is used elsewhere too"
    if channels is None:
        return "its parameters lie along different axes"
    return None


def _before(graph: Graph, node: Node, channels: tuple[Layout, ...]) -> _Plan:
    edge = node.inputs[0]
    product = graph[edge.node] if edge.node else None
    if product is None or product.kind != "product":
        return _Plan(node, why="no product before it")
    name, norm = product.name, node.norm
    assert norm is not None
    if edge.moves:
        return _Plan(node, why=f"{', '.join(edge.moves)} between {name!r} and it")
    if product.only_readers != (node.name,):
        return _Plan(node, why=f"it is not alone in reading {name!r}")
    if why := _stiff(product):
        return _Plan(node, why=why)
    if norm.scale is None and norm.epsilon >= 1:
        return _Plan(node, why="no scale, and an epsilon of 1 or more")
    assert product.weight is not None and product.weight.name is not None
    weight = product.weight.name
    places = [_place(channels, weight, _members(graph, product, weight, "out"))]
    if product.bias is not None:
        bias = _members(graph, product, product.bias, "shift")
        places.append(_place(channels, product.bias, bias))
    known = tuple(p for p in places if p is not None)
    if len(known) < len(places) or not set(node.features) <= set(product.features):
        return _Plan(node, why=f"its channels are not those that {name!r} makes")
    return _Plan(node, "before", (name,), known)


def _behind(graph: Graph, node: Node, channels: tuple[Layout, ...]) -> _Plan:
    norm = node.norm
    assert norm is not None
    if not node.only_readers:
        return _Plan(node, why="not only named nodes read it directly")
    if norm.scale is None or norm.bias is None:
        missing = "scale" if norm.scale is None else "bias"
        return _Plan(node, why=f"no {missing} to move the gain out of")
    places = []
    for name in node.only_readers:
        product = graph[name]
        if product.kind != "product":
            return _Plan(node, why=f"{name!r} behind it is no product")
        if why := _stiff(product):
            return _Plan(node, why=why)
        assert product.weight is not None and product.weight.name is not None
        weight = product.weight.name
        place = _place(channels, weight, _members(graph, product, weight, "in"))
        if place is None or not set(node.features) <= set(product.in_features):
            return _Plan(
                node, why=f"its channels are not those that {name!r} sums over"
            )
        places.append(place)
    return _Plan(node, "behind", node.only_readers, tuple(places))


def _stiff(product: Node) -> str | None:
    """Why a product cannot take a gain."""
    name, weight = product.name, product.weight
    if weight is None or weight.name is None:
        return f"the weight of {name!r} is computed from parameters"
    if weight.stacked:
        return f"the weight of {name!r} is stacked"
    if loops := [r for r in product.region if r not in REMAT]:
        return f"{name!r} runs inside a {loops[-1]}"
    if product.shared:
        return f"{product.shared[0]!r} of {name!r} is used elsewhere too"
    if product.derived_bias:
        return f"the bias of {name!r} is computed from parameters"
    return None


def _place(
    channels: tuple[Layout, ...], parameter: str, members: list[Member]
) -> _Place | None:
    if [m.groups != 1 for m in members] == [True]:
        (only,) = members
        if channels != (only.layout,):
            return None
        return _Place(parameter, (only.axis,), only.groups, only.out_axis)
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
    if plan.why is not None and involved & graph.named:
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
            f"jaxmet.{CALLER}: norm {name!r} computes its statistics from the batch, as in "
            "training. Trace the model in inference mode: train=False, or "
            "use_running_average=True."
        )
    before = plan.node.inputs[0].node
    folds = before is not None and graph[before].kind == "product"
    if norm.over == "constant" and (norm.scale or norm.bias or folds):
        raise ValueError(
            f"jaxmet.{CALLER}: the statistics of norm {name!r} are constants that apply "
            "closes over, so the tree does not hold what folding has to change. Trace a "
            "function of the whole variables, and pass those:\n"
            "    def apply(variables, x):\n"
            "        return model.apply(variables, x)\n"
            f"or leave the norm alone: graph.without({name!r})."
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
        types = {np.dtype(leaf.dtype) for leaf in leaves.values() if _is_array(leaf)}
        wide = np.dtype(np.float64) in types and jnp.asarray(0.0).dtype == np.float64
        self.dtype = np.dtype(np.float64 if wide else np.float32)

    def read(self, name: str) -> jax.Array:
        """A parameter in the precision of the arithmetic."""
        if name not in self.values:
            leaf = self.leaves[name]
            array = leaf.weight if is_compressed(leaf) else leaf
            if not (_is_array(array) and jnp.issubdtype(array.dtype, jnp.floating)):
                raise ValueError(
                    f"jaxmet.{CALLER}: parameter {name!r} is a {type(array).__name__} of "
                    f"{leaf.dtype}, which no gain can be folded into. Fold before "
                    "factorizing and before quantizing to integers."
                )
            array = jnp.asarray(array)
            self.dtypes[name] = array.dtype
            self.values[name] = array.astype(self.dtype)
        return self.values[name]

    def rounded(self, name: str, value: jax.Array) -> jax.Array:
        """What is left of a new value once the leaf has stored it."""
        return value.astype(self.dtypes[name]).astype(self.dtype)

    def write(self, name: str, value: jax.Array) -> None:
        self.values[name] = value.reshape(self.leaves[name].shape)

    def multiply(self, place: _Place, factor: jax.Array) -> None:
        """Multiply a weight or bias along a norm's channels."""
        array = self.read(place.parameter)
        self.write(place.parameter, array * _spread(factor, place, array.shape))

    def results(self) -> dict[str, Any]:
        """The new leaves, in their own dtypes."""
        out = {}
        for name, value in self.values.items():
            leaf, array = self.leaves[name], value.astype(self.dtypes[name])
            if is_concrete(array) and not jnp.all(jnp.isfinite(array)):
                raise ValueError(
                    f"jaxmet.{CALLER}: parameter {name!r} overflows {array.dtype} with the "
                    "gain of its norm folded in. Store it in float32, or leave the norm "
                    "alone with graph.without."
                )
            out[name] = leaf.replace(weight=array) if is_compressed(leaf) else array
        return out


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _spread(factor: jax.Array, place: _Place, shape: tuple[int, ...]) -> jax.Array:
    """A factor for each channel, with the rank of the parameter that it multiplies."""
    sizes = [1] * len(shape)
    if place.groups == 1:
        for axis, n in zip(place.axes, factor.shape, strict=True):
            sizes[axis] = n
        order = sorted(range(factor.ndim), key=lambda i: place.axes[i])
        return jnp.transpose(factor, order).reshape(sizes)
    # Outputs of a group follow each other and read the same inputs: (outputs, inputs).
    (axis,), outputs = place.axes, shape[place.out_axis]
    each = jnp.repeat(factor.reshape(place.groups, -1), outputs // place.groups, axis=0)
    sizes[place.out_axis] = outputs
    if axis < 0:
        return each.reshape(sizes)
    sizes[axis] = each.shape[1]
    return (each if place.out_axis < axis else each.T).reshape(sizes)


@dataclasses.dataclass(frozen=True)
class _Values:
    """A norm's parameters, one axis for each of its channels'."""

    mean: jax.Array | None
    variance: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None

    @classmethod
    def of(cls, work: _Work, plan: _Plan) -> "_Values":
        names = [getattr(plan.norm, field.name) for field in dataclasses.fields(cls)]
        return cls(
            *(None if n is None else work.read(n).reshape(plan.sizes) for n in names)
        )

    def write(self, work: _Work, plan: _Plan) -> None:
        for role, name in _roles(plan.norm).items():
            work.write(name, getattr(self, role))


def _into_before(work: _Work, plan: _Plan) -> str | None:
    """Move a norm's gain into the product before it; how many channels keep theirs."""
    norm, old = plan.norm, _Values.of(work, plan)
    gain = norm_gain(old.variance, old.scale, norm.epsilon)
    mean = jnp.zeros_like(gain) if old.mean is None else old.mean
    mean, variance = folded_statistics(mean, old.variance, gain)
    if old.scale is None:
        variance = jnp.full_like(variance, 1 - norm.epsilon)
    variance, scale = _unit(work, norm, variance)
    factor = _factor(work, norm, gain, variance, scale)
    mean = mean if old.mean is None else old.mean * factor
    finite = jnp.isfinite(factor) & jnp.isfinite(mean) & jnp.isfinite(variance)
    can = finite & (variance + norm.epsilon >= SMALLEST)
    moves = can & ~_is_one(work, norm, gain)
    for place in plan.places:
        work.multiply(place, jnp.where(moves, factor, 1.0))
    _Values(
        None if old.mean is None else jnp.where(moves, mean, old.mean),
        jnp.where(moves, variance, old.variance),
        None if scale is None else jnp.where(moves, scale, old.scale),
        old.bias,
    ).write(work, plan)
    note = "no scale: the variance became 1 − epsilon" if old.scale is None else None
    return _note(note, can)


def _into_behind(work: _Work, plan: _Plan) -> str | None:
    """Move a norm's gain into the products behind it; how many channels keep theirs."""
    norm, old = plan.norm, _Values.of(work, plan)
    assert old.scale is not None and old.bias is not None
    gain = norm_gain(old.variance, old.scale, norm.epsilon)
    _, scale = _unit(work, norm, old.variance)
    factor = _factor(work, norm, gain, old.variance, scale)
    bias = old.bias / jnp.where(factor == 0, 1.0, factor)
    can = jnp.isfinite(factor) & jnp.isfinite(bias) & (jnp.abs(factor) >= SMALLEST)
    can &= jnp.abs(old.scale) > FAINT * jnp.abs(old.bias)
    can &= old.variance + norm.epsilon >= SMALLEST
    moves = can & ~_is_one(work, norm, gain)
    for place in plan.places:
        work.multiply(place, jnp.where(moves, factor, 1.0))
    dataclasses.replace(
        old,
        scale=jnp.where(moves, scale, old.scale),
        bias=jnp.where(moves, bias, old.bias),
    ).write(work, plan)
    return _note(None, can)


def _unit(
    work: _Work, norm: Norm, variance: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """A variance and the scale that makes its gain one, as their leaves will store them."""
    assert norm.variance is not None
    variance = work.rounded(norm.variance, variance)
    if norm.scale is None:
        return variance, None
    return variance, work.rounded(norm.scale, unit_scale(variance, norm.epsilon))


def _factor(
    work: _Work,
    norm: Norm,
    gain: jax.Array,
    variance: jax.Array,
    scale: jax.Array | None,
) -> jax.Array:
    """What the product is multiplied by: the gain that the norm will not have any more."""
    if _coarsest(work, norm) == work.dtype:
        return gain
    return gain / norm_gain(variance, scale, norm.epsilon)


def _is_one(work: _Work, norm: Norm, gain: jax.Array) -> jax.Array:
    """Whether a gain is one but for rounding, as it is after folding."""
    stored = float(jnp.finfo(_coarsest(work, norm)).eps)
    tolerance = max(4 * float(jnp.finfo(work.dtype).eps), stored)
    return jnp.abs(gain - 1.0) <= tolerance


def _coarsest(work: _Work, norm: Norm) -> np.dtype:
    """The dtype of fewest digits among those that a norm's gain is stored in."""
    types = [work.dtypes[n] for n in (norm.variance, norm.scale) if n is not None]
    return max(types, key=lambda t: float(jnp.finfo(t).eps))


# The report


def _note(note: str | None, can: jax.Array) -> str | None:
    kept = int(jnp.sum(~can)) if is_concrete(can) else 0
    more = f"{kept} of {can.size} channels keep their gain" if kept else None
    return "; ".join(n for n in (note, more) if n is not None) or None


def _table(plans: list[_Plan], notes: Mapping[str, str | None]) -> Table:
    done = [plan.why is None for plan in plans]
    return Table(
        {
            "norm": [plan.node.name for plan in plans],
            "into": [
                _listed(p.products) if ok else None
                for p, ok in zip(plans, done, strict=True)
            ],
            "side": [p.how if ok else None for p, ok in zip(plans, done, strict=True)],
            "note": [
                notes[p.node.name] if ok else f"left alone: {p.why}"
                for p, ok in zip(plans, done, strict=True)
            ],
        },
        title=f"{sum(done)} of {len(plans)} norms folded",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
