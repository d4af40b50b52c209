"""Channels that matter least, removed from everything that makes or reads them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.node import Node
from jaxmet.layers.arguments import key_of
from jaxmet.layers.asked_ratios import asked_for
from jaxmet.layers.eligibility import skipped
from jaxmet.layers.grams import grams, unmasked
from jaxmet.layers.once import run_once
from jaxmet.transforms.prune.coupled_channels import (
    CoupledChannels,
    bundles_of,
    channel_along,
    refused,
)
from jaxmet.transforms.prune.prune_report import report, whole_before
from jaxmet.transforms.prune.pruned_leaves import without_channels
from jaxmet.transforms.prune.refit import (
    SELECTIONS,
    Selection,
    read_by,
    refit_consumers,
)
from jaxmet.transforms.prune.select_channels import (
    consumers_of,
    kept_counts,
    left_of,
    removal,
)
from jaxmet.transforms.prune.uniform_ratio import check_one_of, ratio_for_macs
from jaxmet.tree.batches import as_batches, check_batch_functions
from jaxmet.tree.checks import check_choices, check_counts, check_flags, is_concrete
from jaxmet.tree.named_leaves import replace_leaves
from jaxmet.tree.table import Table
from jaxmet.tree.types import P

CALLER = "prune"


@overload
def prune(
    params: P,
    graph: Graph,
    ratios: float | Mapping[str, float] | None = ...,
    *,
    macs: float | None = ...,
    batches: Any = ...,
    selection: Selection | None = ...,
    coupled: bool = ...,
    multiple: int = ...,
    rows: int | None = ...,
    key: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[False] = False,
) -> P: ...
@overload
def prune(
    params: P,
    graph: Graph,
    ratios: float | Mapping[str, float] | None = ...,
    *,
    macs: float | None = ...,
    batches: Any = ...,
    selection: Selection | None = ...,
    coupled: bool = ...,
    multiple: int = ...,
    rows: int | None = ...,
    key: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[True],
) -> tuple[P, Table]: ...
def prune(
    params: Any,
    graph: Graph,
    ratios: float | Mapping[str, float] | None = None,
    *,
    macs: float | None = None,
    batches: Any = None,
    selection: Selection | None = None,
    coupled: bool = True,
    multiple: int = 1,
    rows: int | None = None,
    key: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
    with_report: bool = False,
) -> Any:
    """Remove channels: the leaves become smaller, and the model computes less.

    `ratios` is one number for all layers or one per layer: the share of its input channels that
    a layer keeps, which is its cost afterwards over its cost before as long as its outputs
    stay. Whoever makes these channels makes fewer: products, depthwise convolutions, norms
    and biases in between lose them too, so the network's own ratio is lower (`jm.cost`).
    A layer that reads channels along two axes (heads and what each holds) keeps the root of
    it of both. With `macs` in place of `ratios` one ratio for all layers is found: the largest, in
    128ths, with which at most this share of the multiplications is left, counted for the inputs of
    the trace. (`jm.select_ratios` gives each layer its own.) Channels that additions tie go
    together from all that make or read them, or with `coupled=False` not at all. Where several
    layers read the same channels, the largest of their ratios counts.

    Leaves become `Compressed` with what `Pruned` left, which `jm.lift` and `jm.simulate`
    run; the graph serves the new tree too. It computes what the dense model does with zeros
    in place of all that is gone (`jm.densify`). Where an operation has no rule for
    fewer channels it gets whole arrays, with a note in the report. Nothing is removed inside
    loops and branches. A layer that `graph.without` leaves out makes all its channels; of
    those that it reads with others it loses what they lose.

    `selection` says which channels go: 'magnitude', those that are read with the smallest
    weights (the default without data); 'obs', with `batches`, one after the other the one
    whose loss the others can make good for best (the default with data); 'lasso', those
    that one factor a channel does best without. With `batches` each layer is then refitted,
    weights and bias, to what it made of all channels: least squares on the Gram matrix of
    its inputs in the model as it is, from at most `rows` rows per batch, drawn by `key` (by
    default `jax.random.key(0)`), in other positions of each batch; `mask`, a function of a
    batch, says where its values count, as in `jm.calibrate`. A layer that is no
    single product of a matrix is judged by its weights and not refitted, with a note.

    With `with_report` also a Table: the channels by the first layer that makes them, how
    many are kept, who makes and who reads them, the relative error of the layers that were
    refitted, or why they were skipped.

    He et al., [Channel Pruning for Accelerating Very Deep Neural
    Networks](https://arxiv.org/abs/1707.06168), ICCV 2017; Frantar and Alistarh, [Optimal
    Brain Compression](https://arxiv.org/abs/2208.11580), NeurIPS 2022.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        ratios: the share of its input channels that a layer keeps, in (0, 1]: one number for
            all layers, or one per layer by name.
        macs: the share of its multiplications that the network keeps, in (0, 1], in place of
            `ratios`.
        batches: data for the choice and the refit; default None: by magnitude, without a refit.
        selection: 'magnitude', 'lasso' or 'obs'; default None: 'magnitude' without data, 'obs'
            with data.
        coupled: whether channels that several layers produce may go; default True.
        multiple: ranks or channel counts are rounded up to a multiple of this; default 1.
        rows: how many rows of each layer's inputs are used per batch at most; default None:
            64 for each input of the layer, at most 65,536.
        key: the `jax.random.key` from which all random numbers come; default
            `jax.random.key(0)`.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        progress: whether a progress bar is shown; default True.
        with_report: whether a `Table` is returned as well; default False.

    Returns:
        The tree with fewer channels; with `with_report` also the table, one row per group of
        channels.

    Raises:
        ValueError: for ratios outside (0, 1], for both or neither of `ratios` and `macs`, for a
            share of `macs` out of reach, for names of layers that are not there or whose
            channels cannot be removed, and for traced parameters: which channels stay decides
            about shapes.

    >>> params = jm.prune(params, graph, macs=0.5, batches=batches)
    >>> quantizers = jm.calibrate(params, graph, batches)
    """
    graph, leaves = fitted(params, graph, CALLER)
    check_one_of(ratios, macs, CALLER)
    selection = _selection(selection, batches)
    check_counts(CALLER, multiple=multiple)
    check_counts(CALLER, optional=True, rows=rows)
    check_flags(CALLER, coupled=coupled, progress=progress, with_report=with_report)
    key = key_of(key, CALLER)
    check_batch_functions(CALLER, inputs, mask)
    _check_concrete(leaves)
    bundles = bundles_of(graph)
    why = _why(graph, bundles, coupled)
    free = [b for b in bundles if refused(b, coupled) is None]
    if macs is not None:
        able = [name for name, reason in why.items() if reason is None]
        ratios = ratio_for_macs(
            params, graph, leaves, free, able, macs, multiple, CALLER
        )
    asked = asked_for(ratios, why, graph, CALLER)
    keep = {b.index: b.size for b in bundles}
    keep |= kept_counts(graph, free, asked, multiple)
    chosen = [b for b in bundles if keep[b.index] < b.size]
    read = None
    if batches is not None:
        read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
    lost: dict[str, str] = {}
    names = {name for b in chosen for name in b.consumers}
    seen: Mapping[str, Any] = {}
    if read is not None:
        seen = grams(
            graph,
            params,
            read,
            names,
            caller=CALLER,
            key=key,
            rows=rows,
            progress=progress,
            lost=lost,
        )

    def chose(
        leaves: Mapping[str, Any], seen: Mapping[str, Any]
    ) -> tuple[dict[int, np.ndarray], dict[str, Any], dict[str, float]]:
        consumers = consumers_of(graph, names, leaves, seen)
        masks: dict[int, np.ndarray] = {}
        for bundle in chosen:
            count = keep[bundle.index]
            order = removal(graph, leaves, bundle, consumers, selection, count)
            masks |= dict.fromkeys(bundle.indices, left_of(order, count))
        work, errors = refit_consumers(consumers, masks, leaves)
        left = without_channels(graph, work, masks)
        # All else stays the very array that it is.
        return masks, {n: x for n, x in left.items() if x is not leaves[n]}, errors

    masks, found, errors = run_once(chose, leaves, seen)
    result = replace_leaves(params, found, caller=CALLER)
    if not with_report:
        return result
    before = whole_before(graph, result, masks)

    def notes(b: CoupledChannels) -> list[str]:
        why = refused(b, coupled)
        lone = [n for n in b.consumers if seen and n not in errors and b in chosen]
        whole = dict.fromkeys(n for i in b.indices for n in before.get(i, ()))
        return [
            *filter(None, [skipped(why)]),
            *(f"not refitted: {n!r} is no single matrix" for n in lone),
            *(f"{n!r}: {unmasked(lost[n])}" for n in b.consumers if n in lost),
            *(f"whole arrays before {n}" for n in whole),
        ]

    return result, report(bundles, keep, errors, notes, caller=CALLER)


def _selection(selection: Selection | None, batches: Any) -> Selection:
    if selection is None:
        return "magnitude" if batches is None else "obs"
    check_choices(CALLER, selection=(selection, SELECTIONS))
    if batches is None and selection != "magnitude":
        raise ValueError(
            f"jaxmet.{CALLER}: selection {selection!r} looks at data. Give batches=, or "
            "use selection='magnitude'."
        )
    return selection


def _check_concrete(leaves: Mapping[str, Any]) -> None:
    traced = [
        n for n, x in leaves.items() if not all(map(is_concrete, jax.tree.leaves(x)))
    ]
    if traced:
        raise ValueError(
            f"jaxmet.{CALLER}: parameter {traced[0]!r} is traced. Which channels stay decides "
            "about shapes, so prune outside of jax.jit."
        )


def _why(
    graph: Graph, bundles: Sequence[CoupledChannels], coupled: bool
) -> dict[str, str | None]:
    """For each layer why none of the channels that it reads can be removed, or None."""
    found: dict[str, str | None] = {}
    for node in graph.layers:
        found[node.name] = _why_of(graph, node, bundles, coupled)
    return found


def _why_of(
    graph: Graph, node: Node, bundles: Sequence[CoupledChannels], coupled: bool
) -> str | None:
    layouts = [m.layout for m in read_by(graph, node.name)]
    reads = [b for b in bundles if node.name in b.consumers]
    reads = [
        b
        for b in reads
        if any((channel_along(x, b.indices) >= 0).any() for x in layouts)
    ]
    if not reads:
        downstream = [n for b in bundles if node.name in b.through for n in b.consumers]
        if downstream:
            return (
                "it makes of each channel what another layer reads, and loses those that "
                f"{downstream[0]!r} does without. Give that one a ratio"
            )
        return "it reads no channels that a layer makes"
    whys = [refused(b, coupled) for b in reads]
    return None if None in whys else whys[0]
