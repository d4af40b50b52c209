"""Each layer fed the integers of onnxruntime, which it is made to hand out."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmet.export.onnx_file import CALLER, lowered
from jaxmet.export.onnx_graph import OnnxGraph
from jaxmet.export.onnx_passes import fused
from runtimes.cases import Case
from runtimes.figures import Row
from runtimes.in_onnxruntime import operations, session, written
from runtimes.layers import BATCH, COLUMNS, tallied

__all__ = ["COLUMNS", "rows"]


class Tap(NamedTuple):
    """The integers of a node in the file, and their grid."""

    tensor: str
    scale: np.ndarray
    zero_point: np.ndarray

    def value(self, integers: np.ndarray) -> np.ndarray:
        return (integers.astype(np.float32) - np.float32(self.zero_point)) * self.scale


def rows(case: Case) -> list[Row]:
    """All values of a network that are on a grid."""
    path = case.folder / "tapped.onnx"
    taps = tapped(case, path)
    run = session(path, case.folder / "tapped_optimized.onnx")
    _check_same_operations(case)
    name = run.get_inputs()[0].name

    def batches() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        for i in range(0, len(case.inputs), BATCH):
            x = case.inputs[i : i + BATCH]
            found = run.run([t.tensor for t in taps.values()], {name: x})
            pairs = zip(taps.items(), found, strict=True)
            yield x, {node: tap.value(a) for (node, tap), a in pairs}

    return tallied(case, batches())


def tapped(case: Case, path: Path) -> dict[str, Tap]:
    """Write the file with all its integers as outputs; which is whose."""
    import onnx
    from onnx import helper, numpy_helper

    saved = case.saved
    model, grids = lowered(
        CALLER, case.apply, saved.params, saved.quantizers, (case.example,),
        "dynamic", 21, {},
    )  # fmt: skip
    graph = OnnxGraph(fused(model))
    taps: dict[str, Tap] = {}
    for node in [n for n in graph.graph.node if n.op_type == "QuantizeLinear"]:
        grid = grids.get(node.input[1])
        if grid is None:
            continue
        tensor, reader = node.output[0], graph.only_consumer(node.output[0])
        while reader is not None and reader.op_type in ("Max", "Min"):
            tensor, reader = (
                reader.output[0],
                graph.only_consumer(reader.output[0]),
            )
        scale, zero = (graph.constant(n) for n in node.input[1:])
        if scale is None or zero is None:
            raise ValueError(f"{grid.owner}: its grid is no constant.")
        taps[grid.owner] = Tap(tensor, scale, zero)
    kinds = {t.name: t for t in graph.graph.output}
    for tap in taps.values():
        if tap.tensor not in kinds:
            kind = numpy_helper.from_array(tap.zero_point).data_type
            made = helper.make_empty_tensor_value_info(tap.tensor)
            made.type.tensor_type.elem_type = kind
            graph.graph.output.append(made)
            kinds[tap.tensor] = made
    onnx.save(model, path)
    return taps


def _check_same_operations(case: Case) -> None:
    """What is read must be what onnxruntime computes anyway."""
    written(case)
    session(case.folder / "integers.onnx", case.folder / "optimized.onnx")
    plain, read = (
        operations(case.folder / f"{n}.onnx") for n in ("optimized", "tapped_optimized")
    )
    computes = {k for k in plain | read if k.startswith("QLinear") or k == "QGemm"}
    for kind in sorted(computes):
        if plain[kind] != read[kind]:
            print(
                f"{case.network}, {case.way}: {kind} {plain[kind]}, read {read[kind]}"
            )
