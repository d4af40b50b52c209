r"""A histogram of a stream, which does not depend on the order of the stream.

Bins have a width $w$ that is a power of two and lie on its multiples, so zero is an
edge. The width is the smallest whose bins cover the smallest and the largest value, and
zero. It follows from these two alone, and bins of width $2w$ are pairs of bins of width
$w$: the histogram of two sets of values is exactly the merge of theirs.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmet.numerics.precision import wide

BINS = 2048
SMALLEST_WIDTH = 2.0**-100


class Histogram(NamedTuple):
    """How many values fell into each bin, `zeros` of them exactly zero.

    `low` and `high` are the exact ends of all values. Leading axes are histograms side by
    side. Counts are floats: exact up to 2²⁴, correctly rounded sums above.
    """

    counts: Float[Array, "*layers bins"]
    zeros: Float[Array, "*layers"]
    low: Float[Array, "*layers"]
    high: Float[Array, "*layers"]

    @property
    def width(self) -> Float[Array, "*layers"]:
        """The width of the bins."""
        return bin_width(self.low, self.high, self.counts.shape[-1])

    @property
    def edges(self) -> Float[Array, "*layers edges"]:
        """Where bins begin and end, one more than bins."""
        width = self.width[..., None]
        number = jnp.arange(self.counts.shape[-1] + 1, dtype=width.dtype)
        first = jnp.floor(jnp.minimum(self.low, 0.0)[..., None] / width)
        return (first + _along_last(number, width.ndim)) * width


def bin_width(
    low: Float[Array, "*layers"], high: Float[Array, "*layers"], bins: int = BINS
) -> Float[Array, "*layers"]:
    """The smallest power of two whose bins cover low … high and zero.

    Args:
        low: the smallest values, a float array (*layers).
        high: the largest values, of the same shape.
        bins: how many bins there are; default 2,048.

    Returns:
        The width of the bins of each layer, (*layers).
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    # Halves, since the width of an extreme range may not be a float.
    width = _power_of_two(high / 2 - low / 2) * 2.0 ** (2 - math.ceil(math.log2(bins)))
    width = jnp.maximum(width, SMALLEST_WIDTH)
    fits = jnp.floor(high / width) - jnp.floor(low / width) < bins
    return jnp.where(fits, width, 2 * width)


def _power_of_two(x: Float[Array, "*layers"]) -> Float[Array, "*layers"]:
    """The largest power of two up to x: its exponent without the mantissa."""
    # bits, not log2: a logarithm may round to the next power just below one
    size = jnp.finfo(x.dtype).bits
    exponent = jax.lax.bitcast_convert_type(x, jnp.dtype(f"int{size}"))
    mantissa = jnp.asarray(2 ** jnp.finfo(x.dtype).nmant - 1, exponent.dtype)
    return jax.lax.bitcast_convert_type(exponent & ~mantissa, x.dtype)


class Tally(NamedTuple):
    """Counts of some values of which each stands for `each`, and the ends of all.

    What is exactly zero is in a bin of its own, after the others.
    """

    counts: Int[Array, "*layers bins1"]
    each: Float[Array, "*layers"]
    low: Float[Array, "*layers"]
    high: Float[Array, "*layers"]


