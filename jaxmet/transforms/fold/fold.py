r"""Batch norms folded into the products beside them.

A norm with stored statistics is $y = (x-\mu)\,g+\beta$. Its gain $g$ goes into the
product that makes $x$, or else into the products that read $y$; the norm stays in the
tree as the identity and a shift, with statistics that still are those of what it reads.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.node import Norm
from jaxmet.layers.eligibility import check_named, skipped
from jaxmet.layers.folds.fold_plans import FoldPlan, listed, plan_of
from jaxmet.layers.folds.norm_parameters import (
    check_stored,
    roles_of,
    statistics_weight,
)
from jaxmet.layers.matching import check_quantizers
from jaxmet.layers.once import run_once
from jaxmet.numerics import xp
from jaxmet.numerics.norm import gain_after, gain_before
from jaxmet.numerics.xp import Array
from jaxmet.transforms.fold.fold_quantizers import fold_quantizers, pinned_weights
from jaxmet.tree.checks import check_flags, is_concrete
from jaxmet.tree.leaves import dense, with_weight
from jaxmet.tree.named_leaves import replace_leaves
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.types import P

CALLER = "fold_batch_norm"


@overload
def fold_batch_norm(
    params: P,
    graph: Graph,
    *,
    quantizers: None = None,
    with_report: Literal[False] = False,
) -> P: ...
@overload
def fold_batch_norm(
    params: P, graph: Graph, *, quantizers: None = None, with_report: Literal[True]
) -> tuple[P, Table]: ...
@overload
def fold_batch_norm(
    params: P,
    graph: Graph,
    *,
    quantizers: Quantizers,
    with_report: Literal[False] = False,
) -> tuple[P, Quantizers]: ...
@overload
def fold_batch_norm(
    params: P, graph: Graph, *, quantizers: Quantizers, with_report: Literal[True]
) -> tuple[P, Quantizers, Table]: ...
def fold_batch_norm(
    params: Any,
    graph: Graph,
    *,
    quantizers: Quantizers | None = None,
    with_report: bool = False,
) -> Any:
    r"""The same function with every batch norm an identity plus a shift.

    With $g = \gamma/\sqrt{\sigma^2+\varepsilon}$: where a norm alone reads a product,
    the kernel becomes $W g$ along its outputs and the product's bias $b g$ (where it
    reads a concatenation of products along the channels, each product takes the gain of
    its own channels); the norm keeps $\mu g$, $\sigma^2 g^2$, $\gamma' = \sqrt{\sigma^2
    g^2+\varepsilon}$ and $\beta$. Without a scale the variance becomes $1-\varepsilon$.
    A norm that products alone read, directly, gives them its gain along their inputs
    and keeps $\mu$, $\sigma^2$, $\gamma' = \sqrt{\sigma^2+\varepsilon}$ and $\beta/g$:
    exact under zero padding, since no shift moves. Folding twice changes nothing. A
    channel whose gain cannot move without an overflow or a division by zero keeps it.

    With `quantizers` of a model that was trained beside its norms it returns
    `(params, quantizers)`: a pinned weight scale is multiplied by $|g|$, so that the
    quantized model stays the same function too. Scales that follow the weight do so again.

    With `with_report` also a Table: each norm, what it was folded into, from which
    `side` of that, or why it was skipped.

    Both the norm and the product must be selected in `graph`.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: quantizers whose scales follow the weights into which a gain moves; default
            None.
        with_report: whether a `Table` is returned as well; default False.

    Returns:
        The folded tree; with `quantizers` also these, and with `with_report` also the table.

    Raises:
        ValueError: where the statistics of a norm are constants, come from the batch or are
            missing in `params`, where a norm that `graph.only` named cannot be folded, and
            where a pinned scale cannot follow because it is one for the whole tensor.

    >>> params = jm.fold_batch_norm(params, graph)
    >>> params, quantizers = jm.fold_batch_norm(params, graph, quantizers=quantizers)
    """
    graph, leaves = fitted(params, graph, CALLER)
    check_flags(CALLER, with_report=with_report)
    if quantizers is not None:
        check_quantizers(quantizers, graph, CALLER)
    plans = [plan_of(graph, node) for node in graph.nodes if node.kind == "norm"]
    for plan in plans:
        _check(graph, plan, leaves)
    used = {name: leaves[name] for p in plans if p.why is None for name in p.parameters}

    pinned = pinned_weights(quantizers)

    def solve(used: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        work, kept = _Work(used), {}
        for side in ("before", "after"):
            for plan in plans:
                if plan.why is None and plan.side == side:
                    kept[plan.node.name] = _fold(work, plan)
        gains = {name: gain for name, gain in work.gains.items() if name in pinned}
        return work.results(), kept, gains

    new, kept, gains = run_once(solve, used)
    _check_overflow(new)
    whole = {name: with_weight(leaves[name], array) for name, array in new.items()}
    results: list[Any] = [replace_leaves(params, whole, caller=CALLER)]
    if quantizers is not None:
        results.append(fold_quantizers(quantizers, gains, CALLER))
    if with_report:
        results.append(_table(plans, kept))
    return results[0] if len(results) == 1 else tuple(results)


# Refusals


def _check(graph: Graph, plan: FoldPlan, leaves: Mapping[str, Any]) -> None:
    name = plan.node.name
    if name in graph.selected:
        _check_statistics(graph, plan, leaves)
    cure, others = "", plan.products
    if others:
        both = ", ".join(map(repr, sorted({name, *others})))
        cure = f"Select both: graph.only({both})."
    check_named(name, plan.why, graph, CALLER, "be folded", others=others, cure=cure)


def _check_statistics(graph: Graph, plan: FoldPlan, leaves: Mapping[str, Any]) -> None:
    name, norm = plan.node.name, plan.norm
    check_stored(plan.node, leaves, CALLER)
    producer = plan.node.inputs[0].node
    layer = norm.scale or norm.bias or (producer and graph[producer].kind == "product")
    if norm.over == "constant" and layer:
        raise ValueError(
            f"jaxmet.{CALLER}: the statistics of norm {name!r} are constants that "
            "apply closes over, so what folding has to change is not in the tree. Trace "
            "a function of the whole variables, and pass those:\n"
            "    def apply(variables, x):\n"
            "        return model.apply(variables, x)\n"
            f"Or skip the norm: graph.without({name!r})."
        )


# Folding


class _Work:
    """The leaves that change, in the precision of the arithmetic until the end."""

    def __init__(self, leaves: Mapping[str, Any]):
        self.leaves, self.values, self.dtypes = leaves, {}, {}
        self.gains: dict[str, Array] = {}
        arrays = [leaf for leaf in leaves.values() if _is_array(leaf)]
        wide = any(leaf.dtype == np.float64 for leaf in arrays)
        wide = wide and xp.asarray(0.0).dtype == np.float64
        self.dtype = np.dtype(np.float64 if wide else np.float32)

    def read(self, name: str) -> Array:
        """A parameter in the precision of the arithmetic."""
        if name not in self.values:
            leaf = self.leaves[name]
            array = dense(leaf)
            if not (_is_array(array) and jnp.issubdtype(array.dtype, jnp.floating)):
                raise ValueError(
                    f"jaxmet.{CALLER}: parameter {name!r} is a {type(array).__name__} "
                    f"of {leaf.dtype}, into which no gain can be folded. Fold before "
                    "factorizing and before quantizing to integers."
                )
            array = xp.asarray(array)
            self.dtypes[name] = array.dtype
            self.values[name] = array.astype(self.dtype)
        return self.values[name]

    def write(self, name: str, value: Array) -> None:
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
    return isinstance(leaf, Array)


def _fold(work: _Work, plan: FoldPlan) -> Array:
    """Move the gain of one norm; returns which channels keep it."""
    norm, roles = plan.norm, roles_of(plan.norm)
    old = {role: work.read(name).reshape(plan.sizes) for role, name in roles.items()}
    none = xp.zeros_like(old["variance"])
    given: dict[str, Any] = {"mean": none, "scale": None, "bias": none, **old}
    variance = roles["variance"]
    stored = work.dtypes[variance], work.dtypes[roles.get("scale", variance)]
    move = gain_before if plan.side == "before" else gain_after
    weight = statistics_weight(norm, work.leaves, work.dtype)
    moved = move(**given, epsilon=norm.epsilon, stored=stored, weight=weight)
    for role, name in roles.items():
        work.write(name, getattr(moved, role))
    for place in plan.places:
        kernel = work.read(place.parameter)
        factor = place.spread(moved.factor, kernel.shape)
        work.write(place.parameter, kernel * factor)
        before = work.gains.get(place.parameter)
        work.gains[place.parameter] = factor if before is None else before * factor
    return moved.kept


# The report


def _note(norm: Norm, kept: Array) -> str | None:
    notes = []
    if norm.scale is None:
        notes.append("no scale: its variance became 1 − epsilon")
    if is_concrete(kept) and (count := int(xp.sum(kept))):
        notes.append(f"{count} of {kept.size} channels keep their gain")
    return "; ".join(notes) or None


def _table(plans: Sequence[FoldPlan], kept: Mapping[str, Array]) -> Table:
    rows = [
        (p.node.name, listed(p.products), p.side, _note(p.norm, kept[p.node.name]))
        if p.why is None
        else (p.node.name, None, None, skipped(p.why))
        for p in plans
    ]
    columns = zip(*rows, strict=True) if rows else ((),) * 4
    names = ("norm", "into", "side", "note")
    return Table(
        dict(zip(names, columns, strict=True)),
        title=f"{len(kept)} of {len(plans)} norms folded",
    )
