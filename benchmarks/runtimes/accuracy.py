"""EfficientNet-Lite0 on 512 pictures: the simulation, every file, and onnxruntime on its own.

The tree is folded and its biases are corrected, with a scale per channel. Agreement and SQNR are
those of `efficientnet_lite.py`: against the float model before the correction.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from lite.figures import Resampled, interval, outcome

from runtimes.cases import BATCH, PICTURES, Case
from runtimes.figures import Row
from runtimes.in_onnxruntime import float_file, ran, session

COLUMNS = ("what runs", "agreement with float (%)", "SQNR (dB)")
RUNS = {
    "simulated": "`jm.simulate`",
    "onnxruntime": "`jm.export.onnx` in onnxruntime",
    "integers": "`jm.lift(apply, quantizers)`",
    "litert": "`jm.export.litert` in LiteRT",
    "openvino": "`jm.export.onnx` in OpenVINO",
}


def rows(case: Case) -> list[Row]:
    """A row for each runtime whose outputs are kept, and onnxruntime's own quantization."""
    if case.network != PICTURES:
        return []
    outputs = {what: case.outputs(name) for name, what in RUNS.items()}
    outputs["`onnxruntime.quantization.quantize_static`"] = own(case)
    exact, found = case.exact, []
    resampled = Resampled(len(exact))
    for what, made in outputs.items():
        if made is None:
            continue
        figures = outcome(made, exact)
        both = (resampled.agreement(figures), resampled.sqnr(figures))
        found.append([what, *(str(interval(x)) for x in both)])
    return found


def own(case: Case) -> np.ndarray:
    """Outputs of the float file as onnxruntime itself quantizes it, on the same pictures."""
    from onnxruntime import quantization

    known = case.outputs("own")
    if known is not None:
        return known
    place = case.folder.parent
    ready, path = place / "prepared.onnx", place / "own.onnx"
    quantization.quant_pre_process(float_file(case), ready)
    options: dict[str, Any] = {
        "quant_format": quantization.QuantFormat.QDQ,
        "per_channel": True,
        "activation_type": quantization.QuantType.QUInt8,
        "weight_type": quantization.QuantType.QInt8,
        "calibrate_method": quantization.CalibrationMethod.MinMax,
    }
    quantization.quantize_static(ready, path, _reader(case.load().known), **options)
    return case.keep("own", ran(session(path), case.inputs))


def _reader(known: Any) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = self._batches()

        def _batches(self) -> Iterator[dict[str, np.ndarray]]:
            for i in range(0, len(known), BATCH):
                yield {"input": np.asarray(known[i : i + BATCH])}

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    return Batches()
