"""A decoder of text and a vision transformer, trained here, and what quantization costs them.

    pip install '.[benchmarks]'
    apt-get install dataset-fashion-mnist            # for the vision transformer
    python benchmarks/small_transformers.py decoder
    python benchmarks/small_transformers.py vit --images /usr/share/datasets/fashion-mnist

*decoder*: Llama-like, 4 scanned layers of width 128 with grouped queries, rotary embeddings and a
key/value cache, trained on the letters of Python's language reference. The figure is the
perplexity of a letter in the last tenth of the text, in windows of 128 letters; ranges and
roundings come from 64 windows of the tenth before. *vit*: 4 scanned layers of width 64 on
Fashion-MNIST; the figure is the accuracy on the 10,000 test images, and 512 training images
calibrate. *lost* is the mean of what a row loses to float, window by window or image by image, in
nats or points, with a 95 % interval. Both train again in every run.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from transformer_models import decoder, vit

import jaxmet as jm

Apply = Callable[..., Any]
QUIET = {"progress": False}


class Setting(NamedTuple):
    """A trained model, and data to calibrate it on."""

    apply: Apply
    params: Any
    batches: list[Any]

    @property
    def graph(self) -> jm.Graph:
        return jm.trace(self.apply, self.params, *self.batches[0])


class Row(NamedTuple):
    name: str
    config: jm.QuantConfig
    smooth: bool = False
    adaround: bool = False


def rows() -> Iterator[Row]:
    """What both models are quantized by."""
    default = jm.QuantConfig()
    yield Row("W8A8, the default", default)
    yield Row("W8A8, smooth with input scales", default, smooth=True)
    for name in ("w8a8", "w8a16", "w4a16", "w4a8"):
        yield Row(f"preset {name}", jm.QuantConfig.preset(name))
    four = jm.QuantConfig(weight_bits=4)
    yield Row("W4A8, one scale per channel", four)
    yield Row("W4A8, one scale per channel, adaround", four, adaround=True)
    for name in ("w4a16", "w4a8"):
        config = jm.QuantConfig.preset(name)
        yield Row(f"preset {name}, adaround", config, adaround=True)


def quantized(setting: Setting, graph: jm.Graph, row: Row) -> tuple[jm.Quantizers, Any]:
    """The quantizers and the parameters of a row."""
    params, batches = setting.params, setting.batches
    if row.smooth:
        params = jm.smooth(params, graph, batches, input_scales=True, **QUIET)
    quantizers = jm.calibrate(params, graph, batches, row.config, **QUIET)
    if row.adaround:
        params, quantizers = jm.adaround(params, graph, quantizers, batches, **QUIET)
    return quantizers, params


def of_decoder(options: argparse.Namespace) -> None:
    text = decoder.text()
    start = time.perf_counter()
    params = decoder.trained(options.steps, text.training)
    seconds = time.perf_counter() - start
    apply = decoder.Decoder().apply
    batches = list(decoder.batches_of(text.calibration[:64], 16))
    setting = Setting(apply, params, batches)
    graph = setting.graph
    measured = text.measured
    exact = decoder.surprise(apply, params, measured)
    print(
        f"\n{options.steps} steps in {seconds:.0f} s; {len(exact)} windows measured\n"
    )
    print_head("row", "perplexity", "lost (nats)", "seconds")
    print_line("float", f"{np.exp(exact.mean()):.3f}", "", "")
    for row in rows():
        start = time.perf_counter()
        quantizers, tree = quantized(setting, graph, row)
        run = jm.simulate(apply, quantizers)
        found = decoder.surprise(run, tree, measured)
        seconds = time.perf_counter() - start
        cells = f"{np.exp(found.mean()):.3f}", interval(found - exact), f"{seconds:.0f}"
        print_line(row.name, *cells)
    few = measured[:64]
    print("\n64 windows, letter by letter through the cache against at once:\n")
    print_head("row", "at once", "letter by letter", "difference (nats)")
    shown: list[tuple[str, Apply]] = [("float", apply)]
    caches = ("*/k/add", "*/v")
    for bits in (8, 4):
        rules = [jm.Rule(name, activation_bits=bits) for name in caches]
        config = jm.QuantConfig(rules=rules if bits == 4 else [])
        quantizers = jm.calibrate(params, graph, batches, config, **QUIET)
        name = f"W8A8, keys and values of {bits} bits"
        shown.append((name, jm.simulate(apply, quantizers)))
    for name, run in shown:
        whole = decoder.surprise(run, params, few)
        steps = decoder.decoded(run, params, few)
        pair = (f"{np.exp(a.mean()):.3f}" for a in (whole, steps))
        print_line(name, *pair, interval(steps - whole))


def of_vit(options: argparse.Namespace) -> None:
    from fashion import Fashion
    from train_demo import as_input

    data = Fashion(options.images, validate=False)
    apply = vit.VisionTransformer().apply
    start = time.perf_counter()
    first = jax.jit(vit.VisionTransformer().init)
    params = first(jax.random.key(0), as_input(data.train[0][:1]))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 2e-3, options.steps // 10, options.steps
    )
    fit = data.trainer(
        apply, optax.adamw(schedule), data.smoothed(), options.steps, moved=True
    )
    params = fit(params, 0)
    seconds = time.perf_counter() - start
    known = as_input(data.train[0][:512])
    setting = Setting(apply, params, [(known[i : i + 64],) for i in range(0, 512, 64)])
    graph = setting.graph
    exact = data.right(jax.jit(apply), params)
    print(f"\n{options.steps} steps in {seconds:.0f} s; {len(exact)} images measured\n")
    print_head("row", "accuracy (%)", "lost (points)", "seconds")
    print_line("float", f"{100 * exact.mean():.2f}", "", "")
    for row in rows():
        start = time.perf_counter()
        quantizers, tree = quantized(setting, graph, row)
        found = data.right(jax.jit(jm.simulate(apply, quantizers)), tree)
        seconds = time.perf_counter() - start
        lost = 100.0 * (exact.astype(float) - found)
        print_line(
            row.name, f"{100 * found.mean():.2f}", interval(lost), f"{seconds:.0f}"
        )


def interval(values: np.ndarray) -> str:
    """A mean and half of its 95 % interval."""
    half = 1.96 * values.std() / len(values) ** 0.5
    digits = 2 if half > 0.02 else 4
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"


def print_head(*columns: str) -> None:
    print_line(*columns)
    print_line(*["---"] * len(columns))


def print_line(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("decoder", "vit"))
    parser.add_argument(
        "--steps", type=int, help="default 400 (decoder) or 1,000 (vit)"
    )
    parser.add_argument("--images", type=Path, help="the folder of Fashion-MNIST")
    options = parser.parse_args()
    options.steps = options.steps or {"decoder": 400, "vit": 1000}[options.model]
    versions = ", ".join(f"{n} {version(n)}" for n in ("jaxmet", "jax", "flax"))
    device = jax.devices()[0].device_kind
    print(f"{options.model}, {device}, {versions}, Python {platform.python_version()}")
    {"decoder": of_decoder, "vit": of_vit}[options.model](options)


if __name__ == "__main__":
    main()
