"""A program run for many settings of its arguments: what comes before a change is kept.

A program is cut into stages. From one row of arguments to the next only those stages run again
that come after the first that reads a changed argument, which for one layer of a network
changed at a time is half of the work.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxmet.engine.program import compat
from jaxmet.engine.run.shared_programs import (
    THREADS,
    Step,
    Traced,
    abstract,
    compiled_steps,
    is_own,
)

STAGES = 16
SMALL = 64  # bytes: so much is compared by content


class Stage(NamedTuple):
    """A part of a program; `reads` and `makes` are variables of the whole."""

    run: Any
    given: list[Any]  # in the abstract
    reads: list[Any]
    makes: list[Any]
    arguments: list[int]
    needed_later: set[Any]


class Kept(NamedTuple):
    """What was known before a stage of a row: values by their variables."""

    stage: int
    env: dict[Any, Any]
    row: list[Any]


class StagedProgram:
    """A function of arrays for arguments of the shapes of these, which may be abstract."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        traced = Traced.of(function, arguments, _body)
        self.arguments, self.constants = traced.arguments, traced.constants
        self.results, self.sources = traced.results, traced.sources
        steps = _late(traced.steps, {*self.constants})
        whole = not steps or any(is_own(step.equation) for step in steps)
        parts = [steps] if whole else _cut(steps, {*self.arguments})
        self.stages = self._stages(parts)

    def _stages(self, parts: Sequence[list[Step]]) -> list[Stage]:
        used = {v for v in self.sources if not isinstance(v, Literal)}
        later = []
        for part in reversed(parts):
            later.append(set(used))
            used |= {v for s in part for v in s.reads if not isinstance(v, Literal)}
        number = {v: i for i, v in enumerate(self.arguments)}
        kinds = {v: v.aval for v in (*self.arguments, *self.constants)}
        for step in (s for part in parts for s in part):
            both = zip(step.makes, step.equation.outvars, strict=True)
            kinds |= {made: v.aval for made, v in both}
        found = []
        for part, wanted in zip(parts, reversed(later), strict=True):
            own = {v for s in part for v in s.makes}
            every = (v for s in part for v in s.reads if not isinstance(v, Literal))
            reads = [v for v in dict.fromkeys(every) if v not in own]
            makes = [v for s in part for v in s.makes if v in wanted]
            given = [abstract(kinds[v]) for v in reads]
            run = compiled_steps(part, reads, makes, given)
            arguments = [number[v] for v in reads if v in number]
            found.append(Stage(run, given, reads, makes, arguments, wanted))
        return found

    def compile(self) -> None:
        """Compile all stages, side by side."""
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda s: s.run.lower(*s.given).compile(), self.stages))

    def rows(self, every: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results for each of many rows of arguments, which come one ahead of their turn."""
        rows = (jax.tree.leaves(row) for row in every)
        now, kept = next(rows, None), None
        while now is not None:
            following = next(rows, None)
            own = dict(zip(self.arguments, now, strict=True))
            start, env = 0, self.constants
            if kept is not None and self._same(kept.row, now) >= kept.stage:
                start, env = kept.stage, kept.env
            split = 0 if following is None else self._same(now, following)
            for i, stage in enumerate(self.stages[start:], start):
                if start < i == split:
                    kept = Kept(i, env, now)
                read = [env[v] if v in env else own[v] for v in stage.reads]
                made = zip(stage.makes, stage.run(*read), strict=True)
                known = itertools.chain(env.items(), made)
                env = {v: x for v, x in known if v in stage.needed_later}
            known = own | env
            found = [
                v.val if isinstance(v, Literal) else known[v] for v in self.sources
            ]
            # What no stage makes may still be one of NumPy.
            yield self.results.unflatten(map(jnp.asarray, found))
            now = following

    def _same(self, one: Sequence[Any], two: Sequence[Any]) -> int:
        """How many stages read the same from both, before the first that does not."""
        same = [_equal(a, b) for a, b in zip(one, two, strict=True)]
        for i, stage in enumerate(self.stages):
            if not all(same[argument] for argument in stage.arguments):
                return i
        return len(self.stages)


def _equal(one: Any, two: Any) -> bool:
    known = isinstance(one, np.ndarray | np.generic)
    small = known and isinstance(two, np.ndarray | np.generic) and one.nbytes <= SMALL
    # By bytes: zeros of two signs are equal numbers.
    content = lambda v: (v.shape, v.dtype, v.tobytes())
    return one is two or (small and content(one) == content(two))


def _body(equation: Any) -> tuple[Any, Sequence[Any]]:
    """Body and constants of a call that says nothing of where it runs."""
    if equation.primitive.name in compat.CALLS and not is_own(equation):
        return compat.open_jaxpr(compat.call_body(equation.params))
    return None, ()


def _late(steps: Sequence[Step], constants: set[Any]) -> list[Step]:
    """The steps, those that see no data right before the first that needs them.

    All weights are rounded first of all, say: the first stage would read them all. Data are
    arrays that a function closes over.
    """
    data = {v for v in constants if v.aval.shape}
    fixed = []
    for step in steps:
        sees = any(
            np.ndim(v.val) > 0 if isinstance(v, Literal) else v in data
            for v in step.reads
        )
        fixed.append(sees or bool(step.equation.effects))
        if sees:
            data |= set(step.makes)
    place: dict[Any, int] = {}  # of the first step that reads a value
    keys = [0] * len(steps)
    for i in reversed(range(len(steps))):
        least = min((place.get(v, len(steps)) for v in steps[i].makes), default=i)
        keys[i] = i if fixed[i] else least
        for v in steps[i].reads:
            if not isinstance(v, Literal):
                place[v] = min(place.get(v, len(steps)), keys[i])
    # Those that one step needs come in their old order, and before it.
    order = sorted(range(len(steps)), key=lambda i: (keys[i], fixed[i], i))
    return [steps[i] for i in order]


def _cut(steps: Sequence[Step], arguments: set[Any]) -> list[list[Step]]:
    """At most STAGES parts of about the same work; each begins where arguments are read."""
    work = np.cumsum([_work(step.equation) for step in steps])
    parts: list[list[Step]] = [[]]
    share, met = work[-1] / STAGES, set[Any]()
    for step, done in zip(steps, work, strict=True):
        new = {v for v in step.reads if not isinstance(v, Literal)} & arguments - met
        met |= new
        if new and parts[-1] and done >= share * len(parts):
            parts.append([])
        parts[-1].append(step)
    return parts


def _work(equation: Any) -> float:
    """About how many operations an equation takes."""
    sizes = [math.prod(v.aval.shape) for v in equation.outvars]
    inner = [math.prod(v.aval.shape) for v in equation.invars]
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return float(sizes[0] * math.prod(shape[i] for i in summed))
    if name == "conv_general_dilated":
        outs = equation.invars[1].aval.shape[params["dimension_numbers"].rhs_spec[0]]
        return float(sizes[0] * inner[1] / outs)
    bodies = [compat.open_jaxpr(j)[0] for j in compat.sub_jaxprs(params)]
    if bodies:
        rounds = params.get("length", 1)
        return float(rounds) * sum(_work(e) for body in bodies for e in body.eqns)
    return float(sum(sizes))
