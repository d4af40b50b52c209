"""How much smaller trained networks can be made, and what that costs.

    apt-get install dataset-fashion-mnist
    pip install '.[benchmarks]'
    python benchmarks/compression.py resnet18 resnet50
    python benchmarks/compression.py resnet18 --methods spatial prune --targets 0.5
    python benchmarks/compression.py --table            # scores of 20 layers at 9 ratios

`benchmarks/lite_compression.py` has EfficientNet-Lite0.

Networks are those of `train_residual.py`, their norms folded. A row is a method at a share of
the multiplications. *uniform* gives every layer the same ratio, *greedy* and *optimal* choose
ratios by `jm.score_ratios` on 256 training images (how well the float network's outputs are
kept); all three are turned until the network itself, counted by `jm.cost`, is within the
share. Factors and channels are chosen on 512 other training images. *before* and *after*
are the accuracy on the 10,000 test images before and after `--steps` batches of 128 training
images, on which the network learns the outputs of the float network (no labels). *over
uniform* is the difference before to the same method at uniform ratios (of random channels: to
chosen ones), *change* the difference after to the float network that was trained on for the
same steps; both paired, with 95 % intervals. *time* is the compiled forward of a batch of 64
over that of the float network, the least of several, side by side. Ranks and channels are
multiples of 4.

What is learned from, and the rate, were chosen on 5,000 held-out training images with a
network that had not seen them (trained by `train_residual.py --validate`).
"""

# JAX asks for the standard library's `compression`, of Python 3.14, and finds this script
# where it is run from: to it, this is no module.
if __name__ != "__main__":
    raise ImportError("benchmarks/compression.py is a script")

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fashion import BATCH, Fashion, Tree
from residual import load
from shares import within
from speed import least
from train_demo import DATA, as_input

import jaxmet as jm

SAMPLES, MULTIPLE = 512, 4
METHODS = ("weight", "spatial", "prune", "random", "spatial + prune")
SELECTIONS = ("uniform", "greedy", "optimal")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=["resnet18"])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of idx.gz")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.75, 0.5, 0.3])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--select", nargs="+", default=SELECTIONS, choices=SELECTIONS)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--scored", type=int, default=256, help="images a score")
    parser.add_argument("--table", action="store_true", help="time the table of scores")
    parser.add_argument("--validate", action="store_true", help="hold 5,000 out")
    options = parser.parse_args()
    names = ("jax", "jaxlib", "flax", "optax")
    print(f"python {platform.python_version()}, {jax.devices()[0].device_kind},")
    print(", ".join(f"{n} {version(n)}" for n in names), "\n", flush=True)
    for name in options.networks:
        bench = Bench(name, options)
        if options.table:
            for count in (64, SAMPLES):
                bench.against_rebuilding(count)
        else:
            bench.table()


