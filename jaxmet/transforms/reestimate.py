"""Batch norms' statistics measured again: after training, pruning or rounding."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.node import Node, Norm
from jaxmet.engine.run.replay import Hook, Run
from jaxmet.layers.arguments import check_keywords
from jaxmet.layers.eligibility import (
    NOT_SELECTED,
    SEVERAL_AXES,
    check_named,
    skipped,
    why_looped,
    why_shared,
)
from jaxmet.layers.fake_quantized import fake_quantize_params
from jaxmet.layers.folds.norm_parameters import (
    check_mode,
    check_stored,
    statistics_weight,
)
from jaxmet.layers.grams import unmasked
from jaxmet.layers.lockstep import Copy, Live, Positions, Where
from jaxmet.numerics.moments import Measured, measure, merge
from jaxmet.numerics.norm import norm_gain
from jaxmet.tree.batches import as_batches
from jaxmet.tree.checks import check_choices, check_flags, is_concrete
from jaxmet.tree.named_leaves import replace_leaves
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.types import P, Store

CALLER = "reestimate_batch_norm"


@overload
def reestimate_batch_norm(
    params: P,
    graph: Graph,
    batches: Any,
    *,
    quantizers: Quantizers | None = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    store: Store = ...,
    progress: bool = ...,
    with_report: Literal[False] = False,
    **kwargs: Any,
) -> P: ...
@overload
def reestimate_batch_norm(
    params: P,
    graph: Graph,
    batches: Any,
    *,
    quantizers: Quantizers | None = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    store: Store = ...,
    progress: bool = ...,
    with_report: Literal[True],
    **kwargs: Any,
) -> tuple[P, Table]: ...
def reestimate_batch_norm(
    params: Any,
    graph: Graph,
    batches: Any,
    *,
    quantizers: Quantizers | None = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    store: Store = "host",
    progress: bool = True,
    with_report: bool = False,
    **kwargs: Any,
) -> Any:
    """The statistics of every batch norm, measured over `batches` and put in the tree.

    Mean and variance are those of all values of a channel over all batches: within them
    and between them, whatever their sizes, divided by the number of values. Norms are
    measured one after the other, each after those already measured, so that afterwards
    each stores the moments of what it really reads on this data in inference.

    One float pass over the data: the model runs in pieces, each over all batches before the
    next one, and the values between two pieces are kept for all batches, on the `'host'` or
    on the `'device'` (`store`). So the memory it takes is that of the widest place of the
    network, for all of the data.

    A folded norm is measured as well. It then has a gain again wherever its old variance
    was not that of the data, as the same norm would have had before folding; the report
    says so, and `fold_batch_norm` moves it once more.

    With `quantizers` each norm is measured in the quantized model, weights and activations
    quantized: what training beside the norms, unfolded, wants before it folds them.

    `inputs` picks from a batch what the model takes, `mask` says of it where its values count,
    as in `jm.calibrate`: padding enters no mean and no variance; keyword arguments go to the
    model. With `with_report` also a Table: how far each norm's statistics moved, or why it was
    skipped. Norms must be selected in `graph`.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        batches: `jm.batched(images)`, or any iterable of batches that can be read again.
        quantizers: measure each norm in this quantized model; default None: in float.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        store: where values between layers are kept, 'host' (the default) or 'device'.
        progress: whether a progress bar is shown; default True.
        with_report: whether a `Table` is returned as well; default False.
        **kwargs: keyword arguments for the model.

    Returns:
        The tree with new statistics; with `with_report` also the table, one row per norm.

    Raises:
        ValueError: for norms that compute their statistics from the batch or whose statistics
            are not in the tree, where `graph.only` named a norm that cannot be measured, and
            where a norm reads NaN or infinity.

    >>> params = jm.reestimate_batch_norm(params, graph, jm.batched(images))
    """
    graph, leaves = fitted(params, graph, CALLER)
    check_keywords(kwargs, graph, params, CALLER)
    check_choices(CALLER, store=(store, get_args(Store)))
    check_flags(CALLER, progress=progress, with_report=with_report)
    if quantizers is not None:
        check_are_quantizers(quantizers, CALLER)
    left = {n.name: why for n in _norms(graph) if (why := _unfit(graph, n, leaves))}
    for name, why in left.items():
        check_named(name, why, graph, CALLER, "be measured")
    norms = [n for n in _norms(graph) if n.name not in left]
    read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
    rows = [{"norm": n, "note": skipped(why)} for n, why in left.items()]
    if norms:
        quantizers = quantizers or Quantizers()
        # Weights do not change while norms are measured, so they are rounded once.
        rounded = fake_quantize_params(params, quantizers)
        before = _before(graph, norms)
        cuts = tuple(cut for cut in before.values() if cut is not None)
        copy = Copy(
            CALLER, graph, rounded, cuts, kwargs, store == "host", quantizers, both=True
        )
        positions = Positions(graph, rounded, before, kwargs)
        for batch in read:
            copy.read(batch)
            positions.read(batch)
        stored: dict[str, Any] = {}
        for node in tqdm(norms, desc=CALLER, disable=not progress):
            moments = _moments(copy, positions, before[node.name], node)
            new, row = _stored(node, leaves, moments)
            if node.name in positions.lost:
                why = unmasked(positions.lost[node.name])
                row["note"] = "; ".join(filter(None, (row.get("note"), why)))
            copy.params = replace_leaves(copy.params, new, caller=CALLER)
            stored |= new
            rows.append(row)
        params = replace_leaves(params, stored, caller=CALLER)
    return (params, _table(rows)) if with_report else params


# What can be measured


def _norms(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.kind == "norm" and n.norm is not None]


def _unfit(graph: Graph, node: Node, leaves: Mapping[str, Any]) -> str | None:
    """Why a norm is skipped; refused where its statistics are not those of the tree."""
    norm = node.norm
    assert norm is not None
    if node.name not in graph.selected:
        return NOT_SELECTED
    check_mode(node, CALLER)
    if (why := norm.why_kept()) is not None:
        return why
    if norm.mean is None or norm.variance is None:
        return "it stores no mean" if norm.mean is None else "it stores no variance"
    statistics = (norm.mean, norm.variance)
    if (why := why_looped(node) or why_shared(node, statistics)) is not None:
        return why
    check_stored(node, leaves, CALLER)
    return SEVERAL_AXES if len(node.features) > 1 else None


# Measuring


def _before(graph: Graph, norms: Sequence[Node]) -> dict[str, str | None]:
    """By norm the last node before it after which the program can be cut, if there is one."""
    names = [n.name for n in graph.nodes if not n.loops]
    before = dict(zip(names, [None, *names[:-1]], strict=True))
    return {norm.name: before[norm.name] for norm in norms}


def _moments(copy: Copy, positions: Positions, cut: str | None, node: Node) -> Measured:
    """The moments of what a norm reads, over all batches, which go on to the cut before it."""
    piece = 0 if cut is None else copy.order.index(cut) + 1
    programs: dict[Any, Any] = {}
    total: Measured | None = None
    for i, (kind, live) in enumerate(copy.lives):
        own = copy.params, copy.quantizers
        if piece:
            live = copy.step(kind, piece - 1)(*own, live, None)
            copy.put(i, live)
        if kind not in programs:
            measured = functools.partial(_measured, copy, kind, piece, node)
            programs[kind] = jax.jit(measured)
        where = positions.batches[i].get(node.name)
        found = programs[kind](*own, live, where)
        total = found if total is None else merge(total, found)
    assert total is not None
    return total


def _measured(
    copy: Copy,
    kind: Any,
    piece: int,
    norm: Node,
    params: Any,
    quantizers: Any,
    live: Live,
    where: Where | None,
) -> Measured:
    """The moments of what a norm reads in one piece; what they do not need is dropped."""

    def watch(own: Hook) -> Hook:
        def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
            result, _ = own(node, run, operands)
            if node.name != norm.name:
                return result, None
            counts = None if where is None else where.operand
            read = operands[0]
            if not jnp.issubdtype(read.dtype, jnp.floating):  # as pixels may be
                read = read.astype(result.dtype)
            return result, measure(read, node.features, where=counts)

        return hook

    observed = copy.observer(kind, piece, watch)
    return observed(params, quantizers, live, None)[norm.name]


# Storing


def _stored(
    node: Node, leaves: Mapping[str, Any], found: Measured
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A norm's new leaves, and what the report says of it."""
    norm = node.norm
    assert norm is not None and norm.mean is not None and norm.variance is not None
    old = [jnp.asarray(leaves[n]) for n in (norm.mean, norm.variance)]
    weight = statistics_weight(norm, leaves, found.moments.mean.dtype)
    values = (found.moments.mean / weight, found.moments.variance / weight)
    new = [v.reshape(o.shape).astype(o.dtype) for v, o in zip(values, old, strict=True)]
    row: dict[str, Any] = {"norm": node.name}
    if all(is_concrete(v) for v in (*new, *old)):
        if not all(bool(jnp.all(jnp.isfinite(v))) for v in new):
            raise ValueError(
                f"jaxmet.{CALLER}: norm {node.name!r} reads NaN or infinity. Either a batch "
                "holds them, or the model overflows there: clean the data, or measure in "
                "float32."
            )
        weight = statistics_weight(norm, leaves, old[0].dtype)
        row |= _moved([v * weight for v in old], [v * weight for v in new])
        if _is_identity(norm, leaves, old[1]):
            row["note"] = "was folded: fold it again"
    return {norm.mean: new[0], norm.variance: new[1]}, row


