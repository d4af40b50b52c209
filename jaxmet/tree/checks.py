"""Checks of arguments that public functions make before any work, in one wording."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmet.tree.leaves import dense


def check_flags(caller: str, **flags: Any) -> None:
    """Raise unless each argument is True or False: any other text would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(
                f"jaxmet.{caller}: {name} is {shown(value)}. Use True or False."
            )


def check_counts(
    caller: str, *, least: int = 1, optional: bool = False, **counts: Any
) -> None:
    """Raise unless each argument is an integer not below the least one, or None if `optional`."""
    none = ", or None" if optional else ""
    for name, value in counts.items():
        if optional and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"jaxmet.{caller}: {name} is {shown(value)}. Give a Python integer of "
                f"{least} or more{none}."
            )


def check_numbers(caller: str, **numbers: tuple[Any, float | int]) -> None:
    """Raise unless each argument is a number, and not below its least value."""
    for name, (value, least) in numbers.items():
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not value >= least:
            raise ValueError(
                f"jaxmet.{caller}: {name} is {shown(value)}. Give a number, {least:g} or "
                "more."
            )


def check_choices(caller: str, **choices: tuple[Any, Sequence[str]]) -> None:
    """Raise unless each argument is one of its known words."""
    for name, (value, known) in choices.items():
        if not isinstance(value, str) or value not in known:
            *others, last = map(repr, known)
            listed = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(
                f"jaxmet.{caller}: {name} is {shown(value)}. It is {listed}."
            )


def check_callable(caller: str, name: str, value: Any, cure: str) -> None:
    """Raise unless the argument is a function."""
    if not callable(value):
        raise ValueError(f"jaxmet.{caller}: {name} is {shown(value)}. {cure}")


def check_type(caller: str, name: str, value: Any, kind: type, cure: str) -> None:
    """Raise unless the argument is of this type."""
    if not isinstance(value, kind):
        raise ValueError(f"jaxmet.{caller}: {name} is {kind_of(value)}. {cure}")


def shown(value: Any) -> str:
    """A wrong argument in an error: itself where it is short, else its type."""
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if isinstance(value, str) and len(value) <= 40:
        return repr(value)
    return kind_of(value)


def kind_of(x: Any) -> str:
    """The type of an argument in an error, with the shape of an array or the keys of a dict."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{type(x).__name__} of shape {tuple(x.shape)}"
    if isinstance(x, Mapping):
        return f"of type {type(x).__name__} with {keys_of(x)}"
    return f"of type {type(x).__name__}" if not isinstance(x, str) else "a text"


def keys_of(batch: Mapping[Any, Any]) -> str:
    """The keys of a dict in an error, not more than ten of them."""
    keys = [repr(key) for key in batch]
    more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
    return f"the keys {', '.join(keys[:10])}{more}" if keys else "no keys"


def is_concrete(x: Any) -> bool:
    """Whether an array's values can be looked at: neither traced nor abstract."""
    return not isinstance(x, Tracer | jax.ShapeDtypeStruct)


def check_concrete(params: Any, caller: str) -> None:
    """Refuse traced trees where values have to be looked at."""
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            f"jaxmet.{caller}: the parameters are traced. Call it outside of jax.jit: it "
            "compiles what it runs by itself."
        )


def check_finite(leaves: Mapping[str, Any], caller: str) -> None:
    """Refuse NaN and infinity in concrete floating-point parameters, by name."""
    bad = []
    for name, leaf in leaves.items():
        array = dense(leaf)
        for part in jax.tree.leaves(array):
            if not hasattr(part, "dtype") or not is_concrete(part):
                continue
            inexact = jnp.issubdtype(part.dtype, jnp.inexact)
            if inexact and not tested("isfinite", part).all():
                bad.append(name)
    if bad:
        raise ValueError(
            f"jaxmet.{caller}: parameter {', '.join(map(repr, bad[:5]))} holds NaN or "
            "infinity. Find out which step made it, and pass the tree from before."
        )


def tested(test: str, x: Any) -> Any:
    """`'isfinite'` or `'isnan'` of each value of a concrete array."""
    # On the host nothing is compiled for each shape; what is spread over hosts stays there.
    if getattr(x, "is_fully_addressable", True):
        return getattr(np, test)(np.asarray(x))
    return getattr(jnp, test)(x)
