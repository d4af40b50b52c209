"""What to compute in."""

from typing import Any

import jax.numpy as jnp


def wide(*dtypes: Any) -> Any:
    """The widest of these types, at least float32, however strict promotion is.

    Args:
        *dtypes: dtypes or names of dtypes; those of integers do not count.

    Returns:
        The dtype.
    """
    known = (jnp.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.inexact))
    return max((jnp.dtype(jnp.float32), *known), key=lambda d: d.itemsize)
