"""What a layer reads as rows, which its matrices (`layers.layer`) multiply."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.flow.token_mask_rules import LostError, windowed
from jaxmet.engine.graph.node import Convolution, Dot, Node
from jaxmet.numerics.drawn_order import drawn_order

ROWS = 65_536


def most_rows(rows: int | None, ins: int, each: int) -> int:
    """How many rows of a layer with `ins` inputs are looked at: `rows`, if given.

    Otherwise `each` of them for each input: rows of neighbouring positions are alike, so for
    few inputs few say all there is, and more cost time (of a depthwise layer most of all).
    """
    return min(ROWS, each * ins) if rows is None else rows


def rows_of(
    node: Node,
    x: jax.Array,
    kernel_shape: tuple[int, ...],
    *,
    offset: Any = None,
    most: int | None = None,
    seed: Any = None,
) -> jax.Array:
    """What a product reads, (groups, rows, ins).

    With `most`, at most so many rows are drawn by `seed`, of a convolution the same positions
    of all examples and one at least; `offset` is what its padding holds instead of zero. The
    columns have the order of `matrix_of`.
    """
    return counted_rows(node, x, kernel_shape, offset=offset, most=most, seed=seed)[0]


def counted_rows(
    node: Node,
    x: jax.Array,
    kernel_shape: tuple[int, ...],
    *,
    where: jax.Array | None = None,
    offset: Any = None,
    most: int | None = None,
    seed: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Rows, with zeros in those that do not count, and which of them count, (rows,).

    `where`, of the rank of x, says where its values count. Rows that count are drawn first.
    """
    if node.convolution is not None:
        rows, own = _windows(
            node.convolution, x, kernel_shape, offset, most, seed, where
        )
    else:
        assert node.dot is not None
        rows, own = _dot_rows(node.dot, x), _dot_counts(node.dot, x.shape, where)
        if most is not None and rows.shape[1] > most:
            drawn = drawn_order(seed, rows.shape[1], own)[:most]
            rows = jnp.take(rows, drawn, axis=1)
            own = None if own is None else jnp.take(own, drawn)
    if own is not None:
        rows = jnp.where(own[:, None], rows, jnp.zeros((), rows.dtype))
    return rows, own


def _dot_rows(dot: Dot, x: jax.Array) -> jax.Array:
    batched, summed = [d for d, _ in dot.batched], [d for d, _ in dot.summed]
    free = [i for i in range(x.ndim) if i not in (*batched, *summed)]
    groups = math.prod(x.shape[i] for i in batched)
    ins = math.prod(x.shape[i] for i in summed)
    x = jnp.transpose(x, (*batched, *free, *summed))
    return x.reshape(groups, -1, ins)


def _dot_counts(
    dot: Dot, shape: tuple[int, ...], where: jax.Array | None
) -> jax.Array | None:
    """A row counts where any of what it holds does."""
    if where is None:
        return None
    meets = [d for d, _ in (*dot.summed, *dot.batched)]
    sizes = [n for i, n in enumerate(shape) if i not in meets]
    return jnp.broadcast_to(jnp.any(where, axis=meets), sizes).reshape(-1)


def _window_counts(
    conv: Convolution,
    where: jax.Array | None,
    sizes: tuple[int, ...],
    spans: list[int],
    counts: list[int],
) -> jax.Array | None:
    """Which windows count, (examples, positions); `sizes` are examples and window."""
    if where is None:
        return None
    batch, channels, *window = conv.input_axes
    where = jnp.any(jnp.transpose(where, (batch, *window, channels)), axis=-1)
    one = [1] * len(window)
    if any(n != 1 for n in where.shape[1:]) and [*conv.input_dilation] != one:
        return None  # its result has no mask either, and the node says so
    strides, padding = (1, *conv.strides), ((0, 0), *conv.padding)
    outs = (sizes[0], *counts)
    try:
        found = windowed(where, sizes, [1, *spans], strides, padding, outs)
    except LostError:
        return None
    return jnp.broadcast_to(found, outs).reshape(sizes[0], -1)


def _windows(
    conv: Convolution,
    x: jax.Array,
    kernel_shape: tuple[int, ...],
    offset: Any,
    most: int | None,
    seed: Any,
    where: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    examples = tuple(x.shape[i] for i in (conv.input_axes[0], *conv.input_axes[2:]))
    x = jnp.transpose(x, (conv.input_axes[0], *conv.input_axes[2:], conv.input_axes[1]))
    if offset is not None:
        offset = jnp.reshape(offset, (1,) * (x.ndim - 1) + (-1,)).astype(x.dtype)
        x = x - offset
    pads = zip(conv.padding, conv.input_dilation, strict=True)
    widths = [(0, 0, 0), *((low, high, d - 1) for (low, high), d in pads), (0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), widths)
    if offset is not None:
        x = x + offset
    window = [kernel_shape[i] for i in conv.kernel_axes[2:]]
    steps = list(zip(window, conv.kernel_dilation, conv.strides, strict=True))
    spans = [(n - 1) * d + 1 for n, d, _ in steps]
    counts = [
        max(0, (size - span) // s + 1)
        for size, span, (_, _, s) in zip(x.shape[1:-1], spans, steps, strict=True)
    ]
    total, channels = math.prod(counts), x.shape[-1]
    own = _window_counts(conv, where, examples, spans, counts)
    most = total if most is None else max(1, most // max(1, examples[0]))
    if most < total:
        first = None if own is None else jnp.any(own, axis=0)
        drawn = drawn_order(seed, total, first)[:most]
        own = None if own is None else jnp.take(own, drawn, axis=1)
        places = _places(conv, counts, drawn, x.shape[1:-1])
        flat = x.reshape(x.shape[0], -1, channels)
        taps = [
            jnp.take(flat, places + _shift(conv, tap, x.shape[1:-1]), axis=1)
            for tap in np.ndindex(*window)
        ]
    else:
        taps = [_shifted(conv, x, tap, counts) for tap in np.ndindex(*window)]
    stacked = jnp.stack(taps, axis=2)  # examples, positions, taps, channels
    split = (*stacked.shape[:3], conv.groups, channels // conv.groups)
    stacked = jnp.transpose(stacked.reshape(split), (3, 0, 1, 2, 4))
    rows = stacked.reshape(conv.groups, -1, math.prod(window) * split[-1])
    return rows, None if own is None else own.reshape(-1)


def _shifted(
    conv: Convolution, x: jax.Array, tap: tuple[int, ...], counts: list[int]
) -> jax.Array:
    """What one weight of the window meets at all positions."""
    starts = [t * d for t, d in zip(tap, conv.kernel_dilation, strict=True)]
    each = zip(starts, counts, conv.strides, strict=True)
    limits = [first + (n - 1) * s + 1 for first, n, s in each]
    taken = lax.slice(
        x,
        (0, *starts, 0),
        (x.shape[0], *limits, x.shape[-1]),
        (1, *conv.strides, 1),
    )
    return taken.reshape(x.shape[0], -1, x.shape[-1])


def _places(
    conv: Convolution, counts: list[int], drawn: jax.Array, sizes: tuple[int, ...]
) -> jax.Array:
    """Where the windows of output positions begin, in the flattened padded input."""
    where = jnp.zeros_like(drawn)
    along = jnp.unravel_index(drawn, counts)
    for index, stride, size in zip(along, conv.strides, sizes, strict=True):
        where = where * size + index * stride
    return where


def _shift(conv: Convolution, tap: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    moved = 0
    for t, d, size in zip(tap, conv.kernel_dilation, sizes, strict=True):
        moved = moved * size + t * d
    return moved
