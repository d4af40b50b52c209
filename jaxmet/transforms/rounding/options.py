"""What the public calls are told, checked before any work."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmet.engine.compat import is_key
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.quantizers import Quantizers

METHODS = ("coordinate", "adam", "gram")
SCALES = ("given", "search", "refit")


def check_quantizers(quantizers: Any, caller: str) -> None:
    """Refuse what jm.calibrate did not make."""
    if not isinstance(quantizers, Quantizers):
        raise ValueError(
            f"jaxmet.{caller}: the quantizers are of type {type(quantizers).__name__}. "
            "Pass what jm.calibrate returned, after params and graph."
        )


def check_concrete(params: Any, caller: str) -> None:
    """Refuse traced trees: layers are looked at one after the other."""
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            f"jaxmet.{caller}: the parameters are traced. Call it outside of jax.jit: it "
            "compiles what it runs by itself."
        )


def check_word(caller: str, **words: tuple[Any, tuple[str, ...]]) -> None:
    """Refuse words that are not among those known."""
    for name, (value, known) in words.items():
        if value not in known:
            listed = ", ".join(map(repr, known))
            raise ValueError(
                f"jaxmet.{caller}: {name} is {value!r}. Use one of {listed}."
            )


def check_number(caller: str, **numbers: tuple[Any, float | int]) -> None:
    """Refuse what is no number, or below its least value."""
    for name, (value, least) in numbers.items():
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not value >= least:
            raise ValueError(
                f"jaxmet.{caller}: {name} is {value!r}. Give a number, {least:g} or more."
            )


def check_key(key: Any, caller: str) -> jax.Array:
    """A typed key of what may be a raw one."""
    if key is None:
        raise ValueError(
            f"jaxmet.{caller}: there is no key, and rows are drawn at random. Give "
            "key=jax.random.key(0)."
        )
    if hasattr(key, "dtype") and is_key(key):
        return key
    try:
        return jax.random.wrap_key_data(jnp.asarray(key))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"jaxmet.{caller}: the key is a {type(key).__name__}. Give "
            "key=jax.random.key(0)."
        ) from error
