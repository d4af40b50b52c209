"""Values that decide or hide instead of being computed with: masks, and what they mask.

Attention keeps a token out by −1e9 or −∞ in front of a softmax, pools by −1e9 in front of a
maximum, models of categories turn inputs into indices. A range that held such entries would
leave nothing for the others, and a mask or an index that is rounded decides otherwise.
"""

from collections.abc import Iterable

import numpy as np

from jaxmet.engine.nodes.cluster import LAYERS, SCALE, SHIFT, VIEWS, Cluster
from jaxmet.engine.nodes.softmax import SOFTMAX
from jaxmet.engine.program.program import (
    DATA,
    PARAM,
    Equation,
    Region,
    Value,
    body_operands,
    carried,
)

SENTINEL = 1e4
"""From here on a constant stands for infinity: masks use 1e4, 1e9, the largest number, ∞."""

UNSEEN = -100.0
"""What a bound leaves of −∞ still hides an entry: e to this power is nothing in float32."""

CARRIES = (
    *VIEWS, *SCALE, *SHIFT, "neg", "concatenate", "stack", "unstack", "tile", "pad",
    "select_n", "slice", "split", "dynamic_slice", "dynamic_update_slice", "gather",
    "reduce_sum", "reduce_min", "sort", "cumsum",
)  # fmt: skip
DECIDES = ("eq", "ne", "floor", "ceil", "round", "sign", "argmax", "argmin")
MAXIMA = ("max", "max_pool")
COMPARES = ("ge", "gt", "le", "lt")
Ending = tuple[Value, bool, bool]
"""A value, whether it was joined on the way, and whether a maximum is an end too."""


