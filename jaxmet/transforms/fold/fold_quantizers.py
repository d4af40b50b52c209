r"""Grids through a fold: those of weights follow their gain, or quantize what is folded.

With scales $s_o$ per channel, $Q_s(W)\,g = Q_{s|g|}(W g)$: a weight that was trained on its
grid beside a norm stays on it when the norm's gain $g$ moves into it.
"""

import dataclasses
from collections.abc import Mapping

from jaxmet.numerics import xp
from jaxmet.numerics.xp import Array
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers


def pinned_weights(quantizers: Quantizers | None) -> set[str]:
    """The parameters whose quantizers do not follow them."""
    if quantizers is None:
        return set()
    return {n for n, q in quantizers.weights.items() if not (q.follows or q.product)}


def fold_quantizers(
    quantizers: Quantizers, gains: Mapping[str, Array], caller: str
) -> Quantizers:
    """The quantizers with every pinned weight scale multiplied by the gain that moved."""
    weights = dict(quantizers.weights)
    for name in sorted(pinned_weights(quantizers) & gains.keys()):
        weights[name] = _scaled(name, weights[name], gains[name], caller)
    return dataclasses.replace(quantizers, weights=weights)


def _scaled(name: str, quantizer: Quantizer, gain: Array, caller: str) -> Quantizer:
    scale, zero_point = quantizer.grid(None)
    fits = scale.ndim == gain.ndim and all(
        n in (1, m) for n, m in zip(gain.shape, scale.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"jaxmet.{caller}: the scale of {name!r} has shape {scale.shape} and the gain "
            f"that folds into it {gain.shape}, so no scale can follow it. Quantize with one "
            "scale per output channel (per_channel=True), train with simulate(…, fold=graph), "
            "or skip the norm with graph.without."
        )
    low, high = quantizer.ends
    zero_point = xp.where(gain < 0, low + high - zero_point, zero_point)
    zero_point = xp.zeros_like(scale) if quantizer.symmetric else zero_point
    # A gain of zero leaves only zeros to quantize, which any scale does.
    size = xp.where(gain == 0, 1.0, xp.abs(gain)).astype(scale.dtype)
    held = quantizer.holding(scale * size, zero_point)
    least = quantizer.least
    return held if least is None else dataclasses.replace(held, least=least * size)
