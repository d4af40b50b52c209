"""What a value is while a program runs in integers.

`Floats` is any array. `Integers` lie on a grid. A `Total` is a sum in int32 before it is put on
a grid, and a `Joint` two values on grids that are added there. Each but `Floats` can say
what it is in float.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxmet.engine.program import compat

Bound: TypeAlias = tuple[str, Any]  # 'max' or 'min', and with what


def number(a: Any) -> np.ndarray | None:
    """The numbers of an array that is known while tracing, or None."""
    if isinstance(a, Tracer) or (hasattr(a, "dtype") and compat.is_key(a)):
        return None
    return np.asarray(a)


def at_hand(a: Any) -> Any:
    """An array as NumPy has it, where it is known: operations on it are not traced."""
    known = number(a)
    return a if known is None else known


def computed(function: Callable[[], Sequence[Any]], *arrays: Any) -> list[Any]:
    """The results of a function of these arrays: numbers at once, where those are known."""
    if any(number(a) is None for a in arrays):
        return list(function())
    with jax.ensure_compile_time_eval():
        return [np.asarray(a) for a in function()]


def at_once(values: Sequence["Held"]) -> Any:
    """Where operations on these values are computed, not traced, if all are known."""
    leaves = [
        (v.stored,) if isinstance(v, Floats) else (v.values, v.scale, v.zero_point)
        for v in values
        if isinstance(v, Floats | Integers) and v.fixed
    ]
    known = [a for group in leaves for a in group if number(a) is not None]
    if len(leaves) < len(values) or len(known) < sum(map(len, leaves)):
        return contextlib.nullcontext()
    return jax.ensure_compile_time_eval()


def is_zero(a: Any) -> bool:
    """Whether an array is known to hold zeros alone."""
    known = number(a)
    return known is not None and not known.any()


def times(a: Any, b: Any) -> Any:
    """A product of scales; of known numbers it is known."""
    x, y = number(a), number(b)
    return a * b if x is None or y is None else x * y


def over(a: Any, b: Any) -> Any:
    """A quotient of scales, rounded once."""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x / y
    # XLA joins constants: (a c) / d would become a times c / d. It cannot join what depends on a.
    return a / jnp.where(jnp.isnan(a), a, jnp.asarray(b))


@dataclasses.dataclass(frozen=True)
class Floats:
    """Any array; `fixed` if no input of the model has a part in it.

    The array may have size 1 along axes of `shape` on which it does not change.
    """

    stored: Any
    fixed: bool
    shape: tuple[Any, ...]

    @property
    def array(self) -> Any:
        if jnp.shape(self.stored) == self.shape:
            return self.stored
        return lax.broadcast_in_dim(self.stored, self.shape, range(len(self.shape)))


@dataclasses.dataclass(frozen=True)
class Integers:
    """`scale * (values - zero_point)`: int8, or int32 for grids of more than 8 bits.

    Scale and zero point have the rank of the values. A grid from 0 to 255 is held less
    `offset`, so that it fits int8. `low` and `high` are its ends as they are held. `layer` is
    whose result it is.
    """

    values: Any
    scale: Any
    zero_point: Any
    low: int
    high: int
    offset: int = 0
    fixed: bool = False
    layer: str = ""

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.values.shape)

    @property
    def array(self) -> Any:
        """In float, as `fake_quant` computes it."""
        floats = self.values.astype(jnp.float32)
        return jnp.asarray(self.scale) * (floats - self.zero_point)

    @property
    def uniform(self) -> bool:
        """Whether one scale and one zero point serve all."""
        sizes = (math.prod(jnp.shape(a)) for a in (self.scale, self.zero_point))
        return all(n == 1 for n in sizes)

    @property
    def small(self) -> bool:
        """Whether it can enter a product: sums of wider ones may not fit int32."""
        return self.values.dtype == jnp.int8


@dataclasses.dataclass(frozen=True)
class Origin:
    """What made a sum: the layer, the equation and its parameters, what it read, its bias.

    `index` is its place in the list of steps.
    """

    layer: str
    equation: str
    reads: tuple[Integers, ...]
    params: dict[str, Any]
    bias: Any = None
    index: int = -1


@dataclasses.dataclass(frozen=True)
class Total:
    """`scale * sums / divisor + rest`, within bounds: an accumulator.

    `rest` is what int32 cannot hold of a bias. `origin` is for tables.
    """

    sums: Any
    scale: Any
    divisor: Any = 1.0
    rest: Any = None
    bounds: tuple[Bound, ...] = ()
    origin: Origin | None = None
    fixed: ClassVar[bool] = False  # one of its terms is an input's

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.sums.shape)

    @property
    def array(self) -> Any:
        """In float."""
        scale = jnp.asarray(over(self.scale, np.float32(1) * self.divisor))
        found = self.sums.astype(jnp.float32) * scale
        if self.rest is not None:
            found = found + self.rest
        return bounded(found, self.bounds)


@dataclasses.dataclass(frozen=True)
class Joint:
    """Two values on grids, added; within bounds."""

    terms: tuple[Integers, Integers]
    bounds: tuple[Bound, ...] = ()
    origin: Origin | None = None
    fixed: ClassVar[bool] = False  # one of its terms is an input's

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.terms[0].shape

    @property
    def array(self) -> Any:
        """In float."""
        return bounded(self.terms[0].array + self.terms[1].array, self.bounds)


Held: TypeAlias = Floats | Integers | Total | Joint


def bounded(x: Any, bounds: tuple[Bound, ...]) -> Any:
    """Values within bounds, applied in their order."""
    for kind, bound in bounds:
        bound = jnp.asarray(bound, x.dtype)
        x = jnp.maximum(x, bound) if kind == "max" else jnp.minimum(x, bound)
    return x


def floats(value: Held) -> Floats:
    """A value in float."""
    if isinstance(value, Floats):
        return value
    return Floats(value.array, value.fixed, value.shape)
