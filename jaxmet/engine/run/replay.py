"""Run a model's own equations again, with a hook at every node.

Calls are inlined; rematerialised, looped and branching bodies are wrapped again as they
were; a group of equations with a name is handed to the hook.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax

from jaxmet.engine.backend.cpu import convolution
from jaxmet.engine.flow.token_masks import Kept, Lost, Masks, ScanMasks, on_input
from jaxmet.engine.frontends import check_apply
from jaxmet.engine.graph.analyse import Analysis, analyse
from jaxmet.engine.graph.describe import describe
from jaxmet.engine.graph.node import Node
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.program import compat
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.program.program import Equation, Region, Value
from jaxmet.engine.pruned.expand import call_of
from jaxmet.engine.run.offset import offsets_of, padded
from jaxmet.tree.batches import BatchInfo, inputs_of
from jaxmet.tree.checks import check_callable, check_flags
from jaxmet.tree.leaves import dense, is_compressed

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


class Counted(NamedTuple):
    """Statistics from under a branch: meaningful only where `count` is not zero."""

    value: Any
    count: Any


HOOK_CURE = (
    "A hook is a function hook(node, run, operands) that returns the node's result and its "
    "statistics, such as (run(*operands), None)."
)


def evaluate(apply: Apply, hook: Hook, *, cpu_formulations: bool = True) -> Callable:
    """A model whose every node runs through a hook.

    Returns `f(params, *inputs, **kwargs) -> (outputs, {node name: statistics})`, with the
    outputs as `apply` gives them. `hook(node, run, operands)` returns the node's result and
    its statistics (any pytree, or None for none); `run(*operands)` computes the node as the
    model would, activations first, then parameters.

    With a hook that returns `run(*operands), None` and `cpu_formulations=False` the replay
    runs the equations of `apply`: the same operations on the same values, with calls inlined
    and each node at its last equation. Under `jax.jit` the outputs are then bit-identical to
    those of `apply` on every model that the tests run. XLA does not promise that, because it
    may fuse equations in another order differently. On CPU the default formulations are
    equal to rounding, see below. Gradients are equal to rounding where a value is used
    several times: its cotangents are summed in the order of the equations, and calls have a
    sum of their own. A hook that adds outputs or operations makes another program, whose
    values are equal to rounding.

    Under `lax.scan` statistics are stacked along a new leading axis. Under `lax.cond` they
    come as `Counted(value, count)`, zero where the branch was not taken; under
    `lax.while_loop` asking for any raises. Each call traces `apply` again: wrap the result
    in `jax.jit`. On CPU faster formulations, equal to rounding, replace convolutions with a
    window of one, with few inputs to an output (depthwise) or over colours;
    `cpu_formulations=False` keeps them as they are. `Compressed` leaves run
    as what they stand for, their bounds in place of the following clip's own, their offset
    in place of the zeros that a convolution pads with.

    Raises ValueError for a leaf with bounds that no clip follows, or with an offset that
    belongs to no convolution.

    >>> def hook(node, run, operands):
    ...     y = run(*operands)
    ...     return y, jnp.max(jnp.abs(y))
    >>> outputs, largest = jax.jit(evaluate(model.apply, hook))(params, images)
    """

    check_apply(apply, "evaluate")
    check_callable("evaluate", "hook", hook, HOOK_CURE)
    check_flags("evaluate", cpu_formulations=cpu_formulations)

    def evaluated(params: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Statistics]:
        inputs, info = inputs_of(inputs)
        call = call_of(apply, params, inputs, kwargs)
        return replay(analyse(call), hook, cpu_formulations=cpu_formulations, info=info)

    return evaluated


def replay(
    analysis: Analysis,
    hook: Hook,
    *,
    cpu_formulations: bool = True,
    info: BatchInfo | None = None,
) -> tuple[Any, Statistics]:
    """Run an analysed call on its own arrays."""
    machine, environment = _ran(analysis, hook, cpu_formulations, info)
    outputs = [machine.read(environment, v) for v in analysis.region.outputs]
    tree = jax.tree_util.tree_structure(analysis.output_shape)
    return tree.unflatten(outputs), machine.statistics


def _ran(
    analysis: Analysis, hook: Hook, cpu_formulations: bool, info: BatchInfo | None
) -> tuple["Machine", Environment]:
    nodes = describe(analysis)
    leaves = dict(zip(analysis.call.names, analysis.call.leaves, strict=True))
    bounds = bounds_of(nodes.values(), leaves)
    offsets = offsets_of(nodes.values(), leaves)
    info = info or BatchInfo()
    machine = Machine(
        nodes,
        hook,
        bounds,
        cpu_formulations,
        offsets=offsets,
        masks=None if info.mask is None else _masks(analysis, info.mask),
        batch=info.number,
    )
    arrays = [dense(leaf) for leaf in leaves.values()] + list(analysis.call.inputs)
    environment: Environment = dict(zip(analysis.region.inputs, arrays, strict=True))
    for cluster in analysis.clusters:
        if cluster.kind == "input":
            machine.visit(cluster, environment)
    machine.run(analysis.region, environment)
    for cluster in analysis.clusters:
        if cluster.kind == "output":
            machine.visit(cluster, environment)
    return machine, environment


def counted_only(node: Node, run: Run, result: Any) -> Any:
    """The result of a node, with zeros in outputs where they do not count."""
    if node.kind != "output" or run.counts is None:
        return result
    return jnp.where(run.counts, result, jnp.zeros((), result.dtype))


def output_masks(apply: Apply) -> Callable:
    """`f(params, *batch, **kwargs)`: for each array that the model returns where it counts."""

    def masks(params: Any, *batch: Any, **kwargs: Any) -> list[Any]:
        inputs, info = inputs_of(batch)
        analysis = analyse(call_of(apply, params, inputs, kwargs))
        if info.mask is None:
            return [None for _ in analysis.region.outputs]
        machine, _ = _ran(analysis, _plain, True, info)
        assert machine.masks is not None
        found = [machine.masks.of(v) for v in analysis.region.outputs]
        return [None if isinstance(m, Lost) else m for m in found]

    return masks


def _plain(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
    del node
    return run(*operands), None


def _masks(analysis: Analysis, mask: Any) -> Masks:
    """What a mask of the batch says of each input."""
    mask = jnp.asarray(mask)
    return Masks(
        analysis.inputs, [on_input(mask, value.shape) for value in analysis.inputs]
    )


def bounds_of(
    nodes: Iterable[Node], leaves: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The bounds that compressed leaves state, by the product that carries them."""
    nodes = list(nodes)
    carriers = {n.carrier for n in nodes if n.carrier is not None}
    found = {}
    for name, leaf in leaves.items():
        if not is_compressed(leaf) or (leaf.lower is None and leaf.upper is None):
            continue
        makers = [
            n.name for n in nodes if n.weight is not None and n.weight.name == name
        ]
        if len(makers) != 1 or makers[0] not in carriers:
            raise ValueError(
                f"jaxmet.lift: parameter {name!r} states bounds for the clip behind it, but "
                "this model has none there. Run the model that the tree was made for."
            )
        found[makers[0]] = (leaf.lower, leaf.upper)
    return found


