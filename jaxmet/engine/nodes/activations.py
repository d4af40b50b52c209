"""What a group of pointwise equations computes: relu, a clip, a leaky slope, a name.

Only what the equations prove is claimed: `known` functions are recognised by their form,
others keep the name of the call or primitive they end in and are treated as arbitrary.
"""

from jaxmet.engine.nodes.records import Pointwise
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import (
    CONST,
    DATA,
    PARAM,
    Equation,
    Value,
    flatten,
    spread_kinds,
)

HOMOGENEOUS = ("relu", "leaky_relu", "prelu", "abs")
RENAMED: dict[str, str] = {
    "hard_silu": "hard_swish",
    "swish": "silu",
    "logistic": "sigmoid",
}
PASS = ("convert_element_type", "copy", "reduce_precision", "stop_gradient")


def classify(
    start: Value, equations: list[Equation], own: set[int]
) -> tuple[str, Pointwise]:
    """The function's name and what is known of it.

    `own` are the numbers of the calls that hold nothing but this group.
    """
    outer = equations
    equations, start = _opened(equations, start)
    core = [e for e in equations if e.name not in PASS]
    for recognise in (_clip, _leaky):
        found = recognise(start, core)
        if found is not None:
            return found
    if len(core) == 1:
        name = core[0].name
        name = _renamed(name)
        return name, Pointwise(known=name in ("tanh", "sigmoid", "abs", "erf"))
    name = _named(core, outer, own)
    return ("pointwise" if name in (*HOMOGENEOUS, "clip") else name), Pointwise()


def _renamed(name: str) -> str:
    return RENAMED[name] if name in RENAMED else name


def _opened(equations: list[Equation], start: Value) -> tuple[list[Equation], Value]:
    """Look inside a custom rule that is the whole group (`jax.nn.relu`)."""
    if len(equations) == 1 and equations[0].name in compat.CUSTOM:
        body = flatten(compat.call_body(equations[0].params))
        for inside, outside in zip(body.inputs, equations[0].operands, strict=True):
            inside.kind, inside.constant = outside.kind, outside.constant
        spread_kinds(body)
        return _opened(body.equations, next(v for v in body.inputs if v.kind == DATA))
    return equations, start


def _base(value: Value) -> Value:
    while value.producer is not None and value.producer.name in PASS:
        value = value.producer.operands[0]
    return value


def number_of(value: Value) -> float | None:
    """The one number that a constant holds, through casts and broadcasts."""
    while value.producer is not None and value.producer.name in (
        *PASS,
        "broadcast_in_dim",
    ):
        value = value.producer.operands[0]
    return value.scalar()


def _clip(start: Value, core: list[Equation]) -> tuple[str, Pointwise] | None:
    low, high = -float("inf"), float("inf")
    for equation in core:
        found = [number_of(v) for v in equation.operands if v.kind == CONST]
        numbers = [n for n in found if n is not None]
        if len(numbers) < len(found):
            return None
        if equation.name == "max" and len(numbers) == 1:
            low, high = max(low, numbers[0]), max(high, numbers[0])
        elif equation.name == "min" and len(numbers) == 1:
            low, high = min(low, numbers[0]), min(high, numbers[0])
        elif equation.name == "clamp" and len(numbers) == 2:
            low, high = (min(max(b, numbers[0]), numbers[1]) for b in (low, high))
        else:
            return None
    if not core:
        return None
    function = "relu" if low == 0 and high == float("inf") else "clip"
    return function, Pointwise(True, bounds=(low, high))


def _leaky(start: Value, core: list[Equation]) -> tuple[str, Pointwise] | None:
    """x where x > 0, a·x elsewhere, in its usual spellings."""
    final = core[-1]
    products = [e for e in core if e.name == "mul"]
    compares = [e for e in core if e.name in ("ge", "gt", "le", "lt")]
    others = [
        e for e in core if e not in products and e not in compares and e is not final
    ]
    if len(products) != 1 or others or len(products[0].data) != 1:
        return None
    if _base(products[0].data[0]) is not start:
        return None
    factor = next(v for v in products[0].operands if v.kind != DATA)
    scaled, slope = products[0].results[0], number_of(factor)
    if final.name == "max" and slope is not None and 0 <= slope <= 1 and not compares:
        branches = {_base(v) for v in final.operands}
        leaky = branches == {start, scaled}
        return ("leaky_relu", Pointwise(True, slope=slope)) if leaky else None
    if final.name != "select_n" or len(compares) != 1 or len(final.operands) != 3:
        return None
    positive = _positive_branch(compares[0], start)
    predicate, *cases = final.operands
    if predicate is not compares[0].results[0] or positive is None:
        return None
    if _base(cases[positive]) is not start or _base(cases[1 - positive]) is not scaled:
        return None
    if factor.kind == PARAM:
        return "prelu", Pointwise(True, factor=factor)
    return None if slope is None else ("leaky_relu", Pointwise(True, slope=slope))


def _positive_branch(compare: Equation, start: Value) -> int | None:
    """Which case of a select is taken where x > 0."""
    left, right = compare.operands
    if _base(left) is start and number_of(right) == 0:
        return 1 if compare.name in ("ge", "gt") else 0
    if _base(right) is start and number_of(left) == 0:
        return 0 if compare.name in ("ge", "gt") else 1
    return None


def _named(core: list[Equation], outer: list[Equation], own: set[int]) -> str:
    """A form with a name, else the call that holds the whole group."""
    names = {e.name for e in core}
    if "exp" in names and "reduce_sum" in names:
        return "softmax"
    if (
        "erf" in names
        or "erfc" in names
        or ("tanh" in names and "integer_pow" in names)
    ):
        return "gelu"
    if "logistic" in names and "mul" in names:
        return "silu"
    calls = set.intersection(*(set(e.calls) for e in outer))
    for number, name in sorted(calls):
        if number in own and name and not name.startswith("<"):
            return _renamed(name)
    return _renamed(core[-1].name)
