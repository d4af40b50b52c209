"""The nodes of a model and those of the same model with factorized layers, by name."""

import re
from collections.abc import Collection, Iterator


def same_nodes(name: str, known: Collection[str]) -> set[str]:
    """The node of another tree that a node is part of, or those that are its parts.

    They differ by the factors of layers: `stem/in` and `stem/out` of one are `stem` of the
    other, and `stem/out/relu` is `stem/relu`.
    """
    within = next((n for n in _without_factors(name) if n in known), None)
    if within is not None:
        return {within}
    return {n for n in known if name in _without_factors(n)}


def _without_factors(name: str) -> Iterator[str]:
    """A name, the same without its last `/in` or `/out`, without the one before, …"""
    yield name
    while (found := re.match(r"(.+)(?:/in|/out)((?:[/:].*)?)$", name)) is not None:
        name = "".join(found.groups())
        yield name