def clip(node: Node, x: Any, lower: Any, upper: Any) -> Any:
    """A clip with a bound a channel where the leaf states one."""
    assert node.bounds is not None

    def bound(stated: Any, own: float) -> Any:
        if stated is None:
            return jnp.asarray(own, x.dtype)
        shape = [x.shape[i] if i in node.features else 1 for i in range(x.ndim)]
        return jnp.reshape(stated, shape).astype(x.dtype)

    return jnp.minimum(
        jnp.maximum(x, bound(lower, node.bounds[0])), bound(upper, node.bounds[1])
    )


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
    masks: Masks | None = None
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
            inside = dict(environment)
            inside.update(zip(cluster.operands, operands, strict=True))
            with jax.named_scope(node.name):
                for equation in cluster.equations:
                    self.bind(equation, inside, self.offsets.get(node.name))
            return self.read(inside, cluster.exit)

        operands = tuple(self.read(environment, v) for v in cluster.operands)
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

    def body(
        self, region: Region, operands: Sequence[Any], masks: Sequence[Kept] = ()
    ) -> tuple[list, Statistics]:
        """The outputs and statistics of an inner region."""
        inside = Masks(region.inputs, masks) if masks else None
        return self.inner(region, operands, inside)

    def inner(
        self, region: Region, operands: Sequence[Any], masks: Masks | None
    ) -> tuple[list, Statistics]:
        inner = dataclasses.replace(self, statistics={}, masks=masks)
        environment: Environment = dict(zip(region.inputs, operands, strict=True))
        inner.run(region, environment)
        return [inner.read(environment, v) for v in region.outputs], inner.statistics


def _masks_before(machine: Machine, equation: Equation) -> list[Kept]:
    """The masks of what a loop or branch reads; those of its results are set."""
    if machine.masks is None:
        return []
    masks = [machine.masks.of(v) for v in equation.operands]
    if equation.name != "scan":
        machine.masks.follow(equation, {})
    return masks


