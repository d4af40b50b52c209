"""Matrices of many layers in two arrays, so that a program does not grow with the layers.

Large matrices are cut into square tiles, of small ones (those of a depthwise convolution)
every entry stands for itself. Inputs and outputs of all layers stand in one vector each. The
arrays are filled up to one of few sizes: networks of about one size share a program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmet.numerics import xp
from jaxmet.numerics.xp import Array

TILE = 64
FEW = 256  # entries, below which a tile would be nearly empty


class Places(NamedTuple):
    """Which inputs and outputs the rows and columns of tiles, and single entries, belong to.

    The last input and the last output belong to nothing.
    """

    rows: Int[Array, "tiles size"]
    columns: Int[Array, "tiles size"]
    entry_rows: Int[Array, " entries"]
    entry_columns: Int[Array, " entries"]


class Packed(NamedTuple):
    """The values of all matrices, at their places."""

    tiles: Float[Array, "tiles size size"]
    entries: Float[Array, " entries"]


def rounded_size(number: int) -> int:
    """The next of the sizes 8, 12, 16, 24, 32, 48, …, at least `number`.

    Args:
        number: a number of entries.

    Returns:
        The size.
    """
    size = 8
    while size < number:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def places_of(shapes: Sequence[tuple[int, ...]], ins: int, outs: int) -> Places:
    """Where the entries of matrices (groups, ins, outs) lie in all of them.

    Args:
        shapes: those of the matrices, layer by layer.
        ins: the length of the vector of all inputs, more than there are.
        outs: that of all outputs.

    Returns:
        The index arrays.
    """
    found: list[list[np.ndarray]] = [[], [], [], []]
    row = column = 0
    for groups, i, o in shapes:
        each = row + np.arange(groups * i).reshape(groups, i)
        every = column + np.arange(groups * o).reshape(groups, o)
        row, column = row + groups * i, column + groups * o
        if _is_small(i, o):
            full = groups, i, o
            found[2].append(np.broadcast_to(each[:, :, None], full).reshape(-1))
            found[3].append(np.broadcast_to(every[:, None], full).reshape(-1))
            continue
        each, every = (_cut(v, end - 1) for v, end in ((each, ins), (every, outs)))
        full = groups, each.shape[1], every.shape[1], TILE
        found[0].append(np.broadcast_to(each[:, :, None], full).reshape(-1, TILE))
        found[1].append(np.broadcast_to(every[:, None], full).reshape(-1, TILE))
    empty = [np.zeros((0, TILE), int)] * 2 + [np.zeros(0, int)] * 2
    joined = [np.concatenate([e, *v]) for e, v in zip(empty, found, strict=True)]
    ends = ins - 1, outs - 1, ins - 1, outs - 1
    return Places(*(_filled(v, end) for v, end in zip(joined, ends, strict=True)))


def pack(matrices: Sequence[Float[Array, "_ _ _"]], fill: float) -> Packed:
    """The values of matrices (groups, ins, outs), with `fill` at the places of nothing.

    Args:
        matrices: float arrays (groups, ins, outs) of one dtype, layer by layer.
        fill: the value where there is nothing, such as -inf for logarithms.

    Returns:
        The values as tiles, (tiles, 64, 64), and entries, each filled up to one of few sizes.
    """
    tiles, entries = [], []
    for matrix in matrices:
        _, i, o = matrix.shape
        if _is_small(i, o):
            entries.append(matrix.reshape(-1))
            continue
        sides = [(0, 0), *((0, -n % TILE) for n in (i, o))]
        cut = xp.pad(matrix, sides, constant_values=fill)
        cut = cut.reshape(-1, cut.shape[1] // TILE, TILE, cut.shape[2] // TILE, TILE)
        tiles.append(xp.swapaxes(cut, 2, 3).reshape(-1, TILE, TILE))
    dtype = matrices[0].dtype
    every = [np.zeros((0, TILE, TILE), dtype), *tiles], [np.zeros(0, dtype), *entries]
    return Packed(*(_filled(xp.concatenate(v), fill) for v in every))


def _is_small(ins: int, outs: int) -> bool:
    return ins * outs <= FEW or min(ins, outs) == 1


def _cut(numbers: np.ndarray, end: int) -> np.ndarray:
    """Numbers (groups, n) in pieces of a tile's size, (groups, pieces, size)."""
    sides = (0, 0), (0, -numbers.shape[1] % TILE)
    padded = np.pad(numbers, sides, constant_values=end)
    return padded.reshape(len(numbers), -1, TILE)


