"""The first lines of a report: how good the result is, what costs most, what to try next."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmet.analysis.compare import worst_nodes
from jaxmet.analysis.costliest import Costly, costliest
from jaxmet.plot.tables import number
from jaxmet.tree.named_leaves import named_leaves
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table

Link = Callable[[str], str | None]
"""The address of a section of the page by its kind, where it has one."""


def verdict(
    params: Any,
    quantizers: Quantizers | None,
    scores: Mapping[str, Any],
    noise: Table | None,
    compare: Table | None,
    link: Link,
) -> str:
    """The figures side by side, then what costs most and the next thing to try, as HTML."""
    shown = dict(scores)
    if noise is not None and len(noise):
        shown["dB, SQNR of the outputs as jm.noise predicts it"] = noise["SQNR (dB)"][
            -1
        ]
    if quantizers is not None:
        shown |= _bits(quantizers)
        shown["times the bytes of the float parameters"] = size_over_float(
            params, quantizers
        )
    parts = [figures(shown)] if shown else []
    if noise is not None and len(noise) > 1:
        parts.append(_by_noise(costliest(noise), link))
    elif compare is not None and len(compare):
        parts.append(_by_own_error(compare, link))
    if quantizers is not None and noise is None:
        parts.append(
            "<p>Next: <code>jm.noise(params, graph, quantizers, batches)</code> predicts what more "
            "bits would give each quantizer; give its table in <code>tables=</code>.</p>"
        )
    return "".join(parts)


def figures(scores: Mapping[str, Any]) -> str:
    """Numbers side by side, large."""
    cells = []
    for name, value in scores.items():
        found = number(value)
        text = str(value) if found is None else f"{found:.4g}"
        cells.append(
            f'<div class="figure"><b>{html.escape(text)}</b>{html.escape(str(name))}</div>'
        )
    return f'<div class="figures">{"".join(cells)}</div>'


def size_over_float(params: Any, quantizers: Quantizers) -> float:
    """The bytes of the parameters, each weight with the bits of its quantizer, over those of float.

    Scales are not counted; a tree that holds integers already counts what these stand for.
    """
    before = after = 0.0
    for name, leaf in named_leaves(params).items():
        arrays = [a for a in jax.tree.leaves(leaf) if hasattr(a, "dtype")]
        size = sum(np.size(a) * a.dtype.itemsize for a in arrays)
        quantizer = quantizers.weights.get(name)
        width = 8 * max((a.dtype.itemsize for a in arrays), default=4)
        bits = width
        if quantizer is not None and quantizer.enabled:
            bits = quantizer.bits
        before, after = before + size, after + size * min(bits, width) / width
    return after / before if before else 1.0


def _bits(quantizers: Quantizers) -> dict[str, str]:
    groups = {
        "bits of weights": [
            q.bits for q in quantizers.weights.values() if q.product is None
        ],
        "bits of activations": [q.bits for q in quantizers.activations.values()],
    }
    return {
        name: ", ".join(map(str, sorted(set(bits)))) if bits else "float"
        for name, bits in groups.items()
    }


def _by_noise(worst: Sequence[Costly], link: Link) -> str:
    """The three largest shares of the noise, and the largest gain."""
    items = []
    for one in worst:
        line = f"{one.kind} {one.tensor}: {100 * one.share:.0f} % of the noise"
        if one.wider is not None:
            line += f"; {one.wider} bits on it: predicted {one.gain:+.1f} dB"
        items.append(f"<li>{_linked(line, link('noise'))}</li>")
    best = max(worst, key=lambda one: one.gain)
    text = "What costs most, by the noise that reaches the outputs:"
    parts = [f"<p>{text}</p><ol>{''.join(items)}</ol>"]
    if best.rule is not None and best.gain > 0:
        rule = html.escape(f"rules=[{best.rule}]")
        parts.append(
            f"<p>Next: <code>{rule}</code>, predicted {best.gain:+.1f} dB.</p>"
        )
    return "".join(parts)


def _by_own_error(compare: Table, link: Link) -> str:
    items = [
        f"<li>{_linked(f'{node}: own error {ratio:.1f} dB below its signal', link('compare'))}</li>"
        for node, ratio in worst_nodes(compare)
    ]
    return (
        f"<p>Where most error enters, relative to the signal:</p><ol>{''.join(items)}</ol>"
        if items
        else ""
    )


def _linked(text: str, address: str | None) -> str:
    text = html.escape(text)
    return text if address is None else f'<a href="{address}">{text}</a>'
