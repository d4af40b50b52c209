"""LiteRT files in LiteRT's own runtime (XNNPACK), of the same trees.

A file has a fixed batch size: values are compared at 32, times at 1 and 32.
"""

from pathlib import Path
from typing import Any

import numpy as np

import jaxmet as jm
from runtimes.cases import BATCH, Case
from runtimes.figures import Row, decibels, same_top, shares, time_ratio

COLUMNS = (
    "network", "quantizers", "integer operations", "identical to the simulation (%)",
    "one step (%)", "top-1 (%)", "identical to onnxruntime (%)", "one step (%)",
    "top-1 (%)", "SQNR file / simulated (dB)", "size / float",
)  # fmt: skip
TIMES = ("network", "quantizers", "time / float, 1", "32")


def rows(case: Case) -> list[Row]:
    """The file against the simulation and onnxruntime."""
    try:
        path = written(case, BATCH)
    except ValueError as error:
        return [[*case.label, f"refused: {error}", *"–" * (len(COLUMNS) - 3)]]
    table = case.table(path)
    call, x = runner(path), case.inputs
    parts = [call(x[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    made = case.keep("litert", np.concatenate(parts))
    simulated, runtime = case.simulated, case.outputs("onnxruntime")
    close = ["–"] * 3
    if runtime is not None:
        close = [*shares(made, runtime, case.step), same_top(made, runtime)]
    size = path.stat().st_size / float_file(case, BATCH).stat().st_size
    return [
        [
            *case.label,
            f"{sum(x == 'yes' for x in table['integers'])} of {len(table)}",
            *shares(made, simulated, case.step),
            same_top(made, simulated),
            *close,
            f"{decibels(case.exact, made):.2f} / {decibels(case.exact, simulated):.2f}",
            f"{size:.3f}",
        ]
    ]


def times(case: Case) -> list[Row]:
    """The integer file over the float one, both fed floats."""
    found = []
    for count in (1, BATCH):
        x = case.inputs[:count]
        try:
            path = written(case, count)
        except ValueError:
            return [[*case.label, "–", "–"]]
        calls = [runner(p) for p in (path, float_file(case, count))]
        runs = [lambda call=call, x=x: call(x) for call in calls]
        found.append(time_ratio(*runs, pairs=40 if count == 1 else 12))
    return [[*case.label, *found]]


def written(case: Case, count: int) -> Path:
    """The integer file at this batch size, fed floats."""
    return case.exported(f"integers{count}.tflite", jm.export.litert, count, io="float")


def float_file(case: Case, count: int) -> Path:
    """The float model at this batch size."""
    name = f"float{count}.tflite"
    return case.exported_float(name, jm.export.litert, count, io="float")


def runner(path: Path) -> Any:
    """A function of one batch, on one thread."""
    from ai_edge_litert.interpreter import Interpreter

    loaded = Interpreter(model_path=str(path), num_threads=1)
    loaded.allocate_tensors()
    first, last = loaded.get_input_details()[0], loaded.get_output_details()[0]

    def call(x: np.ndarray) -> np.ndarray:
        loaded.set_tensor(first["index"], x)
        loaded.invoke()
        return loaded.get_tensor(last["index"])

    return call