def _filled(x: Any, fill: float | int) -> Any:
    """Filled up along the first axis to one of few sizes."""
    sides = [(0, rounded_size(len(x)) - len(x))] + [(0, 0)] * (x.ndim - 1)
    return xp.pad(x, sides, constant_values=fill)


def moved(x: Packed, at: Places, ins: Array, outs: Array) -> Packed:
    """Each value plus what belongs to its input and to its output.

    Args:
        x: the values of all matrices, packed.
        at: which inputs and outputs the entries of `x` belong to.
        ins: what is added along the inputs, a float array (ins,).
        outs: what is added along the outputs, (outs,).

    Returns:
        The sums, packed in the same way.
    """
    tiles = x.tiles + ins[at.rows][:, :, None] + outs[at.columns][:, None]
    return Packed(tiles, x.entries + ins[at.entry_rows] + outs[at.entry_columns])


def largest_by_output(x: Packed, at: Places, ins: Array, outs: int) -> jax.Array:
    """For each output the largest value plus what belongs to its input.

    Args:
        x: the values of all matrices, packed.
        at: which inputs and outputs the entries of `x` belong to.
        ins: what is added along the inputs, a float array (ins,).
        outs: how many outputs there are, filled up.

    Returns:
        The largest sum of each output, (outs,).
    """
    tiles = jnp.max(x.tiles + ins[at.rows][:, :, None], axis=1)
    entries = x.entries + ins[at.entry_rows]
    return _scattered(tiles, entries, at.columns, at.entry_columns, outs)


def largest_by_input(x: Packed, at: Places, outs: Array, ins: int) -> jax.Array:
    """For each input the largest value plus what belongs to its output.

    Args:
        x: the values of all matrices, packed.
        at: which inputs and outputs the entries of `x` belong to.
        outs: what is added along the outputs, a float array (outs,).
        ins: how many inputs there are, filled up.

    Returns:
        The largest sum of each input, (ins,).
    """
    tiles = jnp.max(x.tiles + outs[at.columns][:, None], axis=2)
    entries = x.entries + outs[at.entry_columns]
    return _scattered(tiles, entries, at.rows, at.entry_rows, ins)


def _scattered(
    tiles: jax.Array, entries: jax.Array, places: Array, alone: Array, number: int
) -> jax.Array:
    found = jnp.full(number, -jnp.inf, tiles.dtype).at[places].max(tiles)
    return found.at[alone].max(entries)


def largest_by_layer(x: Packed, at: Places, output_layer: Array, n: int) -> jax.Array:
    """The largest value of each layer, zero for a layer without any.

    Args:
        x: the values of all matrices, packed.
        at: which inputs and outputs the entries of `x` belong to.
        output_layer: the number of the layer of each output, an integer array (outs,).
        n: how many layers there are, filled up.

    Returns:
        The largest value of each layer, (n,).
    """
    tiles = jnp.max(x.tiles, axis=(1, 2))
    found = jnp.full(n, -jnp.inf, tiles.dtype)
    found = found.at[output_layer[at.columns[:, 0]]].max(tiles)
    found = found.at[output_layer[at.entry_columns]].max(x.entries)
    return jnp.where(jnp.isfinite(found), found, 0.0)


def total_by_output(x: Packed, at: Places, ins: Array, outs: int) -> jax.Array:
    """For each output the sum of the values times what belongs to their inputs.

    Args:
        x: the values of all matrices, packed.
        at: which inputs and outputs the entries of `x` belong to.
        ins: what the values are multiplied by along the inputs, a float array (ins,).
        outs: how many outputs there are, filled up.

    Returns:
        The sum of each output, (outs,).
    """
    tiles = jnp.einsum("tio,ti->to", x.tiles, ins[at.rows], precision="highest")
    found = jnp.zeros(outs, tiles.dtype).at[at.columns].add(tiles)
    return found.at[at.entry_columns].add(x.entries * ins[at.entry_rows])
