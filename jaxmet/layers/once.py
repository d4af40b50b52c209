"""Work on weights that runs once: in NumPy, which compiles nothing."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import dtypes

from jaxmet.engine.program import compat
from jaxmet.tree.checks import is_concrete


def run_once(function: Callable, *args: Any) -> Any:
    """`function(*args)` on numbers, for a function of `numerics.xp`; it returns NumPy arrays.

    XLA takes seconds to compile what NumPy computes in milliseconds. Where values are traced
    the program around has them compiled, and where they lie on several hosts, a program.
    """
    flat, tree = jax.tree.flatten(args)
    if not all(map(is_concrete, flat)):
        return function(*args)
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in flat):
        return jax.jit(function, compiler_options=compat.QUICK)(*args)
    arrays = [i for i, leaf in enumerate(flat) if _is_number(leaf)]
    for i, array in zip(arrays, jax.device_get([flat[i] for i in arrays]), strict=True):
        # Without x64, JAX reads what is wider as float32.
        flat[i] = array.astype(dtypes.canonicalize_dtype(array.dtype), copy=False)
    with np.errstate(all="ignore"):
        return function(*tree.unflatten(flat))


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return not compat.is_key(leaf.aval)
    return isinstance(leaf, np.ndarray)
