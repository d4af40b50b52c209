"""The main job on the packaged network: what quantization costs, and what wins it back."""

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmet as jm
from jaxmet.demo import data as packaged
from jaxmet.demo.network import Network

BATCH = 100
SCORED = 128  # images a score of the compression
REPORT = Path("jaxmet-report.html")
REPORTED = "W8A8 per tensor, fold + equalize + correct"
EIGHT = "W8A8 per channel, fold"
INTEGERS = "W8A8 per channel, fold, in integers"
FILE = "W8A8 per channel, fold, in onnxruntime"
SMALL = "50 % MACs in float, fold + prune"
NAMES = (
    "float",
    "W8A8 per tensor, fold",
    "W8A8 per tensor, fold + equalize",
    REPORTED,
    "W8A8 per tensor, the same without data",
    EIGHT,
    INTEGERS,
    FILE,
    "W4A8 per tensor, fold",
    "W4A8 per tensor, fold + equalize",
    "W4A8 per channel, fold",
    "W4A8 per channel, fold + correct",
    "W4A8 per channel, fold + adaround",
    SMALL,
)


class Variant(NamedTuple):
    """A tree, and how it is calibrated: `weights` keep the quantizers that were found for it."""

    params: Any
    config: jm.QuantConfig
    data: Any
    weights: jm.Quantizers | None = None


QUICK = ("float", EIGHT, "W4A8 per channel, fold")


def run(
    *,
    progress: bool = True,
    report: Path | None = None,
    quick: bool = False,
    show: Callable[[str], Any] | None = None,
) -> jm.Table:
    """Quantize the demo's network in several ways and measure each on the test images.

    One row a variant: test accuracy in percent, the half-width of its 95 % interval
    (binomial, 1.96 √(p(1−p)/n)), the paired difference to float with its interval, and the
    signal-to-noise ratio of the logits in dB. `show` is given each line of the table as soon
    as it is known. With `report`, a path, the page of one of the variants is written there.
    `quick` leaves out what takes long: there are the rows of `QUICK`, and no page. The row of the
    ONNX file is there where the extra `onnx` is.
    """
    calibration, images, labels = packaged.load()
    trained = packaged.weights()
    apply = Network().apply
    names = QUICK if quick else _shown()
    title = f"Fashion-MNIST, {len(labels)} test images, 95 % intervals"
    rows: list[dict[str, Any]] = []

    @jax.jit
    def device(quantizers: jm.Quantizers, params: Any, images: Any) -> Any:
        return jm.simulate(apply, quantizers, weights=False)(params, images)

    float_logits = _logits(device, jm.Quantizers(), trained, images)

    def add(name: str, logits: np.ndarray) -> None:
        rows.append(_row(name, logits, float_logits, labels))
        if show is not None:
            lines = [title, _line(dict.fromkeys(rows[0]), names)] * (len(rows) == 1)
            for line in (*lines, _line(rows[-1], names)):
                show(line)

    add("float", float_logits)
    steps = _Steps(apply, trained, calibration, images, progress)
    for name in names[1:]:
        if name == SMALL:
            small = _halved(steps, calibration)
            add(name, _logits(device, jm.Quantizers(), small, images))
            continue
        params, config, data, weights = steps.variant(name)
        quantizers = jm.calibrate(
            params, steps.graph, data, config, weights=weights, progress=False
        )
        if name in (INTEGERS, FILE):
            compute = _in_integers if name == INTEGERS else _in_onnxruntime
            add(name, compute(apply, params, quantizers, images))
            continue
        coarse = jm.round_weights(params, quantizers)
        add(name, _logits(device, quantizers, coarse, images))
        if name == REPORTED and report is not None:
            scores = {r["variant"]: r["accuracy (%)"] for r in (rows[0], rows[-1])}
            noise = jm.noise(
                params, steps.graph, quantizers, steps.batches, progress=False
            )
            jm.report(
                report,
                params,
                steps.graph,
                quantizers=quantizers,
                batch=calibration[:BATCH],
                before=steps.folded,
                tables=[noise],
                scores=scores,
                title="jaxmet on Fashion-MNIST",
            )
    return jm.Table({key: [row[key] for row in rows] for key in rows[0]}, title=title)


