"""ONNX files in onnxruntime: what it computes, what it fuses, and how long it takes.

Without fusion onnxruntime runs a file in float, as it is written. That is a second float program
of what the simulation is the first of: what these two agree on is all that can be asked of a third.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import jaxmet as jm
from jaxmet.export.runtimes import has_vnni
from runtimes.cases import BATCH, Case
from runtimes.figures import Row, decibels, same_top, shares, time_ratio

COLUMNS = (
    "network", "quantizers", "integer operations", "identical (%)", "one step (%)",
    "top-1 (%)", "two float programs: identical (%)", "one step (%)",
    "SQNR file / simulated (dB)", "size / float",
)  # fmt: skip
TIMES = ("network", "quantizers", "time / float, 1", "32")


def rows(case: Case) -> list[Row]:
    """The file against the simulation."""
    path = written(case)
    optimized = case.folder / "optimized.onnx"
    made = case.keep("onnxruntime", ran(session(path, optimized), case.inputs))
    unfused = ran(session(path, fused=False), case.inputs)
    simulated, kinds = case.simulated, operations(optimized)
    exact, found = case.exact, case.table(path)
    fused = [k for k in kinds if k.startswith("QLinear") or k == "QGemm"]
    size = path.stat().st_size / float_file(case).stat().st_size
    return [
        [
            *case.label,
            f"{sum(kinds[k] for k in fused)} of {len(found)}",
            *shares(made, simulated, case.step),
            same_top(made, simulated),
            *shares(unfused, simulated, case.step),
            f"{decibels(exact, made):.2f} / {decibels(exact, simulated):.2f}",
            f"{size:.3f}",
        ]
    ]


def times(case: Case) -> list[Row]:
    """The integer file over the float one."""
    both = [session(p) for p in (written(case), float_file(case))]
    name = both[0].get_inputs()[0].name
    found = []
    for count in (1, BATCH):
        x = {name: case.inputs[:count]}
        runs = [lambda s=s, x=x: s.run(None, x) for s in both]
        found.append(time_ratio(*runs, pairs=40 if count == 1 else 12))
    return [[*case.label, *found]]


def written(case: Case) -> Path:
    """The integer file."""
    return case.exported("integers.onnx", jm.export.onnx)


def float_file(case: Case) -> Path:
    """The float model."""
    return case.exported_float("float.onnx", jm.export.onnx)


def session(path: Path, optimized: Path | None = None, *, fused: bool = True) -> Any:
    """The file on one thread of the processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not has_vnni():
        # Sums of two 8-bit products saturate in 16 bits there, unless it is told to be exact.
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if not fused:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    return onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )


def ran(loaded: Any, inputs: np.ndarray) -> np.ndarray:
    """Outputs for all inputs, in batches."""
    name = loaded.get_inputs()[0].name
    parts = [
        loaded.run(None, {name: inputs[i : i + BATCH]})[0]
        for i in range(0, len(inputs), BATCH)
    ]
    return np.concatenate(parts)


def operations(optimized: Path) -> Counter[str]:
    """The operations that are left after fusion."""
    import onnx

    return Counter(n.op_type for n in onnx.load(optimized).graph.node)
