"""Each layer fed the integers of onnxruntime, which it is made to hand out."""

from collections.abc import Iterator

import numpy as np

from jaxmet.export.onnx_graph import INTEGERS
from jaxmet.export.runtimes import show_integers
from runtimes.cases import Case
from runtimes.figures import Row
from runtimes.in_onnxruntime import operations, session, written
from runtimes.layers import BATCH, COLUMNS, tallied

__all__ = ["COLUMNS", "rows"]


def rows(case: Case) -> list[Row]:
    """All values of a network that are on a grid."""
    import onnx

    path, model = case.folder / "tapped.onnx", onnx.load(written(case))
    grids = show_integers(model)
    onnx.save(model, path)
    run = session(path, case.folder / "tapped_optimized.onnx")
    _check_same_operations(case)
    name = run.get_inputs()[0].name

    def batches() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        for i in range(0, len(case.inputs), BATCH):
            x = case.inputs[i : i + BATCH]
            found, values = run.run([*grids], {name: x}), {}
            for tensor, integers in zip(grids, found, strict=True):
                scale, zero = grids[tensor]
                value = (integers.astype(np.float32) - np.float32(zero)) * scale
                values[tensor.removesuffix(INTEGERS)] = value
            yield x, values

    return tallied(case, batches())


def _check_same_operations(case: Case) -> None:
    """What is read must be what onnxruntime computes anyway."""
    session(written(case), case.folder / "optimized.onnx")
    plain, read = (
        operations(case.folder / f"{n}.onnx") for n in ("optimized", "tapped_optimized")
    )
    computes = {k for k in plain | read if k.startswith("QLinear") or k == "QGemm"}
    for kind in sorted(computes):
        if plain[kind] != read[kind]:
            print(
                f"{case.network}, {case.way}: {kind} {plain[kind]}, read {read[kind]}"
            )
