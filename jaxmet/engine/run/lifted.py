"""Run a model on any tree that jaxmet makes, without editing the model."""

from typing import Any

from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.machine import Run
from jaxmet.engine.run.replay import evaluate
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.named_leaves import flatten


def lifted(apply: Apply) -> Apply:
    """The same model, able to run trees with `Compressed` leaves: `jm.lift` says how."""
    again = replayed(apply)

    def run(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        if not any(is_compressed(leaf) for leaf in flatten(params, whole=True)[1]):
            return apply(params, *inputs, **kwargs)
        return again(params, *inputs, **kwargs)

    return run


def replayed(apply: Apply) -> Apply:
    """The same model from its equations, with what is faster on the platform: `engine.backend`."""
    evaluated = evaluate(apply, _idle)

    def again(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return evaluated(params, *inputs, **kwargs)[0]

    return again


def _idle(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
    del node
    return run(*operands), None
