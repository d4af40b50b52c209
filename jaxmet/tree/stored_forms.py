"""How a tree stores its parameters: shapes, and what was factorized or removed."""

import dataclasses
from typing import Any

from jaxmet.tree.leaves import flatten, is_compressed, is_structured
from jaxmet.tree.names import parameter_names
from jaxmet.tree.structures import PARTS

Form = tuple[Any, ...]


def stored_forms(params: Any) -> dict[str, Form]:
    """By parameter its shape, or its structure: kind, static fields and forms of parts."""
    leaves = flatten(params, whole=True)[1]
    names = parameter_names(params, whole=True)
    return {n: stored_form(leaf) for n, leaf in zip(names, leaves, strict=True)}


def stored_form(leaf: Any) -> Form:
    """The shape of a leaf, or the form of the structure that it holds."""
    weight = leaf.weight if is_compressed(leaf) else leaf
    if not is_structured(leaf):
        return tuple(getattr(weight, "shape", ()))
    fields = ((f.name, getattr(weight, f.name)) for f in dataclasses.fields(weight))
    return (
        type(weight).__name__,
        *(stored_form(x) if name in PARTS else x for name, x in fields),
    )


def is_structure(form: Form | None) -> bool:
    """Whether a form is that of a factorized or pruned parameter."""
    return bool(form) and isinstance(form[0], str)


def brief(form: Form | None) -> str:
    """A form in a message: a shape, or the kind of structure (its indices may be many)."""
    return form[0] if form and is_structure(form) else str(form)
