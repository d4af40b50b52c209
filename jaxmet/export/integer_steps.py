"""The operations of a model in integers, from shapes alone."""

from collections.abc import Callable
from typing import Any

import jax

from jaxmet.engine.frontends import check_apply, refuse_module
from jaxmet.engine.graph.graph import trace
from jaxmet.engine.integers.integer_program import IntegerStep
from jaxmet.engine.program.calls import Apply
from jaxmet.transforms.lift import integer_program
from jaxmet.transforms.quantize import quantize
from jaxmet.tree.leaves import is_quantized
from jaxmet.tree.named_leaves import named_leaves
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers
from jaxmet.tree.table import Table

Function = Callable[..., Any]


def integer_model(
    caller: str,
    apply: Apply,
    params: Any,
    quantizers: Quantizers,
    inputs: tuple[Any, ...],
    kwargs: Any,
) -> tuple[Function, list[IntegerStep]]:
    """The model as a function of its inputs alone, in integers, and its operations."""
    refuse_module(apply, params, caller)
    check_apply(apply, caller)
    check_are_quantizers(quantizers, caller)
    leaves = quantizers.leaves(params, caller)
    if not any(map(is_quantized, named_leaves(params).values())) and leaves:
        graph = trace(apply, params, *inputs, **kwargs)
        params = quantize(params, graph, quantizers)
    run = integer_program(apply, quantizers, params, kwargs)
    steps: list[IntegerStep] = []

    def noted(*values: Any) -> Any:
        found, made = run(*values)
        steps[:] = made
        return found

    jax.eval_shape(noted, *inputs)
    return lambda *values: run(*values)[0], steps


def step_table(steps: list[IntegerStep], caller: str) -> Table:
    """One row per operation: whether it is in integers."""
    columns = {
        "layer": [s.layer for s in steps],
        "operation": [s.operation for s in steps],
        "integers": ["yes" if s.why is None else "no" for s in steps],
        "note": [s.why or _open(s) for s in steps],
    }
    count = sum(s.why is None for s in steps)
    return Table(
        columns, title=f"{caller}: {count} of {len(steps)} operations in integers"
    )


def _open(step: IntegerStep) -> str | None:
    joins = step.operation == "concat"
    return None if joins or step.result is not None else "the result is in float"
