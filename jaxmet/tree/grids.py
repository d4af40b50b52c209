"""Grid ends and switches of quantizers as data, which a training step may change."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.grid import check_bits, ends_of_width
from jaxmet.tree.bias_scales import INT32_ENDS
from jaxmet.tree.checks import check_flags, is_concrete
from jaxmet.tree.globs import suggestion
from jaxmet.tree.quantizer import (
    Grid,
    Quantizer,
)
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers


class Grids(NamedTuple):
    """One `Grid` per quantizer, under the names of `Quantizers`."""

    weights: dict[str, Grid]
    activations: dict[str, Grid]


def grids(
    quantizers: Quantizers,
    *,
    weights: Any = True,
    activations: Any = True,
    weight_bits: Any = None,
    activation_bits: Any = None,
) -> Grids:
    """Grid ends and switches as a tree of data, to change without recompiling.

    `simulate(…, grids=…)` takes it. With other ends a quantizer covers the same real range
    in coarser or finer steps.

    `weights` and `activations` switch a kind on or off, `weight_bits` and `activation_bits`
    give all quantizers of a kind this width: 2 to 16, or 32 for no rounding, fractions rounded
    up. All of them may be traced numbers, so that any function of the training step (an
    optax schedule) drives them, or mappings that give some quantizers a number each, by name.
    An int32 bias keeps its width.

    Args:
        quantizers: the quantizers whose ends are returned.
        weights: a switch for weights: True (the default), False, a traced bool, or a mapping by
            name.
        activations: the same for activations; default True.
        weight_bits: a bit-width for weights, 2 to 16 or 32 for no rounding, a number, traced or
            not, or a mapping by name; default None: their own.
        activation_bits: the same for activations; default None.

    Returns:
        A pytree of the grid ends and switches, for `simulate(…, grids=…)`.

    Raises:
        ValueError: for a name that has no quantizer, a bit-width out of range, and what are no
            quantizers.

    >>> late = jm.grids(quantizers, activations=step >= 500)
    >>> apply = jm.simulate(model.apply, quantizers, grids=late)
    """
    check_are_quantizers(quantizers, "grids")

    for given, group in (
        (weights, quantizers.weights),
        (activations, quantizers.activations),
        (weight_bits, quantizers.weights),
        (activation_bits, quantizers.activations),
    ):
        unknown = given.keys() - group.keys() if isinstance(given, Mapping) else ()
        for name in sorted(unknown)[:1]:
            raise ValueError(
                f"jaxmet.grids: there is no quantizer {name!r}. {suggestion(name, group)}"
            )

    def of(name: str, given: Any, otherwise: Any) -> Any:
        return given.get(name, otherwise) if isinstance(given, Mapping) else given

    def grid(name: str, q: Quantizer, on: Any, bits: Any) -> Grid:
        on, bits = of(name, on, True), of(name, bits, None)
        if not (hasattr(on, "dtype") or isinstance(on, int | float)):
            check_flags("grids", **{f"the switch of {name!r}": on})
        known = isinstance(on, bool | int | float)
        on = bool(on) and q.active if known else jnp.logical_and(q.active, on)
        if q.product is not None or bits is None:
            ends = q.ends if q.product is None else INT32_ENDS
            return _grid(*ends, on)
        if not (hasattr(bits, "dtype") or isinstance(bits, float)):
            check_bits(bits, caller="grids")
        elif is_concrete(bits) and np.isnan(bits):
            raise ValueError(
                f"jaxmet.grids: the bits of {name!r} are {bits}. Give 2 to 16, or 32 for no "
                "rounding: does the schedule divide by zero?"
            )
        if isinstance(bits, int | float):
            width = math.ceil(min(max(bits, 2), 17))
            ends = ends_of_width(
                min(width, 16),
                signed=q.symmetric and q.signed,
                narrow=q.narrow,
            )
            return _grid(*ends, on if width <= 16 else False)
        width = jnp.ceil(jnp.asarray(bits, jnp.float32))
        ends = ends_of_width(
            jnp.clip(width, 2, 16).astype(jnp.int32),
            signed=q.symmetric and q.signed,
            narrow=q.narrow,
        )
        low, high = (end.astype(jnp.float32) for end in ends)
        return Grid(low, high, jnp.logical_and(on, width <= 16))

    return Grids(
        {n: grid(n, q, weights, weight_bits) for n, q in quantizers.weights.items()},
        {
            n: grid(n, q, activations, activation_bits)
            for n, q in quantizers.activations.items()
        },
    )


def _grid(low: float, high: float, on: Any) -> Grid:
    """A grid of known ends: numbers of the host, for which nothing is compiled."""
    on = np.bool_(on) if isinstance(on, bool) else on
    return jax.device_put(Grid(np.float32(low), np.float32(high), on))
