"""Refusals that every transform makes before it starts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxmet.tree.leaves import is_compressed


def is_concrete(x: Any) -> bool:
    """Whether an array's values can be looked at: neither traced nor abstract."""
    return not isinstance(x, Tracer | jax.ShapeDtypeStruct)


def check_finite(leaves: Mapping[str, Any], caller: str) -> None:
    """Refuse NaN and infinity in concrete floating-point parameters, by name."""
    names, flags = [], []
    for name, leaf in leaves.items():
        array = leaf.weight if is_compressed(leaf) else leaf
        for part in jax.tree.leaves(array):
            if not hasattr(part, "dtype") or not is_concrete(part):
                continue
            if jnp.issubdtype(part.dtype, jnp.inexact):
                names.append(name)
                flags.append(jnp.all(jnp.isfinite(part)))
    if not flags:
        return
    bad = [
        name for name, ok in zip(names, jax.device_get(flags), strict=True) if not ok
    ]
    if bad:
        raise ValueError(
            f"jaxmet.{caller}: parameter {', '.join(map(repr, bad[:5]))} holds NaN or "
            "infinity. Find out which step made it, and pass the tree from before."
        )
