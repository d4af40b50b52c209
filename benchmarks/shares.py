"""A compression turned until the network itself is within a share of its work."""

from collections.abc import Callable
from typing import Any

TURNS = 7


def within(
    share: float, make: Callable[[float], Any], work: Callable[[Any], float]
) -> float:
    """The largest setting, to a hundredth, at which `work(make(setting))` is within a share.

    `make` may raise ValueError for a setting that it cannot reach.
    """
    low, high, best = 0.0, 1.0, None
    for _ in range(TURNS):
        middle = (low + high) / 2
        try:
            good = work(make(middle)) <= share
        except ValueError:
            good = None
        if good:
            best = middle
        low, high = (low, middle) if good is False else (middle, high)
    if best is None:
        raise ValueError(f"{share} of the work cannot be reached")
    return best
