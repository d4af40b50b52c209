"""The one file that knows flax: an nnx module as a pure function, leaves on disk."""

import sys
from collections.abc import Callable
from typing import Any

import jax
from flax import serialization

from jaxmet.tree.leaves import Compressed, from_state, to_state


def is_module(thing: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # who has such a module has imported it
    return nnx is not None and isinstance(thing, nnx.Module)


def functional(module: Any) -> tuple[Callable, Any, Callable]:
    """See `jaxmet.functional`."""
    from flax import nnx  # a quarter of a second, which users of linen need not wait

    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"jaxmet.functional: got {type(module).__name__}, which is not an nnx.Module "
            "and not an equinox.Module. A linen module needs no conversion: use module.apply "
            "and its variables."
        )
    definition, params = nnx.split(module)

    def merge(params: Any) -> Any:
        return nnx.merge(definition, _fresh(params))

    def apply(
        params: Any,
        *inputs: Any,
        method: str = "__call__",
        mutable: Any = None,
        **kwargs,
    ) -> Any:
        merged = merge(params)
        outputs = getattr(merged, method)(*inputs, **kwargs)
        return outputs if mutable is None else (outputs, nnx.state(merged, mutable))

    return apply, _fresh(params), merge


def _fresh(state: Any) -> Any:
    """New variables around the same arrays: a module writes into those it is made of."""
    return jax.tree.map(lambda array: array, state)


serialization.register_serialization_state(
    Compressed, to_state, from_state, override=True
)
