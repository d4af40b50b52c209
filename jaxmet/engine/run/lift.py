"""Run a model on any tree that jaxmet makes, without editing the model."""

from typing import Any

from jaxmet.engine.frontends import check_apply
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.machine import Run
from jaxmet.engine.run.replay import evaluate
from jaxmet.tree.leaves import flatten, is_compressed


def lift(apply: Apply) -> Apply:
    """The same model, able to run trees with `Compressed` leaves.

    A tree of plain arrays goes to `apply` itself. Otherwise the model's equations are run
    again with each leaf as what it stands for: exact bounds of an equalized ReLU6, for
    example. New values of pruned parameters (statistics of norms in training mode) come back
    pruned likewise: results with a parameter's path and shape that are made of it entry by
    entry. Differentiable; each call traces `apply`, so wrap the result in `jax.jit`.

    Args:
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.

    Returns:
        A function like `apply` that also runs trees with `Compressed` leaves.

    Raises:
        ValueError: for a leaf whose statement the model has no place for.

    >>> logits = jax.jit(jm.lift(model.apply))(jm.equalize(params, graph), images)
    """
    check_apply(apply, "lift")
    again = replayed(apply)

    def lifted(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        if not any(is_compressed(leaf) for leaf in flatten(params, whole=True)[1]):
            return apply(params, *inputs, **kwargs)
        return again(params, *inputs, **kwargs)

    return lifted


def replayed(apply: Apply) -> Apply:
    """The same model from its equations, with what is faster on the platform: `engine.backend`."""
    run = evaluate(apply, _idle)

    def again(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return run(params, *inputs, **kwargs)[0]

    return again


def _idle(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
    del node
    return run(*operands), None
