"""A LiteRT file whose inputs and outputs are integers: without what quantizes and dequantizes them.

The converter makes such files itself, but only where nothing at all is in float.
"""

from typing import Any


def integer_interface(made: bytes, caller: str) -> bytes:
    """The file with the integers of its inputs and outputs as inputs and outputs.

    Raises:
        ValueError: for an input or output in float that has no quantizer.
    """
    import flatbuffers
    from litert_converter import schema_py_generated as schema

    model: Any = schema.ModelT.InitFromPackedBuf(made, 0)
    graph, kinds = model.subgraphs[0], schema.BuiltinOperator
    for what, kind in (("input", kinds.QUANTIZE), ("output", kinds.DEQUANTIZE)):
        ends = [int(i) for i in getattr(graph, what + "s")]
        integers: dict[int, int] = {}  # of the tensors in float
        for i, index in enumerate(ends):
            is_float = graph.tensors[index].type == schema.TensorType.FLOAT32
            if index in integers or not is_float:
                continue
            operator = _only(graph, what, index)
            if operator is None or _kind(model, operator) != kind:
                raise ValueError(
                    f"jaxmet.{caller}: {what} {i} is computed in float, as it has no quantizer of "
                    "its own. Give it one, or use io='float'."
                )
            near = operator.outputs if what == "input" else operator.inputs
            integers[index] = int(near[0])
            graph.operators.remove(operator)
        setattr(graph, what + "s", [integers.get(i, i) for i in ends])
        for signature in model.signatureDefs:
            for tensor in getattr(signature, what + "s"):
                i = tensor.tensorIndex
                tensor.tensorIndex = integers.get(i, i)
    builder = flatbuffers.Builder(len(made))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _only(graph: Any, what: str, index: int) -> Any:
    """The one operation beside an input or an output; None where more read it."""
    reads = [o for o in graph.operators if index in o.inputs]
    makes = [o for o in graph.operators if index in o.outputs]
    found = reads if what == "input" else makes
    others = makes if what == "input" else reads
    alone = len(found) == 1 and not others
    return found[0] if alone else None


def _kind(model: Any, operator: Any) -> int:
    code = model.operatorCodes[operator.opcodeIndex]
    return max(code.builtinCode, code.deprecatedBuiltinCode)
