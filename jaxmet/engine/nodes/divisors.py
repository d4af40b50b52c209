"""Values that something is divided by, where a small error is a large one of the quotient.

The sum of a softmax that divides after its product, a degree, the length of a vector: on a grid
the small ones become zero and the quotient infinite.
"""

from collections.abc import Iterator

from jaxmet.engine.nodes.cluster import VIEWS, Cluster
from jaxmet.engine.program.program import DATA, Equation, Value

THROUGH = (
    *VIEWS, "select_n", "add", "sub", "add_any", "mul", "max", "sqrt", "reduce_sum",
)  # fmt: skip
"""What a divisor may pass, perhaps with a constant: Σx, x + ε, max(x, ε), √x."""


def divides(cluster: Cluster) -> bool:
    """Whether a result divides, is one over another, or is a product that waits for it.

    Such a product is Σ e v of a softmax (Σ e v) / (Σ e): as small as its divisor.
    """
    found = _is_divisor(cluster.exit) or _is_reciprocal(cluster)
    return found or (cluster.kind == "matmul" and _waits(cluster))


def _is_divisor(value: Value) -> bool:
    for use in value.uses:
        if use is None or use.bodies or _own(use):
            continue
        if value in _divisors(use):
            return True
        if _passes(use) and _is_divisor(use.results[0]):
            return True
    return False


def _is_reciprocal(cluster: Cluster) -> bool:
    divisor = _divisor_of(cluster.exit)
    if divisor is None:
        return False
    # 1 / (1 + x²) within one node is a function of numbers like any other.
    return divisor.producer is None or divisor.producer.node is not cluster


def _waits(cluster: Cluster) -> bool:
    summed = {_root(v) for v in cluster.operands if v.kind == DATA}
    return any(d in summed for d in _over(cluster.exit))


def _over(value: Value) -> Iterator[Value]:
    """What a value is divided by, or multiplied with one over, after views."""
    for use in value.uses:
        if use is None or use.bodies:
            continue
        others = [v for v in use.data if v is not value]
        if use.name in VIEWS and not others:
            yield from _over(use.results[0])
        elif use.name == "div" and others == use.operands[1:]:
            yield _root(others[0])
        elif use.name == "mul" and others:
            divisor = _divisor_of(others[0])
            if divisor is not None:
                yield _root(divisor)


def _divisor_of(value: Value) -> Value | None:
    """x of a value that is one over x, with what x passed taken off."""
    made = _root(value).producer
    if made is None or _own(made) or len(made.data) != 1 or not _divisors(made):
        return None
    return _root(_divisors(made)[0])


def _root(value: Value) -> Value:
    """What a value is made of by what a divisor may pass."""
    while value.producer is not None and _passes(value.producer):
        value = value.producer.data[0]
    return value


def _divisors(equation: Equation) -> list[Value]:
    """The operands of which a zero makes an infinity."""
    name, operands = equation.name, equation.operands
    if name == "div":
        found = operands[1:]
    elif name in ("rsqrt", "log"):
        found = operands
    elif name == "integer_pow":
        found = operands if equation.params["y"] < 0 else []
    elif name == "pow":
        power = operands[1].scalar()
        found = operands[:1] if power is not None and power < 0 else []
    else:
        found = []
    return [v for v in found if v.kind == DATA and v.inexact]


def _passes(equation: Equation) -> bool:
    return equation.name in THROUGH and len(equation.data) == 1


def _own(equation: Equation) -> bool:
    """Whether an equation belongs to a norm, which divides as a whole."""
    return equation.node is not None and equation.node.kind == "norm"
