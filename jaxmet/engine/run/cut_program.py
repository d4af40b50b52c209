"""A program as steps in order, and what is live where it is cut into pieces."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from jaxmet.engine.graph.analyse import Analysis
from jaxmet.engine.graph.node import Node
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import NOISE, Equation, Region, Value, carried

INLINED = (*compat.REMAT, *compat.CUSTOM)


class Piece(NamedTuple):
    """Its last node, its steps, what is live after it, and the loop that it is."""

    name: str | None
    steps: list[Equation | Cluster]
    live: list[Value]
    loop: Equation | None


class CutProgram:
    """Steps in order, values by key, and what is live between the pieces."""

    def __init__(
        self,
        analysis: Analysis,
        nodes: dict[Cluster, Node],
        cuts: set[str],
        loops: set[str],
    ):
        self.analysis, self.nodes = analysis, nodes
        self.alias: dict[Value, Value] = {}
        self.steps: list[Equation | Cluster] = []
        self.steps += [c for c in nodes if c.kind == "input"]
        self.lay_out(analysis.region)
        self.steps += [c for c in nodes if c.kind == "output"]
        self.outputs = [self.base(v) for v in analysis.region.outputs]
        self.loops = self.find_loops(loops)
        self.ends = self.find_ends(cuts)
        self.keys = {}
        for i, step in enumerate(self.steps):
            for value in self.made(step):
                self.keys.setdefault(value, f"value {i}.{len(self.keys)}")
        for cluster, node in nodes.items():
            if cluster.equations:
                self.keys[cluster.exit] = node.name
        for name, value in analysis.leaves.items():
            self.keys[value] = f"parameter {name}"
        self.input_keys = [f"input {i}" for i in range(len(analysis.inputs))]
        for key, value in zip(self.input_keys, analysis.inputs, strict=True):
            self.keys[value] = key
        for i, loop in self.loops.items():
            for j, value in enumerate(carried_inside(loop)):
                self.keys[value] = f"carry {i}.{j}"
        self.values = {key: value for value, key in self.keys.items()}
        self.producer = {v: i for i, s in enumerate(self.steps) for v in self.made(s)}
        self.moving = [self.moves(s) for s in self.steps]

    def lay_out(self, region: Region) -> None:
        for equation in region.equations:
            if equation.name in INLINED and equation.bodies:
                body = equation.bodies[0]
                self.alias.update(zip(body.inputs, equation.operands, strict=True))
                self.lay_out(body)
                self.alias.update(zip(equation.results, body.outputs, strict=True))
            elif equation.node not in self.nodes:
                self.steps.append(equation)
            elif equation.node.exit in equation.results:
                self.steps.append(equation.node)

    def base(self, value: Value) -> Value:
        while value in self.alias:
            value = self.alias[value]
        return value

    def made(self, step: Equation | Cluster) -> list[Value]:
        if isinstance(step, Equation):
            return step.results
        return [step.exit] if step.equations else []

    def read(self, step: Equation | Cluster) -> list[Value]:
        return [self.base(v) for v in step.operands if v.constant is None]

    def moves(self, step: Equation | Cluster) -> bool:
        """Whether a step depends on the data (or on noise), so that it runs once."""
        values = self.made(step) or self.read(step)
        return any(v.kind >= NOISE for v in values)

    def runs_once(self, value: Value) -> bool:
        """Whether a value depends on the data, or comes with one that does out of a loop."""
        i = self.producer.get(value)
        return value.kind >= NOISE or (i is not None and self.moving[i])

    def find_loops(self, names: set[str]) -> dict[int, Equation]:
        """The `scan`s around these nodes, by their place among the steps."""
        inside = {c.exit.producer for c, n in self.nodes.items() if n.name in names}
        return {
            i: step
            for i, step in enumerate(self.steps)
            if isinstance(step, Equation) and step.name == "scan"
            if not inside.isdisjoint(step.bodies[0].walk())
        }

    def find_ends(self, cuts: set[str]) -> list[tuple[int, str | None]]:
        """Where each piece ends, and the node that it ends with, None for another end."""
        ends: list[tuple[int, str | None]] = []
        for i, step in enumerate(self.steps):
            if i in self.loops:
                ends += [(i, None), (i + 1, None)]
            elif isinstance(step, Cluster) and self.nodes[step].name in cuts:
                ends.append((i + 1, self.nodes[step].name))
        return [*ends, (len(self.steps), None)]

    def pieces(self) -> Iterator["Piece"]:
        start = 0
        for (end, name), live in zip(self.ends, self.live(), strict=True):
            loop = self.loops.get(start) if end == start + 1 else None
            yield Piece(name, self.with_parameters(start, end), live, loop)
            start = end

    def with_parameters(self, start: int, end: int) -> list:
        """The moving steps of a piece and the parameter steps that they need."""
        kept = {i for i in range(start, end) if self.moving[i]}
        needed = [v for i in kept for v in self.read(self.steps[i])]
        needed += self.outputs if end == len(self.steps) else []
        while needed:
            i = self.producer.get(needed.pop())
            if i is not None and i not in kept and i < end and not self.moving[i]:
                kept.add(i)
                needed += self.read(self.steps[i])
        return [self.steps[i] for i in sorted(kept)]

    def live(self) -> list[list[Value]]:
        """For each piece the values of the data that are made in it or before, and needed after.

        After the last piece the outputs, also those of parameters alone.
        """
        first = dict.fromkeys(self.analysis.inputs, 0)
        last: dict[Value, int] = {}
        for i, step in enumerate(self.steps):
            for value in self.made(step):
                first.setdefault(value, i + 1)
            last.update(dict.fromkeys(self.read(step), i))
        last.update(dict.fromkeys(self.outputs, len(self.steps)))
        ends = [end for end, _ in self.ends]
        lives: list[list[Value]] = [[] for _ in ends]
        for value in self.keys:
            if value in first and value in last and self.runs_once(value):
                start = bisect_left(ends, first[value])
                stop = bisect_right(ends, last[value])
                for live in lives[start:stop]:
                    live.append(value)
        lives[-1] = [v for v in dict.fromkeys(self.outputs) if v.constant is None]
        return lives


def carried_inside(loop: Equation) -> list[Value]:
    """What a loop carries, as its body reads it."""
    return [inside for inside, _ in carried(loop)]
