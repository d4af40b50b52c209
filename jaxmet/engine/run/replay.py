"""Run a model's own equations again, with a hook at every node.

Calls are inlined; rematerialised, looped and branching bodies are wrapped again as they
were; a group of equations with a name is handed to the hook.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from jaxmet.engine.flow.token_masks import Lost, TokenMasks, on_input
from jaxmet.engine.frontends import check_apply
from jaxmet.engine.graph.analyse import Analysis, analyse
from jaxmet.engine.graph.describe import describe
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.pruned.expand import call_of
from jaxmet.engine.run.bodies import Counted as Counted
from jaxmet.engine.run.compressed import bounds_of, input_transforms, offsets_of
from jaxmet.engine.run.machine import Environment, Hook, Machine, Run, Statistics
from jaxmet.tree.batches import BatchInfo, inputs_of
from jaxmet.tree.checks import check_callable, check_flags
from jaxmet.tree.leaves import dense

HOOK_CURE = (
    "A hook is a function hook(node, run, operands) that returns the node's result and its "
    "statistics, such as (run(*operands), None)."
)


def evaluate(apply: Apply, hook: Hook, *, cpu_formulations: bool = True) -> Callable:
    """A model whose every node runs through a hook.

    `hook(node, run, operands)` returns the node's result and its statistics (any pytree, or
    None for none); `run(*operands)` computes the node as the model would, activations first,
    then parameters.

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
    in place of the zeros that a convolution pads with. A hook gets the input of a dense layer
    divided and rotated as its leaf says.

    Args:
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        hook: a function `hook(node, run, operands) -> (result, statistics)`.
        cpu_formulations: whether depthwise convolutions run on CPU in an equal but faster form;
            default True.

    Returns:
        A function `f(params, *inputs, **kwargs) -> (outputs, {node name: statistics})`, with
        the outputs as `apply` gives them.

    Raises:
        ValueError: for a leaf with bounds that no clip follows, with an offset that belongs
            to no convolution, or with an input scale that belongs to no dense layer.

    >>> def hook(node, run, operands):
    ...     y = run(*operands)
    ...     return y, jnp.max(jnp.abs(y))
    >>> outputs, largest = jax.jit(jm.evaluate(model.apply, hook))(params, images)
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
    transforms = input_transforms(nodes.values(), leaves)
    info = info or BatchInfo()
    machine = Machine(
        nodes,
        hook,
        bounds,
        cpu_formulations,
        offsets=offsets,
        transforms=transforms,
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


def _masks(analysis: Analysis, mask: Any) -> TokenMasks:
    """What a mask of the batch says of each input."""
    mask = jnp.asarray(mask)
    return TokenMasks(
        analysis.inputs, [on_input(mask, value.shape) for value in analysis.inputs]
    )
