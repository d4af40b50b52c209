"""Where the operands of nodes come from, through moves and across regions."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxmet.engine.axes.views import CASTS, CHOOSES
from jaxmet.engine.graph.analyse import Analysis
from jaxmet.engine.graph.node import Edge, Turn
from jaxmet.engine.nodes.activations import number_of
from jaxmet.engine.nodes.cluster import SCALE, SHIFT, Cluster
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import (
    DATA,
    Equation,
    Region,
    Value,
    body_operands,
    carried,
)

Affine = tuple[float, float] | None
SAME: Affine = (1.0, 0.0)


class EdgeOrigin(NamedTuple):
    """A node, the moves after it, what they do to a number, and the turn of a loop it is of."""

    node: str | None
    moves: tuple[str, ...] = ()
    affine: Affine = SAME
    turn: Turn | None = "same"


NONE: frozenset[int] = frozenset()


class _Scope(NamedTuple):
    """A loop's carry whose origins are being looked up, and what was met without it."""

    carry: Value
    found: dict[Value, tuple[list[EdgeOrigin], frozenset[int]]]


class Origins:
    """The named nodes that values may come from."""

    def __init__(self, analysis: Analysis):
        self.producers = {c.exit: c for c in analysis.clusters if c.kind != "output"}
        self.carry: dict[Value, list[Value]] = {}
        self.ends: dict[tuple[Value, Value], Equation] = {}
        for equation in analysis.region.walk():
            inputs = equation.bodies[-1].inputs if equation.bodies else []
            position = {v: i for i, v in enumerate(inputs)}
            for inside, outside in carried(equation):
                first = body_operands(equation)[-1][position[inside]]
                self.ends[inside, outside] = equation
                self.carry[inside] = [v for v in (first, outside) if v.kind == DATA]
        self.sole: dict[Value, str | None] = {}
        for value in analysis.region.inputs:
            self.meet(value, [None])
        self.spread(analysis.region)
        self.found: dict[Value, list[EdgeOrigin]] = {}
        self.scopes: list[_Scope] = []

    def edges(self, cluster: Cluster) -> list[Edge]:
        if cluster.kind == "input":
            return []
        data = [v for v in cluster.operands if v.kind == DATA]
        if cluster.kind == "ragged":  # how many rows each matrix has is no input of it
            data = [v for v in data if v.inexact]
        return [
            Edge(i, *origin)
            for i, value in enumerate(data)
            for origin in self.of(value)
        ]

    def of(self, value: Value) -> list[EdgeOrigin]:
        """The nodes, each with the moves after it and what they do to a number."""
        stack = [value]
        while stack:  # what is chosen among comes first, so that no look-up goes deep
            last, *_ = self.chain(stack[-1])
            equation = last.producer
            if equation is None or self.settled(last):
                stack.pop()
                continue
            ends = (self.chain(v)[0] for v in _numbers(equation, last))
            needed = [v for v in ends if not self.settled(v)]
            if needed:
                stack += needed
            else:
                self.at(last)
        return self.look_up(value)[0]

    def settled(self, value: Value) -> bool:
        """Whether the origins of a value are known, or others than of an equation that chooses."""
        equation = value.producer
        if value in self.producers or value in self.found or equation is None:
            return True
        return bool(equation.bodies) or not _keeps(equation, value)

    def look_up(self, value: Value) -> tuple[list[EdgeOrigin], frozenset[int]]:
        """Origins, and the open scopes without whose carry these are.

        A carry that is met again on the way to its own origins adds none. What was found
        meanwhile holds until that carry is done, so it is kept for that long.
        """
        value, chain, sliced = self.chain(value)
        found, without = self.at(value)
        if sliced:
            found = [o._replace(turn="each") for o in found]
        for equation in reversed(chain):
            if equation.name not in CASTS:
                found = [
                    o._replace(
                        moves=(*o.moves, equation.name),
                        affine=_after(o.affine, equation),
                    )
                    for o in found
                ]
        return found, without

    def chain(self, value: Value) -> tuple[Value, list[Equation], bool]:
        """The value that moves of one value alone lead back to, and these moves.

        Also whether it is an input that a loop slices before any of these.
        """
        chain: list[Equation] = []
        sliced = False
        while value not in self.producers:
            equation = value.producer
            if equation is None or equation.bodies:
                if equation is None and value.source is not None:
                    sliced |= value.sliced
                    value = value.source
                    continue
                break
            data = _numbers(equation, value)
            if len(data) != 1:
                break
            chain.append(equation)
            value, sliced = data[0], False
        made = self.producers.get(value)
        return value, chain, sliced and made is not None and made.kind == "input"

    def at(self, value: Value) -> tuple[list[EdgeOrigin], frozenset[int]]:
        """The origins where more than one value may come together."""
        if value in self.producers:
            return [EdgeOrigin(self.producers[value].name)], NONE
        equation = value.producer
        if equation is not None and not equation.bodies and not _keeps(equation, value):
            return [EdgeOrigin(self.sole.get(value), (equation.name,), None)], NONE
        if equation is None and value not in self.carry:
            return [EdgeOrigin(None, (), None)], NONE
        if value in self.found:
            return self.found[value], NONE
        for depth, scope in enumerate(self.scopes):
            if scope.carry is value:
                return [], frozenset([depth])
            if value in scope.found:
                return scope.found[value]
        if equation is None:
            self.scopes.append(_Scope(value, {}))
            parts = [self.carried(value, v) for v in self.carry[value]]
            self.scopes.pop()
        elif not equation.bodies:
            parts = [self.one_of(equation, v) for v in _numbers(equation, value)]
        else:
            i = equation.results.index(value)
            parts = [self.result_of(equation, b, i) for b in _running(equation)]
        found = _together(f for origins, _ in parts for f in origins)
        without = NONE.union(*(w for _, w in parts)) - {len(self.scopes)}
        if without:
            self.scopes[max(without)].found[value] = found, without
        else:
            self.found[value] = found
        return found, without

    def one_of(
        self, equation: Equation, value: Value
    ) -> tuple[list[EdgeOrigin], frozenset[int]]:
        """The origins of one of several values that an equation chooses among."""
        found, without = self.look_up(value)
        moved = [
            o._replace(moves=(*o.moves, equation.name), affine=None) for o in found
        ]
        return moved, without

    def carried(
        self, carry: Value, value: Value
    ) -> tuple[list[EdgeOrigin], frozenset[int]]:
        """The origins of one of the values that a carry takes: its first, or what a turn leaves."""
        found, without = self.look_up(value)
        equation = self.ends.get((carry, value))
        if equation is None:
            return found, without
        turn: Turn | None = "previous" if _counts_up(equation) else None
        return [_in_turn(o, turn) for o in found], without

    def result_of(
        self, equation: Equation, body: Region, i: int
    ) -> tuple[list[EdgeOrigin], frozenset[int]]:
        """The origins of a result of a loop or branch, by what its body gives."""
        found, without = self.look_up(body.outputs[i])
        if equation.name not in ("scan", "while"):
            return found, without
        last = _counts_up(equation) and i < compat.scan_arity(equation.params)[1]
        return [_in_turn(o, "last" if last else None) for o in found], without

    # The one node that all that a value is computed from comes from

    def spread(self, region: Region) -> bool:
        """Give each value its sole node, None where there are several; whether any changed."""
        changed = False
        for equation in region.equations:
            if equation.bodies:
                changed |= self.spread_bodies(equation)
                continue
            nodes = [self.sole[v] for v in equation.data if v in self.sole]
            for value in equation.results:
                if value.kind == DATA:
                    changed |= self.meet(value, nodes)
        return changed

    def spread_bodies(self, equation: Equation) -> bool:
        changed, again = False, True
        while again:
            for body, outer in zip(
                equation.bodies, body_operands(equation), strict=True
            ):
                for inside, outside in zip(body.inputs, outer, strict=True):
                    if inside.kind != DATA:
                        continue
                    sources = [outside, *self.carry.get(inside, [])]
                    nodes = [self.sole[v] for v in sources if v in self.sole]
                    changed |= self.meet(inside, nodes)
            again = [self.spread(body) for body in equation.bodies].count(True) > 0
            changed |= again
        for body in _running(equation):
            for value, inside in zip(equation.results, body.outputs, strict=True):
                if inside in self.sole and value.kind == DATA:
                    changed |= self.meet(value, [self.sole[inside]])
        return changed

    def meet(self, value: Value, nodes: Sequence[str | None]) -> bool:
        if value in self.producers:
            nodes = [self.producers[value].name]
        before = [self.sole[value]] if value in self.sole else []
        every = {*before, *nodes}
        if not every or every == {*before}:
            return False
        after = every.pop() if len(every) == 1 else None
        if before == [after]:
            return False
        self.sole[value] = after
        return True


