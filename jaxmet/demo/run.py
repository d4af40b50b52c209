"""The main job on the packaged network: what quantization costs, and what wins it back."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import jaxmet as jm
from jaxmet.demo import data as packaged
from jaxmet.demo.network import Network

BATCH = 100
SCORED = 128  # images a score of the compression
REPORT = Path("jaxmet-report.html")
REPORTED = "W8A8 per tensor, fold + equalize + correct"


class Variant(NamedTuple):
    """A tree, and how it is calibrated: `weights` keep the quantizers that were found for it."""

    name: str
    params: Any
    config: jm.QuantConfig
    data: Any
    weights: jm.Quantizers | None = None


def run(*, progress: bool = True, report: Path | None = None) -> jm.Table:
    """Quantize the demo's network in several ways and measure each on the test images.

    One row a variant: test accuracy in percent, the half-width of its 95 % interval
    (binomial, 1.96 √(p(1−p)/n)), the paired difference to float with its interval, and the
    signal-to-noise ratio of the logits in dB. With `report`, a path, the page of one of the
    variants is written there.
    """
    calibration, images, labels = packaged.load()
    apply, trained = Network().apply, packaged.weights()
    graph = jm.trace(apply, trained, images[:1])
    batches = jm.batched(calibration, batch_size=64)
    folded = jm.fold_batch_norm(trained, graph)
    equalized = jm.equalize(folded, graph, progress=progress)

    variants = _variants(graph, folded, equalized, batches, progress=progress)
    bar = tqdm(total=len(variants) + 2, desc="variants", disable=not progress)

    @jax.jit
    def device(quantizers: jm.Quantizers, params: Any, images: Any) -> Any:
        return jm.simulate(apply, quantizers, weights=False)(params, images)

    float_logits = _logits(device, jm.Quantizers(), trained, images)
    rows = [_row("float", float_logits, float_logits, labels)]
    bar.update()
    for name, params, config, data, weights in variants:
        quantizers = jm.calibrate(
            params, graph, data, config, weights=weights, progress=False
        )
        coarse = jm.round_weights(params, quantizers)
        logits = _logits(device, quantizers, coarse, images)
        rows.append(_row(name, logits, float_logits, labels))
        bar.update()
        if name == REPORTED and report is not None:
            scores = {r["variant"]: r["accuracy (%)"] for r in (rows[0], rows[-1])}
            noise = jm.noise(params, graph, quantizers, batches, progress=False)
            jm.report(
                report,
                params,
                graph,
                quantizers=quantizers,
                batch=calibration[:BATCH],
                before=folded,
                tables=[noise],
                scores=scores,
                title="jaxmet on Fashion-MNIST",
            )
    small = _halved(folded, graph, calibration, batches, progress=progress)
    logits = _logits(device, jm.Quantizers(), small, images)
    rows.append(_row("50 % MACs in float, fold + prune", logits, float_logits, labels))
    bar.update()
    bar.close()
    return jm.Table(
        {key: [row[key] for row in rows] for key in rows[0]},
        title=f"Fashion-MNIST, {len(labels)} test images, 95 % intervals",
    )


def _variants(
    graph: jm.Graph, folded: Any, equalized: Any, batches: Any, *, progress: bool
) -> list[Variant]:
    tensor, four = jm.QuantConfig(per_channel=False), jm.QuantConfig(weight_bits=4)
    four_per_tensor = jm.QuantConfig(weight_bits=4, per_channel=False)

    def corrected(params: Any, config: jm.QuantConfig, data: Any) -> Any:
        quantizers = jm.calibrate(params, graph, data, config, progress=False)
        return jm.correct_bias(params, graph, quantizers, data, progress=False)

    def rounded(params: Any, config: jm.QuantConfig) -> tuple[Any, jm.Quantizers]:
        quantizers = jm.calibrate(params, graph, batches, config, progress=False)
        key = jax.random.key(0)
        return jm.adaround(
            params, graph, quantizers, batches, key=key, progress=progress
        )

    adapted, weights = rounded(folded, four)
    fixed, blind = (corrected(equalized, tensor, data) for data in (batches, None))
    return [
        Variant("W8A8 per tensor, fold", folded, tensor, batches),
        Variant("W8A8 per tensor, fold + equalize", equalized, tensor, batches),
        Variant(REPORTED, fixed, tensor, batches),
        Variant("W8A8 per tensor, the same without data", blind, tensor, None),
        Variant("W8A8 per channel, fold", folded, jm.QuantConfig(), batches),
        Variant("W4A8 per tensor, fold", folded, four_per_tensor, batches),
        Variant(
            "W4A8 per tensor, fold + equalize", equalized, four_per_tensor, batches
        ),
        Variant("W4A8 per channel, fold", folded, four, batches),
        Variant(
            "W4A8 per channel, fold + correct",
            corrected(folded, four, batches),
            four,
            batches,
        ),
        Variant("W4A8 per channel, fold + adaround", adapted, four, batches, weights),
    ]


def _halved(
    params: Any, graph: jm.Graph, images: jax.Array, batches: Any, *, progress: bool
) -> Any:
    """Half of the multiplications, from those channels that the outputs miss least."""
    images = images[:SCORED]
    wanted = jax.jit(graph.apply)(params, images)

    def score(apply: Callable, params: Any) -> jax.Array:
        return -jnp.mean(jnp.square(apply(params, images) - wanted))

    table = jm.score_ratios(
        params,
        graph,
        score,
        method="prune",
        ratios=(0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        batches=batches,
        progress=progress,
    )
    ratios = jm.select_ratios(table, 0.5)
    return jm.prune(params, graph, ratios, batches=batches, progress=progress)


def _logits(
    device: Callable, quantizers: jm.Quantizers, params: Any, images: jax.Array
) -> np.ndarray:
    parts = [
        device(quantizers, params, images[i : i + BATCH])
        for i in range(0, len(images), BATCH)
    ]
    return np.asarray(jnp.concatenate(parts))


def _row(
    name: str, logits: np.ndarray, reference: np.ndarray, labels: jax.Array
) -> dict[str, Any]:
    truth = np.asarray(labels)
    right = (logits.argmax(-1) == truth).astype(float)
    change = right - (reference.argmax(-1) == truth)
    noise = np.square(logits - reference).sum()
    return {
        "variant": name,
        "accuracy (%)": f"{100 * right.mean():.2f} ± {_half(right):.2f}",
        "change (points)": "–"
        if logits is reference
        else f"{100 * change.mean():+.2f} ± {_half(change):.2f}",
        "SQNR (dB)": "–"
        if logits is reference
        else f"{10 * np.log10(np.square(reference).sum() / noise):.1f}",
    }


def _half(values: np.ndarray) -> float:
    """Half the 95 % interval of a mean, in percent."""
    return float(196 * values.std() / np.sqrt(len(values)))


def main() -> None:
    """Run the demo, print its table, and write its report where pictures can be drawn."""
    drawn = all(map(importlib.util.find_spec, ("altair", "vl_convert")))
    print(run(report=REPORT if drawn else None))
    print(
        f"\njax {jax.__version__} on {jax.default_backend()}; images and network are inside "
        "the package (jaxmet/demo)."
    )
    if drawn:
        print(f"What was lost where, in pictures: {REPORT.resolve()}")
    else:
        print(
            "Pictures of what was lost where: pip install altair vl-convert-python, then "
            "again."
        )
