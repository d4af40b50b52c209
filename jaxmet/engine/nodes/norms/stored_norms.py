"""Norms with stored statistics: affine maps whose factor holds 1/√(variance + epsilon)."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxmet.engine.nodes.cluster import (
    SHIFT,
    Cluster,
    by_channel,
    cone,
    is_free,
    leaf_of,
    leaves_under,
    only_use,
    through_views,
)
from jaxmet.engine.nodes.norms.affine_chain import (
    DRAWS,
    DrawnNumbers,
    Numbers,
    UnknownError,
    is_step,
)
from jaxmet.engine.nodes.records import Roles, StoredNorm
from jaxmet.engine.program.program import CONST, DATA, PARAM, Equation, Value

CAST = "convert_element_type"
TOLERANCE = 1e-9
"""Of identities in float64; what is no identity misses by far more."""


def stored_norms_of(
    root: Equation, spread: Value, order: dict[Equation, int]
) -> Iterator[Cluster]:
    """The norms that divide by one root of a spread of parameters or constants."""
    uses = sorted(_data_uses(root), key=order.__getitem__)
    while uses:
        run, start = _run(uses[0])
        inside = [i for i, e in enumerate(run) if e in uses]
        uses = [e for e in uses if e not in run]
        found = _best(spread, run, start, inside)
        if found is None:
            continue
        low, high, roles = found
        if roles.scale is not None or roles.bias is not None:
            while high < len(run) and run[high].name == CAST:
                high += 1
        source = through_views(_entry(run, start, low), (CAST,))
        exit = run[high - 1].results[0]
        equations = cone(exit, {source}, order)
        if run[inside[0]] not in equations:
            continue
        if root.kind == CONST and not _is_layer(roles, source):
            continue
        record = StoredNorm(spread, roles, root.kind == CONST)
        yield Cluster("norm", "norm", equations, exit, source, record)


def _is_layer(roles: Roles, source: Value) -> bool:
    """Whether a norm of constants is one: inputs are standardized by constants as well."""
    learned = (v for v in (roles.scale, roles.bias) if v is not None and v.name)
    producer = source.producer.node if source.producer is not None else None
    return any(learned) or (producer is not None and producer.kind == "product")


def _data_uses(root: Equation) -> set[Equation]:
    """The equations that read data and what is computed from the root.

    None at all if one of them is no multiplication and the like, as where a weight is
    normalized.
    """
    found: set[Equation] = set()
    seen, stack = set(root.results), [*root.results]
    while stack:
        value = stack.pop()
        for use in value.uses:
            if use is None or not is_free(use):
                return set()
            if use.kind < DATA:
                stack += [v for v in use.results if v not in seen]
                seen.update(use.results)
                continue
            if len(use.data) != 1 or not is_step(use, use.data[0]):
                return set()
            found.add(use)
    return found


def _run(first: Equation) -> tuple[list[Equation], Value]:
    """The longest run of affine steps through an equation, and what it starts from."""
    run, value = [first], first.results[0]
    while (use := only_use(value)) is not None and is_step(use, value):
        run.append(use)
        value = use.results[0]
    start = first.data[0]
    while len(start.uses) == 1 and (before := start.producer) is not None:
        if not is_free(before) or len(before.data) != 1:
            break
        if not is_step(before, before.data[0]):
            break
        run.insert(0, before)
        start = before.data[0]
    return run, start


def _entry(run: Sequence[Equation], start: Value, low: int) -> Value:
    return run[low - 1].results[0] if low else start


def _best(
    spread: Value, run: list[Equation], start: Value, inside: list[int]
) -> tuple[int, int, Roles] | None:
    """The longest part of a run that is a norm and nothing else, or what may be one."""
    finder = _RoleFinder(spread)
    if not finder.under:
        return None
    first, last = inside[0], inside[-1] + 1
    highs = [last]
    while highs[-1] < len(run) and _own(run[highs[-1]]):
        highs.append(highs[-1] + 1)
    parts = [
        (low, high)
        for low in range(first + 1)
        for high in highs
        if run[low].name != CAST and (high == last or run[high - 1].name != CAST)
    ]
    for low, high in sorted(parts, key=lambda p: p[0] - p[1]):
        roles = finder.roles(run[low:high], _entry(run, start, low))
        ends = [run[low]] * (low < first) + [run[high - 1]] * (high > last)
        own = roles.factor == 1.0 or all(map(_has_leaf, ends))
        if roles.plain and own:  # a scaling by a number beside a norm is not of it
            return low, high, roles
    low = first
    while low and run[low - 1].name == CAST:
        low -= 1
    low = low - 1 if low and run[low - 1].name == "sub" else first
    high = _tail(run, last)
    return low, high, finder.roles(run[low:high], _entry(run, start, low))


def _has_leaf(step: Equation) -> bool:
    return any(v.kind == PARAM or v.ndim for v in step.operands if v.kind < DATA)


def _own(step: Equation) -> bool:
    """Whether what a step multiplies or adds varies along one axis only, as a norm's does."""
    return all(v.kind == DATA or by_channel(v) for v in step.operands)


def _tail(run: Sequence[Equation], high: int) -> int:
    """Where a norm of an unknown form ends: at its scale and bias."""
    end, scaled = high, False
    for i in range(high, len(run)):
        step = run[i]
        if step.name == CAST:
            continue
        others = [v for v in step.operands if v.kind < DATA]
        if not others or leaf_of(others[0]) is None or not _own(step):
            break
        if step.name == "mul" and not scaled:
            scaled, end = True, i + 1
        else:
            return i + 1 if step.name in SHIFT else end
    return end


