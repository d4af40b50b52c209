"""Ranges of activations over data: observed batch by batch, then chosen for each quantizer."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.backend.cpu import computed_once
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Counted, Run
from jaxmet.layers.collect import collect
from jaxmet.layers.entering_values import entering_values, input_of
from jaxmet.layers.placement.placement import Placement
from jaxmet.numerics.calibrators import best_range, values_of
from jaxmet.numerics.grid import grid_ends
from jaxmet.numerics.histogram import (
    Histogram,
    Tally,
    histograms,
    merge,
    merge_all,
    tally,
)
from jaxmet.tree.batches import Batches
from jaxmet.tree.checks import check_counts
from jaxmet.tree.config_fields import Settings

Range = tuple[Any, Any]


class Extremes(NamedTuple):
    """The ends of all values: all that 'minmax' needs to know."""

    low: Any
    high: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ObservedRows:
    """The values observed at nodes, one row per node and layer: few arrays for a whole model.

    Where a branch was not taken the ends are +∞ and −∞. `layout` says which nodes these
    are, and the leading axes that loops gave to each.
    """

    value: Extremes | Histogram
    layout: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(
        metadata={"static": True}
    )

    def by_node(self) -> dict[str, Extremes | Histogram]:
        """The rows of each node, on the host."""
        value, start, found = jax.device_get(self.value), 0, {}
        for name, shape in self.layout:
            stop = start + math.prod(shape)
            found[name] = jax.tree.map(
                lambda v, a=start, b=stop, n=shape: v[a:b].reshape((*n, *v.shape[1:])),
                value,
            )
            start = stop
        return found


def observed_ranges(
    graph: Graph,
    params: Any,
    batches: Batches,
    placement: Placement,
    *,
    samples: int | None,
    progress: bool,
    lost: dict[str, str],
    **kwargs: Any,
) -> dict[str, Range]:
    """A finite range for each node that owns a quantizer: one pair per layer in a loop over layers.

    A node whose branch was never taken, or none of whose values counts, has none. A layer that
    showed nothing but zeros has the range of all layers. `lost` gets the nodes of which it is
    not known which values count.
    """
    by_node = dict(placement.activations)
    for name, owner in placement.shared.items():
        by_node[name] = placement.activations[owner]
    for name in placement.sliced:
        del by_node[name]
    watched = _watched(by_node, placement.scaled)
    only_ends = {name: s.calibrator == "minmax" for name, s in watched.items()}
    seen = collect(
        graph,
        params,
        batches,
        _observed(only_ends, samples, placement.caches),
        merge_rows,
        caller="calibrate",
        progress=progress,
        summary=entries_of,
        lost=lost,
        key=(tuple(only_ends.items()), samples, placement.caches),
        **kwargs,
    )
    for name, layers in placement.scaled.items():
        for layer in layers:
            if layer in lost:
                lost[name] = lost[layer]
    ranges = _chosen(_settle(graph, seen, placement), placement.activations)
    return {name: _filled(*ends) for name, ends in ranges.items()}


def check_samples(samples: Any) -> None:
    """Raise unless `samples` is an integer of 1 or more, or None."""
    check_counts("calibrate", optional=True, samples=samples)


def _watched(
    by_node: Mapping[str, Settings], scaled: Mapping[str, tuple[str, ...]]
) -> dict[str, Settings]:
    """What is looked at: results of nodes, or in their place what enters certain layers."""
    found = {name: s for name, s in by_node.items() if name not in scaled}
    for name in by_node.keys() & scaled.keys():
        for layer in scaled[name]:
            key = name if layer == name else input_of(layer)
            found[key] = by_node[name]
    return found


def _observed(
    only_ends: Mapping[str, bool], samples: int | None, caches: Collection[str]
) -> Callable:
    """A hook at these nodes: the ends of all values, or their histogram too.

    Of caches those of values other than zero, which is where nothing was written yet.
    """

    def look(key: str, value: Any, where: Any, run: Run) -> Any:
        wide = jnp.float32 if value.dtype.itemsize < 4 else value.dtype
        values = value.astype(wide)
        if key in caches:
            where = values != 0 if where is None else where & (values != 0)
        if only_ends[key]:
            return extremes(values, where)
        # Another batch is looked at in other positions.
        number = 0 if run.batch is None else run.batch
        return tally(values, samples, where=where, number=number)

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result, found = run(*operands), {}
        entering = input_of(node.name)
        if entering in only_ends:
            where = run.reads[0] if run.reads else None
            found[entering] = look(entering, operands[0], where, run)
        if node.name in only_ends:
            result = computed_once(result)
            found[node.name] = look(node.name, result, run.counts, run)
        return result, found or None

    return hook


def extremes(values: jax.Array, where: Any = None, axis: Any = None) -> Extremes:
    """The smallest and the largest value that counts: +∞ and −∞ where none does."""
    if where is None:
        return Extremes(jnp.min(values, axis), jnp.max(values, axis))
    low = jnp.min(values, axis, where=where, initial=jnp.inf)
    return Extremes(low, jnp.max(values, axis, where=where, initial=-jnp.inf))


def entries_of(statistics: Mapping[str, Any]) -> dict[str, ObservedRows]:
    """What a batch shows, in rows, of hooks that return several values by name."""
    every = [_apart(found) for found in statistics.values()]
    return rows_of({n: value for found in every for n, value in found.items()})


def _apart(found: Any) -> dict[str, Any]:
    """Values by name, each counted where all of them are."""
    if not isinstance(found, Counted):
        return found
    return {n: Counted(v, found.count) for n, v in _apart(found.value).items()}


def rows_of(statistics: Mapping[str, Any]) -> dict[str, ObservedRows]:
    """What a batch shows, in rows; in few arrays for all nodes."""
    kinds: dict[Any, dict[str, Any]] = {}
    for name, found in statistics.items():
        value = _uncounted(found)
        kinds.setdefault((type(value), value.low.dtype), {})[name] = value
    return {
        f"{kind.__name__} {dtype}": ObservedRows(
            _in_rows(kind, [*found.values()]),
            tuple((name, v.low.shape) for name, v in found.items()),
        )
        for (kind, dtype), found in kinds.items()
    }


def _in_rows(kind: type, values: list[Any]) -> Extremes | Histogram:
    if kind is Tally:
        return histograms(values)
    flat = [_flat(v) for v in values]
    return jax.tree.map(lambda *v: jnp.concatenate(v), *flat)


def _flat(value: Any) -> Any:
    """One leading axis for all that loops gave."""
    ndim = np.ndim(value.low)
    return jax.tree.map(lambda v: v.reshape((-1, *v.shape[ndim:])), value)


def _uncounted(found: Any) -> Any:
    """What a branch saw; nothing, where it was not taken."""
    if not isinstance(found, Counted):
        return found
    value, taken = _uncounted(found.value), found.count > 0
    taken = taken.reshape(taken.shape + (1,) * (value.low.ndim - taken.ndim))
    low, high = (
        jnp.where(taken, end, jnp.full_like(end, nothing))
        for end, nothing in ((value.low, jnp.inf), (value.high, -jnp.inf))
    )
    return value._replace(low=low, high=high)


def merge_rows(
    one: dict[str, ObservedRows], two: dict[str, ObservedRows]
) -> dict[str, ObservedRows]:
    """The rows of both sets of batches, which are of the same nodes."""

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, Histogram):
            return merge(a, b)
        return Extremes(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))

    return {
        k: ObservedRows(join(one[k].value, two[k].value), one[k].layout) for k in one
    }


# Settling


def _settle(
    graph: Graph, seen: dict[str, ObservedRows], placement: Placement
) -> dict[str, Extremes | Histogram]:
    """Finite values for each owner of a quantizer, of all nodes that share it."""
    every = {n: v for rows in seen.values() for n, v in rows.by_node().items()}
    found: dict[str, Any] = {}
    seen_at = ((n, key) for n in graph.nodes for key in (n.name, input_of(n.name)))
    for node, key in seen_at:
        if key not in every:
            continue
        value = every[key]
        taken = ~np.asarray(value.low > value.high)  # NaN is no less a value
        if not taken.any():
            continue
        if not all(
            np.isfinite(end[taken]).all() for end in map(np.asarray, value[-2:])
        ):
            raise ValueError(
                f"jaxmet.calibrate: the values of {node.name!r} hold NaN or infinity. "
                "Either a batch holds them, or the model overflows there, as float16 "
                "does: clean the data, or calibrate in bfloat16 or float32."
            )
        ends = {
            "low": np.where(taken, value.low, 0),
            "high": np.where(taken, value.high, 0),
        }
        value = value._replace(**ends)
        found[key] = value if node.layers else _as_one([value])
    for name, layers in placement.scaled.items():
        entering = entering_values(graph, name, layers, found, _as_one)
        found |= {} if entering is None else {name: entering}
    sharing: dict[str, list[Any]] = {}
    for name, owner in placement.shared.items():
        if name in placement.sliced:  # its owner keeps a range for each layer
            continue
        values = sharing.setdefault(owner, [found[owner]] if owner in found else [])
        values += [found[name]] if name in found else []
    return found | {owner: _as_one(v) for owner, v in sharing.items() if v}


def _as_one(values: list[Any]) -> Any:
    """What several saw, and each in a loop, as if one had."""
    if isinstance(values[0], Histogram):
        rows = _side_by_side(values)
        if rows.low.size == 1:
            return jax.tree.map(lambda v: v[0], rows)
        return jax.device_get(_merge_all(rows))
    lows, highs = ([np.min(v[0]) for v in values], [np.max(v[1]) for v in values])
    return Extremes(np.min(lows), np.max(highs))


# Choosing


def _chosen(
    found: Mapping[str, Extremes | Histogram], activations: Mapping[str, Settings]
) -> dict[str, Range]:
    """The range of each quantizer: what was observed, or what its calibrator makes of it."""
    ranges: dict[str, Range] = {}
    searched: dict[Any, list[str]] = {}
    for name, settings in activations.items():
        value = found.get(name)
        if isinstance(value, Histogram):
            kind = settings.calibrator, settings.symmetric, value.counts.dtype
            searched.setdefault(kind, []).append(name)
        elif value is not None:
            ranges[name] = value.low, value.high
    for (method, symmetric, _), names in searched.items():
        # All quantizers of a kind side by side, layers too: one program.
        layers = [np.size(found[n].low) for n in names]
        rows = _side_by_side([found[n] for n in names])
        given = np.repeat(
            [_given(activations[n], found[n]) for n in names], layers, axis=0
        )
        given = given.T.astype(rows.counts.dtype)
        chosen = _best_ranges(rows, *given, method=method, symmetric=symmetric)
        cuts = np.cumsum(layers)[:-1]
        parts = zip(*(np.split(np.asarray(v), cuts) for v in chosen), strict=True)
        for name, ends in zip(names, parts, strict=True):
            low, high = (end.reshape(np.shape(found[name].low)) for end in ends)
            ranges[name] = low, high
    return ranges


def _filled(low: Any, high: Any) -> Range:
    """Ranges of layers, those of layers without values as wide as all the others together."""
    nothing = (low == 0) & (high == 0)
    if not np.any(nothing):
        return low, high
    return np.where(nothing, np.min(low), low), np.where(nothing, np.max(high), high)


def _side_by_side(values: list[Any]) -> Histogram:
    """Histograms of the host in rows."""
    return jax.tree.map(lambda *v: np.concatenate(v), *map(_flat, values))


# Operation by operation each would be a program of its own.
_merge_all = jax.jit(merge_all)


@partial(jax.jit, static_argnames=("method", "symmetric"))
def _best_ranges(rows: Histogram, *given: Any, method: Any, symmetric: bool) -> Any:
    return best_range(values_of(rows), *given, method=method, symmetric=symmetric)


def _given(settings: Settings, value: Any) -> tuple[float, float, float]:
    """The ends of the quantizer that a range is for, and the share that may lie outside."""
    signed = is_signed(settings, value.low)
    low, high = grid_ends(settings.bits, signed=settings.symmetric and signed)
    return float(low), float(high), 1 - settings.percentile / 100


def is_signed(settings: Settings, low: Any) -> bool:
    """Whether the quantizer of an activation has negative integers or a zero point."""
    if not settings.symmetric or not settings.unsigned_symmetric:
        return True
    return bool(np.min(low) < 0)