def _shown() -> tuple[str, ...]:
    """The rows that can be computed here."""
    extra = all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime")))
    return NAMES if extra else tuple(n for n in NAMES if n != FILE)


def _line(row: dict[str, Any], names: Sequence[str]) -> str:
    """A row as the table prints it; the head, where there are no values."""
    widths = (max(map(len, (*names, "variant"))), *map(len, [*row][1:]))
    cells = [key if value is None else value for key, value in row.items()]
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


class _Steps:
    """The trees that variants share, each made when the first of them asks for it."""

    def __init__(
        self, apply: Any, trained: Any, calibration: Any, images: Any, progress: bool
    ) -> None:
        self.trained, self.progress = trained, progress
        self.graph = jm.trace(apply, trained, images[:1])
        self.batches = jm.batched(calibration, batch_size=64)

    @cached_property
    def folded(self) -> Any:
        return jm.fold_batch_norm(self.trained, self.graph)

    @cached_property
    def equalized(self) -> Any:
        return jm.equalize(self.folded, self.graph, progress=self.progress)

    def variant(self, name: str) -> Variant:
        """A variant by what its name says."""
        bits, _, rest = name.partition(" ")
        config = jm.QuantConfig(
            weight_bits=int(bits[1]),
            per_channel=rest.startswith("per channel"),
            bias="int32",
        )
        blind = "without data" in name
        data = None if blind else self.batches
        done = "equalize" in name or blind
        params, weights = self.equalized if done else self.folded, None
        if "adaround" in name:
            quantizers = self.calibrated(params, config, data)
            params, weights = jm.adaround(
                params,
                self.graph,
                quantizers,
                data,
                key=jax.random.key(0),
                progress=self.progress,
            )
        elif "correct" in name or blind:
            quantizers = self.calibrated(params, config, data)
            params = jm.correct_bias(
                params, self.graph, quantizers, data, progress=False
            )
        return Variant(params, config, data, weights)

    def calibrated(self, params: Any, config: Any, data: Any) -> jm.Quantizers:
        return jm.calibrate(params, self.graph, data, config, progress=False)


def _halved(steps: _Steps, images: jax.Array) -> Any:
    """Half of the multiplications, from those channels that the outputs miss least."""
    params, graph, batches = steps.folded, steps.graph, steps.batches
    progress = steps.progress
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
    return np.concatenate([np.asarray(part) for part in parts])


def _in_integers(
    apply: Any, params: Any, quantizers: jm.Quantizers, images: jax.Array
) -> np.ndarray:
    """The same network computed in int8 and int32."""
    graph = jm.trace(apply, params, images[:1])
    program = jax.jit(jm.lift(apply, quantizers))
    device = lambda _, integers, images: program(integers, images)
    return _logits(device, quantizers, jm.quantize(params, graph, quantizers), images)


def _in_onnxruntime(
    apply: Any, params: Any, quantizers: jm.Quantizers, images: jax.Array
) -> np.ndarray:
    """The same network as a file, run without JAX."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        jm.export.onnx(path, apply, params, quantizers, images[:1])
        session = runtime.InferenceSession(path.read_bytes(), options)
    device = lambda *given: session.run(None, {"input": np.asarray(given[-1])})[0]
    return _logits(device, quantizers, params, images)


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


def main(*, quick: bool = False) -> None:
    """Run the demo, print its rows, and write its report where pictures can be drawn."""
    drawn = all(map(importlib.util.find_spec, ("altair", "vl_convert")))
    report = REPORT if drawn and not quick else None
    start = time.perf_counter()
    # Bars in a file would be lines of litter between the rows.
    run(
        report=report,
        quick=quick,
        progress=sys.stderr.isatty(),
        show=partial(print, flush=True),
    )
    print(
        f"\n{time.perf_counter() - start:.0f} s; jax {jax.__version__} on "
        f"{jax.default_backend()}; images and network are inside the package (jaxmet/demo)."
    )
    if quick:
        print("Without --quick there are more rows: python -m jaxmet")
    elif drawn:
        print(f"What was lost where, in pictures: {REPORT.resolve()}")
    else:
        print(
            "Pictures of what was lost where: pip install altair vl-convert-python, then "
            "again."
        )
