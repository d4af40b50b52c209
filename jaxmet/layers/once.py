"""Programs that run once: compiled together, and quickly."""

from collections.abc import Callable
from typing import Any

import jax

from jaxmet.engine.program import compat
from jaxmet.tree.checks import is_concrete


def run_once(function: Callable, *args: Any) -> Any:
    """`function(*args)` as one program, for which XLA takes little time.

    Operation by operation every new shape would be compiled by itself. Where values are
    traced the program around compiles it.
    """
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(args)):
        return function(*args)
    return jax.jit(function, compiler_options=compat.QUICK)(*args)