def _remat(machine: Machine, equation: Equation, operands: list) -> list:
    masks = _masks_before(machine, equation)

    def body(*operands):
        return machine.body(equation.bodies[0], operands, masks)

    p = equation.params
    again = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])
    results, statistics = again(*operands)
    machine.statistics |= statistics
    return results


def _scan(machine: Machine, equation: Equation, operands: list) -> list:
    p, region = equation.params, equation.bodies[0]
    skip, count = compat.scan_arity(p)
    constants = operands[:skip]
    masked = None
    if machine.masks is not None:
        masked = ScanMasks(equation, _masks_before(machine, equation))

    def body(carry, slices):
        (carry, held), (number, *slices, seen) = carry, slices
        inner = dataclasses.replace(machine, iteration=(*machine.iteration, number))
        inputs = masked.inside(held, seen) if masked is not None else None
        masks = None if inputs is None else Masks(region.inputs, inputs)
        out, statistics = inner.inner(region, (*constants, *carry, *slices), masks)
        left: list = []
        if masked is not None and masks is not None:
            held, left = masked.outside([masks.of(v) for v in region.outputs])
        return (out[:count], held), (out[count:], left, statistics)

    start, seen = ([], []) if masked is None else (masked.carry, masked.slices)
    (carry, held), (stacked, left, statistics) = lax.scan(
        body,
        (operands[skip : skip + count], start),
        [jnp.arange(p["length"]), *operands[skip + count :], seen],
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    if masked is not None and machine.masks is not None:
        machine.masks.put(equation.results, masked.results(held, left))
    machine.statistics |= statistics
    return [*carry, *stacked]


def _cond(machine: Machine, equation: Equation, operands: list) -> list:
    index, *rest = operands
    masks = _masks_before(machine, equation)[1:]
    traced = [
        jax.make_jaxpr(lambda *o, b=body: machine.body(b, o, masks), return_shape=True)(
            *rest
        )
        for body in equation.bodies
    ]
    shapes = [statistics for _, (_, statistics) in traced]

    def branch(i: int):
        jaxpr, shape = traced[i]

        def taken(*operands):
            flat = jax.extend.core.jaxpr_as_fun(jaxpr)(*operands)
            results, statistics = jax.tree.unflatten(jax.tree.structure(shape), flat)
            every = {}
            for k, other in enumerate(shapes):
                for name, one in other.items():
                    value = statistics[name] if k == i else jax.tree.map(_zeros, one)
                    every[name] = Counted(value, jnp.int32(k == i))
            return results, every

        return taken

    branches = [branch(i) for i in range(len(equation.bodies))]
    results, statistics = lax.switch(index, branches, *rest)
    machine.statistics |= statistics
    return results


def _zeros(shape: Any) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _while(machine: Machine, equation: Equation, operands: list) -> list:
    first = equation.params["cond_nconsts"]
    second = first + equation.params["body_nconsts"]
    condition, body = equation.bodies
    _masks_before(machine, equation)
    machine = dataclasses.replace(machine, masks=None)

    def again(carry):
        return machine.body(condition, (*operands[:first], *carry))[0][0]

    def step(carry):
        results, statistics = machine.body(body, (*operands[first:second], *carry))
        if statistics:
            raise ValueError(
                f"jaxmet.evaluate: the hook returned statistics of {sorted(statistics)}, "
                "which run under lax.while_loop, where their number is not known. Return "
                "None for nodes whose `region` has 'while', or write the loop as lax.scan."
            )
        return results

    return list(lax.while_loop(again, step, operands[second:]))


def _custom(machine: Machine, equation: Equation, operands: list) -> list:
    """A custom derivative rule with a site inside keeps its rule."""
    masks = _masks_before(machine, equation)

    def inner(*operands):
        return machine.body(equation.bodies[0], operands, masks)

    wrapped = jax.custom_jvp(inner)

    @wrapped.defjvp
    def rule(primals, tangents):
        outputs = inner(*primals)
        results, given = jax.jvp(
            lambda *o: compat.bind(equation.primitive, equation.params, o),
            primals,
            tangents,
        )
        del results
        zeros = jax.tree.map(_zero_tangent, outputs[1])
        return outputs, (given, zeros)

    results, statistics = wrapped(*operands)
    machine.statistics |= statistics
    return results


def _zero_tangent(x: Any) -> Any:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return jnp.zeros(x.shape, jax.dtypes.float0)


REGIONS = {
    "scan": _scan,
    "cond": _cond,
    "while": _while,
    **dict.fromkeys(compat.REMAT, _remat),
    **dict.fromkeys(compat.CUSTOM, _custom),
}