def _moved(old: Sequence[jax.Array], new: Sequence[jax.Array]) -> dict[str, float]:
    """How far the mean moved, in old standard deviations, and by what the variance grew."""
    (mean, variance), (now, spread) = old, new
    alive = variance > 0
    sigma = jnp.sqrt(jnp.where(alive, variance, 1.0))
    apart = jnp.where(alive, jnp.abs(now - mean) / sigma, 0.0)
    ratio = jnp.where(alive, spread / jnp.where(alive, variance, 1.0), 1.0)
    return {
        "mean moved": float(jnp.max(apart)),
        "variance min": float(jnp.min(ratio)),
        "variance max": float(jnp.max(ratio)),
    }


def _is_identity(norm: Norm, leaves: Mapping[str, Any], variance: jax.Array) -> bool:
    """Whether a norm's gain was one, as folding leaves it."""
    scale = None
    if norm.scale is not None:
        scale = jnp.asarray(leaves[norm.scale]).reshape(-1).astype(variance.dtype)
    variance = variance * statistics_weight(norm, leaves, variance.dtype)
    gain = norm_gain(variance.reshape(-1), scale, norm.epsilon)
    near = 4 * float(jnp.finfo(variance.dtype).eps)
    return bool(jnp.all(jnp.abs(gain - 1.0) <= near))


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    done = sum("mean moved" in row for row in rows)
    columns = ("norm", "mean moved", "variance min", "variance max", "note")
    return Table(
        {c: [row.get(c) for row in rows] for c in columns},
        title=f"{done} of {len(rows)} norms measured",
    )
