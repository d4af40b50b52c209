"""Equations gathered into nodes: groups with a single exit, within one region.

Products take their bias, norms the smallest cone above their input, softmax its own
pattern, activations the largest cone of pointwise equations of one value. Additions,
multiplications, matmuls, concatenations and pools of what is left are nodes of their own;
everything else is a move.
"""

import dataclasses
from collections.abc import Iterable

from jaxmet.engine import compat
from jaxmet.engine.activations import classify
from jaxmet.engine.program import CONST, DATA, NOISE, PARAM, Equation, Region, Value
from jaxmet.engine.views import CASTS, VIEW_RULES, follow, holding, numbered

LINEAR = ("neg", *CASTS)
SCALE = ("mul", "div")
SHIFT = ("add", "sub", "add_any")
VIEWS = tuple(VIEW_RULES)
POINTWISE = (
    *LINEAR, *SCALE, *SHIFT, "max", "min", "clamp", "select_n", "exp", "exp2", "expm1",
    "log", "log1p", "logistic", "tanh", "sinh", "cosh", "asinh", "acosh", "atanh", "sin",
    "cos", "tan", "asin", "acos", "atan", "erf", "erfc", "erf_inv", "sqrt", "rsqrt",
    "cbrt", "pow", "integer_pow", "square", "abs", "sign", "floor", "ceil", "round",
    "ge", "gt", "le", "lt", "eq", "ne", "and", "or", "not", "is_finite", "rem",
    "lgamma", "digamma",
)  # fmt: skip
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")
WINDOWS = {
    "reduce_window_max": "max_pool",
    "reduce_window_min": "min_pool",
    "reduce_window_sum": "avg_pool",
    "reduce_window": "pool",
}
RESIZE_CALLS = ("_resize", "resize", "_scale_and_translate", "scale_and_translate")


@dataclasses.dataclass(eq=False, repr=False)
class Cluster:
    """A node before it has a name: what it is, what it computes, what it reads."""

    kind: str
    function: str
    equations: list[Equation]
    exit: Value
    entry: Value | None = None
    details: dict = dataclasses.field(default_factory=dict)
    name: str = ""
    operands: list[Value] = dataclasses.field(default_factory=list)


def group(region: Region) -> None:
    """Claim the equations of this region and of those inside it."""
    for equation in region.equations:
        for body in equation.bodies:
            group(body)
    for find in (_products, _norms, _softmaxes, _resizes, _activations, _rest):
        for cluster in find(region):
            _claim(cluster)


def _claim(cluster: Cluster) -> None:
    inside = set(cluster.equations)
    made = {v for e in cluster.equations for v in e.results}
    operands: dict[Value, None] = {}
    for equation in cluster.equations:
        equation.node = cluster
        for value in equation.operands:
            if value not in made and value.constant is None:
                operands[value] = None
    ordered = sorted(operands, key=lambda v: v.kind != DATA)
    cluster.operands = ordered
    assert cluster.exit.producer in inside


def _free(equation: Equation) -> bool:
    return equation.node is None and not equation.bodies


def _only_use(value: Value) -> Equation | None:
    return value.uses[0] if len(value.uses) == 1 else None


def through_views(value: Value, names: Iterable[str] = VIEWS) -> Value:
    """The value that this one is a view of."""
    while value.producer is not None and value.producer.name in names:
        if not value.producer.operands:
            break
        value = value.producer.operands[0]
    return value


@dataclasses.dataclass(frozen=True, repr=False)
class Leaf:
    """A parameter and the views through which it is used; None: a loop slices it."""

    value: Value
    views: tuple[Equation | None, ...]

    @property
    def stacked(self) -> bool:
        return None in self.views


def leaf_of(value: Value) -> Leaf | None:
    """The parameter that a value is a view of, followed out of loops and branches."""
    views: list[Equation | None] = []
    while value.name is None:
        producer = value.producer
        if producer is not None and producer.name in VIEWS:
            views.append(producer)
            value = producer.operands[0]
        elif value.source is not None:
            views += [None] * value.sliced
            value = value.source
        else:
            return None
    return Leaf(value, tuple(reversed(views)))


def leaves_under(value: Value) -> list[Value]:
    """Every parameter that a value is computed from, in order of discovery."""
    found: dict[Value, None] = {}
    seen: set[Value] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if value in seen or value.kind != PARAM:
            continue
        seen.add(value)
        if value.name is not None:
            found[value] = None
        elif value.source is not None:
            stack.append(value.source)
        elif value.producer is not None:
            stack += reversed(value.producer.operands)
    return list(found)


