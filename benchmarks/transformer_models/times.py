"""Compile and run time of `jm.simulate` over those of the float model, by depth."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxmet as jm
from transformer_models.bert import SentenceEncoder, Size, unstacked

COLUMNS = (
    "network",
    "compile float (s)",
    "compile simulate (s)",
    "ratio",
    "run float (s)",
    "run simulate (s)",
    "ratio",
)
ROUNDS = 3


class Depth(NamedTuple):
    """A network of MiniLM's widths with drawn weights: times do not depend on them."""

    scanned: bool
    layers: int

    @property
    def name(self) -> str:
        return (
            f"times: {'scanned' if self.scanned else 'unrolled'}, {self.layers} layers"
        )


DEPTHS = (
    Depth(False, 6),
    Depth(False, 12),
    Depth(True, 6),
    Depth(True, 24),
    Depth(True, 96),
)


def cells(depth: Depth, batch: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """The row of a network, on one batch of tokens and mask."""
    size = Size(depth=depth.layers)
    apply = SentenceEncoder(size, depth.scanned).apply
    variables = drawn(size, depth.scanned)
    graph = jm.trace(apply, variables, *batch)
    quantizers = jm.calibrate(variables, graph, [batch], progress=False)
    models = apply, jm.simulate(apply, quantizers)
    compiled = [timed_compile(model, variables, *batch) for model in models]
    runs = [functools.partial(run, variables, *batch) for run, _ in compiled]
    return [*pair([s for _, s in compiled]), *pair(least_times(runs))]


def drawn(size: Size, scanned: bool) -> Any:
    """Variables of one key, the same for both ways to write the network down."""
    tokens = np.zeros((1, 1), np.int32)
    model = SentenceEncoder(size, scanned=True)
    variables = jax.jit(model.init)(jax.random.key(0), tokens, tokens == 0)
    return variables if scanned else unstacked(variables)


def timed_compile(
    model: Callable[..., Any], *inputs: Any
) -> tuple[Callable[..., Any], float]:
    """The compiled model and the seconds of tracing, lowering and compiling it."""
    start = time.perf_counter()
    compiled = jax.jit(model).lower(*inputs).compile()
    return compiled, time.perf_counter() - start


def least_times(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """The least seconds of each, run in turn after one round to warm up."""
    seconds: list[list[float]] = []
    for _ in range(ROUNDS + 1):
        seconds.append([])
        for run in runs:
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[-1].append(time.perf_counter() - start)
    return [min(column) for column in zip(*seconds[1:], strict=True)]


def pair(seconds: Sequence[float]) -> list[str]:
    plain, simulated = seconds
    return [f"{plain:.3g}", f"{simulated:.3g}", f"{simulated / plain:.2f}"]
