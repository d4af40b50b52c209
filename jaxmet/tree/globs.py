"""Globs that select names, and the names nearest to one that was not found."""

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence, Set
from typing import Any

from jaxmet.tree.checks import shown


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
