"""Plain arrays again: of the old shapes, or as small as what is left of them."""

from collections.abc import Callable
from typing import Any

import jax

from jaxmet.numerics.hadamard import rotated
from jaxmet.numerics.precision import wide
from jaxmet.tree.leaves import (
    dense,
    input_scale_of,
    input_signs_of,
    is_compressed,
    is_structured,
)
from jaxmet.tree.named_leaves import path_name
from jaxmet.tree.structures import LowRank, Pruned, multiplied, parts_of, scattered
from jaxmet.tree.types import P


def densify(params: P) -> P:
    """Plain arrays in place of compressed leaves, where arrays can say the same.

    Factors are multiplied, and what was pruned is zero again: the dense tree computes what
    the compressed one does, at the price of the model as it was. A weight that was multiplied by
    the scale of its inputs is divided by it.

    A leaf that states more than its weight raises ValueError: dropping the statement would
    change what the model computes.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.

    Returns:
        The same tree with plain arrays.

    Raises:
        ValueError: for a leaf that states more than its weight, such as bounds of a clip.

    >>> dense = jm.densify(jm.factorize(params, graph, ratios=0.5))
    """

    return _plain(params, "densify", _whole)


def rebuild(params: Any) -> Any:
    """The small arrays that are left, for a model that is built anew with fewer channels.

    In place of a pruned leaf stands the array of what was kept, in place of a factorized one
    a dict of its factors, `{"first": …, "second": …}`: the kernels of two layers, the second
    of which has the bias. Integers become the weights that they stand for. `jm.widths` says
    which parameters have become smaller, and to which shapes; a model with layers of these
    widths computes with `rebuild(params)` what `jm.lift(apply)` computes with `params`.

    A leaf that states more than its weight raises ValueError: dropping the statement would
    change what the model computes.

    Args:
        params: a tree of `jm.prune` or `jm.factorize`; not changed.

    Returns:
        The tree with plain arrays.

    Raises:
        ValueError: for a leaf that states more than its weight, such as bounds of a clip.

    >>> small = jm.rebuild(jm.prune(params, graph, 0.5))
    """
    return _plain(params, "rebuild", _left)


def _plain(params: Any, caller: str, of: Callable[..., Any]) -> Any:
    """Every leaf as `of(structure, plain parts)` makes it."""

    def plain(path: tuple[Any, ...], leaf: Any) -> Any:
        if not is_compressed(leaf):
            return leaf
        if more := sorted(
            set(leaf.stated()) - {"weight", "input_scale", "input_signs"}
        ):
            raise ValueError(
                f"jaxmet.{caller}: {path_name(path, params)!r} states "
                f"{' and '.join(more)}, which no plain array can hold. Keep the leaf "
                "and run the model through jm.lift(apply)."
            )
        if not is_structured(leaf):
            return _as_given(leaf)
        parts = {k: plain(path, part) for k, part in parts_of(leaf.weight).items()}
        return of(leaf.weight, parts)

    return jax.tree_util.tree_map_with_path(plain, params, is_leaf=is_compressed)


def _as_given(leaf: Any) -> Any:
    """The weight of inputs that nothing divides or rotates."""
    array, scale, signs = dense(leaf), input_scale_of(leaf), input_signs_of(leaf)
    dtype, found = array.dtype, array
    if signs is not None:
        found = found.astype(wide(dtype))
        found = rotated(found, signs.astype(found.dtype), inverse=True)
    if scale is not None:
        of = wide(dtype, scale.dtype)
        found = found.astype(of) / scale.astype(of)
    return found.astype(dtype)


def _whole(structure: LowRank | Pruned, parts: dict[str, Any]) -> Any:
    if isinstance(structure, LowRank):
        return multiplied(structure, **parts)
    return scattered(parts["part"], structure.keep)


def _left(structure: LowRank | Pruned, parts: dict[str, Any]) -> Any:
    return parts if isinstance(structure, LowRank) else parts["part"]
