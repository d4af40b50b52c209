"""A program cut at named nodes: a list of pure functions that run it piece by piece."""

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxmet.engine.graph.analyse import Analysis, analyse
from jaxmet.engine.graph.describe import describe
from jaxmet.engine.graph.graph import Graph, check_graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.program import compat
from jaxmet.engine.program.calls import make_call
from jaxmet.engine.program.program import NOISE, Equation, Region, Value
from jaxmet.engine.pruned.expand import call_of
from jaxmet.engine.run.compressed import bounds_of, offsets_of
from jaxmet.engine.run.machine import Environment, Hook, Machine, Statistics
from jaxmet.engine.run.replay import HOOK_CURE
from jaxmet.tree.checks import check_callable, check_flags, keys_of, kind_of
from jaxmet.tree.leaves import dense
from jaxmet.tree.names import check_names, named_leaves, suggestion

Live = dict[str, Any]
INLINED = (*compat.REMAT, *compat.CUSTOM)


def segments(
    graph: Graph,
    params: Any,
    *inputs: Any,
    cuts: Sequence[str],
    hook: Hook | None = None,
    cpu_formulations: bool = True,
    **kwargs: Any,
) -> "Segments":
    """The model as pure functions `(params, environment) -> environment`, cut after nodes.

    One piece ends with each node in `cuts` (in the order in which they run) and a last one
    with the outputs. An environment is a dict of the live values that depend on the data;
    what depends on parameters alone is computed again where it is needed. Pieces are
    specialised on the shapes of `inputs`, which may be `jax.ShapeDtypeStruct`s. With a
    `hook(node, run, operands) -> (result, statistics)` every node runs through it (its
    statistics are dropped here). Run one after another the pieces give what `apply` gives,
    to rounding.

    Args:
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        params: the parameter tree, whatever the model takes first; not changed.
        *inputs: example inputs: arrays or `jax.ShapeDtypeStruct`s.
        cuts: names of the nodes after which the program is cut.
        hook: a function through which every node runs, as in `jm.evaluate`; default None.
        cpu_formulations: whether depthwise convolutions run on CPU in an equal but faster form;
            default True.
        **kwargs: keyword arguments for the model.

    Returns:
        The pieces, an iterable with `begin` and `finish`.

    Raises:
        ValueError: for an unknown cut, and for one inside a `scan`, `cond` or `while` body.

    >>> pieces = jm.segments(graph, params, images, cuts=["stem", "block1"])
    >>> environment = pieces.begin(images)
    >>> for piece in pieces:
    ...     environment = jax.jit(piece)(params, environment)
    >>> logits = pieces.finish(environment)
    """
    check_graph(
        graph, "segments", "Pass what jm.trace returned first, then the parameters."
    )
    check_flags("segments", cpu_formulations=cpu_formulations)
    if hook is not None:
        check_callable("segments", "hook", hook, HOOK_CURE)
    cuts = check_names("segments", "a cut", cuts)
    analysis = analyse(call_of(graph.apply, params, inputs, kwargs))
    nodes = describe(analysis)
    _check_cuts(cuts, nodes)
    return Segments(
        _Schedule(analysis, nodes, set(cuts)), hook or _idle, cpu_formulations
    )


def _idle(node: Node, run: Any, operands: tuple[Any, ...]) -> tuple[Any, None]:
    del node
    return run(*operands), None


def _check_cuts(cuts: Sequence[str], nodes: Mapping[Cluster, Node]) -> None:
    by_name = {n.name: n for n in nodes.values()}
    for cut in cuts:
        if cut not in by_name:
            raise ValueError(
                f"jaxmet.segments: there is no node {cut!r} to cut after. "
                f"{suggestion(cut, by_name)}"
            )
        loops = by_name[cut].loops
        if loops:
            raise ValueError(
                f"jaxmet.segments: {cut!r} runs inside a {loops[0]} body and cannot end a "
                "segment. Cut before or after the whole loop."
            )


class _Schedule:
    """Steps in order, values by key, and what is live between the pieces."""

    def __init__(self, analysis: Analysis, nodes: dict[Cluster, Node], cuts: set[str]):
        self.analysis, self.nodes = analysis, nodes
        self.alias: dict[Value, Value] = {}
        self.steps: list[Equation | Cluster] = []
        self.steps += [c for c in nodes if c.kind == "input"]
        self.lay_out(analysis.region)
        self.steps += [c for c in nodes if c.kind == "output"]
        self.outputs = [self.base(v) for v in analysis.region.outputs]
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

    def find_ends(self, cuts: set[str]) -> list[int]:
        ends = [
            i + 1
            for i, step in enumerate(self.steps)
            if isinstance(step, Cluster) and self.nodes[step].name in cuts
        ]
        return [*ends, len(self.steps)]

    def pieces(self) -> list[tuple[str | None, list[Equation | Cluster], list[Value]]]:
        """For each piece its last node, its steps and what is live after it."""
        found, start = [], 0
        for end, live in zip(self.ends, self.live(), strict=True):
            last = self.steps[end - 1]
            name = self.nodes[last].name if isinstance(last, Cluster) else None
            name = name if end != len(self.steps) else None
            found.append((name, self.with_parameters(start, end), live))
            start = end
        return found

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
        lives: list[list[Value]] = [[] for _ in self.ends]
        for value in self.keys:
            if value in first and value in last and value.kind >= NOISE:
                start = bisect_left(self.ends, first[value])
                stop = bisect_right(self.ends, last[value])
                for live in lives[start:stop]:
                    live.append(value)
        lives[-1] = [v for v in dict.fromkeys(self.outputs) if v.constant is None]
        return lives


