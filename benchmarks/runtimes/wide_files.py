"""ONNX files with activations of 16 bits or in float, in onnxruntime, which computes in float.

Weights of 4 bits take half a byte (`weights="int4"`). What is gained is the size. onnxruntime may
compute such a file less exactly than it says, and without its optimizations as it says.
"""

import jaxmet as jm
from runtimes.cases import Case
from runtimes.figures import Row, decibels, same_top
from runtimes.in_onnxruntime import float_file, ran, session

COLUMNS = (
    "network", "quantizers", "top-1 as simulated (%)", "top-1 as in float (%)",
    "SQNR file / file without optimizations / simulated (dB)", "size / float",
)  # fmt: skip
WIDE = True


def rows(case: Case) -> list[Row]:
    """The file against the simulation and the float model."""
    kind = "int4" if case.way.startswith("W4") else "int8"
    path = case.exported("wide.onnx", jm.export.onnx, weights=kind)
    made, plain = (ran(session(path, fused=f), case.inputs) for f in (True, False))
    exact, simulated = case.exact, case.simulated
    ratios = [f"{decibels(exact, x):.2f}" for x in (made, plain, simulated)]
    size = path.stat().st_size / float_file(case).stat().st_size
    return [
        [
            *case.label,
            same_top(made, simulated),
            same_top(made, exact),
            " / ".join(ratios),
            f"{size:.3f}",
        ]
    ]