def cone(exit: Value, stop: set[Value], region_order: dict[Equation, int]) -> list[Equation]:
    """What `exit` needs between the values in `stop` and itself, and nothing else needs.

    Equations that read neither data nor parameters made inside come along; an equation
    whose result is used outside stays out, and with it what only it needs.
    """
    found: set[Equation] = set()
    stack = [exit]
    while stack:
        value = stack.pop()
        equation = value.producer
        if value in stop or equation is None or equation in found or not _free(equation):
            continue
        if equation not in region_order:
            continue
        found.add(equation)
        stack += equation.operands
    return _shrink(found, exit, region_order)


def _shrink(
    found: set[Equation], exit: Value, order: dict[Equation, int]
) -> list[Equation]:
    last = exit.producer
    while True:
        escaping = {
            e
            for e in found
            if e is not last and any(u not in found for v in e.results for u in v.uses)
        }
        if not escaping:
            return sorted(found, key=order.__getitem__)
        found = found - escaping


def _order(region: Region) -> dict[Equation, int]:
    return {e: i for i, e in enumerate(region.equations)}


# Products and lookups


def _products(region: Region) -> Iterable[Cluster]:
    order = _order(region)
    for equation in region.equations:
        if equation.name == "gather" and _is_lookup(equation):
            yield Cluster(
                "lookup",
                "gather",
                [equation],
                equation.results[0],
                equation.operands[1],
                {"weight": equation.operands[0]},
            )
        if equation.name not in ("conv_general_dilated", "dot_general"):
            continue
        one, two = equation.operands[:2]
        if {one.kind, two.kind} != {DATA, PARAM}:
            continue
        data, weight = (one, two) if one.kind == DATA else (two, one)
        if equation.name == "conv_general_dilated" and weight is one:
            continue
        yield _with_bias(equation, data, weight, order)


def _is_lookup(equation: Equation) -> bool:
    table, indices = equation.operands[:2]
    return table.kind == PARAM and indices.kind == DATA and table.inexact


def feature_axes(equation: Equation, weight: Value) -> tuple[int, ...]:
    """Axes of a product's result that come from its weight."""
    numbers = equation.params["dimension_numbers"]
    if equation.name == "conv_general_dilated":
        return (numbers.out_spec[1],)
    (lc, rc), (lb, rb) = numbers
    lhs, rhs = equation.operands[:2]
    if weight is rhs:
        start = lhs.ndim - len(lc)
        return tuple(range(start, start + rhs.ndim - len(rc) - len(rb)))
    return tuple(range(len(lb), lhs.ndim - len(lc)))


def _with_bias(
    equation: Equation, data: Value, weight: Value, order: dict[Equation, int]
) -> Cluster:
    value, equations, bias = equation.results[0], [equation], None
    features = feature_axes(equation, weight)
    axes = numbered(value)
    wanted = [axes[i] for i in features]
    while (use := _only_use(value)) is not None and _free(use):
        if use.name in VIEWS and use.name != "broadcast_in_dim":
            axes = follow(axes, [use])
        elif use.name == "add":
            bias = _bias(use, value, holding(axes, wanted))
            break
        else:
            break
        value = use.results[0]
    if bias is not None and use is not None:
        features, value = holding(axes, wanted), use.results[0]
        equations = cone(value, {data, weight}, order)
    else:
        value = equation.results[0]
    details = {"weight": weight, "bias": bias, "product": equation, "features": features}
    function = "conv" if equation.name == "conv_general_dilated" else "dot"
    return Cluster("product", function, equations, value, data, details)


def _bias(add: Equation, value: Value, features: tuple[int, ...]) -> Value | None:
    """The parameter that is added along the feature axes alone, if there is one."""
    others = [v for v in add.operands if v is not value]
    if len(others) != 1 or others[0].kind != PARAM:
        return None
    return others[0] if varying_axes(others[0]) <= set(features) else None


def varying_axes(value: Value) -> set[int]:
    """Axes along which a value varies: neither of size one nor just broadcast."""
    axes = {i for i, n in enumerate(value.shape) if n != 1}
    producer = value.producer
    if producer is not None and producer.name == "broadcast_in_dim":
        source, where = producer.operands[0], producer.params["broadcast_dimensions"]
        kept = {int(where[i]) for i in varying_axes(source)}
        return axes & kept
    if producer is not None and producer.name in LINEAR:
        return axes & varying_axes(producer.operands[0])
    return axes


