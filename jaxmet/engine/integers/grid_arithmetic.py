"""The integers of a grid, from floats, from sums in int32, and from two other grids.

As onnxruntime computes them, to the bit: a sum is multiplied by one float32 number and rounded,
ties to even; of an addition the zero points are inside of the rounding. Jacob et al.,
[Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference](https://arxiv.org/abs/1712.05877), CVPR 2018, section 2.2, with a float multiplier.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.integers.integer_values import (
    Bound,
    Held,
    Integers,
    Joint,
    Total,
    computed,
    number,
    over,
)
from jaxmet.numerics.fake_quant import quotient


class TargetGrid(NamedTuple):
    """Scale and zero point with the rank of what goes there, and the ends, known."""

    scale: Any
    zero_point: Any
    low: int
    high: int

    @property
    def offset(self) -> int:
        """What to take off so that 8 bits fit int8."""
        fits = self.low >= -(2**7) and self.high < 2**7
        return 0 if fits or self.high - self.low >= 2**8 else 2**7

    def fits(self, shape: tuple[Any, ...]) -> bool:
        """Whether values of a shape share it without blocks."""
        return all(
            n in (1, m)
            for a in (self.scale, self.zero_point)
            for n, m in zip(jnp.shape(a), shape, strict=True)
        )

    @property
    def dtype(self) -> Any:
        low, high = self.low - self.offset, self.high - self.offset
        return jnp.int8 if low >= -(2**7) and high < 2**7 else jnp.int32


def target_grid(grid: list[Any]) -> TargetGrid | None:
    """The operands of a `fake_quant`, where the ends are known integers."""
    scale, zero_point, *ends = grid
    known = [number(a) for a in ends]
    if any(a is None or a.size == 0 or (a != a.flat[0]).any() for a in known):
        return None
    low, high = (int(a.flat[0]) for a in known if a is not None)
    return TargetGrid(scale, zero_point, low, high)


def on_grid(value: Held, grid: TargetGrid) -> Integers:
    """The integers of a value on a grid."""
    bounds: tuple[Bound, ...] = ()
    if isinstance(value, Total):
        found, bounds = _of_total(value, grid), value.bounds
    elif isinstance(value, Joint):
        found, bounds = _of_joint(value, grid), value.bounds
    else:
        array = jnp.asarray(value.array)
        scale = jnp.broadcast_to(jnp.asarray(grid.scale, array.dtype), array.shape)
        found = jnp.rint(quotient(array, scale)) + grid.zero_point
    return held_on(grid, _within(found, grid, bounds), fixed=value.fixed)


def held_on(grid: TargetGrid, found: Any, *, fixed: bool) -> Integers:
    """Integers of a grid, float or int32, as they are held."""
    offset = np.float32(grid.offset)
    return Integers(
        (found - np.asarray(grid.offset, found.dtype)).astype(grid.dtype),
        grid.scale,
        grid.zero_point - offset,
        grid.low - grid.offset,
        grid.high - grid.offset,
        grid.offset,
        fixed,
    )


def _of_total(value: Total, grid: TargetGrid) -> Any:
    multiplier = over(value.scale, grid.scale * np.float32(1) * value.divisor)
    found = value.sums.astype(jnp.float32) * jnp.asarray(multiplier)
    if value.rest is not None:
        found = found + value.rest / grid.scale
    return jnp.rint(found) + grid.zero_point


def _of_joint(value: Joint, grid: TargetGrid) -> Any:
    a, b = value.terms
    ratios = [over(x.scale, grid.scale) for x in (a, b)]
    zeros = [x.zero_point + np.float32(x.offset) for x in (a, b)]
    shift = grid.zero_point - _fused(ratios[0], zeros[0], ratios[1] * zeros[1])
    whole = [x.values.astype(jnp.float32) + np.float32(x.offset) for x in (a, b)]
    found = _rounded_once(whole[1], ratios[1], shift)
    return jnp.rint(_rounded_once(whole[0], ratios[0], found))


def _rounded_once(x: Any, ratio: Any, c: Any) -> Any:
    """c + x ratio as processors with a fused operation compute it, for integers of 8 bits.

    Whether a compiler fuses a product and a sum depends on what stands around them. So the ratio is
    split in two numbers of few bits: both products are exact, and what the first sum loses (Knuth's
    TwoSum) is added with the second.
    """
    whole = lax.bitcast_convert_type(jnp.asarray(ratio), jnp.int32)
    upper = lax.bitcast_convert_type(whole & np.int32(-(2**9)), jnp.float32)
    first, second = x * upper, x * (ratio - upper)
    # XLA would take (c + first) - c for first: it cannot see through a bound that never binds.
    total = jnp.maximum(c + first, np.finfo(np.float32).min)
    moved = total - c
    lost = (c - (total - moved)) + (first - moved)
    return total + (lost + second)


def _fused(a: Any, b: Any, c: Any) -> Any:
    """a b + c, of known numbers rounded once, as processors with a fused operation do."""
    known = [number(x) for x in (a, b, c)]
    if any(x is None for x in known):
        return a * b + c
    x, y, z = (np.asarray(k, np.float64) for k in known)
    return (x * y + z).astype(np.float32)


def _within(found: Any, grid: TargetGrid, bounds: tuple[Bound, ...]) -> Any:
    low, high = integer_bounds(grid, bounds)
    return jnp.clip(found, low, high)


def integer_bounds(grid: TargetGrid, bounds: tuple[Bound, ...]) -> tuple[Any, Any]:
    """The lowest and highest integer: of the grid, and of bounds: rounding is monotone."""
    ends = np.float32(grid.low), np.float32(grid.high)
    low, high = ends
    for kind, bound in bounds:
        apply = np.maximum if kind == "max" else np.minimum
        traced = jnp.maximum if kind == "max" else jnp.minimum

        (whole,) = computed(
            partial(_bound_on, grid, bound), bound, grid.scale, grid.zero_point
        )
        known = all(number(a) is not None for a in (low, high, whole))
        low, high = ((apply if known else traced)(a, whole) for a in (low, high))
    return low, high


def _bound_on(grid: TargetGrid, bound: Any) -> list[Any]:
    steps = jnp.rint(jnp.asarray(bound, jnp.float32) / grid.scale)
    ends = np.float32(grid.low), np.float32(grid.high)
    return [jnp.clip(steps + grid.zero_point, *ends)]