class Bench:
    """One network: compressed, scored, trained on, timed."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.data = Fashion(options.data, validate=options.validate)
        self.model, variables = load(name)
        images = as_input(self.data.train[0][: 2 * SAMPLES])
        self.one = images[:1]
        graph = jm.trace(self.model.apply, variables, self.one)
        self.folded = self.params = jm.fold_batch_norm(variables, graph)
        self.graph = jm.trace(self.model.apply, self.params, self.one).without(
            "classifier"
        )
        self.batches = jm.batched(images[:SAMPLES], batch_size=64)
        self.score = self.score_on(images[SAMPLES:][: options.scored])
        self.taught = self.data.told_by(self.model.apply, self.params)
        self.total = self.macs(self.params)
        self.tables: dict[str, jm.Table] = {}
        self.before: dict[tuple[float, str, str], np.ndarray] = {}

    def table(self) -> None:
        float_right = self.data.right(jax.jit(self.model.apply), self.params)
        trained = self.fine_tuned(self.params) if self.options.steps else self.params
        on = self.data.right(jax.jit(jm.lift(self.model.apply)), trained)
        print(
            f"{self.name}: float {100 * float_right.mean():.2f} %, trained on "
            f"{100 * on.mean():.2f} %; {self.total:,} multiplications, "
            f"{self.options.steps} steps of {BATCH}\n"
        )
        columns = [
            "MACs",
            "method",
            "ratios",
            "before (%)",
            "over uniform",
            "after (%)",
            "change (points)",
            "parameters",
            "time",
            "seconds",
        ]
        print("|", " | ".join(columns), "|")
        print("|" + "---|" * len(columns), flush=True)
        for target in self.options.targets:
            for method in self.options.methods:
                for select in sorted(self.options.select, key=SELECTIONS.index):
                    if select != "uniform" and method == "random":
                        continue
                    self.row(target, method, select, on)

    def against_rebuilding(self, count: int) -> None:
        """The table of scores against a network rebuilt and compiled for each of its rows."""
        images = as_input(self.data.train[0][SAMPLES:][:count])
        score = self.score_on(images)
        shapes = jax.ShapeDtypeStruct(images.shape, images.dtype)
        start = time.perf_counter()
        table = jm.score_ratios(
            self.params, self.graph, score, batches=shapes, progress=False
        )
        ours = time.perf_counter() - start
        rows = [row for row in table if row["ratio"] < 1]
        start, worst = time.perf_counter(), 0.0
        for row in rows:
            small = jm.factorize(
                self.params, self.graph, ratios={row["layer"]: row["ratio"]}
            )
            run = jax.jit(lambda p: score(jm.lift(self.model.apply), p))
            worst = max(worst, abs(float(run(small)) - row["score"]))
        theirs = time.perf_counter() - start
        layers = len(dict.fromkeys(row["layer"] for row in rows))
        print(
            f"{self.name}: {layers} layers, {len(rows)} rows, {count} images: {ours:.1f} s, "
            f"compilation included; rebuilt {theirs:.1f} s, {theirs / ours:.1f} times as "
            f"long; largest difference of a score {worst:.1e}",
            flush=True,
        )

    def row(self, target: float, method: str, select: str, on: np.ndarray) -> None:
        start = time.perf_counter()
        small = self.compressed(target, method, select)
        spent = time.perf_counter() - start
        run = jax.jit(jm.lift(self.model.apply))
        before = self.data.right(run, small)
        self.before[target, method, select] = before
        same = self.before.get((target, self.kind(method), "uniform"))
        after = "–", "–"
        if self.options.steps:
            right = self.data.right(run, self.fine_tuned(small))
            after = f"{100 * right.mean():.2f}", paired(right, on)
        cells = [
            f"{self.macs(small) / self.total:.3f}",
            method,
            select,
            f"{100 * before.mean():.2f}",
            "–" if same is None or same is before else paired(before, same),
            *after,
            f"{size(small) / size(self.params):.2f}",
            f"{self.time(small):.2f}",
            f"{spent:.0f}",
        ]
        print("|", " | ".join(cells), "|", flush=True)

    def compressed(self, target: float, method: str, select: str) -> Tree:
        """The tree that is within the share of the multiplications, and nearly uses it."""
        if method == "spatial + prune":
            first = self.compressed(target**0.5, "spatial", select)
            rest = Bench.__new__(Bench)
            rest.__dict__.update(self.__dict__)
            rest.params, rest.tables = first, {}
            rest.graph = jm.trace(self.model.apply, first, self.one).without(
                "classifier"
            )
            return rest.compressed(target, "prune", select)
        make = self.pruned if method in ("prune", "random") else self.factorized
        setting = within(
            target,
            lambda share: make(method, self.ratios(method, select, share), quick=True),
            lambda small: self.macs(small) / self.total,
        )
        return make(method, self.ratios(method, select, setting), quick=False)

    def ratios(self, method: str, select: str, share: float) -> Any:
        if select == "uniform":
            return share
        kind = self.kind(method)
        if kind not in self.tables:
            self.tables[kind] = jm.score_ratios(
                self.params,
                self.graph,
                self.score,
                batches=self.batches,
                method=kind,
                multiple=MULTIPLE,
                progress=False,
            )
        return jm.select_ratios(self.tables[kind], share, method=select)

    def kind(self, method: str) -> str:
        return "prune" if method == "random" else method

    def score_on(self, images: jax.Array) -> Callable[[Callable, Tree], jax.Array]:
        """Minus the mean squared error of the outputs for these images."""
        wanted = jax.jit(self.model.apply)(self.folded, images)
        return lambda apply, params: (
            -jnp.mean(jnp.square(apply(params, images) - wanted))
        )

    def factorized(self, method: str, ratios: Any, *, quick: bool) -> Tree:
        make = partial(
            jm.factorize,
            graph=self.graph,
            ratios=ratios,
            method=method,
            multiple=MULTIPLE,
            progress=False,
        )
        if quick:  # the shapes alone
            return jax.eval_shape(make, self.params)
        return make(self.params, batches=self.batches)

    def pruned(self, method: str, ratios: Any, *, quick: bool) -> Tree:
        params = self.params
        if method == "random":
            params = jax.tree.map(
                lambda a: jax.random.uniform(jax.random.key(a.size), a.shape), params
            )
            small = jm.prune(params, self.graph, ratios, multiple=MULTIPLE)
            return cut_as(small, self.params)
        batches = None if quick else self.batches
        return jm.prune(
            params,
            self.graph,
            ratios,
            multiple=MULTIPLE,
            batches=batches,
            progress=False,
        )

    def fine_tuned(self, params: Tree) -> Tree:
        optimizer = optax.adam(
            optax.cosine_decay_schedule(self.options.rate, self.options.steps)
        )
        graph = jm.trace(self.model.apply, params, self.one)
        labels = jm.optimizer_labels(params, graph)
        each = {"weights": optimizer, "statistics": optax.set_to_zero()}
        each["bounds"] = each["statistics"]
        fit = self.data.trainer(
            jm.lift(self.model.apply),
            optax.multi_transform(each, labels),
            self.taught,
            self.options.steps,
            moved=False,
        )
        return fit(params, 0)

    def macs(self, params: Tree) -> int:
        graph = jm.trace(self.model.apply, params, self.one)
        return jm.cost(params, graph, self.one).where(layer="(all)")["macs"][0]

    def time(self, params: Tree) -> float:
        """Forward time over that of the float network, both as the replay runs them."""
        x = jnp.tile(self.one, (64, 1, 1, 1))
        idle = jm.evaluate(self.model.apply, lambda n, run, o: (run(*o), None))
        run = jax.jit(lambda p, x: idle(p, x)[0])
        ways = {"small": partial(run, params, x), "float": partial(run, self.params, x)}
        seconds = least(ways, 15)
        return seconds["small"] / seconds["float"]


def cut_as(small: Tree, params: Tree) -> Tree:
    """The entries of `params` that another pruned tree keeps."""

    def cut(leaf: Any, array: Any) -> Any:
        if not isinstance(leaf, jm.Compressed):
            return array
        for axis, _, indices in leaf.weight.keep:
            array = jnp.take(array, np.array(indices), axis=axis)
        return leaf.replace(weight=jm.Pruned(array, leaf.weight.keep))

    return jax.tree.map(
        cut, small, params, is_leaf=lambda leaf: isinstance(leaf, jm.Compressed)
    )


def paired(right: np.ndarray, other: np.ndarray) -> str:
    """The mean difference in points, and half its 95 % interval."""
    change = 100 * (right.astype(float) - other)
    half = 1.96 * change.std(ddof=1) / np.sqrt(len(change))
    return f"{change.mean():+.2f} ± {half:.2f}"


def size(params: Tree) -> int:
    return sum(a.size for a in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
