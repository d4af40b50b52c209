"""Shares of outputs that agree, decibels, ratios of times, and tables of them."""

import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = (
    "jax", "jaxlib", "flax", "jax2onnx", "onnx", "onnxruntime", "openvino", "litert-converter",
    "ai-edge-litert",
)  # fmt: skip
Row = Sequence[Any]


def steps_apart(one: np.ndarray, two: np.ndarray, step: float) -> np.ndarray:
    """By how many steps of a grid two arrays differ."""
    return np.rint(np.abs(one - two) / step)


def shares(one: np.ndarray, two: np.ndarray, step: float) -> list[str]:
    """Per cent of values that are identical, and no more than one step apart."""
    apart = steps_apart(one, two, step)
    return [percent(apart == 0, 2), percent(apart <= 1, 3)]


def percent(is_so: np.ndarray, digits: int) -> str:
    """A share, rounded down: 100 is said of all values alone."""
    scale = 10**digits
    return f"{np.floor(100 * scale * np.mean(is_so)) / scale:.{digits}f}"


def same_top(one: np.ndarray, two: np.ndarray) -> str:
    """Per cent of places whose largest output is the same."""
    return percent(one.argmax(-1) == two.argmax(-1), 2)


def decibels(exact: np.ndarray, noisy: np.ndarray) -> float:
    """SQNR: 10 log10 of the energy of all outputs over that of all errors."""
    exact, noisy = exact.astype(np.float64), noisy.astype(np.float64)
    return float(10 * np.log10(np.sum(exact**2) / np.sum((exact - noisy) ** 2)))


def time_ratio(one: Callable[[], Any], two: Callable[[], Any], *, pairs: int) -> str:
    """The median of the ratio of two times, run in turn after two pairs to warm up."""
    seconds: list[list[float]] = []
    for _ in range(pairs + 2):
        pair = []
        for run in (one, two):
            start = time.perf_counter()
            run()
            pair.append(time.perf_counter() - start)
        seconds.append(pair)
    return f"{np.median([a / b for a, b in seconds[2:]]):.2f}"


def print_table(title: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    if not rows:
        return
    print(f"\n{title}\n\n|", " | ".join(names), "|\n|" + "---|" * len(names))
    for row in rows:
        print("|", " | ".join(map(str, row)), "|", flush=True)


def print_device() -> None:
    """The processor, what it has for integers, and versions."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    about = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    model = next((x for x in about.splitlines() if x.startswith("model name")), "")
    vnni = ", ".join(x for x in ("avx512_vnni", "avx_vnni") if x in about.split())
    kind = model.partition(": ")[2] or jax.devices()[0].device_kind
    print(f"{kind} ({vnni or 'no VNNI'}), Python {platform.python_version()},", end=" ")
    print(", ".join(found))
