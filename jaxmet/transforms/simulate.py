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
    compiles once. `weights=False` expects a tree of `jm.round_weights` and quantizes
    activations only. Each call traces `apply` again: wrap the result in `jax.jit`.

    Raises ValueError where `quantizers` names a node that the model does not run.

    >>> device = jax.jit(jm.simulate(model.apply, quantizers))
    >>> logits = device(params, images)
    """

    def simulated(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        seen: set[str] = set()

        def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
            seen.add(node.name)
            if weights:
                operands = _derived(node, operands, quantizers, grids)
            return _activation(node, run, run(*operands), quantizers, grids), None

        if weights:
            params = round_weights(params, quantizers, grids=grids, partial=True)
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


def _activation(
    node: Node, run: Run, result: Any, quantizers: Quantizers, grids: Grids | None
) -> Any:
    owner = quantizers.owner(node.name)
    if owner is None:
        return result
    quantizer: Quantizer = quantizers.activations[owner]
    if node.layers and quantizer.scale is not None and jax.numpy.ndim(quantizer.scale):
        here = run.iteration[-1]
        scale = quantizer.scale[here]
        zero_point = (
            None if quantizer.zero_point is None else quantizer.zero_point[here]
        )
        quantizer = dataclasses.replace(quantizer, scale=scale, zero_point=zero_point)
    return quantizer(result, grids and grids.activations[owner])


def _derived(
    node: Node, operands: tuple[Any, ...], quantizers: Quantizers, grids: Grids | None
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
    params: Any,
    quantizers: Quantizers,
    *,
    grids: Grids | None = None,
    partial: bool = False,
) -> Any:
    """The same tree with every quantized parameter on its grid.

    What `simulate` does at each call, done once: pass the result to
    `simulate(…, weights=False)`. Weights that the model derives from several parameters are
    not in the tree; `partial=True` says that something else takes care of them.

    Raises ValueError for a quantizer of an unknown parameter, or of a derived weight.

    >>> rounded = jm.round_weights(params, quantizers)
    >>> fast = jax.jit(jm.simulate(model.apply, quantizers, weights=False))
    """
    leaves = named_leaves(params)
    missing = [name for name in quantizers.weights if name not in leaves]
    if missing and not partial:
        raise ValueError(
            f"jaxmet.round_weights: the tree has no parameter {missing[0]!r} to round. It is "
            "another tree, or a weight that the model computes; use simulate with "
            "weights=True for that."
        )
    quantized = quantizers.quantize_weights(leaves, grids)
    return replace_leaves(
        params, {n: quantized[n] for n in quantizers.weights if n in leaves}
    )
