"""Draws docs/accuracy_against_bits.svg: test accuracy against the bits of the weights.

The demo's network and test images, weights quantized per tensor, activations to 8 bits.
Three ways to quantize: nearest rounding after folding; equalized with biases corrected;
equalized with AdaRound. Calibration uses the demo's separate calibration images.

    pip install '.[plot]' && python docs/accuracy_against_bits.py
"""

from pathlib import Path
from typing import Any

import altair as alt
import jax
import numpy as np

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network

BITS = (2, 3, 4, 5, 6, 8)
BATCH = 100
TARGET = Path(__file__).with_suffix(".svg")
WAYS = ("nearest rounding", "equalized + bias correction", "equalized + AdaRound")


def measure() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per way and bit-width, and the row of the float network."""
    calibration, images, labels = data.load()
    apply, trained, truth = Network().apply, data.weights(), np.asarray(labels)
    graph = jm.trace(apply, trained, images[:1])
    batches = jm.batched(calibration, batch_size=64)
    folded = jm.fold_batch_norm(trained, graph)
    equalized = jm.equalize(folded, graph, progress=False)

    @jax.jit
    def device(quantizers: jm.Quantizers, params: Any, images: Any) -> Any:
        # Weights come rounded, so that one compiled program serves every bit-width.
        return jm.simulate(apply, quantizers, weights=False)(params, images)

    def row(name: str, bits: int, params: Any, quantizers: jm.Quantizers) -> dict:
        rounded = jm.round_weights(params, quantizers)
        parts = [
            np.asarray(device(quantizers, rounded, images[i : i + BATCH]))
            for i in range(0, len(images), BATCH)
        ]
        right = np.concatenate(parts).argmax(-1) == truth
        accuracy = 100 * right.mean()
        half = 196 * right.std() / np.sqrt(len(right))  # binomial 95 % interval
        found = {"method": name, "bits": bits, "accuracy": accuracy}
        found |= {"low": accuracy - half, "high": accuracy + half}
        print(f"{name}, {bits} bits: {accuracy:.2f} ± {half:.2f}", flush=True)
        return found

    rows = []
    for bits in BITS:
        config = jm.QuantConfig(weight_bits=bits, per_channel=False)

        def ranges(params: Any, config: jm.QuantConfig = config, **kwargs: Any) -> Any:
            return jm.calibrate(
                params, graph, batches, config, progress=False, **kwargs
            )

        rows.append(row(WAYS[0], bits, folded, ranges(folded)))
        corrected = jm.correct_bias(
            equalized, graph, ranges(equalized), batches, progress=False
        )
        rows.append(row(WAYS[1], bits, corrected, ranges(corrected)))
        rounded, weights = jm.adaround(
            equalized, graph, ranges(equalized), batches, progress=False
        )
        rows.append(row(WAYS[2], bits, rounded, ranges(rounded, weights=weights)))
    return rows, row("float", 32, trained, jm.Quantizers())


def chart(rows: list[dict[str, Any]], reference: dict[str, Any]) -> alt.LayerChart:
    """Lines with 95 % intervals, and the float network as a dashed line."""
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("bits:Q", title="bits per weight", axis=alt.Axis(values=list(BITS))),
        color=alt.Color(
            "method:N", sort=WAYS, title=None, legend=alt.Legend(orient="bottom")
        ),
    )
    lines = base.mark_line(point=True).encode(
        y=alt.Y("accuracy:Q", title="test accuracy (%)").scale(domain=[0, 100])
    )
    intervals = base.mark_rule().encode(y="low:Q", y2="high:Q")
    floor = alt.Chart(alt.Data(values=[reference])).mark_rule(strokeDash=[4, 4])
    title = alt.TitleParams(
        "Fashion-MNIST, per-tensor weights, 8-bit activations",
        subtitle="dashed: the float network; bars: 95 % intervals",
    )
    return alt.layer(floor.encode(y="accuracy:Q"), intervals, lines).properties(
        width=520, height=280, title=title
    )


if __name__ == "__main__":
    chart(*measure()).save(TARGET)