class Segments(Sequence):
    """The pieces in order, with how to begin and how to read the outputs."""

    def __init__(self, plan: _Schedule, hook: Hook, cpu_formulations: bool):
        self._plan = plan
        self._pieces: list[Segment] = []
        reads = tuple(plan.input_keys)
        for name, steps, live in plan.pieces():
            self._pieces.append(
                Segment(
                    plan, hook, cpu_formulations, name, tuple(steps), reads, tuple(live)
                )
            )
            reads = tuple(plan.keys[v] for v in live)

    def __getitem__(self, i):
        return self._pieces[i]

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator["Segment"]:
        return iter(self._pieces)

    def begin(self, *inputs: Any, **kwargs: Any) -> Live:
        """The first environment: the model's inputs."""
        call = make_call(self._plan.analysis.call.apply, {}, inputs, kwargs)
        if len(call.inputs) != len(self._plan.input_keys):
            raise ValueError(
                f"jaxmet.Segments.begin: got {len(call.inputs)} arrays, the pieces were made "
                f"for {len(self._plan.input_keys)}. Pass inputs like those given to segments."
            )
        return dict(zip(self._plan.input_keys, call.inputs, strict=True))

    def finish(self, environment: Live) -> Any:
        """The model's outputs, from the last environment."""
        plan = self._plan
        read = [plan.keys[v] for v in plan.outputs if v.constant is None]
        cure = "Pass what the last piece returned."
        _check_environment("Segments.finish", environment, read, cure)
        values = [
            v.constant if v.constant is not None else environment[plan.keys[v]]
            for v in plan.outputs
        ]
        return jax.tree.structure(plan.analysis.output_shape).unflatten(values)


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """One piece; `name` is the node that it ends with, None for the last piece."""

    plan: _Schedule = dataclasses.field(repr=False)
    hook: Hook = dataclasses.field(repr=False)
    cpu_formulations: bool
    name: str | None
    steps: tuple = dataclasses.field(repr=False)
    reads: tuple[str, ...] = dataclasses.field(repr=False)
    live: tuple = dataclasses.field(repr=False)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that this piece runs."""
        return tuple(
            self.plan.nodes[s].name for s in self.steps if isinstance(s, Cluster)
        )

    def __call__(self, params: Any, environment: Live) -> Live:
        return self.run(params, environment)[0]

    def run(self, params: Any, environment: Live) -> tuple[Live, Statistics]:
        """The next environment, and what the hook returned besides."""
        plan = self.plan
        leaves = named_leaves(params)
        for name in plan.analysis.leaves:
            if name not in leaves:
                raise ValueError(
                    f"jaxmet.Segment: the tree has no parameter {name!r}. "
                    f"{suggestion(name, leaves)} Pass the parameters that segments got."
                )
        cure = "Pass what the piece before returned, or pieces.begin(*inputs)."
        _check_environment("Segment", environment, self.reads, cure)
        bounds = bounds_of(plan.nodes.values(), leaves)
        offsets = offsets_of(plan.nodes.values(), leaves)
        machine = Machine(
            plan.nodes, self.hook, bounds, self.cpu_formulations, offsets=offsets
        )
        values: Environment = _Aliased(plan)
        wanted = {v for s in self.steps for v in plan.read(s)} | {*self.live}
        for value in wanted:
            if value.name is not None:
                values[value] = dense(leaves[value.name])
        values.update({plan.values[key]: a for key, a in environment.items()})
        for step in self.steps:
            if isinstance(step, Cluster):
                machine.visit(step, values)
            else:
                machine.step(step, values)
        return {plan.keys[v]: values[v] for v in self.live}, machine.statistics


def _check_environment(
    caller: str, environment: Any, read: Sequence[str], cure: str
) -> None:
    if not isinstance(environment, Mapping):
        raise ValueError(
            f"jaxmet.{caller}: the environment is {kind_of(environment)}. {cure}"
        )
    for key in read:
        if key not in environment:
            raise ValueError(
                f"jaxmet.{caller}: the environment has no {key!r}, which is read here. It has "
                f"{keys_of(environment)}. {cure}"
            )


class _Aliased(dict):
    """An environment that knows the two names of a value inside an inlined body."""

    def __init__(self, plan: _Schedule, content: Mapping | None = None):
        super().__init__(content or {})
        self.plan = plan

    def __contains__(self, value: object) -> bool:
        return super().__contains__(self.plan.base(value))  # type: ignore[arg-type]

    def __getitem__(self, value: Value) -> Any:
        return super().__getitem__(self.plan.base(value))
