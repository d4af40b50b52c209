"""Softmax and its logarithms, found by what they do: normalize exponentials by their sum.

A softmax is exp(x − m) / Σ exp(x − m), a log-softmax x − m − log Σ exp(x − m), and a
logsumexp log Σ exp(x − m) + m, with any m. Entries may be masked on the way, before the
exponential or after it.
"""

from collections.abc import Iterable, Iterator

from jaxmet.engine.nodes.cluster import (
    LINEAR,
    SHIFT,
    VIEWS,
    Cluster,
    centre,
    cone,
    is_free,
    order_of,
    through_views,
)
from jaxmet.engine.program.program import CONST, DATA, Equation, Region, Value

SOFTMAX = ("softmax", "log_softmax", "logsumexp")
"""Functions of which an entry far below the largest of its row is no part."""


def softmaxes(region: Region) -> Iterable[Cluster]:
    order = order_of(region)
    for equation in region.equations:
        if equation.name != "exp" or not is_free(equation) or equation.kind != DATA:
            continue
        source, shift = centre(equation.operands[0])
        for function, exit in _ends(equation, source, shift):
            inside = cone(exit, {source}, order)
            if equation in inside:
                yield Cluster("activation", function, inside, exit, source)
                break


def _ends(
    exponential: Equation, source: Value, shift: Value | None
) -> Iterator[tuple[str, Value]]:
    """What the exponentials become once their sum is known."""
    numerators = _masked(exponential.results[0])
    totals = [
        u.results[0]
        for v in numerators
        for u in _free_uses(v)
        if u.name == "reduce_sum" and u.operands[0] in numerators
    ]
    for total in dict.fromkeys(totals):
        for spread in _views_of(total):
            for use in _free_uses(spread):
                if use.name == "div" and use.operands[1] is spread:
                    if use.operands[0] in numerators:
                        yield "softmax", use.results[0]
                elif use.name == "log":
                    yield from _logarithms(use.results[0], source, shift)


def _logarithms(
    log: Value, source: Value, shift: Value | None
) -> Iterator[tuple[str, Value]]:
    bare = source if shift is None else None
    moved = through_views(shift) if shift is not None else None
    for value in _views_of(log):
        for use in _free_uses(value):
            if use.name == "sub" and use.operands[1] is value:
                first = through_views(use.operands[0], LINEAR)
                centred = first.producer is not None and first.producer.name == "sub"
                if first is bare or (centred and centre(first)[0] is source):
                    yield "log_softmax", use.results[0]
            elif use.name == "add" and moved is not None:
                other = next((v for v in use.operands if v is not value), value)
                if through_views(other) is moved:
                    yield "logsumexp", use.results[0]


def _masked(value: Value) -> dict[Value, None]:
    """A value, and the same with entries put to zero or scaled by what is no exponential."""
    found = {value: None}
    stack = [value]
    while stack:
        for use in _free_uses(stack.pop()):
            same = use.results[0].shape == value.shape
            others = [v for v in use.operands if v not in found]
            masks = use.name == "select_n" and len(others) == 2
            scales = use.name == "mul" and len(others) == 1
            if same and (masks or scales or use.name in LINEAR):
                if use.results[0] not in found:
                    found[use.results[0]] = None
                    stack.append(use.results[0])
    return found


def _views_of(value: Value) -> dict[Value, None]:
    """A value, its views, and it with a number added or put below it (against zero)."""
    found = {value: None}
    stack = [value]
    while stack:
        for use in _free_uses(stack.pop()):
            constant = all(v in found or v.kind == CONST for v in use.operands)
            guards = use.name in ("max", "select_n", "abs", *SHIFT) and constant
            if use.name in VIEWS or guards:
                if use.results[0] not in found:
                    found[use.results[0]] = None
                    stack.append(use.results[0])
    return found


def _free_uses(value: Value) -> list[Equation]:
    return [u for u in value.uses if u is not None and is_free(u)]
