"""Where the nodes of a graph stand in a drawing: rows by depth, and lanes beside them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class NodePosition(NamedTuple):
    """The row of a node, counted from the top, and its place in the row from 0 on."""

    row: int
    column: int


def places(reads: Mapping[str, Sequence[str]]) -> dict[str, NodePosition]:
    """A row below everything that a node reads; those in one row stand side by side.

    `reads` is in the order in which the nodes run: what a node reads comes before it, and what
    does not (a loop) is passed over.
    """
    rows: dict[str, int] = {}
    for name, before in reads.items():
        rows[name] = 1 + max([rows[b] for b in before if b in rows], default=-1)
    used: dict[int, int] = {}
    found = {}
    for name, row in rows.items():
        found[name] = NodePosition(row, used.get(row, 0))
        used[row] = found[name].column + 1
    return found


def lanes(spans: Sequence[tuple[int, int]]) -> list[int]:
    """A lane for each span of rows, so that no two in one lane overlap or touch."""
    ends: list[int] = []
    found = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: spans[i]):
        start, stop = spans[i]
        free = next((k for k, end in enumerate(ends) if end < start), len(ends))
        ends[free : free + 1] = [stop]
        found[i] = free
    return found
