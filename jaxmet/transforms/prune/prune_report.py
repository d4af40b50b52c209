"""What was removed, what was skipped, and where nothing is saved."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmet.engine.graph.channel_groups import indices_of
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.pruned.expand import scattered_before
from jaxmet.transforms.prune.coupled_channels import CoupledChannels, left_along
from jaxmet.tree.table import Table

COLUMNS = ("channels", "kept", "of", "made by", "read by", "error", "note")


def report(
    bundles: Sequence[CoupledChannels],
    keep: Mapping[int, int],
    errors: Mapping[str, float],
    notes: Callable[[CoupledChannels], Sequence[str]],
    *,
    caller: str,
) -> Table:
    """One row per bundle; `errors` are those of the layers that were refitted."""
    rows = []
    for b in bundles:
        known = [errors[n] for n in b.consumers if n in errors]
        less = keep[b.index] < b.size
        rows.append(
            (
                b.name,
                keep[b.index],
                b.size,
                ", ".join(b.producers) or None,
                ", ".join(b.consumers) or None,
                max(known) if less and known else None,
                "; ".join(notes(b)) or None,
            )
        )
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    count = sum(keep[b.index] < b.size for b in bundles)
    return Table(
        dict(zip(COLUMNS, columns, strict=True)),
        title=f"{caller}: {count} of {len(bundles)} groups of channels",
    )


def whole_before(
    graph: Graph, pruned: Any, masks: Mapping[int, np.ndarray]
) -> dict[int, list[str]]:
    """By group the operations that get whole arrays of its channels, some of them gone.

    Where it is not known whose channels an array has, they count for all groups.
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
