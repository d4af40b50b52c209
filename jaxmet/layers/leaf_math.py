"""Arithmetic on a leaf in wide precision: what else it states, and its dtype, stay.

And what a leaf says of the inputs of its layer.
"""

from typing import Any

from jaxmet.numerics import xp
from jaxmet.numerics.hadamard import hadamard
from jaxmet.numerics.precision import wide
from jaxmet.numerics.xp import Array
from jaxmet.tree.leaves import dense, input_scale_of, input_signs_of, with_weight


def replaced(leaf: Any, array: Any) -> Any:
    """The leaf with another array of its shape, in its own dtype."""
    old = dense(leaf)
    return with_weight(leaf, xp.asarray(array).reshape(old.shape).astype(old.dtype))


def shifted(leaf: Any, change: Array) -> Any:
    """The leaf plus `change`, one number for each of its entries in any shape."""
    array = xp.asarray(dense(leaf))
    dtype = wide(array.dtype, change.dtype)
    return replaced(
        leaf, array.astype(dtype) + change.astype(dtype).reshape(array.shape)
    )


def scaled(leaf: Any, factor: Array, power: int = 1) -> Any:
    """The leaf times a whole power of `factor`, which has the leaf's rank."""
    array = xp.asarray(dense(leaf))
    dtype = wide(array.dtype, factor.dtype)
    new, factor = array.astype(dtype), factor.astype(dtype)
    # step by step: factor ** power alone could overflow where the product does not
    for _ in range(abs(power)):
        new = new * factor if power > 0 else new / factor
    return replaced(leaf, new)


def as_entered(leaf: Any, values: Array) -> Array:
    """Numbers of a layer's inputs, divided and rotated as its leaf says, (..., inputs)."""
    scale, signs = input_scale_of(leaf), input_signs_of(leaf)
    if scale is not None:
        values = values / xp.asarray(scale).reshape(-1).astype(values.dtype)
    if signs is None:
        return values
    return hadamard(values * xp.asarray(signs).reshape(-1).astype(values.dtype))
