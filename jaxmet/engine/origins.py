"""Where the operands of nodes come from, through moves and across regions."""

from jaxmet.engine.activations import number_of
from jaxmet.engine.analyse import Analysis
from jaxmet.engine.cluster import SCALE, SHIFT, Cluster
from jaxmet.engine.node import Edge
from jaxmet.engine.program import DATA, Equation, Value, body_operands, carried
from jaxmet.engine.views import CASTS

Affine = tuple[float, float] | None
Origin = tuple[str | None, tuple[str, ...], Affine]
SAME: Affine = (1.0, 0.0)


class Origins:
    """The named nodes that values may come from."""

    def __init__(self, analysis: Analysis):
        self.makers = {c.exit: c for c in analysis.clusters if c.kind != "output"}
        self.carry: dict[Value, list[Value]] = {}
        for equation in analysis.region.walk():
            for inside, outside in carried(equation):
                i = equation.bodies[-1].inputs.index(inside)
                first = body_operands(equation)[-1][i]
                self.carry[inside] = [v for v in (first, outside) if v.kind == DATA]

    def edges(self, cluster: Cluster) -> list[Edge]:
        if cluster.kind == "input":
            return []
        data = [v for v in cluster.operands if v.kind == DATA]
        return [
            Edge(i, node, moves, affine)
            for i, value in enumerate(data)
            for node, moves, affine in self.of(value, frozenset())
        ]

    def of(self, value: Value, seen: frozenset[Value]) -> list[Origin]:
        """The nodes, each with the moves after it and what they do to a number."""
        if value in self.makers:
            return [(self.makers[value].name, (), SAME)]
        if value in seen:
            return []
        seen |= {value}
        if value.producer is None:
            if value.source is not None:
                return self.of(value.source, seen)
            if value not in self.carry:
                return [(None, (), None)]
            found = [f for v in self.carry[value] for f in self.of(v, seen)]
            return list(dict.fromkeys(found))
        equation = value.producer
        data = [v for v in equation.operands if v.kind == DATA]
        if equation.bodies:
            i = equation.results.index(value)
            bodies = (
                equation.bodies[-1:] if equation.name == "while" else equation.bodies
            )
            found = [f for b in bodies for f in self.of(b.outputs[i], seen)]
            return list(dict.fromkeys(found))
        if equation.name == "select_n" and value.inexact:  # one of its cases
            cases = [v for v in equation.operands[1:] if v.kind == DATA]
            found = [
                (node, (*moves, "select_n"), affine if len(cases) == 1 else None)
                for v in dict.fromkeys(cases)
                for node, moves, affine in self.of(v, seen)
            ]
            return list(dict.fromkeys(found)) or [(None, ("select_n",), None)]
        if len(data) != 1:  # index arithmetic reads one input several times
            nodes = {node for v in data for node, _, _ in self.of(v, seen)}
            return [(nodes.pop() if len(nodes) == 1 else None, (equation.name,), None)]
        name = equation.name
        if name in CASTS:
            return self.of(data[0], seen)
        return [
            (node, (*moves, name), _after(affine, equation))
            for node, moves, affine in self.of(data[0], seen)
        ]


def _after(affine: Affine, equation: Equation) -> Affine:
    """Scale and shift of a number once a move has seen it, None where it is unknown."""
    if affine is None:
        return None
    scale, shift = affine
    name, operands = equation.name, equation.operands
    if name == "neg":
        return -scale, -shift
    if name not in (*SCALE, *SHIFT):
        return affine
    first = operands[0].kind == DATA
    number = number_of(operands[1 if first else 0])
    if number is None or (name == "div" and not (first and number)):
        return None
    if name == "mul":
        return scale * number, shift * number
    if name == "div":
        return scale / number, shift / number
    if name != "sub":
        return scale, shift + number
    return (scale, shift - number) if first else (-scale, number - shift)
