"""The same ONNX files in OpenVINO on CPUs.

It is told to compute in float32 what it has no integers for: where a processor has bfloat16,
OpenVINO takes that by default, for the outputs too.
"""

from pathlib import Path
from typing import Any

import numpy as np

from runtimes.cases import BATCH, Case
from runtimes.figures import Row, decibels, same_top, shares, time_ratio
from runtimes.in_onnxruntime import float_file, written

COLUMNS = (
    "network", "quantizers", "layers in integers", "identical to the simulation (%)",
    "one step (%)", "top-1 (%)", "identical to onnxruntime (%)", "one step (%)",
    "SQNR file / simulated (dB)",
)  # fmt: skip
TIMES = ("network", "quantizers", "time / float, 1", "32")


def rows(case: Case) -> list[Row]:
    """Its outputs against the simulation and onnxruntime."""
    model, x = compiled(written(case)), case.inputs
    request = model.create_infer_request()
    parts = [run_model(request, x[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    made = case.keep("openvino", np.concatenate(parts))
    simulated, runtime = case.simulated, case.outputs("onnxruntime")
    return [
        [
            *case.label,
            integer_layers(model),
            *shares(made, simulated, case.step),
            same_top(made, simulated),
            *(["–", "–"] if runtime is None else shares(made, runtime, case.step)),
            f"{decibels(case.exact, made):.2f} / {decibels(case.exact, simulated):.2f}",
        ]
    ]


def times(case: Case) -> list[Row]:
    """The integer file over the float one."""
    files = (written(case), float_file(case))
    both = [compiled(path).create_infer_request() for path in files]
    found = []
    for count in (1, BATCH):
        x = case.inputs[:count]
        runs = [lambda m=m, x=x: run_model(m, x) for m in both]
        found.append(time_ratio(*runs, pairs=40 if count == 1 else 12))
    return [[*case.label, *found]]


def compiled(path: Path) -> Any:
    """The file on one thread of the processor."""
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    return openvino.Core().compile_model(path, "CPU", options)


def integer_layers(model: Any) -> str:
    """How many of its convolutions and products compute in 8 bits."""
    kinds = ("Convolution", "FullyConnected", "MatMul")
    notes = [n.rt_info for n in model.get_runtime_model().get_ordered_ops()]
    products = [n for n in notes if n["layerType"].value in kinds]
    count = sum(n["runtimePrecision"].value in ("u8", "i8") for n in products)
    return f"{count} of {len(products)}"


def run_model(request: Any, x: np.ndarray) -> np.ndarray:
    return request.infer([x])[0].copy()
