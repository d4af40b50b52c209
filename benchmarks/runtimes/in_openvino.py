"""The same ONNX files in OpenVINO on CPUs."""

from pathlib import Path
from typing import Any

import numpy as np

from runtimes.cases import BATCH, Case
from runtimes.figures import Row, decibels, same_top, shares, time_ratio
from runtimes.in_onnxruntime import written

COLUMNS = (
    "network", "quantizers", "identical to the simulation (%)", "one step (%)",
    "largest output (%)", "identical to onnxruntime (%)", "one step (%)",
    "SQNR file / simulated (dB)",
)  # fmt: skip
TIMES = ("network", "quantizers", "time / float, 1", "32")


def rows(case: Case) -> list[Row]:
    """Its outputs against the simulation and onnxruntime."""
    model, x = compiled(written(case)), case.inputs
    parts = [run_model(model, x[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    made = case.keep("openvino", np.concatenate(parts))
    simulated, runtime = case.simulated, case.outputs("onnxruntime")
    return [
        [
            *case.label,
            *shares(made, simulated, case.step),
            same_top(made, simulated),
            *(["–", "–"] if runtime is None else shares(made, runtime, case.step)),
            f"{decibels(case.exact, made):.2f} / {decibels(case.exact, simulated):.2f}",
        ]
    ]


def times(case: Case) -> list[Row]:
    """The integer file over the float one."""
    both = [compiled(p) for p in (written(case), case.folder.parent / "float.onnx")]
    found = []
    for count in (1, BATCH):
        x = case.inputs[:count]
        runs = [lambda m=m, x=x: run_model(m, x) for m in both]
        found.append(time_ratio(*runs, pairs=40 if count == 1 else 12))
    return [[*case.label, *found]]


def compiled(path: Path) -> Any:
    """A request for the file, on one thread of the processor, floats in float32."""
    import openvino

    # Where the processor has bfloat16, OpenVINO would use it for what is left in float.
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(path, "CPU", options).create_infer_request()


def run_model(request: Any, x: np.ndarray) -> np.ndarray:
    return request.infer([x])[0].copy()
