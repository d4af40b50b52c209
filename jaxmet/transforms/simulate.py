"""The model as an integer device would compute it: every grid in its place."""

import dataclasses
from typing import Any

import jax

from jaxmet.engine.calls import Apply
from jaxmet.engine.node import Node
from jaxmet.engine.replay import Run, evaluate
from jaxmet.tree.names import named_leaves, replace_leaves, suggestion
from jaxmet.tree.quantizers import Grids, Quantizer, Quantizers


def simulate(
    apply: Apply,
    quantizers: Quantizers,
    *,
    grids: Grids | None = None,
    weights: bool = True,
) -> Apply:
    """The same model with weights and activations on the grids of `quantizers`.

    The result is called like `apply`, gives what `apply` gives (any pytree), and is
    differentiable: rounding passes gradients straight through to `params`, and to the scales
    and zero points in `quantizers`. It runs trees with `Compressed` leaves. `grids` (from
    `jm.grids`) overrides grid ends and switches as data, so that a sweep over bit-widths
    compiles once. `weights=False` expects a tree of `jm.round_weights` and rounds
    no parameter again. Each call traces `apply` again: wrap the result in `jax.jit`.

    Raises ValueError where `quantizers` names a node that the model does not run.

    >>> device = jax.jit(jm.simulate(model.apply, quantizers))
    >>> logits = device(params, images)
    """

    if not isinstance(quantizers, Quantizers) or not callable(apply):
        raise ValueError(
            f"jaxmet.simulate: got a {type(apply).__name__} and a "
            f"{type(quantizers).__name__}. Pass apply first, then the Quantizers."
        )
    if grids is not None and not isinstance(grids, Grids):
        raise ValueError(
            f"jaxmet.simulate: grids is of type {type(grids).__name__}. Pass what "
            "jm.grids(quantizers) returns."
        )

    def simulated(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        seen: set[str] = set()

        def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
            seen.add(node.name)
            operands = round_derived(node, operands, quantizers, grids)
            return put_on_grid(node, run, run(*operands), quantizers, grids), None

        if weights:
            params = _rounded(params, quantizers, grids)
        outputs, _ = evaluate(apply, hook)(params, *inputs, **kwargs)
        known = seen | named_leaves(params).keys()
        missing = [name for name in quantizers.activations if name not in seen]
        missing += [name for name in quantizers.weights if name not in known]
        for name in missing[:1]:
            raise ValueError(
                f"jaxmet.simulate: the quantizers have one for {name!r}, which this "
                f"model does not run. {suggestion(name, known)} Calibrate again for it."
            )
        return outputs

    return simulated


def quantizer_at(node: Node, run: Run, quantizers: Quantizers) -> Quantizer | None:
    """What quantizes a node's result, in a loop over layers the one of this layer."""
    owner = quantizers.owner(node.name)
    if owner is None:
        return None
    quantizer: Quantizer = quantizers.activations[owner]
    if node.layers and quantizer.scale is not None and jax.numpy.ndim(quantizer.scale):
        here = run.iteration[-1]
        scale = quantizer.scale[here]
        zero_point = (
            None if quantizer.zero_point is None else quantizer.zero_point[here]
        )
        quantizer = dataclasses.replace(quantizer, scale=scale, zero_point=zero_point)
    return quantizer


def put_on_grid(
    node: Node,
    run: Run,
    result: Any,
    quantizers: Quantizers,
    grids: Grids | None = None,
) -> Any:
    """A node's result on its grid, if it has one."""
    quantizer, owner = quantizer_at(node, run, quantizers), quantizers.owner(node.name)
    if quantizer is None or owner is None:
        return result
    return quantizer(result, grids and grids.activations[owner])


def round_derived(
    node: Node,
    operands: tuple[Any, ...],
    quantizers: Quantizers,
    grids: Grids | None = None,
) -> tuple[Any, ...]:
    """Put a weight that the model computes from several parameters on its grid."""
    weight = node.weight
    if weight is None or weight.name is not None or node.name not in quantizers.weights:
        return operands
    quantizer = quantizers.weights[node.name]
    i = weight.operand
    quantized = quantizer(operands[i], grids and grids.weights[node.name])
    return (*operands[:i], quantized, *operands[i + 1 :])


def round_weights(
    params: Any, quantizers: Quantizers, *, grids: Grids | None = None
) -> Any:
    """The same tree with every quantized parameter on its grid.

    What `simulate` does at each call, done once: pass the result to
    `simulate(…, weights=False)`. Weights that the model derives from several parameters
    are not in the tree and are still rounded where they are used.

    Raises ValueError for a quantizer of a parameter that the tree does not have.

    >>> rounded = jm.round_weights(params, quantizers)
    >>> fast = jax.jit(jm.simulate(model.apply, quantizers, weights=False))
    """
    leaves = named_leaves(params)
    for name in quantizers.weights:
        if name not in leaves and name not in quantizers.derived:
            raise ValueError(
                f"jaxmet.round_weights: the tree has no parameter {name!r} to round. "
                f"{suggestion(name, leaves)} Pass the tree that the quantizers are of."
            )
    return _rounded(params, quantizers, grids)


def _rounded(params: Any, quantizers: Quantizers, grids: Grids | None) -> Any:
    leaves = named_leaves(params)
    quantized = quantizers.quantize_weights(leaves, grids)
    held = {name: quantized[name] for name in quantizers.weights if name in leaves}
    return replace_leaves(params, held)
