"""An array some of whose channels are not computed.

A model is traced with the shapes that it was written for. Where a leaf was pruned, the
program runs on what is left of every array that depends on it: `Partial` holds the part,
which entries of which axes it is, and the one number that all other entries would be.
Nothing is approximated: where an equation has no rule for a part, it gets the whole array.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.structures import Keep, scattered, whole_shape

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Partial:
    """What is left of an array; `fill` is what every entry that is gone would be."""

    part: Any
    keep: tuple[Keep, ...]
    fill: Any = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return whole_shape(self.part.shape, self.keep)

    @property
    def zero(self) -> bool:
        """Whether what is gone is known to be zero."""
        return is_concrete(self.fill) and not np.any(np.asarray(self.fill))

    def on(self, axis: int) -> Keep | None:
        return next((k for k in self.keep if k.axis == axis), None)

    def without(self, axis: int) -> tuple[Keep, ...]:
        return tuple(k for k in self.keep if k.axis != axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Uniform:
    """An array that is one number everywhere, not written out yet."""

    number: Any
    shape: tuple[int, ...]


def _flatten(x: Partial) -> tuple[tuple, tuple]:
    known = is_concrete(x.fill)
    held = _Number(x.fill) if known else None
    return (x.part, None if known else x.fill), (x.keep, held)


def _unflatten(static: tuple, parts: Sequence[Any]) -> Partial:
    keep, held = static
    return Partial(parts[0], keep, parts[1] if held is None else held.value)


class _Number:
    """A number that may be static data of a tree."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Number) and same_number(self.value, other.value)

    def __hash__(self) -> int:
        return hash(float(np.asarray(self.value)))


jax.tree_util.register_pytree_node(Partial, _flatten, _unflatten)
jax.tree_util.register_pytree_node(
    Uniform, lambda x: ((x.number,), x.shape), lambda shape, n: Uniform(n[0], shape)
)


def same_number(a: Any, b: Any) -> bool:
    """Whether two numbers are known to be equal."""
    if a is b:
        return True
    if not (is_concrete(a) and is_concrete(b)):
        return False
    return bool(np.asarray(a) == np.asarray(b))


def whole(x: Any) -> Any:
    """The array with every entry in its place."""
    if isinstance(x, Partial):
        return scattered(x.part, x.keep, x.fill)
    if isinstance(x, Uniform):
        return jnp.full(x.shape, x.number)
    return x


def taken(x: Any, keep: Sequence[Keep]) -> Any:
    """The kept entries of a whole array."""
    for axis, _, indices in keep:
        x = jnp.take(x, np.asarray(indices, np.int32), axis=axis, unique_indices=True,
                     indices_are_sorted=True, mode="clip")  # fmt: skip
    return x


def number_under(
    primitive: Any, params: Params, numbers: Sequence[Any], dtypes: Sequence[Any]
) -> Any:
    """What an elementwise equation makes of single numbers, now if they are known."""
    arrays = [
        n if hasattr(n, "dtype") and n.dtype == d else np.asarray(n, d)
        if is_concrete(n) else lax.convert_element_type(n, d)
        for n, d in zip(numbers, dtypes, strict=True)
    ]  # fmt: skip
    if all(map(is_concrete, numbers)):
        with jax.ensure_compile_time_eval():
            return compat.bind(primitive, params, [jnp.asarray(a) for a in arrays])[0]
    return compat.bind(primitive, params, arrays)[0]


def parts(operands: Sequence[Any]) -> list[Partial]:
    """Those of the operands of which only a part is left."""
    return [x for x in operands if isinstance(x, Partial)]


def in_order(keep: Sequence[Keep]) -> tuple[Keep, ...]:
    """By axis, without those that keep all."""
    return tuple(sorted(k for k in keep if len(k.indices) < k.size))


def number_of(x: Any) -> Any:
    """What every entry is that is not written out."""
    if isinstance(x, Partial):
        return x.fill
    return x.number if isinstance(x, Uniform) else x


Rule = Callable[[Equation, list[Any]], "list[Any] | None"]
"""From an equation and its operands to its results, None where it needs whole arrays."""
