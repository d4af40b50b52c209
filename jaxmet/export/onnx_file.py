"""A model and its quantizers as an ONNX file that integer runtimes fuse."""

import os
from collections.abc import Mapping
from typing import Any

from jaxmet.engine.backend.onnx_lowering import WrittenGrid, onnx_model
from jaxmet.engine.program.calls import Apply
from jaxmet.export.flat_model import flat_model, needs_batch_size
from jaxmet.export.onnx_graph import INTEGERS, LAYOUT, OnnxGraph, nodes_of
from jaxmet.export.onnx_passes import fused
from jaxmet.tree.checks import check_choices, check_counts, check_flags
from jaxmet.tree.packages import package
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.writing import check_free, writable, written

CALLER = "export.onnx"
INSTALL = "'.[onnx]'"
COMPUTES = (
    "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", "Add", "Mul", "Sub", "Div", "Softmax",
    "GlobalAveragePool", "AveragePool", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin",
    "Concat", "Sigmoid", "Erf", "Tanh", "LeakyRelu", "Elu", "Exp", "Log", "Pow", "Sqrt", "Resize",
    "LayerNormalization",
)  # fmt: skip


def onnx(
    path: str | os.PathLike[str],
    apply: Apply,
    params: Any,
    quantizers: Quantizers | None,
    *inputs: Any,
    batch: str = "dynamic",
    opset: int = 21,
    weights: str = "int8",
    overwrite: bool = False,
    **kwargs: Any,
) -> Table:
    r"""Write the model as an ONNX file, in integers where there are quantizers.

    The file computes what `jm.simulate(apply, quantizers)(params, *inputs)` computes: weights
    are int8 (int16 above 8 bits) and one DequantizeLinear each, values on a grid a
    QuantizeLinear and a DequantizeLinear, biases of integer products int32 at $s_x s_w$.
    Norms that were folded are the biases that they stand for, and clips before a grid bounds of
    its integers, so that onnxruntime runs QLinearConv, QGemm, QLinearAdd and
    QLinearGlobalAveragePool in between. With None for quantizers it is the float model.

    It needs `pip install '.[onnx]'`: jax2onnx lowers the equations.

    Args:
        path: the file to write.
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        params: its parameters: any tree that jaxmet makes.
        quantizers: the quantizers of `jm.calibrate` for this tree, or None.
        *inputs: example inputs, or `jax.ShapeDtypeStruct`s of them.
        batch: 'dynamic' (the default), the first axis of every input has any size, or 'fixed',
            it has that of the examples.
        opset: the ONNX operator set, 19 or more; default 21.
        weights: 'int8' (the default), or 'int4': weights of at most 4 bits take half a byte each,
            and onnxruntime computes with them in float.
        overwrite: whether an existing file is replaced; default False.
        **kwargs: keyword arguments for the model.

    Returns:
        A table with one row per operation that computes: whether it is between integers, and
        if not, what is in float.

    Raises:
        ValueError: for a path that exists, for a model that needs to know its batch size, and
            for what ONNX has no place for; ImportError without the extra.

    >>> jm.export.onnx("model.onnx", apply, params, quantizers, images[:1])
    """
    check_flags(CALLER, overwrite=overwrite)
    check_choices(CALLER, weights=(weights, ("int8", "int4")))
    path = writable(path, CALLER)
    check_free(path, overwrite, CALLER)
    model, grids = lowered(
        CALLER,
        apply,
        params,
        quantizers,
        inputs,
        batch,
        opset,
        kwargs,
        packed=weights == "int4",
    )
    model = fused(model)
    _name_layers(OnnxGraph(model), grids)
    package("onnx.checker", CALLER, INSTALL).check_model(model)
    written(path, lambda f: f.write(model.SerializeToString()))
    return _table(model, grids)


def lowered(
    caller: str,
    apply: Apply,
    params: Any,
    quantizers: Quantizers | None,
    inputs: tuple[Any, ...],
    batch: str,
    opset: int,
    kwargs: Any,
    *,
    packed: bool = False,
) -> tuple[Any, dict[str, WrittenGrid]]:
    """The model before the passes, and its grids by the names of their scales."""
    check_choices(caller, batch=(batch, ("dynamic", "fixed")))
    check_counts(caller, least=19, opset=opset)
    _check_packages(opset, caller)
    model = flat_model(caller, apply, params, quantizers, inputs, kwargs, batch=batch)
    try:
        return onnx_model(
            model.function,
            model.shapes,
            opset=opset,
            input_names=model.inputs,
            output_names=model.outputs,
            packed=packed,
        )
    except Exception as error:
        symbolic = ("Symbolic dimension", "_DimExpr", "dim_as_value")
        if batch == "dynamic" and any(word in str(error) for word in symbolic):
            raise needs_batch_size(caller, error) from error
        raise


