"""Compiled programs that every equal computation shares, from layer to layer and call to call.

A function is traced for the shapes of its arguments, and what it does not need of them is left
out. Two whose programs read the same are one: equal blocks of a model, and a second call
with other numbers, compile nothing.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.extend.core import Literal

from jaxmet.engine.program import compat
from jaxmet.engine.program.calls import is_array
from jaxmet.tree.checks import is_concrete

KEPT = 1024  # programs that are remembered, those used last
AHEAD = 8  # programs that are compiled before they are needed
THREADS = max(2, min(4, os.cpu_count() or 1))
# What an equation calls or where it runs is not in the text of the program.
OWN = ("callback", "partitioning", "shard", "mesh")

_known: OrderedDict[bytes, Callable] = OrderedDict()
_lock = threading.Lock()


class Program:
    """A function of arrays for arguments of the shapes of these, which may be abstract."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        traced = Traced.of(function, arguments, compat.inlined_body)
        self.results, self.shapes = traced.results, traced.shapes
        self.order = _order(traced.steps, traced.sources)
        places = {v: i for i, v in enumerate(traced.arguments)}
        # Closed-over arrays are data, too: the program does not depend on them.
        self.arguments = tuple(places.get(v, -1) for v in traced.read)
        self.constants = [traced.constants.get(v) for v in traced.read]
        outputs = [traced.sources[i] for i in self.order]
        self.given = [abstract(v.aval) for v in traced.read]
        self.run = compiled_steps(traced.steps, traced.read, outputs, self.given)

    def __call__(self, *arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        both = zip(self.arguments, self.constants, strict=True)
        found = self.run(*(c if i < 0 else leaves[i] for i, c in both))
        results = [None] * len(found)
        for place, value in zip(self.order, found, strict=True):
            results[place] = value
        return self.results.unflatten(results)

    def compile(self) -> None:
        """Compile now, in any thread, what a call would compile."""
        self.run.lower(*self.given).compile()  # type: ignore[attr-defined]


def share_programs(function: Callable) -> Callable:
    """`jax.jit(function)`, compiled once for all functions that trace to the same program.

    For functions that close over a user's own code and data, such as a score: each is traced
    and lowered, and nothing is compiled that was compiled before.
    """
    plain, programs = jax.jit(function), dict[Hashable, Program]()

    def run(*arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        if not all(is_array(x) and is_concrete(x) for x in leaves):
            return plain(*arguments)
        kind = (
            tree,
            *((x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves),
        )
        if kind not in programs:
            programs[kind] = Program(function, *arguments)
        return programs[kind](*arguments)

    return run


def abstract(aval: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


class Step(NamedTuple):
    """An equation, with what it reads and makes in the whole program."""

    equation: Any
    reads: list[Any]
    makes: list[Any]


class Traced(NamedTuple):
    """What a function computes: the steps that its results need, and what they read.

    Variables are those of the jaxpr for arguments and constants, in `read` in the order of
    their first use. Names and places of arguments say nothing then: equal blocks give equal
    programs.
    """

    arguments: list[Any]
    constants: dict[Any, Any]
    steps: list[Step]
    read: list[Any]
    sources: list[Any]  # a variable or a Literal for each result
    results: Any  # their structure
    shapes: Any

    @staticmethod
    def of(
        function: Callable,
        arguments: Sequence[Any],
        body_of: Callable[[Any], tuple[Any, Sequence[Any]]],
    ) -> "Traced":
        """For arguments like these; calls that have a body without constants are opened."""
        leaves, structure = jax.tree.flatten(arguments)
        flat = lambda *leaves: function(*structure.unflatten(leaves))
        closed, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        jaxpr, constants = compat.open_jaxpr(closed)
        every, sources = _inlined(jaxpr, body_of)
        own = dict(zip(jaxpr.constvars, constants, strict=True))
        steps, read = _needed(every, sources, {*jaxpr.invars, *own})
        results = jax.tree.structure(shape)
        shapes = results.unflatten([abstract(v.aval) for v in jaxpr.outvars])
        return Traced([*jaxpr.invars], own, steps, read, sources, results, shapes)


def _inlined(
    jaxpr: Any, body_of: Callable[[Any], tuple[Any, Sequence[Any]]]
) -> tuple[list[Step], list[Any]]:
    """The steps of a program, and where its results come from."""
    steps: list[Step] = []

    def walk(jaxpr: Any, known: dict[Any, Any]) -> list[Any]:
        source = lambda v: v if isinstance(v, Literal) else known.get(v, v)
        for equation in jaxpr.eqns:
            reads = [*map(source, equation.invars)]
            body, constants = body_of(equation)
            if body is not None and not constants:
                found = walk(body, dict(zip(body.invars, reads, strict=True)))
                known.update(zip(equation.outvars, found, strict=True))
                continue
            # Variables of a body that is called twice would be two values.
            makes = [object() for _ in equation.outvars]
            known.update(zip(equation.outvars, makes, strict=True))
            steps.append(Step(equation, reads, makes))
        return [*map(source, jaxpr.outvars)]

    return steps, walk(jaxpr, {})


def _needed(
    every: Sequence[Step], sources: Sequence[Any], outer: set[Any]
) -> tuple[list[Step], list[Any]]:
    """The steps that the results need, and what they read from outside."""
    wanted = {v for v in sources if not isinstance(v, Literal)}
    steps = []
    for step in reversed(every):
        if step.equation.effects or any(v in wanted for v in step.makes):
            steps.append(step)
            wanted |= {v for v in step.reads if not isinstance(v, Literal)}
    steps.reverse()
    read = [v for s in steps for v in s.reads] + [*sources]
    first = dict.fromkeys(v for v in read if not isinstance(v, Literal))
    return steps, [v for v in first if v in outer]


def _order(steps: Sequence[Step], sources: Sequence[Any]) -> list[int]:
    """The places of the results in the order in which they are made."""
    made = {v: i for i, s in enumerate(steps) for v in s.makes}
    place = lambda v: -1 if isinstance(v, Literal) else made.get(v, -1)
    return sorted(range(len(sources)), key=lambda i: place(sources[i]))


def is_own(equation: Any) -> bool:
    """Whether an equation is more than its text: functions of the host, places of arrays."""
    if equation.effects or any(word in equation.primitive.name for word in OWN):
        return True
    both = (equation.params.get(f"{end}_shardings", ()) for end in ("in", "out"))
    if any(type(s).__name__ != "UnspecifiedValue" for where in both for s in where):
        return True
    bodies = (compat.open_jaxpr(j)[0] for j in compat.sub_jaxprs(equation.params))
    return any(is_own(e) for body in bodies for e in body.eqns)


def compiled_steps(
    steps: Sequence[Step],
    read: Sequence[Any],
    outputs: Sequence[Any],
    given: Sequence[Any],
) -> Any:
    """`jax.jit` of these steps on what they read, `given` in the abstract, and what they make."""

    def run(*values: Any) -> list[Any]:
        known = dict(zip(read, values, strict=True))
        get = lambda v: v.val if isinstance(v, Literal) else known[v]
        for step in steps:
            own = step.equation
            found = compat.bind(own.primitive, own.params, [*map(get, step.reads)])
            known.update(zip(step.makes, found, strict=True))
        return [*map(get, outputs)]

    # An argument that only a call inside leaves out would be missing in the text.
    compiled = jax.jit(run, keep_unused=True)
    own = any(is_own(step.equation) for step in steps)
    return compiled if own else _shared(compiled, given)


def _shared(run: Any, given: Sequence[Any]) -> Callable:
    """The function with the same program that was there first."""
    text = run.lower(*given).as_text()
    # Random keys of any generator are integers in the text.
    kinds = [str(x.dtype) for x in (*given, *run.eval_shape(*given))]
    key = hashlib.sha256("\n".join((*kinds, text)).encode()).digest()
    with _lock:
        run = _known.setdefault(key, run)
        _known.move_to_end(key)
        while len(_known) > KEPT:
            _known.popitem(last=False)
    return run


def placed(*trees: Any) -> bool:
    """Whether any array is where the user put it, which programs depend on, or is traced."""
    leaves = jax.tree.leaves(trees)
    return any(isinstance(x, Tracer) or getattr(x, "committed", False) for x in leaves)


class ProgramSequence:
    """Programs that are needed one after the other, compiled side by side before they are.

    `make(number, before)` makes each from the one before it. With `ahead` threads compile
    them; else each is compiled when it is called.
    """

    def __init__(
        self,
        make: Callable[[int, Program | None], Program],
        number: int,
        *,
        ahead: bool,
    ) -> None:
        self.make, self.number = make, number
        self.programs: list[Program] = []
        self.compiled: list[Future | None] = []
        self.pool = ThreadPoolExecutor(THREADS) if ahead else None

    def __getitem__(self, number: int) -> Program:
        while len(self.programs) < min(self.number, number + 1 + AHEAD):
            last = self.programs[-1] if self.programs else None
            program = self.make(len(self.programs), last)
            self.programs.append(program)
            submitted = self.pool and self.pool.submit(program.compile)
            self.compiled.append(submitted)
        if (waited := self.compiled[number]) is not None:
            waited.result()
        return self.programs[number]

    def close(self) -> None:
        """Compile nothing more."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
