"""From the path of a leaf to its name."""

from collections.abc import Mapping
from typing import Any

from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxmet.tree.structures import PARTS


def path_parts(path: tuple[Any, ...]) -> list[str]:
    """One text a key, without the `value` that an nnx variable adds to its path.

    That key is told by its type (an attribute after a dictionary key), so a parameter
    that is itself called 'value' keeps its name. The factors of a leaf 'stem/kernel' are
    'stem/in/kernel' and 'stem/out/kernel'.
    """
    factors: list[str] = []
    while len(path) > 2 and path[-2] == _WEIGHT and (part := _part(path[-1])) in PARTS:
        path, factor = path[:-2], PARTS[part]
        factors[:0] = [factor] if factor is not None else []
    parts = _own_parts(path)
    where = max(len(parts) - 1, 1)
    return [*parts[:where], *factors, *parts[where:]]


_WEIGHT = GetAttrKey("weight")


def _own_parts(path: tuple[Any, ...]) -> list[str]:
    if len(path) > 1 and path[-1] == GetAttrKey("value"):
        path = path[:-1] if isinstance(path[-2], DictKey) else path
    return [_part(key) for key in path]


def path_name(path: tuple[Any, ...], params: Any, *, slash: str = "/") -> str:
    """The name of the leaf of `params` at `path`: no collection, joined by '/'.

    `slash` is what one inside a key becomes.
    """
    parts = [part.replace("/", slash) for part in path_parts(path)]
    if has_collections(params):
        parts = parts[1:] or parts
    return "/".join(parts) or "params"


def has_collections(params: Any) -> bool:
    """Whether the first key of every path names a collection."""
    return isinstance(params, Mapping) and "params" in params


def _part(key: Any) -> str:
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
        case GetAttrKey():
            return key.name
    return str(key)
