r"""High biases absorbed: what a rectifier never cuts off, moved into the layer after it.

The norm before a rectifier knows mean and spread of each channel. A channel that lies far
above zero loses a constant there, and every product that reads it gets back what the
constant was worth to it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np

from jaxmet.engine.flow.bias_targets import BiasTargets
from jaxmet.engine.graph.channel_groups import Layout, Member
from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.node import Node, Norm
from jaxmet.layers.channels import how_often, split, spread
from jaxmet.layers.eligibility import (
    NO_BIAS,
    NO_CARRIER,
    SEVERAL_AXES,
    check_floats,
    check_named,
    of,
    skipped,
    why_frozen,
    why_looped,
    why_outside,
    why_shared,
)
from jaxmet.layers.layer import by_channel
from jaxmet.layers.leaf_math import as_entered, shifted
from jaxmet.layers.moments import MomentNetwork
from jaxmet.layers.once import run_once
from jaxmet.numerics import xp
from jaxmet.numerics.absorb import absorbed, shift_after
from jaxmet.numerics.moments import Moments
from jaxmet.numerics.xp import Array
from jaxmet.tree.checks import check_flags, is_concrete
from jaxmet.tree.leaves import Compressed, is_compressed
from jaxmet.tree.named_leaves import replace_leaves
from jaxmet.tree.table import Table
from jaxmet.tree.types import P

CALLER = "absorb_bias"
RECTIFIERS = ("relu", "leaky_relu", "prelu")
COLUMNS = ("rectifier", "norm", "into", "padded", "channels", "largest", "note")


@overload
def absorb_bias(
    params: P,
    graph: Graph,
    *,
    n_sigma: float = ...,
    with_report: Literal[False] = False,
) -> P: ...
@overload
def absorb_bias(
    params: P, graph: Graph, *, n_sigma: float = ..., with_report: Literal[True]
) -> tuple[P, Table]: ...
def absorb_bias(
    params: Any, graph: Graph, *, n_sigma: float = 3.0, with_report: bool = False
) -> Any:
    r"""Move constants out of high channels into the layers that read them.

    With mean $\mu$ and standard deviation $\sigma$ of what a norm with stored statistics
    makes, folded or not, $c = \max(0, \mu - n\sigma)$ per channel. After it stands a
    rectifier: ReLU, leaky ReLU, or a clip at zero, whose upper bound then is less by c too
    (the leaf that carries it becomes `Compressed`). The norm's bias loses c, so its
    statistics stay true, and each product that reads the channel gets $\sum W c$ into its
    bias, or taken off the mean of the norm after it. A convolution that pads has lost c
    where its inputs are but not where its padding is: its kernel becomes `Compressed` and
    says that padding holds −c, which is exact at every border.

    The function stays wherever a value before the rectifier is at least c, which a normal
    one is in 99.865 % of cases at `n_sigma=3`. Activation ranges become smaller: calibrate
    afterwards. A channel with nothing to absorb stays unchanged; where no channel of a
    rectifier has anything, so do all leaves (under `jax.jit`, where that cannot be seen,
    leaves become `Compressed` all the same).

    With `with_report` also a Table: each rectifier, the norm and the products on both sides
    of it, how many channels gave something and how much, or why it was skipped.

    Norm and products must be selected in `graph`.

    Nagel et al., [Data-Free Quantization Through Weight Equalization and Bias
    Correction](https://arxiv.org/abs/1906.04721), ICCV 2019, section 4.1.3.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        n_sigma: how many standard deviations below its mean a channel is taken to reach; at
            least 0, default 3.0.
        with_report: whether a `Table` is returned as well; default False.

    Returns:
        The new tree, of the same structure; with `with_report` also the table.

    Raises:
        ValueError: unless `n_sigma` is a number of at least zero, and where `graph.only`
            named a norm or rectifier whose channels cannot give anything.

    >>> params = jm.absorb_bias(jm.equalize(params, graph), graph)
    """
    _check_n_sigma(n_sigma)
    check_flags(CALLER, with_report=with_report)
    graph, leaves = fitted(params, graph, CALLER)
    plans = [_plan(graph, n) for n in graph.nodes if n.kind == "activation"]
    plans = [plan for plan in plans if plan is not None]
    for plan in plans:
        _check(graph, plan, leaves)
    rows: list[dict[str, Any]] = []

    def solve(leaves: Mapping[str, Any]) -> dict[str, Any]:
        work = dict(leaves)
        network = MomentNetwork(graph, leaves)
        rows.extend(_absorb(plan, network, work, n_sigma) for plan in plans)
        return {k: v for k, v in work.items() if v is not leaves[k]}

    arrays = {name: leaf for name, leaf in leaves.items() if hasattr(leaf, "dtype")}
    result = replace_leaves(params, run_once(solve, arrays), caller=CALLER)
    return (result, _table(rows)) if with_report else result


def _check_n_sigma(n_sigma: Any) -> None:
    number = isinstance(n_sigma, int | float) and not isinstance(n_sigma, bool)
    if not number or not math.isfinite(n_sigma) or n_sigma < 0:
        raise ValueError(
            f"jaxmet.{CALLER}: n_sigma is {n_sigma!r}. Give a number from zero on: how many "
            "standard deviations of each channel stay above the rectifier's zero, 3.0 "
            "by default."
        )


# What can be moved where


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """A product after a rectifier, and the parameter that gets the constant's worth."""

    product: Node
    members: tuple[Member, ...]
    place: str
    sign: int  # +1: a bias; -1: the mean of the norm after it

    @property
    def parameter(self) -> str:
        return self.product.kernel

    @property
    def inputs(self) -> Layout:
        return next(m.layout for m in self.members if m.role == "in")

    @property
    def pads(self) -> bool:
        return self.product.convolution is not None and self.product.convolution.pads


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One rectifier: the norm before it and the products after, or why nothing moves."""

    rectifier: Node
    norm: Node
    consumers: tuple[_Consumer, ...] = ()
    bounds: str | None = None  # the parameter whose leaf states the upper bound
    why: str | None = None

    @property
    def of(self) -> Norm:
        assert self.norm.norm is not None
        return self.norm.norm


def _plan(graph: Graph, node: Node) -> _Plan | None:
    """None for an activation that is no rectifier of a norm."""
    clip = node.bounds is not None and node.bounds[0] == 0
    if not (clip or node.function in RECTIFIERS) or len(node.inputs) != 1:
        return None
    edge = node.inputs[0]
    if edge.node is None or graph[edge.node].kind != "norm":
        return None
    norm = graph[edge.node]
    why = _unfit(graph, norm, node)
    if why is not None:
        return _Plan(node, norm, why=why)
    targets = _targets(node)
    assert targets is not None
    consumers = []
    for name in targets.products:
        consumer = _consumer(graph, norm, graph[name])
        if isinstance(consumer, str):
            return _Plan(node, norm, why=consumer)
        consumers.append(consumer)
    bounds = None
    if clip:
        assert node.carrier is not None
        weight = graph[node.carrier].weight
        bounds = weight.name if weight is not None else None
    return _Plan(node, norm, tuple(consumers), bounds)


def _targets(rectifier: Node) -> BiasTargets | None:
    """The products that a constant reaches that the rectifier's channels lose."""
    activation = rectifier.activation
    return activation.bias_targets if activation is not None else None


def _unfit(graph: Graph, node: Node, rectifier: Node) -> str | None:
    """Why a norm cannot give anything through its rectifier."""
    norm, targets = node.norm, _targets(rectifier)
    assert norm is not None
    none = NO_BIAS if norm.bias is None or norm.variance is None else None
    kept = norm.why_kept() or none or why_looped(node) or why_shared(node)
    if (why := of(node.name, kept) or why_looped(rectifier)) is not None:
        return why
    if rectifier.inputs[0].moves:
        return f"{rectifier.inputs[0].moves[-1]} between it and its norm"
    if node.only_consumers != (rectifier.name,):
        return f"it is not alone in reading {node.name!r}"
    if (why := why_outside(graph, node.name)) is not None:
        return why
    if targets is None or targets.stopped is not None:
        return targets.stopped if targets is not None else "nothing reads it"
    if rectifier.bounds is not None and rectifier.function == "clip":
        return _unbounded(graph, rectifier, node)
    return None


def _unbounded(graph: Graph, clip: Node, norm: Node) -> str | None:
    """Why the upper bound of a clip cannot be less for some channels."""
    carrier = graph[clip.carrier] if clip.carrier is not None else None
    if carrier is None or carrier.weight is None or carrier.weight.name is None:
        return NO_CARRIER
    out = _only(graph, carrier, "out", carrier.weight.name)
    mine = _only(graph, norm, "variance")
    if out is None or mine is None or out.layout != mine.layout:
        return SEVERAL_AXES
    return None


def _consumer(graph: Graph, norm: Node, product: Node) -> _Consumer | str:
    """How a product takes the constant, or why it does not."""
    name = product.name
    why = why_outside(graph, name) or of(name, why_frozen(product))
    if why is not None:
        return why
    if product.convolution is not None:
        if any(d != 1 for d in product.convolution.input_dilation):
            return f"{name} has a dilated input: its windows do not weigh alike"
    into = _only(graph, product, "in")
    mine = _only(graph, norm, "variance")
    if into is None or mine is None:
        return f"the channels that {name} reads are on no single axis"
    groups = how_often(into.layout)
    if any(groups[g] != 1 for g in how_often(mine.layout)):
        return f"{name} does not read each of the channels once"
    members = tuple(m for m in graph.members if m.node == name)
    if product.bias is not None:
        return _Consumer(product, members, product.bias, 1)
    downstream = product.only_consumers
    after = (
        graph[downstream[0]]
        if downstream is not None and len(downstream) == 1
        else None
    )
    next_norm = after.norm if after is not None else None
    if (
        after is None
        or next_norm is None
        or next_norm.over != "stored"
        or not next_norm.plain
    ):
        return f"{name}: {NO_BIAS}; no norm with stored statistics alone reads it"
    direct = after.inputs[0].moves == () and not after.shared
    out, at = _only(graph, product, "out"), _only(graph, after, "shift", next_norm.mean)
    if not direct or out is None or at is None or out.layout != at.layout:
        return f"{name}: {NO_BIAS}; the norm after it is of other channels"
    if (why := why_outside(graph, after.name)) is not None:
        return f"{name}: {NO_BIAS}; {why}"
    if next_norm.debias is not None:
        return f"{name}: {NO_BIAS}; the norm after it divides its mean by a count"
    assert next_norm.mean is not None
    return _Consumer(product, members, next_norm.mean, -1)


def _only(
    graph: Graph, node: Node, role: str, parameter: str | None = None
) -> Member | None:
    mine = [
        m
        for m in graph.members
        if m.node == node.name
        and m.role == role
        and (parameter is None or m.parameter == parameter)
    ]
    return mine[0] if len(mine) == 1 else None


def _check(graph: Graph, plan: _Plan, leaves: Mapping[str, Any]) -> None:
    """Refuse what was asked for by name, and a tree that lacks what has to change."""
    name, norm = plan.rectifier.name, plan.norm.name
    cure = "Leave the name out of only(), or select both sides."
    given = {"others": (norm,), "cure": cure}
    check_named(name, plan.why, graph, CALLER, "give anything", **given)
    if plan.why is not None:
        return
    norm = plan.of
    parameters = [norm.mean, norm.variance, norm.scale, norm.bias, plan.bounds]
    parameters += [p for r in plan.consumers for p in (r.parameter, r.place)]
    check_floats(leaves, parameters, CALLER, name, "Absorb biases of")


# Moving


def _absorb(
    plan: _Plan, network: MomentNetwork, work: dict[str, Any], n_sigma: float
) -> dict[str, Any]:
    """Change the leaves in `work`; what the report says of it."""
    row: dict[str, Any] = {"rectifier": plan.rectifier.name, "norm": plan.norm.name}
    if plan.why is not None:
        return row | {"note": skipped(plan.why)}
    tensor = network.made_by(plan.norm)
    if isinstance(tensor, str):
        return row | {"note": skipped(tensor)}
    member = _only(network.graph, plan.norm, "variance")
    assert member is not None
    made = [Moments(*(v for v in tensor[g])) for g in _groups(member.layout)]
    every = Moments(*(xp.concatenate(v) for v in zip(*made, strict=True)))
    upper = _upper(plan, work, every.mean)
    c = absorbed(every.mean, every.variance, upper, n_sigma)
    if is_concrete(c):
        row |= {"channels": int(xp.sum(c > 0)), "largest": float(xp.max(c))}
        if not row["channels"]:
            return row | {"note": "nothing to absorb"}
    assert plan.of.bias is not None
    work[plan.of.bias] = shifted(work[plan.of.bias], -c)
    if plan.bounds is not None:
        leaf = _as_compressed(work[plan.bounds])
        work[plan.bounds] = leaf.replace(upper=(upper - c).astype(_held(leaf, c)))
    by_group = split(member.layout, Moments(c, c, c, c)) or {}
    vectors = {g: x.mean for g, x in by_group.items()}
    for consumer in plan.consumers:
        _take(consumer, vectors, work)
    row["into"] = ", ".join(r.product.name for r in plan.consumers)
    row["padded"] = ", ".join(r.product.name for r in plan.consumers if r.pads) or None
    return row


def _groups(layout: Layout) -> list[int]:
    return list(how_often(layout))


def _upper(plan: _Plan, work: Mapping[str, Any], like: Array) -> Array:
    """The rectifier's upper bound, channel by channel."""
    bounds, stated = plan.rectifier.bounds, None
    if plan.bounds is not None and is_compressed(work[plan.bounds]):
        stated = work[plan.bounds].upper
    own = bounds[1] if bounds is not None else np.inf
    if stated is None:
        return xp.full_like(like, own)
    return xp.broadcast_to(xp.asarray(stated).astype(like.dtype), like.shape)


def _take(
    consumer: _Consumer, vectors: Mapping[int, Array], work: dict[str, Any]
) -> None:
    """Give one product what its inputs lost."""
    leaf = work[consumer.parameter]
    weight = by_channel(consumer.product, leaf)
    lost = spread(consumer.inputs, vectors).astype(weight.dtype)
    worth = shift_after(weight, as_entered(leaf, lost))
    work[consumer.place] = shifted(work[consumer.place], consumer.sign * worth)
    if consumer.pads:
        leaf = _as_compressed(leaf)
        before = leaf.input_offset
        held = xp.zeros_like(lost) if before is None else xp.asarray(before, lost.dtype)
        offset = held - lost
        work[consumer.parameter] = leaf.replace(input_offset=offset)


def _as_compressed(leaf: Any) -> Compressed:
    return leaf if is_compressed(leaf) else Compressed(leaf)


def _held(leaf: Compressed, c: Array) -> Any:
    return c.dtype if leaf.upper is None else leaf.upper.dtype


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    done = sum(row.get("into") is not None for row in rows)
    return Table(
        {c: [row.get(c) for row in rows] for c in COLUMNS},
        title=f"{done} of {len(rows)} rectifiers after a norm gave something",
    )
