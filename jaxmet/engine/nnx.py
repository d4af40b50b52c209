"""The one file that knows flax: an nnx module as a pure function, leaves on disk."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx, serialization

from jaxmet.tree.leaves import Compressed, from_state, to_state


def functional(module: Any) -> tuple[Callable, Any, Callable]:
    """An nnx module as `(apply, params, merge)`.

    `apply(params, *inputs, **kwargs)` calls a module made of `params` and leaves the given
    one alone; `method='name'` calls another method. With `mutable=` (an nnx filter, such as
    `nnx.BatchStat`) it returns `(outputs, updated state)`, as linen does. `params` is the
    whole state: weights and running statistics. `merge(params)` is a module again.

    Raises TypeError for anything but an nnx module (linen needs no such step).

    >>> apply, params, merge = jm.functional(model)
    >>> params = jm.fold_batch_norm(params, jm.trace(apply, params, images[:1]))
    >>> model = merge(params)
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"jaxmet.functional: got {type(module).__name__}, which is not an nnx.Module. "
            "A linen module needs no conversion: use module.apply and its variables."
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
