"""A program cut at named nodes: a list of pure functions that run it piece by piece."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxmet.engine.graph.analyse import analyse
from jaxmet.engine.graph.describe import describe
from jaxmet.engine.graph.graph import Graph, check_graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.program import compat
from jaxmet.engine.program.calls import make_call
from jaxmet.engine.program.program import Equation, Value
from jaxmet.engine.pruned.expand import call_of
from jaxmet.engine.run.bodies import turn_of
from jaxmet.engine.run.compressed import bounds_of, input_transforms, offsets_of
from jaxmet.engine.run.cut_program import CutProgram, carried_inside
from jaxmet.engine.run.machine import Environment, Hook, Machine, Statistics
from jaxmet.engine.run.replay import HOOK_CURE
from jaxmet.tree.checks import check_callable, check_flags, keys_of, kind_of
from jaxmet.tree.globs import check_names, suggestion
from jaxmet.tree.leaves import dense
from jaxmet.tree.named_leaves import named_leaves

Live = dict[str, Any]


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
    return cut(graph, params, inputs, kwargs, cuts, (), hook, cpu_formulations)


def cut(
    graph: Graph,
    params: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    cuts: Sequence[str],
    loops: Sequence[str],
    hook: Hook | None = None,
    cpu_formulations: bool = True,
) -> "Segments":
    """`segments` in which the loop around each node of `loops` is a piece of its own.

    Another piece, perhaps an empty one, ends before that loop, which can run turn by turn.
    """
    analysis = analyse(call_of(graph.apply, params, tuple(inputs), dict(kwargs)))
    nodes = describe(analysis)
    _check_cuts(cuts, nodes)
    plan = CutProgram(analysis, nodes, set(cuts), set(loops))
    return Segments(plan, hook or _idle, cpu_formulations)


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


class Segments(Sequence):
    """The pieces in order, with how to begin and how to read the outputs."""

    def __init__(self, plan: CutProgram, hook: Hook, cpu_formulations: bool):
        self._plan = plan
        self._pieces: list[Segment] = []
        reads = tuple(plan.input_keys)
        for name, steps, live, loop in plan.pieces():
            self._pieces.append(
                Segment(
                    plan,
                    hook,
                    cpu_formulations,
                    name,
                    tuple(steps),
                    reads,
                    tuple(live),
                    loop,
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

    plan: CutProgram = dataclasses.field(repr=False)
    hook: Hook = dataclasses.field(repr=False)
    cpu_formulations: bool
    name: str | None
    steps: tuple = dataclasses.field(repr=False)
    reads: tuple[str, ...] = dataclasses.field(repr=False)
    live: tuple = dataclasses.field(repr=False)
    loop: Equation | None = dataclasses.field(default=None, repr=False)

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
        machine, values = self._start(params, environment)
        for step in self.steps:
            self._take(step, machine, values)
        plan = self.plan
        return {plan.keys[v]: values[v] for v in self.live}, machine.statistics

    @property
    def turns(self) -> tuple[int, ...]:
        """The slices that the turns of the loop read, in the order in which they run."""
        assert self.loop is not None
        numbers = tuple(range(self.loop.params["length"]))
        return numbers[::-1] if self.loop.params["reverse"] else numbers

    def enter(self, params: Any, environment: Live) -> Live:
        """The environment with what the loop carries before its first turn."""
        _, carry, _ = self._opened(params, environment)
        return {**environment, **carry}

    def turn(
        self, params: Any, environment: Live, number: Any
    ) -> tuple[Live, Statistics]:
        """The environment after one more turn, which reads slice `number`, as `run`."""
        assert self.loop is not None
        machine, first, operands = self._opened(params, environment)
        carry = [environment[key] for key in first]
        new, statistics = turn_of(machine, self.loop, operands, carry, number)
        return {**environment, **dict(zip(first, new, strict=True))}, statistics

    def _opened(self, params: Any, environment: Live) -> tuple[Machine, Live, list]:
        """What the loop carries at first, by the keys of its carry, and all that it reads."""
        assert self.loop is not None
        machine, values = self._start(params, environment)
        for step in self.steps:
            if step is not self.loop:
                self._take(step, machine, values)
        operands = [machine.read(values, v) for v in self.loop.operands]
        skip, count = compat.scan_arity(self.loop.params)
        keys = [self.plan.keys[v] for v in carried_inside(self.loop)]
        first = operands[skip : skip + count]
        return machine, dict(zip(keys, first, strict=True)), operands

    def _take(
        self, step: Equation | Cluster, machine: Machine, values: Environment
    ) -> None:
        if isinstance(step, Cluster):
            machine.visit(step, values)
        else:
            machine.step(step, values)

    def _start(self, params: Any, environment: Live) -> tuple[Machine, Environment]:
        """What runs the steps, and the values before them."""
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
            plan.nodes,
            self.hook,
            bounds,
            self.cpu_formulations,
            offsets=offsets,
            transforms=input_transforms(plan.nodes.values(), leaves),
        )
        values: Environment = _Aliased(plan)
        wanted = {v for s in self.steps for v in plan.read(s)} | {*self.live}
        for value in wanted:
            if value.name is not None:
                values[value] = dense(leaves[value.name])
        values.update({plan.values[key]: a for key, a in environment.items()})
        return machine, values


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

    def __init__(self, plan: CutProgram, content: Mapping | None = None):
        super().__init__(content or {})
        self.plan = plan

    def __contains__(self, value: object) -> bool:
        return super().__contains__(self.plan.base(value))  # type: ignore[arg-type]

    def __getitem__(self, value: Value) -> Any:
        return super().__getitem__(self.plan.base(value))
