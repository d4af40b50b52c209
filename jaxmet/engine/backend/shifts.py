"""Convolutions with few inputs to an output, as sums of shifted inputs times a number.

Three ways to say one sum, since each derivative wants another: a gradient is the transpose,
and the transpose of a slice is a padded array for every term.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

Params = dict[str, Any]


class Sum(NamedTuple):
    """What is static about such a convolution of (batch, *space, channels)."""

    inputs: int
    channels: int
    strides: tuple[int, ...]
    reach: tuple[int, ...]  # from the first place of the window to the last
    places: list[tuple[int, ...]]

    def size(self, x: Any) -> list[int]:
        """The spatial sizes of the output for a padded input."""
        sides = zip(x.shape[1:-1], self.reach, self.strides, strict=True)
        return [(n - r - 1) // s + 1 for n, r, s in sides]

    def term(self, x: Any, tap: Any) -> Any:
        """The input times the numbers of one place, `tap` of (inputs, channels)."""
        total = None
        scales = [tap] if self.inputs == 1 else lax.split(tap, (1,) * self.inputs)
        for i, scale in enumerate(scales):
            part = _spread(x, i, self.inputs, self.channels)
            axes = (0, x.ndim - 1)
            one = lax.mul(part, lax.broadcast_in_dim(scale, part.shape, axes))
            total = one if total is None else lax.add(total, one)
        return total


def shift_and_multiply(p: Params, x: Any, kernel: Any) -> Any:
    """All terms at once. Each group reads its own input channels."""
    x, (taps, how) = opened(p, x), _read(p, kernel)
    size, total = how.size(x), None
    for start, tap in zip(how.places, lax.split(taps, (1,) * len(taps)), strict=True):
        shifted = window(x, start, size, how.strides)
        one = how.term(shifted, lax.squeeze(tap, (0,)))
        total = one if total is None else lax.add(total, one)
    return closed(p, total)


def place_by_place(p: Params, x: Any, kernel: Any) -> Any:
    """One place of the window after the other, for the gradient of the kernel.

    It is a sum over the whole input for each place, and all at once they would keep a copy
    of the input each.
    """
    x, (taps, how) = opened(p, x), _read(p, kernel)
    size = how.size(x)

    @jax.checkpoint
    def turn(total: Any, one: tuple[Any, Any]) -> tuple[Any, None]:
        tap, start = one
        span = [(n - 1) * s + 1 for n, s in zip(size, how.strides, strict=True)]
        sizes = (x.shape[0], *span, x.shape[-1])
        shifted = lax.dynamic_slice(x, (0, *start, 0), sizes)
        shifted = window(shifted, [0] * len(size), size, how.strides)
        return lax.add(total, how.term(shifted, tap)), None

    nothing = lax.full((x.shape[0], *size, how.channels), 0, x.dtype)
    return closed(p, lax.scan(turn, nothing, (taps, np.array(how.places)))[0])


def multiply_and_shift(p: Params, x: Any, kernel: Any) -> Any:
    """Shifted after the products, for the gradient of the input.

    Its transpose pads once and is a sum of slices.
    """
    x, (taps, how) = opened({**p, "padding": ()}, x), _read(p, kernel)
    zero, total = np.zeros((), x.dtype), None

    def padded(y: Any, sides: list[tuple[int, int, int]]) -> Any:
        return lax.pad(y, zero, [(0, 0, 0), *sides, (0, 0, 0)])

    for start, tap in zip(how.places, lax.split(taps, (1,) * len(taps)), strict=True):
        sides = [(r - b, b, 0) for r, b in zip(how.reach, start, strict=True)]
        one = padded(how.term(x, lax.squeeze(tap, (0,))), sides)
        total = one if total is None else lax.add(total, one)
    ends = [
        (int(low) - r, int(high) - r, 0)
        for r, (low, high) in zip(how.reach, p["padding"], strict=True)
    ]
    total = padded(total, ends)
    size = [-(-n // s) for n, s in zip(total.shape[1:-1], how.strides, strict=True)]
    return closed(p, window(total, [0] * len(size), size, how.strides))


def _read(p: Params, kernel: Any) -> tuple[Any, Sum]:
    """The kernel as (places, inputs, channels), and what is static."""
    spec = p["dimension_numbers"].rhs_spec
    taps = lax.transpose(kernel, (*spec[2:], spec[1], spec[0]))
    *size, inputs, channels = taps.shape
    taps = lax.reshape(taps, (math.prod(size), inputs, channels))
    sides = list(zip(size, p["rhs_dilation"], strict=True))
    places = list(itertools.product(*(range(0, k * d, d) for k, d in sides)))
    reach = tuple((k - 1) * d for k, d in sides)
    return taps, Sum(inputs, channels, tuple(p["window_strides"]), reach, places)


def opened(p: Params, x: Any) -> Any:
    """The input with its channels last and padded."""
    batch, channels, *space = p["dimension_numbers"].lhs_spec
    x = lax.transpose(x, (batch, *space, channels))
    if not any(side for pair in p["padding"] for side in pair):
        return x
    sides = [(low, high, 0) for low, high in p["padding"]]
    return lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])


def closed(p: Params, y: Any) -> Any:
    """The output with its axes where the convolution puts them."""
    batch, channels, *space = p["dimension_numbers"].out_spec
    return lax.transpose(y, np.argsort((batch, *space, channels)))


def window(
    x: Any, start: Sequence[int], size: Sequence[int], strides: Sequence[int]
) -> Any:
    """`size` entries of each spatial axis from `start` on, `strides` apart."""
    places = zip(start, size, strides, strict=True)
    stop = [b + (n - 1) * s + 1 for b, n, s in places]
    stop = (x.shape[0], *stop, x.shape[-1])
    return lax.slice(x, (0, *start, 0), stop, (1, *strides, 1))


def _spread(x: Any, i: int, inputs: int, channels: int) -> Any:
    """Input channel `i` of every group, once for each output channel of the group."""
    if inputs > 1:
        x = lax.slice_in_dim(x, i, None, inputs, axis=-1)
    groups = x.shape[-1]
    if groups == channels:
        return x
    if groups == 1:
        return lax.broadcast_in_dim(x, (*x.shape[:-1], channels), range(x.ndim))
    wide = (*x.shape, channels // groups)
    wide = lax.broadcast_in_dim(x, wide, range(x.ndim))
    return lax.reshape(wide, (*x.shape[:-1], channels))
