"""What does each step of data-free quantization win back on trained networks?

The tables of Nagel et al., [Data-Free Quantization Through Weight Equalization and Bias
Correction](https://arxiv.org/abs/1906.04721), ICCV 2019, in miniature: a segmentation
net (mIoU) and a detector (mAP at an overlap of 0.5), on scenes of Fashion-MNIST
garments. Each is shown as trained and in a stress copy of the same function, whose
channels were rescaled by random factors up to 100.

    python benchmarks/dfq_tables.py
    python benchmarks/dfq_tables.py --networks ssd --copies trained --scenes 200

The data are those of the Debian package dataset-fashion-mnist. Intervals are of 95 %,
from bootstrap resamples of the test scenes; a change to float is a paired difference.
"""

import argparse
import fnmatch
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dfq.boxes import detect
from dfq.metrics import Score, mean_ap, mean_iou
from dfq.networks import HERE, NETWORKS, Tree, load_weights
from dfq.scenes import DATA, Composer, Scenes
from dfq.stress import rescaled
from tqdm.auto import tqdm

import jaxmet as jm

BATCH = 25
PER_TENSOR = jm.QuantConfig(per_channel=False)
PER_CHANNEL = jm.QuantConfig()
METRICS = {"deeplab": "mIoU (%)", "ssd": "mAP50 (%)"}
COPIES = ("trained", "stress")

Variant = tuple[Any, jm.Quantizers]  # a tree, and the quantizers that it runs on


class Recipe:
    """The steps from a trained network to its quantizers, each done when first asked for.

    With `batches`, objectives, ranges and corrections come from calibration scenes;
    with None, all of them come from the statistics of the norms.
    """

    def __init__(self, trained: Tree, graph: jm.Graph, batches: Any) -> None:
        self.trained, self.graph, self.batches = trained, graph, batches

    @cached_property
    def folded(self) -> Any:
        return jm.fold_batch_norm(self.trained, self.graph)

    @cached_property
    def equalized(self) -> Any:
        return jm.equalize(
            self.folded,
            self.graph,
            config=PER_TENSOR,
            batches=self.batches,
            progress=False,
        )

    @cached_property
    def absorbed(self) -> Any:
        return jm.absorb_bias(self.equalized, self.graph)

    def on_grids(self, params: Any, config: jm.QuantConfig) -> Variant:
        grids = jm.calibrate(params, self.graph, self.batches, config, progress=False)
        return params, grids

    def corrected(self, params: Any, config: jm.QuantConfig) -> Variant:
        _, grids = self.on_grids(params, config)
        correct = partial(jm.correct_bias, progress=False)
        return correct(params, self.graph, grids, self.batches), grids


ROWS: dict[str, Callable[[Recipe], Variant]] = {
    "float": lambda r: (r.trained, jm.Quantizers()),
    "INT8 per tensor, as it is": lambda r: r.on_grids(r.trained, PER_TENSOR),
    "  + fold": lambda r: r.on_grids(r.folded, PER_TENSOR),
    "  + equalize": lambda r: r.on_grids(r.equalized, PER_TENSOR),
    "  + absorb": lambda r: r.on_grids(r.absorbed, PER_TENSOR),
    "  + correct": lambda r: r.corrected(r.absorbed, PER_TENSOR),
    "float, absorbed": lambda r: (r.absorbed, jm.Quantizers()),
    "INT8 per channel, fold": lambda r: r.on_grids(r.folded, PER_CHANNEL),
    "  fold + correct": lambda r: r.corrected(r.folded, PER_CHANNEL),
}


class Judge:
    """Runs variants of one network over the test scenes and gives their score."""

    def __init__(self, network: str, scenes: Scenes) -> None:
        self.network, self.scenes = network, scenes
        apply = NETWORKS[network]().apply

        # Quantizers are data: one compilation serves every row of the same tree.
        @jax.jit
        def forward(params: Any, quantizers: jm.Quantizers, images: jax.Array) -> Any:
            device = jm.simulate(apply, quantizers, weights=False)
            outputs = device(params, images)
            if network == "ssd":
                return detect(*outputs)
            return jnp.argmax(outputs, -1).astype(jnp.uint8)

        self.forward = forward

    def score(self, variant: Variant) -> Score:
        params, quantizers = variant
        params = jm.round_weights(params, quantizers)
        images = self.scenes.images
        parts = [
            jax.device_get(self.forward(params, quantizers, images[i : i + BATCH]))
            for i in range(0, len(images), BATCH)
        ]
        found = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        if self.network == "ssd":
            return mean_ap(found.boxes, found.scores, self.scenes)
        return mean_iou(found, self.scenes)


def table(
    name: str, trained: Tree, judge: Judge, columns: dict[str, Any], rows: list[str]
) -> jm.Table:
    """One copy of one network: a row a variant, two columns for each kind of data."""
    graph = jm.trace(NETWORKS[judge.network]().apply, trained, judge.scenes.images[:1])
    reference = judge.score(ROWS["float"](Recipe(trained, graph, None)))
    found: dict[str, list[str]] = {"variant": rows}
    bar = tqdm(total=len(rows) * len(columns), desc=name)
    for column, batches in columns.items():
        recipe, scores = Recipe(trained, graph, batches), []
        for row in rows:
            bar.set_postfix_str(row.strip())
            is_float = row == "float"
            scores.append(reference if is_float else judge.score(ROWS[row](recipe)))
            bar.update()
        changes = [score.change(reference) for score in scores]
        found[f"{METRICS[judge.network]}, {column}"] = [s.text() for s in scores]
        found[f"change, {column}"] = [
            "–" if row == "float" else change
            for row, change in zip(rows, changes, strict=True)
        ]
    bar.close()
    return jm.Table(found, title=f"{name}, {len(judge.scenes.images)} test scenes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of idx files")
    parser.add_argument(
        "--weights", type=Path, default=HERE, help="folder of npz files"
    )
    parser.add_argument("--networks", nargs="+", choices=METRICS, default=[*METRICS])
    parser.add_argument("--copies", nargs="+", choices=COPIES, default=[*COPIES])
    parser.add_argument("--scenes", type=int, default=1000, help="test scenes")
    parser.add_argument("--calibration", type=int, default=256, help="scenes")
    kinds = ("scenes", "none")
    parser.add_argument("--calibrate-on", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs of rows")
    options = parser.parse_args()

    rows = [r for r in ROWS if any(fnmatch.fnmatch(r, g) for g in options.rows)]
    calibration = Composer.read("calibration", options.data)
    images = calibration.scenes(range(options.calibration)).images
    batches = jm.batched(jnp.asarray(images), batch_size=32)
    columns = {"scenes": (f"{len(images)} scenes", batches), "none": ("no data", None)}
    columns = dict(columns[kind] for kind in options.calibrate_on)
    scenes = Composer.read("test", options.data).scenes(range(options.scenes))
    for network in options.networks:
        trained = load_weights(options.weights / f"{network}.npz")
        judge = Judge(network, scenes)
        for copy in options.copies:
            begin = time.perf_counter()
            tree = trained
            if copy == "stress":
                apply = NETWORKS[network]().apply
                tree = rescaled(trained, jm.trace(apply, trained, images[:1]))
            print(table(f"{network}, {copy}", tree, judge, columns, rows))
            print(f"{time.perf_counter() - begin:.0f} s\n", flush=True)
    print(f"jax {jax.__version__} on {jax.default_backend()}")


if __name__ == "__main__":
    main()