def tally(
    x: Float[Array, "..."],
    samples: int | None = None,
    *,
    bins: int = BINS,
    where: Bool[Array, "..."] | None = None,
    number: Any = 0,
) -> Tally:
    """Count at most `samples` values of an array, or all of them.

    They are those at every `stride`-th position, round and round, with a stride that shares no
    factor with the size, so that they spread evenly over all axes, channels too. Of arrays
    with the `number` 0, 1, 2 … each goes on where the one before stopped, so that together
    they count all positions equally often, give or take one. The ends are exact. Only values
    `where` it is True count; where none does the ends are +∞ and −∞.

    Args:
        x: the values, a float array of any shape.
        samples: how many values are counted at most; default None: all.
        bins: how many bins there are; default 2,048.
        where: a boolean array that broadcasts to the shape of `x`, True where a value counts;
            default None: all count.
        number: how many arrays were tallied before this one; default 0.

    Returns:
        Counts as int32, one bin more than `bins` for exact zeros; how many values each stands
        for; and both ends.
    """
    if where is not None:
        where = jnp.broadcast_to(where, x.shape).reshape(-1)
    x = x.reshape(-1).astype(wide(x.dtype))
    low = jnp.min(x, where=where, initial=None if where is None else jnp.inf)
    high = jnp.max(x, where=where, initial=None if where is None else -jnp.inf)
    stride = stride_of(x.size, samples)
    values, counted = x, where
    if stride > 1:
        place = np.arange(0, x.size, stride, dtype=np.int32)
        # So many positions past its end an array stops; the product must not overflow.
        past = place.size * stride - x.size
        turn = jnp.asarray(number, jnp.int32) % ((2**31 - 1) // max(1, past))
        place = place + turn * past % x.size
        place = jnp.where(place < x.size, place, place - x.size)
        values = jnp.take(x, place)
        counted = None if where is None else jnp.take(where, place)
    if counted is not None:
        values = jnp.where(counted, values, 0.0)
    width = bin_width(low, high, bins)
    lowest = jnp.floor(jnp.minimum(low, 0.0) / width)
    place = _place(jnp.floor(values / width) - lowest, bins)
    # Integers: a float stops counting single values at 2²⁴.
    counts = jnp.zeros(bins + 1, jnp.int32)
    one = 1 if counted is None else counted.astype(jnp.int32)
    counts = counts.at[jnp.where(values == 0, bins, place)].add(one)
    return Tally(counts, jnp.full_like(low, stride), low, high)


def histogram(x: Float[Array, "..."], *, bins: int = BINS) -> Histogram:
    """The histogram of an array.

    Args:
        x: the values, any shape.
        bins: how many bins there are; default 2,048.

    Returns:
        The counts of equal bins around zero, and the exact ends.
    """
    return jax.tree.map(lambda v: v[0], histograms([tally(x, bins=bins)]))


def histograms(tallies: Sequence[Tally]) -> Histogram:
    """The histograms of what the tallies stand for, one after the other in a row.

    Where values stand for others, the ends are counted once more for themselves: they are
    values that the rest may not know of.

    Args:
        tallies: tallies with as many bins each; their leading axes are flattened.

    Returns:
        The histograms side by side, one row per tally.
    """
    tallies = [
        t._replace(counts=t.counts.reshape(-1, t.counts.shape[-1])) for t in tallies
    ]
    counts = jnp.concatenate([t.counts for t in tallies])
    each, low, high = (
        jnp.concatenate([jnp.reshape(t[i], -1) for t in tallies]) for i in (1, 2, 3)
    )
    bins, rows = counts.shape[1] - 1, jnp.arange(counts.shape[0])
    width = bin_width(low, high, bins)
    first = jnp.floor(jnp.minimum(low, 0.0) / width)
    counts = counts.astype(low.dtype) * each[:, None]
    for end in (low, high):
        place = jnp.where(end == 0, bins, _place(jnp.floor(end / width) - first, bins))
        known = (each > 1) & (low <= high)
        counts = counts.at[rows, place].add(known.astype(low.dtype))
    counts, zeros = counts[:, :bins], counts[:, bins]
    return Histogram(counts.at[rows, _place(-first, bins)].add(zeros), zeros, low, high)


def stride_of(size: int, samples: int | None) -> int:
    """The stride at which at most `samples` of `size` values are counted.

    Args:
        size: how many values there are.
        samples: how many are counted at most; None: all.

    Returns:
        The stride; 1 where all values are counted.
    """
    if samples is None or size <= samples:
        return 1
    stride = -(-size // samples)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride


def merge(one: Histogram, two: Histogram) -> Histogram:
    """The histogram of both sets of values: associative, commutative, exact.

    One without values, whose ends are +∞ and −∞, changes nothing.

    Args:
        one: a histogram, or several along leading axes.
        two: as many of them.

    Returns:
        The histograms of the values of both.
    """
    low, high = jnp.minimum(one.low, two.low), jnp.maximum(one.high, two.high)
    counts = jnp.zeros_like(one.counts)
    both = Histogram(counts, one.zeros + two.zeros, low, high)
    return both._replace(counts=_moved(one, both) + _moved(two, both))


def merge_all(histograms: Histogram) -> Histogram:
    """One histogram of all that lie side by side.

    Args:
        histograms: histograms along a leading axis.

    Returns:
        The histogram of all values.
    """
    bins = histograms.counts.shape[-1]
    counts, *rest = histograms
    flat = Histogram(counts.reshape(-1, bins), *(v.reshape(-1) for v in rest))
    while (number := flat.low.shape[0]) > 1:
        half = number // 2
        pairs = merge(*(_rows(flat, i * half, (i + 1) * half) for i in range(2)))
        last = _rows(flat, 2 * half, number)
        flat = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pairs, last)
    return jax.tree.map(lambda v: v[0], flat)


def _rows(histograms: Histogram, start: int, stop: int) -> Histogram:
    return jax.tree.map(lambda v: v[start:stop], histograms)


def _moved(old: Histogram, new: Histogram) -> Float[Array, "*layers bins"]:
    """The counts of `old` in the bins of `new`, which are as wide or wider."""
    bins = old.counts.shape[-1]
    # Below 2⁻²⁴ every bin goes next to zero, and the ratio might underflow.
    ratio = jnp.maximum(old.width / new.width, 2.0**-24)
    first = jnp.floor(jnp.minimum(old.low, 0.0) / old.width)
    new_first = jnp.floor(jnp.minimum(new.low, 0.0) / new.width)
    number = _along_last(jnp.arange(bins, dtype=ratio.dtype), old.counts.ndim)
    moved = jnp.floor((number + first[..., None]) * ratio[..., None])
    place = _place(moved - new_first[..., None], bins)
    add = jnp.vectorize(
        lambda i, c: jnp.zeros_like(c).at[i].add(c), signature="(b),(b)->(b)"
    )
    return add(place, old.counts)


def _place(number: Float[Array, "..."], bins: int) -> jax.Array:
    return jnp.clip(number, 0, bins - 1).astype(jnp.int32)


def _along_last(number: jax.Array, ndim: int) -> jax.Array:
    return number.reshape((1,) * (ndim - 1) + number.shape)