class AttentionMasks:
    """Which values of a program hold masked entries, and which decide."""

    def __init__(self, region: Region):
        self.weighted: set[Value] = set()
        """Values that depend on the data and on parameters."""
        self.masked: set[Value] = set()
        self.decides: set[Value] = set()
        self.compared: set[Value] = set()
        """What only comparisons decide by: of a value that is computed with, no reason."""
        self.ends_so: dict[Ending, bool] = {}
        self._forward(region)
        self._backward(region)

    def hidden(self, cluster: Cluster) -> bool:
        """Whether a softmax is all that sees a result, or it has entries that mean −∞."""
        if cluster.kind in (*LAYERS, "output", "matmul", "norm"):
            return False
        if cluster.exit in self.masked or self._masked_later(cluster):
            return True
        joined = self._joins(cluster)
        bias = cluster.exit not in self.weighted
        masking = bias or not self._all_weighted(cluster)
        return (joined or bias) and self._ends_so(cluster.exit, joined, masking)

    def _masked_later(self, cluster: Cluster) -> bool:
        """Whether an exponential is masked after it: what the mask hides may be huge."""
        uses = cluster.exit.uses
        return (
            cluster.function in ("exp", "exp2")
            and bool(uses)
            and all(u is not None and self._is_masking(u) for u in uses)
        )

    def _is_masking(self, use: Equation) -> bool:
        """Whether an equation multiplies by what has no weights in it, or selects by it."""
        others = [v for v in use.operands if v not in self.weighted]
        if use.name == "mul":
            return any(v.ndim and v.kind != PARAM for v in others)
        return use.name == "select_n" and len(others) == 2 and use.operands[0] in others

    def selects(self, cluster: Cluster) -> bool:
        """Whether a result without weights decides what a mask hides or an index means."""
        if cluster.kind in (*LAYERS, "output", "matmul", "norm"):
            return False
        if cluster.exit in self.weighted:
            return False
        compared = cluster.exit in self.compared and not self._computes(cluster.exit)
        return compared or cluster.exit in self.decides

    def _joins(self, cluster: Cluster) -> bool:
        """Whether a node adds to scores, or masks them by a factor without weights."""
        factor = not self._all_weighted(cluster)
        return cluster.kind == "add" or (cluster.kind == "multiply" and factor)

    def _all_weighted(self, cluster: Cluster) -> bool:
        return all(v in self.weighted for v in cluster.operands if v.kind == DATA)

    def _ends_so(self, value: Value, joined: bool, masking: bool) -> bool:
        """Whether all that becomes of a value, in sums and moves, is a softmax of a sum.

        Of what has a mask in it (`masking`), or a maximum of a sum.
        """
        stack = [(value, joined, masking)]
        while stack:  # a recursion would go as deep as the model
            key = stack[-1]
            after = None if key in self.ends_so else self._after(*key)
            unknown = [k for k in after or () if k not in self.ends_so]
            if unknown:
                stack += unknown
                continue
            if key not in self.ends_so:
                found = after is not None and all(self.ends_so[k] for k in after)
                self.ends_so[key] = found
            stack.pop()
        return self.ends_so[value, joined, masking]

    def _after(self, value: Value, joined: bool, masking: bool) -> list[Ending] | None:
        """What must end so for a value to, None where it does not."""
        ends = (*SOFTMAX, *(MAXIMA if masking else ()))
        found: list[Ending] = []
        for use in value.uses:
            if use is None or use.bodies:
                return None
            cluster = use.node
            if cluster is None or self._joins(cluster):
                results = use.results if cluster is None else [cluster.exit]
                if not all(r.inexact for r in results):
                    return None
                found += [(r, joined or cluster is not None, masking) for r in results]
            elif not joined or cluster.function not in ends:
                return None
        return found if value.uses else None

    # Forward: what depends on weights, and what has masked entries

    def _forward(self, region: Region) -> None:
        for equation in region.equations:
            if not equation.bodies:
                self._weigh(equation)
                if self._masks(equation):
                    self.masked.update(v for v in equation.results if v.inexact)
                continue
            pairs = body_operands(equation)
            for body, outer in zip(equation.bodies, pairs, strict=True):
                self._spread(zip(outer, body.inputs, strict=True))
                self._forward(body)
            if self._spread((o, i) for i, o in carried(equation)):
                for body in equation.bodies:
                    self._forward(body)
            for body in equation.bodies:
                if len(body.outputs) == len(equation.results):
                    self._spread(zip(body.outputs, equation.results, strict=True))

    def _spread(self, pairs: Iterable[tuple[Value, Value]]) -> bool:
        """Whether anything new was learned of the second values."""
        before = len(self.weighted) + len(self.masked)
        for one, two in pairs:
            for found in (self.weighted, self.masked):
                if one in found:
                    found.add(two)
            if one.kind == PARAM and two.kind == DATA:
                self.weighted.add(two)
        return len(self.weighted) + len(self.masked) > before

    def _weigh(self, equation: Equation) -> None:
        if equation.kind == DATA and any(
            v.kind == PARAM or v in self.weighted for v in equation.operands
        ):
            self.weighted.update(equation.results)

    def _masks(self, equation: Equation) -> bool:
        name, operands, cluster = equation.name, equation.operands, equation.node
        held = [v for v in operands if self._hides(v)]
        if cluster is not None and cluster.kind == "activation":
            if cluster.function == "log_softmax":
                whole = equation.results[0] is cluster.exit
                return whole and cluster.entry in self.masked
            if cluster.function in SOFTMAX or _bounded(cluster):
                return False
            if cluster.pointwise.known and name in ("max", "min", "clamp"):
                return any(v in self.masked for v in equation.data)
            cases = [v for v in operands[1:] if v.kind == DATA]
            if name == "select_n" and cases:
                # A function of one number, by cases: what is masked stays so.
                return any(v in self.masked for v in cases)
        if name in ("max", "min"):
            kept = [v for v in held if v.kind == DATA]
            return bool(kept) and not (name == "max" and len(equation.data) == 1)
        if name not in CARRIES or not held:
            return False
        if name in SCALE and not any(v.kind == DATA for v in held):
            return not any(v.kind == PARAM or v in self.weighted for v in operands)
        if name == "select_n":
            return any(v in held for v in operands[1:])
        return name != "gather" or operands[0] in held

    def _hides(self, value: Value) -> bool:
        return value in self.masked or _is_sentinel(value)

    # Backward: what decides

    def _backward(self, region: Region) -> None:
        for equation in reversed(region.equations):
            pairs = body_operands(equation)
            for body, outer in zip(equation.bodies, pairs, strict=True):
                self._backward(body)
                for inside, outside in zip(body.inputs, outer, strict=True):
                    for found in (self.decides, self.compared):
                        if inside in found:
                            found.add(outside)
            if equation.bodies or equation.kind != DATA:
                continue
            for value in equation.data:
                if value in self.weighted:
                    continue
                if self._decides(equation, value):
                    self.decides.add(value)
                if self._compares(equation):
                    self.compared.add(value)

    def _decides(self, equation: Equation, value: Value) -> bool:
        if _known(equation):
            return False
        if equation.name in DECIDES:
            return True
        if (
            equation.name not in COMPARES
            and value.inexact != equation.results[0].inexact
        ):
            return value.inexact
        cluster = equation.node
        made = equation.results if cluster is None else [cluster.exit]
        return any(
            r not in self.weighted
            and (r in self.decides or r in self.masked or self._ends_so(r, False, True))
            for r in made
        )

    def _compares(self, equation: Equation) -> bool:
        if _known(equation) or _by_cases(equation.node):
            return False
        return equation.name in COMPARES or any(
            r in self.compared and r not in self.weighted for r in equation.results
        )

    def _computes(self, value: Value) -> bool:
        """Whether a product reads the value, or what is made of it without weights."""
        stack, seen = [value], {value}
        while stack:
            value = stack.pop()
            for use in value.uses:
                if use is None:
                    continue
                if use.node is not None and use.node.kind in (*LAYERS, "matmul"):
                    return True
                after = list(use.results)
                for body, outer in zip(use.bodies, body_operands(use), strict=True):
                    pairs = zip(body.inputs, outer, strict=True)
                    after += [inside for inside, v in pairs if v is value]
                for r in after:
                    if r.inexact and r not in self.weighted and r not in seen:
                        seen.add(r)
                        stack.append(r)
        return False


def _is_sentinel(value: Value) -> bool:
    """Whether a constant holds a number that stands for infinity."""
    numbers = value.numbers()
    return numbers is not None and bool((np.abs(numbers) >= SENTINEL).any())


def _bounded(cluster: Cluster) -> bool:
    """Whether an activation is known and leaves nothing of −∞, as a sigmoid or ReLU does."""
    form = cluster.pointwise
    if not form.known or form.slope is not None:
        return False
    return form.bounds is None or form.bounds[0] > UNSEEN


def _known(equation: Equation) -> bool:
    """Whether an equation belongs to an activation that is known, as a rectifier is."""
    return equation.node is not None and equation.node.pointwise.known


def _by_cases(cluster: Cluster | None) -> bool:
    """Whether a node is a function of one number that is defined by cases, as elu is."""
    return cluster is not None and any(
        e.name == "select_n" and any(v.kind == DATA for v in e.operands[1:])
        for e in cluster.equations
    )