# Norms


def _norms(region: Region) -> Iterable[Cluster]:
    order = _order(region)
    for equation in region.equations:
        if not _free(equation):
            continue
        if equation.name == "rsqrt" or (
            equation.name == "pow" and equation.operands[1].scalar() == -0.5
        ):
            inverse = True
        elif equation.name == "sqrt":
            inverse = False
        else:
            continue
        spread = equation.operands[0]
        if not spread.shape or equation.kind == NOISE or spread.scalar() is not None:
            continue
        found = _norm(equation, inverse, order)
        if found is not None:
            yield found


def _norm(root: Equation, inverse: bool, order: dict[Equation, int]) -> Cluster | None:
    gain, scale = root.results[0], None
    upright, scaled = inverse, True  # whether the gain holds 1/root, and scale itself
    while True:
        use = _only_use(gain)
        if use is None or not _free(use):
            return None
        others = [v for v in use.operands if v is not gain]
        if use.name == "div" and use.operands[1] is gain:
            upright, scaled = not upright, scale is None or not scaled
        if use.name in SCALE and others and others[0].kind == DATA:
            if _derived_from_same(others[0], gain, use):
                break
        if use.name in SCALE and others and others[0].kind == PARAM:
            scale, scaled = others[0], use.name == "mul" or use.operands[1] is gain
        elif use.name in SCALE and others and others[0].kind == DATA and gain.kind == DATA:
            return None
        elif use.name not in VIEWS and not (
            use.name in SCALE and others and others[0].kind == CONST
        ):
            return None
        gain = use.results[0]
    body = use
    centred = others[0]
    source, mean = _centre(centred)
    exit, scale, bias = _affine_tail(body.results[0], scale)
    equations = cone(exit, {source}, order)
    if root not in equations or body not in equations:
        return None
    batch_free = root.kind < DATA
    details = {
        "spread": root.operands[0],
        "mean": mean,
        "scale": scale,
        "bias": bias,
        "affine": batch_free and (mean is None or mean.kind < DATA),
        "constant": root.kind == CONST,
        "direct": upright and scaled and not (body.name == "div" and body.operands[0] is gain),
    }
    return Cluster("norm", "norm", equations, exit, source, details)


def _derived_from_same(numerator: Value, gain: Value, use: Equation) -> bool:
    """Whether `use` normalizes its numerator by statistics of the numerator's source."""
    if gain.kind < DATA:
        return True
    source, _ = _centre(numerator)
    seen: set[Value] = set()
    stack = [gain]
    while stack:
        value = stack.pop()
        if value is source or through_views(value) is through_views(source):
            return True
        if value in seen or value.producer is None:
            continue
        seen.add(value)
        stack += [v for v in value.producer.operands if v.kind == DATA]
    return False


def _centre(value: Value) -> tuple[Value, Value | None]:
    """The value that is centred and its mean: (x, m) of x − m, else (x, None)."""
    value = through_views(value, ("convert_element_type",))
    if value.producer is not None and value.producer.name == "sub":
        x, mean = value.producer.operands
        same = x.ndim == mean.ndim and x.kind == DATA
        if same and (mean.kind < DATA or varying_axes(mean) != varying_axes(x)):
            x = through_views(x, ("convert_element_type",))
            return x, mean
    return value, None


def _affine_tail(
    value: Value, scale: Value | None
) -> tuple[Value, Value | None, Value | None]:
    """Follow a norm's own scale and bias to its exit."""
    bias, exit = None, value
    while (use := _only_use(value)) is not None and _free(use):
        others = [v for v in use.operands if v is not value]
        if use.name == "convert_element_type":
            value = use.results[0]
            if bias is not None or scale is not None:
                exit = value
            continue
        if not others or others[0].kind != PARAM or bias is not None:
            break
        if leaf_of(others[0]) is None and use.name != "add":
            break
        if len(varying_axes(others[0])) > 1:
            break
        if use.name == "mul" and scale is None:
            scale = others[0]
        elif use.name == "add":
            bias = others[0]
        else:
            break
        value = exit = use.results[0]
    return exit, scale, bias


# Softmax and resize


