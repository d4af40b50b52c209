"""A weight as the integers of its grid, several to a byte where they are small."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.numerics.precision import wide


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    r"""Integers q, a scale s and a zero point z in place of a weight: $\hat w = s\,(q - z)$.

    It is the `weight` of a `Compressed` leaf, made by `jm.quantize`. Integers of at most 4 bits
    lie two to a byte along the last axis, those of 2 bits four, each as its distance from the
    lowest of its width, the first in the lowest bits. `values` spreads them out.

    Args:
        integers: the integers, int8, int16 or int32 of the weight's shape, or uint8 with
            several in a byte.
        scale: the step, a scalar or of the weight's rank with size 1 where it does not change.
        zero_point: the integer that stands for zero, of the shape of `scale`; default None: 0.
        bits: the bit-width: 2 to 8, up to 16, or 32 for a bias.
        low: the lowest integer of the grid; it is stored as 0 where bytes hold several.
        shape: the shape of the weight.
        stands_for: the name of the weight's dtype; default 'float32'.
        block: how many neighbours share a scale; default None: no blocks.

    >>> leaf = jm.quantize(params, graph, quantizers)["conv"]["kernel"]
    >>> leaf.weight.values
    """

    integers: Any
    scale: Any
    zero_point: Any = None
    bits: int = 8
    low: int = -127
    shape: tuple[int, ...] = ()
    stands_for: str = "float32"
    block: int | None = None

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return jnp.dtype(self.stands_for)

    @property
    def values(self) -> jax.Array:
        """The integers q, int32 of the weight's shape."""
        return _values(self)

    @property
    def array(self) -> jax.Array:
        """The weight that they stand for, s (q − z)."""
        return _array(self)


_DATA = ["integers", "scale", "zero_point"]
_META = [f.name for f in dataclasses.fields(Quantized) if f.name not in _DATA]
jax.tree_util.register_dataclass(Quantized, _DATA, _META)


def in_a_byte(bits: int) -> int:
    """How many integers of this width one byte holds."""
    return 4 if bits == 2 else 2 if bits <= 4 else 1


def stored(values: np.ndarray, bits: int, low: int) -> np.ndarray:
    """Integers in the fewest bytes: several in one along the last axis, or the fitting dtype."""
    number = in_a_byte(bits)
    if number == 1 or values.ndim == 0:
        top = int(values.max(initial=0)), int(values.min(initial=0))
        kinds = (np.int8, np.uint8, np.int16, np.uint16, np.int32)
        fits = lambda t: np.iinfo(t).min <= top[1] and top[0] <= np.iinfo(t).max
        return values.astype(next(t for t in kinds if fits(t)))
    width = 8 // number
    digits = (values - low).astype(np.uint8)
    digits = np.pad(
        digits, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % number)]
    )
    digits = digits.reshape(*digits.shape[:-1], digits.shape[-1] // number, number)
    shifts = np.arange(number, dtype=np.uint8) * width
    return np.bitwise_or.reduce(digits << shifts, axis=-1).astype(np.uint8)


@jax.jit
def _values(leaf: Quantized) -> jax.Array:
    integers = jnp.asarray(leaf.integers)
    number = in_a_byte(leaf.bits)
    if number == 1 or integers.shape == leaf.shape == ():
        return integers.astype(jnp.int32)
    width, last = 8 // number, leaf.shape[-1]
    shifts = (jnp.arange(number) * width).astype(jnp.uint8)
    shifts = shifts.reshape((1,) * integers.ndim + (number,))
    digits = jnp.right_shift(integers[..., None], shifts) & jnp.uint8(2**width - 1)
    digits = digits.reshape(*integers.shape[:-1], integers.shape[-1] * number)
    return lax.slice_in_dim(digits, 0, last, axis=-1).astype(jnp.int32) + leaf.low


@jax.jit
def _array(leaf: Quantized) -> jax.Array:
    """As `fake_quant` computes it, to the bit."""
    over = wide(leaf.dtype)
    values = _values(leaf).astype(over)
    scale = _along(jnp.asarray(leaf.scale, over), leaf)
    if leaf.zero_point is not None:
        values = values - _along(jnp.asarray(leaf.zero_point, over), leaf)
    return (scale * values).astype(leaf.dtype)


def _along(a: jax.Array, leaf: Quantized) -> jax.Array:
    """A number for each weight, of which neighbours in a block share one."""
    if a.ndim == 0 or leaf.block is None:
        return jnp.broadcast_to(a, leaf.shape)
    for i, (n, m) in enumerate(zip(a.shape, leaf.shape, strict=True)):
        if n not in (1, m):
            a = lax.slice_in_dim(jnp.repeat(a, leaf.block, axis=i), 0, m, axis=i)
    return jnp.broadcast_to(a, leaf.shape)
