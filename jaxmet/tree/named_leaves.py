"""A tree as leaves by name, and back; how each of them is stored.

Everything that reads or replaces parameters goes through here, so that a tree is taken apart in
one way. A compressed leaf is one; of a structured leaf (`LowRank`, `Pruned`) each part is.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxmet.tree.checks import is_concrete
from jaxmet.tree.globs import suggestion
from jaxmet.tree.leaves import (
    as_before,
    dense,
    input_signs_of,
    is_compressed,
    is_quantized,
    is_stated,
    is_structured,
)
from jaxmet.tree.structures import PARTS


def flatten(
    params: Any, *, whole: bool = False
) -> tuple[list[tuple[Any, ...]], list[Any], Any]:
    """Paths, leaves and tree structure; of a structured leaf each part is one.

    With `whole` it counts as one itself.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=is_compressed if whole else is_stated
    )
    return [path for path, _ in pairs], [leaf for _, leaf in pairs], treedef


def parameter_names(params: Any, *, whole: bool = False) -> list[str]:
    """The name of every leaf, in the order of the leaves of `flatten`."""
    return _named(flatten(params, whole=whole)[0], params)


def _named(paths: list[tuple[Any, ...]], params: Any) -> list[str]:
    """The names of paths: without the collection.

    Should two collections use one name, the trained parameter keeps it and the others say their
    collection; should two paths, a slash in a key is written '|'.
    """
    names = [path_name(path, params) for path in paths]
    count = Counter(names)
    if has_collections(params):
        parts = [path_parts(path) for path in paths]
        names = [
            name if count[name] == 1 or part[0] == "params" else "/".join(part)
            for name, part in zip(names, parts, strict=True)
        ]
        count = Counter(names)
    names = [
        name if count[name] == 1 else path_name(path, params, slash="|")
        for name, path in zip(names, paths, strict=True)
    ]
    count = Counter(names)
    return [
        name if count[name] == 1 else jax.tree_util.keystr(path)
        for name, path in zip(names, paths, strict=True)
    ]


def named_leaves(params: Any) -> dict[str, Any]:
    """The leaves by name, a compressed leaf being one; in the order of the leaves."""
    paths, leaves, _ = flatten(params)
    return dict(zip(_named(paths, params), leaves, strict=True))


def replace_leaves(
    params: Any, leaves: Mapping[str, Any], *, caller: str = "replace_leaves"
) -> Any:
    """The same tree with the named leaves exchanged.

    NumPy arrays become JAX arrays, on the devices of those that they replace; one that several
    leaves hold becomes one.
    """
    paths, given, treedef = flatten(params)
    old = dict(zip(_named(paths, params), given, strict=True))
    for name in leaves:
        if name not in old:
            raise ValueError(
                f"jaxmet.{caller}: there is no parameter {name!r}. "
                f"{suggestion(name, old)}"
            )
    for name, leaf in leaves.items():
        if is_quantized(old[name]) and not is_quantized(leaf):
            raise ValueError(
                f"jaxmet.{caller}: {name!r} holds integers, which are no longer changed. Pass the "
                "tree that jm.quantize was given, and quantize last; jm.simulate runs "
                "integers with weights=False."
            )
    put: dict[Any, Any] = {}
    new = {name: _placed(leaf, old[name], put) for name, leaf in leaves.items()}
    return treedef.unflatten((old | new).values())


def _placed(leaf: Any, old: Any, put: dict[Any, Any]) -> Any:
    """A leaf on the devices of an old one; `put` are the arrays that are there already."""
    numbers = [isinstance(part, np.ndarray) for part in jax.tree.leaves(leaf)]
    if not any(numbers):
        return leaf

    array = dense(old)
    where = getattr(array, "sharding", None) if is_concrete(array) else None

    def placed(part: Any) -> Any:
        if not isinstance(part, np.ndarray):
            return part
        if (id(part), where) not in put:
            put[id(part), where] = as_before(part, array)
        return put[id(part), where]

    return jax.tree.map(placed, leaf)


# From the path of a leaf to its name


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


# How a tree stores its parameters: shapes, and what was factorized or removed

Form = tuple[Any, ...]


def stored_forms(params: Any) -> dict[str, Form]:
    """By parameter its shape, or its structure: kind, static fields and forms of parts."""
    paths, leaves, _ = flatten(params, whole=True)
    names = _named(paths, params)
    return {n: stored_form(leaf) for n, leaf in zip(names, leaves, strict=True)}


def stored_form(leaf: Any) -> Form:
    """The shape of a leaf, or the form of what it holds in place of plain rows."""
    weight = leaf.weight if is_compressed(leaf) else leaf
    if not is_structured(leaf):
        shape = tuple(getattr(weight, "shape", ()))
        return shape if input_signs_of(leaf) is None else ("Rotated", shape)
    fields = ((f.name, getattr(weight, f.name)) for f in dataclasses.fields(weight))
    return (
        type(weight).__name__,
        *(stored_form(x) if name in PARTS else x for name, x in fields),
    )


def is_structure(form: Form | None) -> bool:
    """Whether a form is that of a factorized, pruned or rotated parameter."""
    return bool(form) and isinstance(form[0], str)


def brief(form: Form | None) -> str:
    """A form in a message: a shape, or the kind of structure (its indices may be many)."""
    return form[0] if form and is_structure(form) else str(form)