def _softmaxes(region: Region) -> Iterable[Cluster]:
    order = _order(region)
    for equation in region.equations:
        if equation.name != "exp" or not _free(equation) or equation.kind != DATA:
            continue
        numerator = equation.results[0]
        quotient = next(
            (u for u in numerator.uses if u is not None and u.name == "div"), None
        )
        if quotient is None or quotient.operands[0] is not numerator:
            continue
        total = through_views(quotient.operands[1])
        if total.producer is None or total.producer.name != "reduce_sum":
            continue
        if through_views(total.producer.operands[0], LINEAR) is not numerator:
            continue
        source, _ = _centre(equation.operands[0])
        exit = quotient.results[0]
        equations = cone(exit, {source}, order)
        yield Cluster("activation", "softmax", equations, exit, source)


def _resizes(region: Region) -> Iterable[Cluster]:
    calls: dict[int, list[Equation]] = {}
    for equation in region.equations:
        for number, name in equation.calls:
            if name in RESIZE_CALLS and _free(equation):
                calls.setdefault(number, []).append(equation)
    claimed: set[Equation] = set()
    for equations in calls.values():
        inside = set(equations)
        if inside & claimed:
            continue
        made = {v for e in equations for v in e.results}
        exits = [
            v for v in made if v.kind == DATA and any(u not in inside for u in v.uses)
        ]
        entries = {
            v for e in equations for v in e.operands if v.kind == DATA and v not in made
        }
        escapes = any(u not in inside for v in made - set(exits) for u in v.uses)
        if len(exits) == 1 and len(entries) == 1 and not escapes:
            claimed |= inside
            yield Cluster("resize", "resize", equations, exits[0], entries.pop())


# Activations


def _pointwise(equation: Equation) -> bool:
    """Whether an equation maps one data value elementwise, parameters beside it."""
    if not _free(equation) or len(equation.results) != 1 or equation.kind != DATA:
        return False
    if any(v.kind == NOISE for v in equation.operands):
        return False
    shape = equation.results[0].shape
    if any(v.shape != shape for v in equation.data):
        return False
    if equation.name in compat.CUSTOM:
        others = [v for v in equation.operands if v.kind != DATA]
        return len(equation.data) == 1 and all(v.kind == CONST for v in others)
    return equation.name in POINTWISE


def _is_linear(equation: Equation) -> bool:
    if equation.name in LINEAR:
        return True
    if equation.name in (*SCALE, *SHIFT):
        divides = equation.name == "div" and equation.operands[1].kind == DATA
        return len(equation.data) == 1 and not divides
    return False


def _activations(region: Region) -> Iterable[Cluster]:
    order = _order(region)
    root: dict[Value, Value] = {}
    members: dict[Value, list[Equation]] = {}
    for equation in region.equations:
        if not _pointwise(equation):
            continue
        sources = {root.get(v, v) for v in equation.data}
        if len(sources) == 1 and (source := sources.pop()).inexact:
            root[equation.results[0]] = source
            members.setdefault(source, []).append(equation)
    for source, equations in members.items():
        for start, chain in _closed_cones(source, equations):
            yield from _segments(start, chain, _own_calls(region, chain), order)


def _own_calls(region: Region, equations: list[Equation]) -> set[int]:
    """The calls that hold equations of this group alone."""
    inside = set(equations)
    own = {n for e in equations for n, _ in e.calls}
    for equation in region.equations:
        if equation.kind == DATA and equation not in inside:
            own -= {n for n, _ in equation.calls}
    return own


def _closed_cones(
    source: Value, equations: list[Equation]
) -> Iterable[tuple[Value, list[Equation]]]:
    """Split a pointwise family at every value that is needed in two places."""
    inside = set(equations)
    terminals = {
        e.results[0]: None
        for e in equations
        if any(u not in inside for u in e.results[0].uses)
    }
    while True:
        cones = {t: _back(t, source, terminals, inside) for t in terminals}
        count: dict[Equation, int] = {}
        for found in cones.values():
            for equation in found:
                count[equation] = count.get(equation, 0) + 1
        shared = [e.results[0] for e in equations if count.get(e, 0) > 1]
        if not shared:
            break
        terminals[shared[-1]] = None
    for terminal, found in cones.items():
        made = {e.results[0] for e in found}
        entries = {v for e in found for v in e.data if v not in made}
        if len(entries) == 1:
            yield entries.pop(), [e for e in equations if e in found]


