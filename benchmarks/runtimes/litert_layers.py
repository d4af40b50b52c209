"""Each layer fed the integers of LiteRT, which it is made to hand out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmet.engine.backend.litert_lowering import owner_of
from runtimes.cases import BATCH, Case
from runtimes.figures import Row
from runtimes.in_litert import written
from runtimes.layers import COLUMNS, tallied

__all__ = ["COLUMNS", "rows"]


def rows(case: Case) -> list[Row]:
    """All values of a network that are on a grid, and that the file has."""
    from ai_edge_litert.interpreter import Interpreter

    path = case.folder / "tapped.tflite"
    try:
        tensors = tapped(written(case, BATCH), path)
    except ValueError:  # what the table of files says
        return []
    loaded = Interpreter(model_path=str(path), num_threads=1)
    loaded.allocate_tensors()
    grids = {d["index"]: d["quantization"] for d in loaded.get_output_details()}
    nodes = owners(case, tensors, grids)
    first, last = loaded.get_input_details()[0], loaded.get_output_details()[0]

    def value(index: int) -> np.ndarray:
        scale, zero = grids[index]
        integers = loaded.get_tensor(index).astype(np.float32)
        return (integers - np.float32(zero)) * np.float32(scale)

    def batches() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        kept = case.outputs("litert")
        for i in range(0, len(case.inputs), BATCH):
            x = case.inputs[i : i + BATCH]
            loaded.set_tensor(first["index"], x)
            loaded.invoke()
            made = loaded.get_tensor(last["index"])
            if kept is not None and np.any(made != kept[i : i + BATCH]):
                raise ValueError(f"{case.label}: read out, LiteRT computes otherwise.")
            yield x, {node: value(index) for node, index in nodes.items()}

    return tallied(case, batches())


def tapped(source: Path, path: Path) -> dict[int, str]:
    """Write the file with all its integers as outputs; their tensors and names."""
    import flatbuffers
    from litert_converter import schema_py_generated as schema

    made = source.read_bytes()
    model: Any = schema.ModelT.InitFromPackedBuf(made, 0)
    graph, tensors = model.subgraphs[0], {}
    for operator in graph.operators:
        index = int(operator.outputs[0])
        if graph.tensors[index].type == schema.TensorType.INT8:
            tensors[index] = graph.tensors[index].name.decode()
    outputs = [int(i) for i in graph.outputs]
    graph.outputs = [*outputs, *(i for i in tensors if i not in outputs)]
    builder = flatbuffers.Builder(len(made))
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return tensors


def owners(
    case: Case, tensors: dict[int, str], grids: dict[int, Any]
) -> dict[str, int]:
    """The tensor of each node: the last one that speaks of its layer and has its grid."""
    found: dict[str, int] = {}
    quantizers = case.saved.quantizers
    nodes = {*quantizers.activations} | {name for name, _ in quantizers.shared}
    for index, name in tensors.items():
        owner = owner_of(name)
        if owner is None:
            continue
        layer = owner.removesuffix("/add")
        # What follows an addition is named after the layer before it, as that layer's own norm is.
        before = f"{layer}/" if layer != owner else (f"{layer}/", f"{layer}_bn")
        for node in nodes:
            quantizer = quantizers.activation(node)
            near = node == owner or node.startswith(before)
            if quantizer is None or not near:
                continue
            scale, zero = (
                np.ravel(a)[0] for a in (quantizer.scale, quantizer.zero_point)
            )
            same = np.float32(grids[index][0]) == np.float32(scale)
            if same and (grids[index][1] - int(zero)) % 128 == 0:
                found[node] = index
    return found
