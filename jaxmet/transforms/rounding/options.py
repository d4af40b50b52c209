"""What the public calls are told, checked before any work."""

from typing import Any, Literal, get_args

Method = Literal["coordinate", "adam", "gram"]
METHODS = get_args(Method)
Scales = Literal["given", "search", "refit"]
SCALES = get_args(Scales)


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
