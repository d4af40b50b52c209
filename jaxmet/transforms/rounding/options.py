"""Options of the public calls and of methods, checked before any work."""

from typing import Any, get_args


def check_word(caller: str, **words: tuple[Any, Any]) -> None:
    """Raise unless each word is one of its `Literal`."""
    for name, (value, known) in words.items():
        if value not in get_args(known):
            listed = ", ".join(map(repr, get_args(known)))
            raise ValueError(
                f"jaxmet.{caller}: {name} is {value!r}. Use one of {listed}."
            )


def check_number(
    caller: str, *, whole: bool = False, **numbers: tuple[Any, float | int]
) -> None:
    """Raise unless each is a number, not below its least value."""
    kinds = (int,) if whole else (int, float)
    for name, (value, least) in numbers.items():
        good = isinstance(value, kinds) and not isinstance(value, bool)
        if not good or not value >= least:
            what = "whole number" if whole else "number"
            raise ValueError(
                f"jaxmet.{caller}: {name} is {value!r}. Give a {what}, {least:g} or more."
            )
