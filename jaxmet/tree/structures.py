"""Weights that are stored as something smaller than the array they stand for.

A structure is the `weight` of a `Compressed` leaf. Its parts are leaves themselves: plain
arrays, or `Compressed` leaves that state more. So a factor may be pruned, a kept part may
hold bounds, and every transform sees the parts as ordinary parameters.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Keep(NamedTuple):
    """Which entries of one axis are kept, of how many."""

    axis: int
    size: int
    indices: tuple[int, ...]


def whole_shape(shape: Sequence[int], keep: Sequence[Keep]) -> tuple[int, ...]:
    """The shape of an array of which this is left."""
    sizes = list(shape)
    for axis, size, _ in keep:
        sizes[axis] = size
    return tuple(sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    r"""Two factors in place of one weight: the product of `first` and then `second`.

    Both have the weight's axes in its order. The first reads the weight's inputs and makes
    channels along the last of `out_axes`, which the second reads along the last of
    `in_axes` (in a grouped convolution as many for each group). What a factor does not
    hold has size 1. Of a convolution `method` says which factor holds the window:
    'weight', all of it in the second; 'spatial', the first window axis in the first and
    the others in the second, as in $W_{yxio} = \sum_r A_{yir} B_{xro}$. `shape` is that
    of the weight.

    Jaderberg et al., [Speeding up Convolutional Neural Networks with Low Rank
    Expansions](https://arxiv.org/abs/1405.3866), BMVC 2014, for 'spatial'; Denton et al.,
    [Exploiting Linear Structure Within Convolutional
    Networks](https://arxiv.org/abs/1404.0736), NeurIPS 2014.

    Args:
        first: the factor that reads the weight's inputs.
        second: the factor that makes its outputs.
        method: 'weight' (the default) or 'spatial': which factor holds the window of a
            convolution.
        shape: the shape of the weight.
        in_axes: the axes of the weight that its inputs run along.
        out_axes: the axes that its outputs run along.

    >>> params = jm.factorize(params, graph, ranks={"head": 8})
    """

    first: Any
    second: Any
    method: str = "weight"
    shape: tuple[int, ...] = ()
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()

    @property
    def dtype(self) -> Any:
        return self.first.dtype

    @property
    def rank(self) -> int:
        """The number of channels between the factors, of one group."""
        return int(self.second.shape[self.in_axes[-1]])

    @property
    def window_axes(self) -> tuple[int, ...]:
        known = (*self.in_axes, *self.out_axes)
        return tuple(i for i in range(len(self.shape)) if i not in known)


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """What is left of a weight whose other entries along some axes are gone.

    The weight that it stands for has zeros there.

    Args:
        part: the entries that are left, an array with the axes of the weight.
        keep: for each axis with removed entries a tuple: the axis, its full size, the indices
            that are kept.

    >>> jm.Pruned(jnp.ones((2, 1)), keep=((1, 3, (0,)),)).shape
    (2, 3)
    """

    part: Any
    keep: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(Keep(*k) for k in self.keep))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape before anything was removed."""
        return whole_shape(self.part.shape, self.keep)

    @property
    def dtype(self) -> Any:
        return self.part.dtype


STRUCTURES = (LowRank, Pruned)
PARTS = {"first": "in", "second": "out", "part": None}
"""The fields that hold leaves, and what a leaf there is called beside its name."""

jax.tree_util.register_dataclass(
    LowRank, ["first", "second"], ["method", "shape", "in_axes", "out_axes"]
)
jax.tree_util.register_dataclass(Pruned, ["part"], ["keep"])


def parts_of(structure: Any) -> dict[str, Any]:
    """The leaves of a structure by field."""
    fields = (f.name for f in dataclasses.fields(structure) if f.name in PARTS)
    return {name: getattr(structure, name) for name in fields}


def multiplied(low_rank: LowRank, first: jax.Array, second: jax.Array) -> jax.Array:
    """The weight that two factors stand for."""
    window, ins, outs = low_rank.window_axes, low_rank.in_axes, low_rank.out_axes
    order = (*window, *ins, *outs)
    a, b = jnp.transpose(first, order), jnp.transpose(second, order)
    n, rank = len(window), low_rank.rank
    groups = first.shape[outs[-1]] // rank
    a = a.reshape(*a.shape[:n], -1, groups, rank)  # (window, ins, groups, rank)
    b = b.reshape(*b.shape[:n], rank, groups, -1)  # (window, rank, groups, outs)
    product = jnp.matmul(
        jnp.moveaxis(a, -2, n), jnp.moveaxis(b, -2, n), precision="highest"
    )
    product = jnp.moveaxis(product, n, -2)
    sizes = [low_rank.shape[i] for i in order]
    return jnp.transpose(
        product.reshape(sizes), [order.index(i) for i in range(len(order))]
    )


def scattered(part: jax.Array, keep: tuple[Keep, ...], fill: Any = 0) -> jax.Array:
    """An array with everything that was removed back in its place, as `fill`."""
    for axis, size, indices in keep:
        shape = list(part.shape)
        shape[axis] = size
        full = jnp.full(shape, fill, part.dtype)
        where = (*(slice(None),) * axis, np.asarray(indices, np.int32))
        part = full.at[where].set(part, unique_indices=True, indices_are_sorted=True)
    return part
