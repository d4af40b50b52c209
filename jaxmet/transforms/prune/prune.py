"""Channels that matter least, removed from everything that makes or reads them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np

from jaxmet.engine.channels import indices_of
from jaxmet.engine.expand import scattered_before
from jaxmet.engine.graph import Graph, leaves_of
from jaxmet.engine.node import Node
from jaxmet.transforms.grams import ROWS, Gram, grams
from jaxmet.transforms.prune.bundles import (
    Bundle,
    axes_of,
    bundles_of,
    channel_along,
    left_along,
)
from jaxmet.transforms.prune.leaves import pruned
from jaxmet.transforms.prune.readers import SELECTIONS, Reader, magnitudes
from jaxmet.transforms.ratios import asked_for, check_multiple
from jaxmet.tree.batches import as_batches
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.names import replace_leaves
from jaxmet.tree.table import Table

CALLER = "prune"
COLUMNS = ("channels", "kept", "of", "made by", "read by", "error", "note")


@overload
def prune(
    params: Any,
    graph: Graph,
    ratios: float | Mapping[str, float],
    *,
    batches: Any = ...,
    selection: str | None = ...,
    coupled: bool = ...,
    multiple: int = ...,
    rows: int = ...,
    inputs: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[False] = False,
) -> Any: ...
@overload
def prune(
    params: Any,
    graph: Graph,
    ratios: float | Mapping[str, float],
    *,
    batches: Any = ...,
    selection: str | None = ...,
    coupled: bool = ...,
    multiple: int = ...,
    rows: int = ...,
    inputs: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[True],
) -> tuple[Any, Table]: ...
def prune(
    params: Any,
    graph: Graph,
    ratios: float | Mapping[str, float],
    *,
    batches: Any = None,
    selection: str | None = None,
    coupled: bool = True,
    multiple: int = 1,
    rows: int = ROWS,
    inputs: Callable[[Any], Any] | None = None,
    progress: bool = True,
    with_report: bool = False,
) -> Any:
    r"""Remove channels: the leaves become smaller, and the model computes less.

    `ratios` is one number for all sites or one a site: the share of its input channels that
    a site keeps, which is its cost afterwards over its cost before as long as its outputs
    stay. Whoever makes these channels makes fewer: products, depthwise convolutions, norms
    and biases in between lose them too, so the network's own ratio is lower (`jm.cost`).
    Channels that additions tie are removed together from all that make or read them, or
    with `coupled=False` not at all. Where several sites read the same channels, the largest
    of their ratios counts.

    Leaves become `Compressed` with what `Pruned` left, which `jm.lift` and `jm.simulate`
    run: trace the model again with the new tree. It computes what the dense model does with
    zeros in place of all that is gone (`jm.densify`). Where an operation has no rule for
    fewer channels it gets whole arrays, with a note in the report. Nothing is removed inside
    loops and branches, nor of what a site reads that `graph.without` leaves out.

    `selection` says which channels go: 'magnitude', those that are read with the smallest
    weights (the default without data); 'obs', with `batches`, one after the other the one
    whose loss the others can make good for best (the default with data); 'lasso', those
    that one factor a channel does best without. With `batches` each site is then refitted,
    weights and bias, to what it made of all channels: least squares on the Gram matrix of
    its inputs in the model as it is, from at most `rows` rows a batch. A site that is no
    single product of a matrix is judged by its weights and not refitted, with a note.

    With `with_report` also a Table: the channels by the first site that makes them, how
    many are kept, who makes and who reads them, the relative error of the sites that were
    refitted, or why they were left alone.

    Raises ValueError for ratios outside (0, 1], for names of sites that are not there or
    whose channels cannot be removed, and for traced parameters: which channels stay decides
    about shapes.

    He et al., [Channel Pruning for Accelerating Very Deep Neural
    Networks](https://arxiv.org/abs/1707.06168), ICCV 2017; Frantar and Alistarh, [Optimal
    Brain Compression](https://arxiv.org/abs/2208.11580), NeurIPS 2022.

    >>> params = jm.prune(params, graph, 0.7, batches=batches)
    >>> graph = jm.trace(model.apply, params, images[:1])
    """
    leaves = leaves_of(params, graph, CALLER)
    selection = _selection(selection, batches)
    check_multiple(multiple, CALLER)
    check_multiple(rows, CALLER, "rows")
    _check_concrete(leaves)
    bundles = bundles_of(graph)
    why = _why(graph, bundles, coupled)
    asked = asked_for(ratios, why, graph, CALLER)
    keep = {b.index: b.size for b in bundles}
    for bundle in bundles:
        wanted = [asked[name] for name in bundle.readers if name in asked]
        if wanted and refused(bundle, coupled) is None:
            keep[bundle.index] = kept_at(bundle.size, max(wanted), multiple)
    chosen = [b for b in bundles if keep[b.index] < b.size]
    read = None if batches is None else as_batches(batches, CALLER, inputs=inputs)
    names = {name for b in chosen for name in b.readers}
    seen: Mapping[str, Any] = {}
    if read is not None:
        seen = grams(
            graph, params, read, names, caller=CALLER, rows=rows, progress=progress
        )
    readers = readers_of(graph, names, leaves, seen)
    masks: dict[int, np.ndarray] = {}
    for bundle in chosen:
        order = removal(graph, leaves, bundle, readers, selection, keep[bundle.index])
        mask = np.ones(bundle.size, bool)
        mask[order[: bundle.size - keep[bundle.index]]] = False
        masks |= dict.fromkeys(bundle.indices, mask)
    work, errors = _refit(readers, masks, leaves)
    result = replace_leaves(params, removed(graph, work, masks), caller=CALLER)
    if not with_report:
        return result
    notes: dict[int, list[str]] = {}
    for b in bundles:
        why = refused(b, coupled)
        notes[b.index] = [f"left alone: {why}"] if why else []
    for b in chosen if seen else ():
        lone = [n for n in b.readers if n not in readers]
        notes[b.index] += [f"not refitted: {n!r} is no single matrix" for n in lone]
    before = whole_before(graph, result, masks)
    for b in chosen:
        notes[b.index] += [f"whole arrays before {n}" for n in before.pop(b.index, ())]
    notes_of = {index: "; ".join(n) or None for index, n in notes.items()}
    return result, _table(bundles, keep, errors, notes_of)


def removed(
    graph: Graph, leaves: Mapping[str, Any], masks: Mapping[int, np.ndarray]
) -> dict[str, Any]:
    """The leaves without what the masks take away."""
    sites = {n.weight.name: n for n in graph.nodes if n.weight is not None}
    found = {
        name: pruned(leaves[name], left, sites.get(name))
        for name, left in axes_of(graph.members, masks).items()
    }
    return {n: leaf for n, leaf in leaves.items() if n not in found} | found


def readers_of(
    graph: Graph,
    names: Iterable[str],
    leaves: Mapping[str, Any],
    seen: Mapping[str, Gram],
) -> dict[str, Reader]:
    """What the data say to the sites with these names, as far as they have seen any."""
    found = {n: Reader.of(graph, n, leaves, seen[n]) for n in names if n in seen}
    return {n: reader for n, reader in found.items() if reader is not None}


def removal(
    graph: Graph,
    leaves: Mapping[str, Any],
    bundle: Bundle,
    readers: Mapping[str, Reader],
    selection: str,
    keep: int,
) -> np.ndarray:
    """The channels of a bundle in the order in which they go."""
    known = [readers.get(n) for n in bundle.readers]
    if selection == "obs" and len(known) == 1 and known[0] is not None:
        order = known[0].order(bundle)
        if order is not None:
            return order
    scores = np.zeros(bundle.size)
    for name, reader in zip(bundle.readers, known, strict=True):
        if reader is None or selection == "magnitude":
            scores += magnitudes(graph, name, leaves, bundle)
        else:
            scores += reader.scores(bundle, selection, keep)
    return np.argsort(scores, kind="stable")


def _refit(
    readers: Mapping[str, Reader],
    masks: Mapping[int, np.ndarray],
    leaves: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Leaves in which the readers make good for what they lose, and what they cannot."""
    work, errors = dict(leaves), {}
    for name, reader in readers.items():
        found, error = reader.refitted(reader.left(masks), leaves)
        work |= found
        errors[name] = float(error)
    return work, errors


def kept_at(size: int, ratio: float, multiple: int) -> int:
    """How many of so many channels stay: one at least, rounded up to a multiple."""
    count = max(1, math.floor(size * ratio * (1 + 1e-12)))
    return min(size, -(-count // multiple) * multiple)


def _selection(selection: str | None, batches: Any) -> str:
    if selection is None:
        return "magnitude" if batches is None else "obs"
    if selection not in SELECTIONS:
        raise ValueError(
            f"jaxmet.{CALLER}: selection is {selection!r}. It is one of "
            f"{', '.join(map(repr, SELECTIONS))}: how the channels that go are chosen."
        )
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


def refused(bundle: Bundle, coupled: bool) -> str | None:
    tied = len(bundle.makers) > 1 and not coupled
    return bundle.why or (f"tied: {', '.join(bundle.makers)}" if tied else None)


def _why(
    graph: Graph, bundles: Sequence[Bundle], coupled: bool
) -> dict[str, str | None]:
    """For each site why none of the channels that it reads can be removed, or None."""
    found: dict[str, str | None] = {}
    for node in graph.sites:
        found[node.name] = _why_of(graph, node, bundles, coupled)
    return found


def _why_of(
    graph: Graph, node: Node, bundles: Sequence[Bundle], coupled: bool
) -> str | None:
    layouts = [
        m.layout for m in graph.members if m.node == node.name and m.role == "in"
    ]
    reads = [b for b in bundles if node.name in b.readers]
    reads = [
        b
        for b in reads
        if any((channel_along(x, b.indices) >= 0).any() for x in layouts)
    ]
    if not reads:
        behind = [n for b in bundles if node.name in b.through for n in b.readers]
        if behind:
            return (
                "it makes of each channel what another site reads, and loses those that "
                f"{behind[0]!r} does without. Give that one a ratio"
            )
        return "it reads no channels that a site makes"
    whys = [refused(b, coupled) for b in reads]
    return None if None in whys else whys[0]


def whole_before(
    graph: Graph, pruned: Any, masks: Mapping[int, np.ndarray]
) -> dict[int, list[str]]:
    """By group the operations that get whole arrays of its channels, some of them gone.

    Where it cannot be told whose channels an array has, they count for all groups.
    """
    places: dict[tuple[int, tuple[int, ...]], set[int]] = {}
    for member in graph.members:
        left = left_along(member.layout, masks)
        kept = left.size, tuple(map(int, np.flatnonzero(left)))
        of = indices_of(member.layout) & masks.keys()
        places.setdefault(kept, set()).update(of)
    found: dict[int, dict[str, None]] = {}
    inputs, kwargs = graph.called
    for operation, keep in scattered_before(graph.apply, pruned, inputs, kwargs):
        for _, size, indices in keep:
            for index in places.get((size, indices), masks):
                found.setdefault(index, {})[operation] = None
    return {index: list(names) for index, names in found.items()}


def _table(
    bundles: Sequence[Bundle],
    keep: Mapping[int, int],
    errors: Mapping[str, float],
    notes: Mapping[int, str | None],
) -> Table:
    rows = []
    for b in bundles:
        known = [errors[n] for n in b.readers if n in errors]
        less = keep[b.index] < b.size
        rows.append(
            (
                b.name,
                keep[b.index],
                b.size,
                ", ".join(b.makers) or None,
                ", ".join(b.readers) or None,
                max(known) if less and known else None,
                notes[b.index],
            )
        )
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    count = sum(keep[b.index] < b.size for b in bundles)
    return Table(
        dict(zip(COLUMNS, columns, strict=True)),
        title=f"{CALLER}: {count} of {len(bundles)} groups of channels",
    )