def _back(exit: Value, source: Value, terminals, inside) -> set[Equation]:
    found: set[Equation] = set()
    stack = [exit]
    while stack:
        value = stack.pop()
        equation = value.producer
        if equation not in inside or equation in found:
            continue
        found.add(equation)
        stack += [v for v in equation.data if v not in terminals and v is not source]
    return found


def _segments(
    start: Value, equations: list[Equation], own: set[int], order: dict[Equation, int]
) -> Iterable[Cluster]:
    """One cone, cut into the activations that it strings together."""
    for start, piece in _joined(_by_calls(_pieces(start, equations), own), own):
        exit = piece[-1].results[0]
        if exit.inexact and not all(_is_linear(e) for e in piece):
            held = sorted({*piece, *cone(exit, {start}, order)}, key=order.__getitem__)
            function, details = classify(start, piece, own)
            yield Cluster("activation", function, held, exit, start, details)


Piece = tuple[Value, list[Equation]]


def _pieces(entry: Value, equations: list[Equation]) -> list[Piece]:
    """Cut wherever a single value passes."""
    pieces, start, current = [], entry, []
    for i, equation in enumerate(equations):
        current.append(equation)
        rest = equations[i + 1 :]
        later = {equation.results[0], *(e.results[0] for e in rest)}
        if all(v in later for e in rest for v in e.data):
            pieces.append((start, current))
            start, current = equation.results[0], []
    return pieces


def _by_calls(pieces: list[Piece], own: set[int]) -> list[Piece]:
    """Put together again what one nonlinear call holds (`jax.nn.hard_sigmoid`)."""
    spans: dict[int, list[int]] = {}
    for i, (_, piece) in enumerate(pieces):
        for number in {n for e in piece for n, _ in e.calls} & own:
            spans.setdefault(number, []).append(i)
    out: list[Piece] = []
    i = 0
    while i < len(pieces):
        ends = [max(w) for w in spans.values() if min(w) == i]
        end = max(ends, default=i)
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
    for start, piece in pieces:
        if all(_is_linear(e) for e in piece):
            linear += piece if out else []
            continue
        known = _stands_alone(start, piece, own)
        if out and not known and not _stands_alone(*out[-1], own):
            out[-1] = (out[-1][0], [*out[-1][1], *linear, *piece])
        elif out and not linear and _bounds(piece) and _bounds(out[-1][1]):
            out[-1] = (out[-1][0], [*out[-1][1], *piece])
        else:
            out.append((start, piece))
        linear = []
    return out


def _bounds(piece: list[Equation]) -> bool:
    return all(e.name in ("max", "min", "clamp") for e in piece)


def _stands_alone(start: Value, piece: list[Equation], own: set[int]) -> bool:
    """Whether a piece is an activation by itself: a call, or a function with a name."""
    if any(e.name in compat.CUSTOM for e in piece):
        return True
    shared = set.intersection(*({n for n, _ in e.calls} for e in piece))
    return bool(shared & own) or classify(start, piece, own)[1].get("known", False)


# What is left


def _rest(region: Region) -> Iterable[Cluster]:
    for equation in region.equations:
        if not _free(equation) or equation.kind != DATA:
            continue
        out = equation.results[0]
        if not out.inexact:
            continue
        wide = [v for v in equation.operands if v.kind in (DATA, PARAM) and v.inexact]
        kind = None
        if equation.name == "dot_general" and len(equation.data) == 2:
            kind, function = "matmul", "dot"
        elif equation.name in SHIFT and len(wide) == 2:
            kind, function = "add", equation.name
        elif equation.name in SCALE and len(wide) == 2:
            kind, function = "multiply", equation.name
        elif equation.name == "concatenate" and len(wide) > 1:
            kind, function = "concat", "concat"
        elif equation.name in WINDOWS:
            yield _pool(equation, WINDOWS[equation.name])
        elif equation.name in REDUCTIONS:
            yield _pool(equation, equation.name.replace("reduce_", ""))
        if kind is not None:
            yield Cluster(kind, function, [equation], out, equation.data[0])


def _pool(equation: Equation, function: str) -> Cluster:
    """A pool with the division that makes it a mean."""
    equations, exit = [equation], equation.results[0]
    if function in ("avg_pool", "sum"):
        use = _only_use(exit)
        if use is not None and _free(use) and use.name in SCALE and use.operands[0] is exit:
            if use.operands[1].kind == CONST:
                equations.append(use)
                exit = use.results[0]
                function = "mean" if function == "sum" else function
    return Cluster("pool", function, equations, exit, equation.data[0])