def _weight(spread: Value) -> tuple[Value | None, bool]:
    """The one number that a stored variance is multiplied or divided by, if there is one.

    A running average that starts from zero is divided by the sum of its weights.
    """
    value = spread
    while leaf_of(value) is None and value.producer is not None:
        equation = value.producer
        computed = [v for v in equation.operands if v.producer or v.name or v.source]
        if equation.name in ("mul", "div") and len(computed) == 2:
            first, second = computed
            if equation.name == "mul" and not first.ndim:
                first, second = second, first
            base = through_views(second)
            if base.ndim or not leaves_under(base):
                return None, False
            return base, equation.name == "div"
        if not computed:
            break
        value = computed[0]
    return None, False


class _RoleFinder:
    """Roles by what changes when a leaf does."""

    def __init__(self, spread: Value):
        self.spread = spread
        self.weight, self.inverse = _weight(spread)
        self.draws: dict[Value, Numbers] = {}
        self.fixed: dict[Value, Numbers] = {}
        if self.weight is not None:
            self.fixed[self.weight] = np.linspace(0.3, 0.9, DRAWS)
        self.under = self.leaves_of(spread)
        for value in self.under:  # of what a root is taken
            self.draws[value] = np.abs(self.draws[value])

    def leaves_of(self, value: Value) -> list[Value]:
        drawn = DrawnNumbers(self.draws, self.fixed)
        try:
            with np.errstate(all="ignore"):
                drawn.number(value)
        except UnknownError:
            return []
        return list(drawn.met)

    def roles(self, run: Sequence[Equation], start: Value) -> Roles:
        try:
            with np.errstate(all="ignore"):
                return self.identify(run, start)
        except UnknownError:
            return Roles()

    def identify(self, run: Sequence[Equation], start: Value) -> Roles:
        drawn, one = DrawnNumbers(self.draws, self.fixed), np.ones(DRAWS)
        a, c = drawn.affine(run, start)

        def changed(leaf: Value, number: Numbers) -> tuple[Numbers, Numbers]:
            return DrawnNumbers(self.draws, self.fixed | {leaf: number}).affine(
                run, start
            )

        weight = self.fixed[self.weight] if self.weight is not None else one
        weight = 1 / weight if self.inverse else weight
        roles = Roles(weight=self.weight, inverse=self.inverse)
        others = [leaf for leaf in drawn.met if leaf not in self.under]
        strangers = len(self.under) != 1
        for leaf in others:
            role, number = None, self.draws[leaf]
            a_more, c_more = changed(leaf, number + 1)
            if not _same(a_more, a):
                a_twice, _ = changed(leaf, 2 * number)
                role = "scale" if _same(a_twice, 2 * a) else None
            elif _same(c_more - c, one):
                role = "bias"
            elif _same(c_more - c, -a * weight):
                role = "mean"
            if role is None or getattr(roles, role) is not None:
                strangers = True
            else:
                setattr(roles, role, leaf)
        if strangers:
            return roles
        (variance,) = self.under
        roles.variance = variance
        return self.prove(
            roles, weight, a, c, lambda number: changed(variance, number)[0]
        )

    def prove(
        self,
        roles: Roles,
        weight: Numbers,
        a: Numbers,
        c: Numbers,
        a_at: Callable[[Numbers], Numbers],
    ) -> Roles:
        """Whether a = factor·scale/√(variance + epsilon) and c = bias − mean·a.

        `a_at` is the factor at another variance: at zero it tells the epsilon.
        """
        mean, variance, scale, bias = (
            np.full(DRAWS, empty) if leaf is None else self.draws[leaf]
            for leaf, empty in (
                (roles.mean, 0.0),
                (roles.variance, 0.0),
                (roles.scale, 1.0),
                (roles.bias, 0.0),
            )
        )
        # 1/a² is a line over the variance; its value at zero over its slope is epsilon.
        at_zero = np.square(scale / a_at(0 * variance))
        slope = (np.square(scale / a) - at_zero) / (variance * weight)
        epsilons, factors = at_zero / slope, 1 / np.sqrt(slope)
        roles.epsilon = self.exact(float(np.median(epsilons)))
        gain = scale / np.sqrt(variance * weight + roles.epsilon)
        factor = float(np.median(factors)) * (1 if a[0] * gain[0] > 0 else -1)
        roles.factor = 1.0 if _same(factor, 1.0) else factor
        leaves = (roles.mean, roles.variance, roles.scale, roles.bias)
        # Max(√v, ε) and √v + ε differ from it only where the variance is as small as epsilon.
        small = roles.epsilon * variance / weight
        small_gain = scale / np.sqrt(small * weight + roles.epsilon)
        roles.plain = (
            all(leaf is None or leaf.name is not None for leaf in leaves)
            and _same(epsilons, np.full(DRAWS, roles.epsilon))
            and _same(a, roles.factor * gain)
            and (small.max() == 0 or _same(a_at(small), roles.factor * small_gain))
            and _same(c, bias - mean * weight * a)
        )
        return roles

    def exact(self, epsilon: float) -> float:
        """The number in the equations that an epsilon found by arithmetic is."""
        stack, seen = [self.spread], set()
        while stack:
            value = stack.pop()
            number = value.scalar()
            if number is not None and _same(number, epsilon):
                return number
            if value.producer is not None and value not in seen:
                seen.add(value)
                stack += value.producer.operands
        return epsilon


def _same(x: Numbers | float, y: Numbers | float) -> bool:
    return bool(np.all(np.abs(x - y) <= TOLERANCE * np.abs(y) + 1e-13))
