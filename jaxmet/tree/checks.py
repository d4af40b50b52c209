"""Refusals that every transform makes before it starts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmet.tree.leaves import dense


def is_concrete(x: Any) -> bool:
    """Whether an array's values can be looked at: neither traced nor abstract."""
    return not isinstance(x, Tracer | jax.ShapeDtypeStruct)


def check_concrete(params: Any, caller: str) -> None:
    """Refuse traced trees where values have to be looked at."""
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            f"jaxmet.{caller}: the parameters are traced. Call it outside of jax.jit: it "
            "compiles what it runs by itself."
        )


def check_finite(leaves: Mapping[str, Any], caller: str) -> None:
    """Refuse NaN and infinity in concrete floating-point parameters, by name."""
    bad = []
    for name, leaf in leaves.items():
        array = dense(leaf)
        for part in jax.tree.leaves(array):
            if not hasattr(part, "dtype") or not is_concrete(part):
                continue
            inexact = jnp.issubdtype(part.dtype, jnp.inexact)
            if inexact and not tested("isfinite", part).all():
                bad.append(name)
    if bad:
        raise ValueError(
            f"jaxmet.{caller}: parameter {', '.join(map(repr, bad[:5]))} holds NaN or "
            "infinity. Find out which step made it, and pass the tree from before."
        )


def tested(test: str, x: Any) -> Any:
    """`'isfinite'` or `'isnan'` of each value of a concrete array."""
    # On the host nothing is compiled for each shape; what is spread over hosts stays there.
    if getattr(x, "is_fully_addressable", True):
        return getattr(np, test)(np.asarray(x))
    return getattr(jnp, test)(x)