def _check_packages(opset: int, caller: str) -> None:
    for name in ("jax2onnx", "onnx"):
        package(name, caller, INSTALL)
    most = package("onnx", caller, INSTALL).defs.onnx_opset_version()
    if opset > most:
        raise ValueError(
            f"jaxmet.{caller}: opset is {opset}, and this onnx knows {most}. Use 21."
        )


def _name_layers(graph: OnnxGraph, grids: Mapping[str, WrittenGrid]) -> None:
    """Give values the names of the nodes that they are the results of, and to their integers."""
    nodes = [*nodes_of(graph, "QuantizeLinear")]
    for node in reversed(nodes):  # of several with one grid the last is as in JAX
        grid = grids.get(node.input[1])
        if grid is None:
            continue
        integers = node.output[0]
        while (bound := graph.only_consumer(integers)) is not None:
            if bound.op_type not in ("Max", "Min"):
                break
            integers = bound.output[0]
        integers = graph.rename(integers, grid.owner + INTEGERS)
        for consumer in graph.consumers[integers][:]:
            if consumer.op_type == "DequantizeLinear" and consumer.input[1] in grids:
                graph.rename(consumer.output[0], grid.owner)


def _table(model: Any, grids: Mapping[str, WrittenGrid]) -> Table:
    """Which operations are between integers."""
    graph = OnnxGraph(model)
    rows = []
    for node in graph.graph.node:
        if node.op_type not in COMPUTES or not graph.is_float(node.output[0]):
            continue
        read = [n for n in node.input[:2] if graph.is_float(n) and _is_float(graph, n)]
        wrote = [n for n in node.output if not _is_stored(graph, n)]
        sums = node.op_type in SUMS and not read and not _adds_float(graph, node)
        why = [f"reads {n} in float" for n in read] + [
            f"gives {n} in float" for n in wrote
        ]
        rows.append(
            (
                node.op_type,
                _owner(graph, node, grids) or node.output[0],
                "no" if why and not sums else "yes",
                "; ".join(why) or None,
            )
        )
    names = ("operation", "layer", "integers", "note")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    count = sum(row[2] == "yes" for row in rows)
    return Table(
        columns, title=f"{CALLER}: {count} of {len(rows)} operations in integers"
    )


SUMS = ("Gemm", "MatMul")
"""Operations of which runtimes have a kernel that takes integers and gives floats."""


def _adds_float(graph: OnnxGraph, node: Any) -> bool:
    bias = node.input[2] if len(node.input) > 2 else ""
    return bool(bias) and _is_float(graph, bias)


def _owner(graph: OnnxGraph, node: Any, grids: Mapping[str, WrittenGrid]) -> str | None:
    """Whose result it is, as the grid says that the result goes on."""
    found: Any = node
    while found is not None and found.op_type != "QuantizeLinear":
        consumers = graph.consumers.get(found.output[0], [])
        found = consumers[0] if len(consumers) == 1 else None
    grid = None if found is None else grids.get(found.input[1])
    return grid.owner if grid is not None else None


MOVES = (*LAYOUT, "Pad", "MaxPool")
"""Operations that runtimes do on integers themselves."""


def _is_float(graph: OnnxGraph, name: str) -> bool:
    node = graph.producers.get(name)
    while node is not None and node.op_type in MOVES:
        node = graph.producers.get(node.input[0])
    return node is None or node.op_type != "DequantizeLinear"


def _is_stored(graph: OnnxGraph, name: str) -> bool:
    """Whether only QuantizeLinear reads a value, after moves."""
    consumers = graph.consumers.get(name, [])
    if name in graph.outputs or not consumers:
        return False
    return all(
        r.op_type == "QuantizeLinear"
        or (r.op_type in MOVES and _is_stored(graph, r.output[0]))
        for r in consumers
    )