def _together(origins: Iterable[EdgeOrigin]) -> list[EdgeOrigin]:
    """Each node once: ways through branches would double with every branch."""
    found: dict[str | None, EdgeOrigin] = {}
    for one in origins:
        other = found.get(one.node)
        if other is not None and other != one:
            one = EdgeOrigin(
                one.node,
                tuple(dict.fromkeys((*other.moves, *one.moves))),
                one.affine if one.affine == other.affine else None,
                one.turn if one.turn == other.turn else None,
            )
        found[one.node] = one
    return list(found.values())


def _counts_up(equation: Equation) -> bool:
    """Whether a loop's turns run through its slices from the first to the last."""
    return equation.name == "scan" and not equation.params["reverse"]


def _in_turn(origin: EdgeOrigin, turn: Turn | None) -> EdgeOrigin:
    """The origin, seen from the other side of one loop; of two it is not known."""
    return origin._replace(turn=turn if origin.turn == "same" else None)


def _running(equation: Equation) -> tuple[Region, ...]:
    """The bodies whose outputs are the results of a loop or branch."""
    return equation.bodies[-1:] if equation.name == "while" else equation.bodies


def _keeps(equation: Equation, value: Value) -> bool:
    return value.inexact and equation.name in (*CHOOSES, "sort")


def _numbers(equation: Equation, value: Value) -> list[Value]:
    """The operands from the data that the numbers of a result come from."""
    if not _keeps(equation, value):
        return equation.data
    if equation.name == "sort":
        return [equation.operands[equation.results.index(value)]]
    chosen = equation.operands[CHOOSES[equation.name]]
    return list(dict.fromkeys(v for v in chosen if v.kind == DATA)) or equation.data


def _after(affine: Affine, equation: Equation) -> Affine:
    """Scale and shift of a number after a move, None where it is unknown."""
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
