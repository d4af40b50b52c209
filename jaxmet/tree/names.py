"""Names of parameters and nodes, and the globs that select them."""

import difflib
import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np

from jaxmet.tree.checks import is_concrete, shown
from jaxmet.tree.leaves import as_before, dense, flatten, is_quantized
from jaxmet.tree.paths import has_collections, path_name, path_parts


def parameter_names(params: Any, *, whole: bool = False) -> list[str]:
    """The name of every leaf, in the order of the leaves of `flatten`.

    A name is the path without the collection. Should two collections use one name, the
    trained parameter keeps it and the others say their collection; should two paths, a slash
    in a key is written '|'.
    """
    paths, _, _ = flatten(params, whole=whole)
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
    return dict(zip(parameter_names(params), flatten(params)[1], strict=True))


def replace_leaves(
    params: Any, leaves: Mapping[str, Any], *, caller: str = "replace_leaves"
) -> Any:
    """The same tree with the named leaves exchanged.

    NumPy arrays become JAX arrays, on the devices of those that they replace; one that several
    leaves hold becomes one.
    """
    old = named_leaves(params)
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
    return flatten(params)[2].unflatten((old | new).values())


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


def match(glob: str, name: str) -> bool:
    """Whether a glob means this name.

    `*`, `?` and `[...]` work as in a shell, but `*` crosses '/'. Without any of them
    the glob is a name, and means that name and everything below it: 'stem' means
    'stem', 'stem/kernel' and 'stem:0'.
    """
    if glob == name:
        return True
    if any(sign in glob for sign in "*?["):
        return fnmatch.fnmatchcase(name, glob)
    return name.startswith((f"{glob}/", f"{glob}:"))


def check_names(caller: str, what: str, names: Any) -> list[str]:
    """One name or several as a list; raise unless they are texts."""
    listed = [names] if isinstance(names, str) else names
    listed = listed if isinstance(listed, Sequence | Set) else [listed]
    for name in listed:
        if not isinstance(name, str):
            raise ValueError(
                f"jaxmet.{caller}: {what} is {shown(name)}. Give names as texts, such as "
                "'conv1' or 'block1*'."
            )
    return list(listed)


def select(
    globs: str | Sequence[str], names: Iterable[str], *, caller: str = "select"
) -> list[str]:
    """The names that any of the globs means, in their own order.

    A glob that matches nothing raises and lists the names nearest to it.
    """
    globs = check_names(caller, "a glob", globs)
    names = list(names)
    for glob in globs:
        if not any(match(glob, name) for name in names):
            raise ValueError(
                f"jaxmet.{caller}: nothing is called {glob!r}. "
                f"{suggestion(glob, names)}"
            )
    return [name for name in names if any(match(glob, name) for glob in globs)]


def suggestion(name: str, names: Collection[str]) -> str:
    """A sentence with the names nearest to one that was not found."""
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    if near:
        return f"The nearest names are {', '.join(map(repr, near))}."
    if not names:
        return "There is nothing to choose from."
    first = ", ".join(map(repr, list(names)[:5]))
    return f"Names look like {first}{', …' if len(names) > 5 else ''}."
