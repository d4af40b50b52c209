"""Activations: the largest cones of pointwise equations of one value."""

from collections import Counter
from collections.abc import Iterable

from jaxmet.engine.nodes.activations import classify
from jaxmet.engine.nodes.cluster import (
    LINEAR,
    SCALE,
    SHIFT,
    Cluster,
    cone,
    is_free,
    order_of,
)
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import CONST, DATA, NOISE, Equation, Region, Value

POINTWISE = (
    *LINEAR, *SCALE, *SHIFT, "max", "min", "clamp", "select_n", "exp", "exp2", "expm1",
    "log", "log1p", "logistic", "tanh", "sinh", "cosh", "asinh", "acosh", "atanh", "sin",
    "cos", "tan", "asin", "acos", "atan", "erf", "erfc", "erf_inv", "sqrt", "rsqrt",
    "cbrt", "pow", "integer_pow", "square", "abs", "sign", "floor", "ceil", "round",
    "ge", "gt", "le", "lt", "eq", "ne", "and", "or", "not", "is_finite", "rem",
    "lgamma", "digamma",
)  # fmt: skip
Piece = tuple[Value, list[Equation]]


def activations(region: Region) -> Iterable[Cluster]:
    order = order_of(region)
    root: dict[Value, Value] = {}
    members: dict[Value, list[Equation]] = {}
    for equation in region.equations:
        if not _pointwise(equation):
            continue
        sources = {root.get(v, v) for v in equation.data}
        if len(sources) == 1 and (source := sources.pop()).inexact:
            root[equation.results[0]] = source
            members.setdefault(source, []).append(equation)
    sizes = _sizes_of_calls(region.equations)
    for equations in members.values():
        for start, chain in _closed_cones(equations):
            inside = _sizes_of_calls(chain)
            own = {call for call, size in inside.items() if size == sizes[call]}
            yield from _segments(start, chain, own, order)


def _pointwise(equation: Equation) -> bool:
    """Whether an equation maps one data value elementwise, parameters beside it."""
    if not is_free(equation) or len(equation.results) != 1 or equation.kind != DATA:
        return False
    if any(v.kind == NOISE for v in equation.operands):
        return False
    shape = equation.results[0].shape
    if any(v.shape != shape for v in equation.data) or _masks(equation):
        return False
    if equation.name in compat.CUSTOM:
        others = [v for v in equation.operands if v.kind != DATA]
        return len(equation.data) == 1 and all(v.kind == CONST for v in others)
    return equation.name in POINTWISE


def _masks(equation: Equation) -> bool:
    """Whether values are kept or replaced by their position: a move, which makes none."""
    if equation.name != "select_n" or equation.operands[0].kind == DATA:
        return False
    return len(equation.data) == 1


def _is_linear(equation: Equation) -> bool:
    if equation.name in LINEAR:
        return True
    if equation.name in (*SCALE, *SHIFT):
        divides = equation.name == "div" and equation.operands[1].kind == DATA
        return len(equation.data) == 1 and not divides
    return False


def _sizes_of_calls(equations: Iterable[Equation]) -> Counter[int]:
    """How many of these equations each call holds."""
    return Counter(n for e in equations if e.kind == DATA for n, _ in e.calls)


def _closed_cones(
    equations: list[Equation],
) -> Iterable[tuple[Value, list[Equation]]]:
    """Split a pointwise family at every value that is needed in two places."""
    inside = set(equations)
    end: dict[Equation, Value] = {}  # the value that each equation's cone makes
    for equation in reversed(equations):
        value = equation.results[0]
        ends = {end[u] if u in inside else None for u in value.uses}
        one = ends.pop() if len(ends) == 1 else None
        end[equation] = value if one is None else one
    cones: dict[Value, list[Equation]] = {}
    for equation in equations:
        cones.setdefault(end[equation], []).append(equation)
    for found in cones.values():
        made = {e.results[0] for e in found}
        entries = {v for e in found for v in e.data if v not in made}
        if len(entries) == 1:
            yield entries.pop(), found


def _segments(
    start: Value, equations: list[Equation], own: set[int], order: dict[Equation, int]
) -> Iterable[Cluster]:
    """One cone, cut into the activations that it strings together."""
    for entry, piece in _joined(_by_calls(_pieces(start, equations), own), own):
        exit = piece[-1].results[0]
        if exit.inexact and not all(_is_linear(e) for e in piece):
            held = sorted({*piece, *cone(exit, {entry}, order)}, key=order.__getitem__)
            function, record = classify(entry, piece, own)
            yield Cluster("activation", function, held, exit, entry, record)


def _pieces(entry: Value, equations: list[Equation]) -> list[Piece]:
    """Cut wherever a single value passes."""
    place = {e.results[0]: i for i, e in enumerate(equations)}
    first = len(equations)  # of the values that the equations after this one read
    needed = []
    for equation in reversed(equations):
        needed.append(first)
        first = min(first, *(place.get(v, -1) for v in equation.data))
    pieces, start, current = [], entry, []
    for i, equation in enumerate(equations):
        current.append(equation)
        if needed[-1 - i] >= i:
            pieces.append((start, current))
            start, current = equation.results[0], []
    return pieces


def _by_calls(pieces: list[Piece], own: set[int]) -> list[Piece]:
    """Put together again what one nonlinear call holds (`jax.nn.hard_sigmoid`)."""
    spans: dict[int, list[int]] = {}
    for i, (_, piece) in enumerate(pieces):
        for number in {n for e in piece for n, _ in e.calls} & own:
            spans.setdefault(number, []).append(i)
    ends: dict[int, int] = {}  # the last piece of the calls that begin with each
    for first, *_, last in ([*w, w[-1]] for w in spans.values()):
        ends[first] = max(last, ends.get(first, last))
    out: list[Piece] = []
    i = 0
    while i < len(pieces):
        end = ends.get(i, i)
        joined = [e for _, piece in pieces[i : end + 1] for e in piece]
        if all(_is_linear(e) for e in joined):
            out += pieces[i : end + 1]
        else:
            out.append((pieces[i][0], joined))
        i = end + 1
    return out


def _joined(pieces: list[Piece], own: set[int]) -> list[Piece]:
    """Join unnamed neighbours into the largest group: `1 / (1 + exp(-x))` is one."""
    out: list[Piece] = []
    linear: list[Equation] = []
    alone = False  # whether the last group has a name; none that was joined has
    for start, piece in pieces:
        if all(_is_linear(e) for e in piece):
            linear += piece if out else []
            continue
        known = _stands_alone(start, piece, own)
        if out and not known and not alone:
            out[-1][1].extend([*linear, *piece])
        elif out and not linear and _bounds(piece) and _bounds(out[-1][1]):
            out[-1][1].extend(piece)
        else:
            out.append((start, [*piece]))
            alone = known
        linear = []
    return out


def _bounds(piece: list[Equation]) -> bool:
    return all(e.name in ("max", "min", "clamp") for e in piece)


def _stands_alone(start: Value, piece: list[Equation], own: set[int]) -> bool:
    """Whether a piece is an activation by itself: a call, or a function with a name."""
    if any(e.name in compat.CUSTOM for e in piece):
        return True
    shared = set.intersection(*({n for n, _ in e.calls} for e in piece))
    return bool(shared & own) or classify(start, piece, own)[1].known
