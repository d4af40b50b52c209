"""Values that something is divided by, where a small error is a large one of the quotient.

The sum of a softmax that divides after its product, a degree, the length of a vector: on a grid
the small ones become zero and the quotient infinite.
"""

from collections.abc import Iterator

from jaxmet.engine.nodes.cluster import VIEWS, Cluster
from jaxmet.engine.program.program import DATA, Equation, Region, Value

THROUGH = (
    *VIEWS, "select_n", "add", "sub", "add_any", "mul", "max", "sqrt", "reduce_sum",
)  # fmt: skip
"""What a divisor may pass, perhaps with a constant: Σx, x + ε, max(x, ε), √x."""


class Divisors:
    """The values of a program that something is divided by, and what values are made of."""

    def __init__(self, region: Region):
        self.divided: set[Value] = set()
        self.roots: dict[Value, Value] = {}
        self._forward(region)
        self._backward(region)

    def divides(self, cluster: Cluster) -> bool:
        """Whether a result divides, is one over another, or is a product that waits for it.

        Such a product is Σ e v of a softmax (Σ e v) / (Σ e): as small as its divisor.
        """
        found = cluster.exit in self.divided or self._is_reciprocal(cluster)
        return found or (cluster.kind == "matmul" and self._waits(cluster))

    def _forward(self, region: Region) -> None:
        """The root of each value: what it is made of by what a divisor may pass."""
        for equation in region.equations:
            for body in equation.bodies:
                self._forward(body)
            if _passes(equation):
                self.roots[equation.results[0]] = self._root(equation.data[0])

    def _backward(self, region: Region) -> None:
        for equation in reversed(region.equations):
            for body in equation.bodies:
                self._backward(body)
            if equation.bodies or _own(equation):
                continue
            self.divided.update(_divisors(equation))
            if _passes(equation) and equation.results[0] in self.divided:
                self.divided.add(equation.data[0])

    def _is_reciprocal(self, cluster: Cluster) -> bool:
        divisor = self._divisor_of(cluster.exit)
        if divisor is None:
            return False
        # 1 / (1 + x²) within one node is a function of numbers like any other.
        return divisor.producer is None or divisor.producer.node is not cluster

    def _waits(self, cluster: Cluster) -> bool:
        summed = {self._root(v) for v in cluster.operands if v.kind == DATA}
        return any(d in summed for d in self._over(cluster.exit))

    def _over(self, value: Value) -> Iterator[Value]:
        """What a value is divided by, or multiplied with one over, after views."""
        for use in value.uses:
            if use is None or use.bodies:
                continue
            others = [v for v in use.data if v is not value]
            if use.name in VIEWS and not others:
                yield from self._over(use.results[0])
            elif use.name == "div" and others == use.operands[1:]:
                yield self._root(others[0])
            elif use.name == "mul" and others:
                divisor = self._divisor_of(others[0])
                if divisor is not None:
                    yield self._root(divisor)

    def _divisor_of(self, value: Value) -> Value | None:
        """x of a value that is one over x, with what x passed taken off."""
        made = self._root(value).producer
        if made is None or _own(made) or len(made.data) != 1 or not _divisors(made):
            return None
        return self._root(_divisors(made)[0])

    def _root(self, value: Value) -> Value:
        return self.roots.get(value, value)


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
