"""The model on any tree that jaxmet makes, and in integers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.frontends import check_apply
from jaxmet.engine.integers.grid_arithmetic import TargetGrid, held_on, on_grid
from jaxmet.engine.integers.integer_program import IntegerStep, in_integers
from jaxmet.engine.integers.integer_values import Floats, Held, at_hand, computed
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.lifted import lifted
from jaxmet.layers.deployed import deployed, weights_on_grids
from jaxmet.tree.leaves import dense, is_quantized
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers

CALLER = "lift"


def lift(apply: Apply, quantizers: Quantizers | None = None) -> Apply:
    r"""The same model, able to run trees with `Compressed` leaves; with quantizers in integers.

    A tree of plain arrays goes to `apply` itself. Otherwise the model's equations are run
    again with each leaf as what it stands for: exact bounds of an equalized ReLU6, for
    example. New values of pruned parameters (statistics of norms in training mode) come back
    pruned likewise: results with a parameter's path and shape that are made of it entry by
    entry. Differentiable; each call traces `apply`, so wrap the result in `jax.jit`.

    With quantizers it computes what `jm.simulate(apply, quantizers)` simulates: dots and
    convolutions of int8 with sums in int32, biases in int32, then
    $q = \mathrm{clip}(\mathrm{round}(a\, s_x s_w / s_y) + z_y)$ for the next grid, clips as
    bounds of the integers, additions, pools and concatenations of integers. What lies between
    other operations stays in float. It is not differentiable. Give it a tree of
    `jm.quantize`; one of floats is rounded at each call.

    Jacob et al., [Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference](https://arxiv.org/abs/1712.05877), CVPR 2018.

    Args:
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        quantizers: the quantizers of `jm.calibrate` for this tree, for integer arithmetic;
            default None: the tree as it is.

    Returns:
        A function like `apply` that also runs trees with `Compressed` leaves.

    Raises:
        ValueError: for a leaf whose statement the model has no place for, and for quantizers
            of another tree.

    >>> logits = jax.jit(jm.lift(model.apply))(jm.equalize(params, graph), images)
    >>> integers = jm.quantize(params, graph, quantizers)
    >>> logits = jax.jit(jm.lift(model.apply, quantizers))(integers, images)
    """
    check_apply(apply, CALLER)
    if quantizers is None:
        return lifted(apply)
    check_are_quantizers(quantizers, CALLER)

    def integer(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return integer_program(apply, quantizers, params, kwargs)(*inputs)[0]

    return integer


def integer_program(
    apply: Apply, quantizers: Quantizers, params: Any, kwargs: Any
) -> Callable[..., tuple[Any, list[IntegerStep]]]:
    """`f(*inputs)`: the outputs in integers, and the operations that made them.

    What is known of the parameters is computed now, outside of a trace of `f`.
    """
    leaves = quantizers.leaves(params, CALLER)
    names = weights_on_grids(params, quantizers)
    held = [_held(quantizers.weights[name], leaves[name]) for name in names]
    function = deployed(apply, params, quantizers, kwargs)

    def run(*inputs: Any) -> tuple[Any, list[IntegerStep]]:
        found, structure = jax.tree.flatten(inputs)
        trees: list[Any] = []

        def flat(weights: list[Any], values: list[Any]) -> list[Any]:
            arguments = jax.tree.unflatten(structure, values)
            named = dict(zip(names, weights, strict=True))
            made, tree = jax.tree.flatten(function(named, *arguments))
            trees.append(tree)
            return made

        results, steps = in_integers(flat, held, [jnp.asarray(x) for x in found])
        return jax.tree.unflatten(trees[-1], results), steps

    return run


def _held(q: Quantizer, leaf: Any) -> Held:
    """A weight as integers on its grid, or in float where no product takes those."""
    given = dense(leaf)
    shape = tuple(jnp.shape(given))
    if is_quantized(leaf):
        weight = leaf.weight
        scale, zero_point = weight.scale, weight.zero_point
        (values,) = computed(lambda: [weight.values], weight.integers)
        if zero_point is None:
            zero_point = np.zeros(np.shape(scale), np.float32)
    else:
        values, (scale, zero_point) = None, q.grid(jnp.asarray(given))
    scale, zero_point = at_hand(scale), at_hand(zero_point)
    if jnp.ndim(scale) == 0:
        one = (1,) * len(shape)
        scale, zero_point = scale.reshape(one), zero_point.reshape(one)
    grid = TargetGrid(scale, zero_point, *q.ends)
    if not grid.fits(shape) or given.dtype != np.float32:
        full = given if is_quantized(leaf) else q(given)
        return Floats(jnp.asarray(full), True, shape)
    if values is None:
        return on_grid(Floats(jnp.asarray(given, np.float32), True, shape), grid)
    return held_on(grid, values, fixed=True)
