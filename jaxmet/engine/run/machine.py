"""Binds the equations of a program one by one, and hands groups with a name to a hook."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend

from jaxmet.engine.backend.cpu import convolution
from jaxmet.engine.flow.token_masks import Kept, Lost, TokenMasks
from jaxmet.engine.graph.node import Node
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation, Region, Value
from jaxmet.engine.run.bodies import REGIONS
from jaxmet.engine.run.compressed import InputTransform, clip, padded, transformed

Statistics = dict[str, Any]
Environment = dict[Value, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """Computes one node: `run(*operands)`. `iteration` counts the loops around it.

    `counts` says where the values of the result count, `reads` where those of each operand
    do: boolean arrays of the same rank that broadcast to them, None where all do. `lost` says
    why that is not known where it should be. `batch` is the number of the batch.
    """

    compute: Callable[..., Any]
    iteration: tuple[Any, ...] = ()
    counts: Any = None
    reads: tuple[Any, ...] = ()
    lost: str | None = None
    batch: Any = None

    def __call__(self, *operands: Any) -> Any:
        return self.compute(*operands)


Hook = Callable[[Node, Run, tuple[Any, ...]], tuple[Any, Any]]


@dataclasses.dataclass(repr=False)
class Machine:
    """Binds equations; collects statistics of the region that it is in."""

    nodes: Mapping[Cluster, Node]
    hook: Hook
    bounds: Mapping[str, tuple[Any, Any]]
    cpu_formulations: bool = True
    iteration: tuple[Any, ...] = ()
    statistics: Statistics = dataclasses.field(default_factory=dict)
    offsets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    transforms: Mapping[str, InputTransform] = dataclasses.field(default_factory=dict)
    entered: dict[Any, Any] = dataclasses.field(default_factory=dict)
    masks: TokenMasks | None = None
    batch: Any = None

    def read(self, environment: Environment, value: Value) -> Any:
        if value in environment:
            return environment[value]
        return value.constant

    def run(self, region: Region, environment: Environment) -> None:
        """Every equation of a region, groups with a name at their last one."""
        for equation in region.equations:
            self.step(equation, environment)

    def step(self, equation: Equation, environment: Environment) -> None:
        cluster = equation.node
        if cluster in self.nodes:
            if cluster.exit in equation.results:
                self.visit(cluster, environment)
        elif equation.bodies:
            operands = [self.read(environment, v) for v in equation.operands]
            results = REGIONS[equation.name](self, equation, operands)
            environment.update(zip(equation.results, results, strict=True))
        else:
            self.bind(equation, environment)
            self.follow([equation], environment)

    def follow(self, equations: Iterable[Equation], environment: Environment) -> None:
        """Where the values of these results count."""
        if self.masks is not None:
            for equation in equations:
                self.masks.follow(equation, environment)

    def bind(
        self, equation: Equation, environment: Environment, offset: Any = None
    ) -> None:
        operands = [self.read(environment, v) for v in equation.operands]
        params = equation.params
        if offset is not None and equation.name == "conv_general_dilated":
            params, operands[0] = padded(params, operands[0], offset)
        if self.cpu_formulations and equation.name == "conv_general_dilated":
            results = [convolution(equation.primitive, params, *operands)]
        else:
            results = compat.bind(equation.primitive, params, operands)
        environment.update(zip(equation.results, results, strict=True))

    def visit(self, cluster: Cluster, environment: Environment) -> None:
        """Hand a node to the hook and keep what it returns."""
        node = self.nodes[cluster]

        def compute(*operands: Any) -> Any:
            if node.carrier is not None and node.carrier in self.bounds:
                return clip(node, operands[0], *self.bounds[node.carrier])
            # All that it reads but constants: a copy of the whole environment at each
            # node would make a replay quadratic.
            inside: Environment = dict(zip(cluster.operands, operands, strict=True))
            with jax.named_scope(node.name):
                for equation in cluster.equations:
                    self.bind(equation, inside, self.offsets.get(node.name))
            return self.read(inside, cluster.exit)

        operands = tuple(self.read(environment, v) for v in cluster.operands)
        if node.name in self.transforms:
            operands = (self.transformed(cluster, operands[0]), *operands[1:])
        run = Run(compute, self.iteration, batch=self.batch)
        if self.masks is not None:
            self.follow(cluster.equations, environment)
            masks = [self.masks.of(v) for v in (cluster.exit, *cluster.operands)]
            known = [None if isinstance(m, Lost) else m for m in masks]
            lost = [m.why for m in masks if isinstance(m, Lost)]
            run = dataclasses.replace(
                run,
                counts=known[0],
                reads=tuple(known[1:]),
                lost=lost[0] if lost else None,
            )
        found = self.hook(node, run, operands)
        if not isinstance(found, tuple) or len(found) != 2 or found[0] is None:
            raise ValueError(
                f"jaxmet.evaluate: the hook returned {type(found).__name__} at "
                f"{node.name!r}. Return (run(*operands), statistics), None for none."
            )
        result, statistics = found
        environment[cluster.exit] = result
        if statistics is not None:
            self.statistics[node.name] = statistics

    def transformed(self, cluster: Cluster, x: Any) -> Any:
        """What a dense layer reads, divided and rotated: once for all that do the same."""
        node = self.nodes[cluster]
        found = self.transforms[node.name]
        key = cluster.operands[0], found.key
        if key not in self.entered:
            with jax.named_scope(node.name):
                self.entered[key] = transformed(node, x, found, self.iteration)
        return self.entered[key]

    def body(
        self, region: Region, operands: Sequence[Any], masks: Sequence[Kept] = ()
    ) -> tuple[list, Statistics]:
        """The outputs and statistics of an inner region."""
        inside = TokenMasks(region.inputs, masks) if masks else None
        return self.inner(region, operands, inside)

    def inner(
        self, region: Region, operands: Sequence[Any], masks: TokenMasks | None
    ) -> tuple[list, Statistics]:
        inner = dataclasses.replace(self, statistics={}, entered={}, masks=masks)
        environment: Environment = dict(zip(region.inputs, operands, strict=True))
        inner.run(region, environment)
        return [inner.read(environment, v) for v in region.outputs], inner.statistics
