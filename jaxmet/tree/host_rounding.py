"""Weights rounded on the host: as `Quantizer` does it, and nothing is compiled.

Each shape of a weight would be a handful of programs, for work of milliseconds.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.grid import grid_ends
from jaxmet.numerics.learned_ranges import SCALE_CEILING
from jaxmet.numerics.ranges import SCALE_FLOOR, grid_on_host
from jaxmet.tree.checks import is_concrete

if TYPE_CHECKING:
    from jaxmet.tree.quantizer import Quantizer

Grid = tuple[np.ndarray, np.ndarray]


def on_host(x: Any) -> np.ndarray | None:
    """The floats of an array, where they are known, lie on one device and are not of half size.

    Half precision has many ties, which XLA may round otherwise.
    """
    if not (is_concrete(x) and hasattr(x, "dtype") and hasattr(x, "shape")):
        return None
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 4:
        return None
    if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
        return None
    return np.asarray(x, jnp.result_type(x))  # float64 only where JAX has it


def grid_of(q: "Quantizer", x: np.ndarray, bits: int | None = None) -> Grid | None:
    """`q.grid(x)`, at other `bits` over the same range; None where that is not plain."""
    if not q.follows or q.product is not None:
        return stated_grid(q, bits)
    least = None if q.least is None else on_host(q.least)
    plain = q.calibrator == "minmax" and x.size > 0
    if not plain or (least is None) != (q.least is None):
        return None
    ends = _ends(q, bits)
    with np.errstate(all="ignore"):
        grid = grid_on_host(*_extremes(q, x), *ends, symmetric=q.symmetric)
    return _raised(grid, least)


def stated_grid(q: "Quantizer", bits: int | None = None) -> Grid | None:
    """The grid that a scale states, where it is known."""
    if q.scale is None or q.maximum is not None or q.product is not None:
        return None
    given = (q.scale, q.zero_point, q.least)
    scale, zero_point, least = (None if a is None else on_host(a) for a in given)
    found = (scale, zero_point, least)
    if any((a is None) != (b is None) for a, b in zip(given, found, strict=True)):
        return None
    assert scale is not None
    return _raised(_stated(q, scale, zero_point, _ends(q, bits)), least)


def _raised(grid: Grid, least: np.ndarray | None) -> Grid:
    """The grid with no scale below the least one."""
    scale, zero_point = map(np.asarray, grid)
    if least is None:
        return scale, zero_point
    least = least.astype(scale.dtype)
    scale = np.asarray(np.maximum(scale, least if scale.ndim else np.max(least)))
    return scale, np.broadcast_to(zero_point, scale.shape)


def _ends(q: "Quantizer", bits: int | None) -> tuple[int, int]:
    if bits is None:
        return q.ends
    return grid_ends(bits, signed=q.symmetric and q.signed, narrow=q.narrow)


def _stated(
    q: "Quantizer",
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    ends: tuple[int, int],
) -> Grid:
    dtype = scale.dtype.type
    scale = np.clip(np.abs(scale), dtype(SCALE_FLOOR), dtype(SCALE_CEILING))
    (low, high), (new_low, new_high) = (map(dtype, e) for e in (q.ends, ends))
    if zero_point is None:
        zero_point = np.zeros_like(scale)
    else:
        zero_point = np.clip(np.round(zero_point.astype(dtype)), low, high)
    if ends == q.ends:
        return scale, zero_point
    if q.symmetric:
        scale = scale * (high / new_high)
    else:
        finer = (new_high - new_low) / (high - low)
        zero_point = np.round(new_low + (zero_point - low) * finer)
        scale = scale * ((high - low) / (new_high - new_low))
    change = dtype(q.margin(ends)) / dtype(q.margin(q.ends))
    return np.asarray(scale * change), np.asarray(zero_point)


def _extremes(q: "Quantizer", x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the values that share a scale, with the rank of x."""
    kept = {a % x.ndim for a in q.axis or ()}
    at = None if q.block is None else (q.block_axis or 0) % x.ndim
    others = tuple(a for a in range(x.ndim) if a not in kept | {at})
    ends = []
    for reduced, block in ((np.min, np.minimum), (np.max, np.maximum)):
        end = reduced(x, axis=others, keepdims=True)
        if at is not None and q.block is not None:
            end = block.reduceat(end, np.arange(0, x.shape[at], q.block), axis=at)
        ends.append(end)
    return ends[0], ends[1]


def rounded(x: np.ndarray, grid: Grid, ends: tuple[float, float], block: Any) -> Any:
    """`fake_quant` of an array of the host, in its dtype."""
    scale, zero_point = (repeated(a.astype(x.dtype), x.shape, block) for a in grid)
    # Into one array: a weight may be large.
    with np.errstate(all="ignore"):  # infinities and NaN pass through
        q = np.asarray(x / scale)
        np.rint(q, out=q)
        q += zero_point
        np.clip(q, x.dtype.type(ends[0]), x.dtype.type(ends[1]), out=q)
        q -= zero_point
        q *= scale
    return q


def repeated(a: np.ndarray, shape: tuple[int, ...], block: int | None) -> np.ndarray:
    """An operand of the grid, one number for each of its neighbours in a block."""
    if block is None or a.ndim == 0:
        return a
    for i, (n, m) in enumerate(zip(a.shape, shape, strict=True)):
        if n not in (1, m):
            a = np.take(a, np.arange(m) // block, axis=i)
    return a


def round_on_host(q: "Quantizer", x: Any, bits: int | None = None) -> np.ndarray | None:
    """`q(x)` on the host, at other `bits` too; None where only JAX can do it."""
    array = on_host(x)
    if array is None:
        return None
    if bits is None and not q.active:
        return array
    grid = grid_of(q, array, bits)
    fits = grid is not None and (grid[0].ndim in (0, array.ndim))
    return rounded(array, grid, _ends(q, bits), q.block) if grid and fits else None


def grid_in_numpy(q: "Quantizer", x: np.ndarray) -> Grid:
    """`q.grid(x)` as NumPy arrays, found by JAX where only JAX can do it."""
    array = on_host(x)
    grid = None if array is None else grid_of(q, array)
    scale, zero_point = q.grid(jnp.asarray(x)) if grid is None else grid
    return np.asarray(scale), np.asarray(zero_point)


def round_in_numpy(q: "Quantizer", x: np.ndarray) -> np.ndarray:
    """`q(x)` as a NumPy array, found by JAX where only JAX can do it."""
    found = round_on_host(q, x)
    return np.asarray(q(jnp.asarray(x))) if found is None else found
