"""Data that lie in memory, cut into batches of one size."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from jaxmet.tree.checks import check_counts, kind_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Batched:
    """Data cut into batches of one size, and what was left over.

    The leaves of `full` have leading axes `[batches, batch]`, those of `rest` a shorter
    `[batch]`; either is None if there is nothing in it. Iterating yields the batches.
    """

    full: Any
    rest: Any = None

    def __len__(self) -> int:
        return _leading(self.full) + (self.rest is not None)

    def __repr__(self) -> str:
        parts = []
        if self.full is not None:
            number = _leading(self.full)
            several = "batch" if number == 1 else "batches"
            parts.append(f"{number} {several} of {_shown(self.full, 1)}")
        if self.rest is not None:
            parts.append(f"the last of {_shown(self.rest, 0)}")
        return f"Batched({', '.join(parts)})"

    def __iter__(self) -> Iterator[Any]:
        for i in range(_leading(self.full)):
            yield jax.tree.map(lambda x, i=i: x[i], self.full)
        if self.rest is not None:
            yield self.rest


jax.tree_util.register_dataclass(Batched, ["full", "rest"], [])


def batched(inputs: Any, batch_size: int = 32) -> Batched:
    """Data with a leading axis, as batches of `batch_size` and a shorter last one.

    `inputs` is an array or a tree of arrays with equally many rows; a tuple is the
    inputs of the model. Numpy arrays stay on the host.

    Args:
        inputs: an array, or a tree of arrays with equally many rows.
        batch_size: rows per batch; at least 1, default 32.

    Returns:
        The batches, which can be read any number of times.

    Raises:
        ValueError: for a `batch_size` that is no positive integer, and for arrays without rows
            or with different numbers of them.

    >>> batches = jm.batched(images, batch_size=64)
    """
    if hasattr(batch_size, "shape"):
        raise ValueError(
            f"jaxmet.batched: batch_size is {kind_of(batch_size)}, not an integer. "
            "Several inputs go into one tuple: jm.batched((x, y), batch_size=32)."
        )
    check_counts("batched", batch_size=batch_size)
    pairs = jax.tree_util.tree_leaves_with_path(inputs)
    if not pairs:
        raise ValueError("jaxmet.batched: there is no array. Give the data itself.")
    sizes = {f"inputs{jax.tree_util.keystr(p)}": _rows(x, p) for p, x in pairs}
    rows = next(iter(sizes.values()))
    for name, size in sizes.items():
        if size != rows:
            raise ValueError(
                f"jaxmet.batched: {name} has {size} rows and {next(iter(sizes))} has "
                f"{rows}. Give arrays with equally many rows."
            )
    if rows == 0:
        raise ValueError("jaxmet.batched: the arrays have no rows. Give some data.")
    batches = rows // batch_size
    kept = batches * batch_size
    full = rest = None
    if batches:
        full = jax.tree.map(
            lambda x: x[:kept].reshape(batches, batch_size, *x.shape[1:]), inputs
        )
    if kept < rows:
        rest = jax.tree.map(lambda x: x[kept:], inputs)
    return Batched(full, rest)


def _rows(x: Any, path: tuple[Any, ...]) -> int:
    name = f"inputs{jax.tree_util.keystr(path)}"
    if isinstance(x, jax.ShapeDtypeStruct) or not hasattr(x, "shape"):
        raise ValueError(
            f"jaxmet.batched: {name} is {kind_of(x)}. Give an array with its numbers."
        )
    if len(x.shape) == 0:
        raise ValueError(
            f"jaxmet.batched: {name} is a scalar. Its first axis must count the rows."
        )
    return x.shape[0]


def _leading(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return leaves[0].shape[0] if leaves else 0


def _shown(tree: Any, axes: int) -> str:
    """The shapes and dtypes of one batch, without the first so many axes."""

    def shape(x: Any) -> Any:
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            return _Word(type(x).__name__)
        return _Word(f"{x.dtype}[{', '.join(map(str, x.shape[axes:]))}]")

    return repr(jax.tree.map(shape, tree))


class _Word(str):
    """A text that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)
