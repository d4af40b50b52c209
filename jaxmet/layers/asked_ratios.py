"""What a user asks of each layer: one ratio for all, or one by name."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.eligibility import check_named
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.globs import suggestion


def asked_for(
    ratios: Any, layers: Mapping[str, str | None], graph: Graph, caller: str
) -> dict[str, float]:
    """The ratio of every layer that can have one and is asked for.

    `layers` says of each why it cannot, or None. Refused are ratios outside (0, 1], unknown
    names, and names, here or in `graph.only`, of layers that cannot.
    """
    by_name = isinstance(ratios, Mapping)
    asked = (
        dict(ratios) if by_name else {n: ratios for n, why in layers.items() if not why}
    )
    for name, ratio in asked.items() if by_name else [("", ratios)]:
        check_ratio(f"ratio of {name!r}" if name else "ratio", ratio, caller)
    named = set(asked) if by_name else set()
    for name in [*asked, *(graph.named & set(layers))]:
        if name not in layers:
            raise ValueError(
                f"jaxmet.{caller}: there is no selected layer {name!r}. "
                f"{suggestion(name, list(layers))}"
            )
        cure = "Leave it out." if name in named else ""
        check_named(
            name, layers[name], graph, caller, "be compressed", asked=named, cure=cure
        )
    return {name: float(ratio) for name, ratio in asked.items()}


def check_ratio(what: str, ratio: Any, caller: str) -> None:
    """Raise unless each ratio is a cost afterwards over the cost before."""
    number = isinstance(ratio, int | float | np.number) and not isinstance(ratio, bool)
    number |= isinstance(ratio, jax.Array) and ratio.ndim == 0 and is_concrete(ratio)
    if not number or not 0 < ratio <= 1:
        raise ValueError(
            f"jaxmet.{caller}: the {what} is {ratio!r}. It is the cost afterwards over the "
            "cost before: a plain number above 0 and up to 1."
        )
