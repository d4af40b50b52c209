"""The operations of a LiteRT file, and which of them are in integers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxmet.engine.backend.litert_lowering import owner_of
from jaxmet.tree.table import Table

MOVES = (
    "RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS", "SLICE", "STRIDED_SLICE", "PAD", "PADV2",
    "GATHER", "GATHER_ND", "SPLIT", "BROADCAST_TO", "CAST", "SHAPE", "PACK", "UNPACK", "REVERSE_V2",
)  # fmt: skip
RIM = ("QUANTIZE", "DEQUANTIZE")


class FileTensor(NamedTuple):
    """A tensor of the file: its name, the name of its type, whether it has a scale."""

    name: str
    kind: str
    has_scale: bool
    data: Any  # the bytes of a constant as an array, None for other tensors
    rank: int

    @property
    def is_constant(self) -> bool:
        return self.data is not None


class FileOperation(NamedTuple):
    """An operation of the file: its name, what it reads and what it makes."""

    kind: str
    reads: list[FileTensor]
    makes: list[FileTensor]


def check_computable(made: bytes, caller: str) -> None:
    """Refuse operations that LiteRT does not have, and biases that int32 does not hold."""
    operations = [o for g in _graphs(made) for o in _operations(made, g)]
    foreign = {o.kind for o in operations if o.kind.startswith(("STABLEHLO", "CUSTOM"))}
    if foreign:
        raise ValueError(
            f"jaxmet.{caller}: LiteRT has no operation for {', '.join(sorted(foreign))}. Write "
            "that part of the model otherwise, or use jm.export.onnx."
        )
    ends = np.iinfo(np.int32)
    for operation in operations:
        for t in operation.reads:
            if not (t.kind == "INT32" and t.has_scale and t.is_constant):
                continue
            # The converter clips without a word.
            count = int(np.sum(np.isin(t.data.view(np.int32), (ends.min, ends.max))))
            if count:
                raise ValueError(
                    f"jaxmet.{caller}: the bias of {(owner_of(t.name) or t.name)!r} does not fit "
                    f"int32 in {count} channels, whose weights are almost zero. Calibrate with "
                    "jm.QuantConfig(bias='int32'), which raises their scales."
                )


def litert_table(made: bytes, caller: str) -> Table:
    """One row per operation that computes."""
    rows = []
    for operation in (o for g in _graphs(made) for o in _operations(made, g)):
        reads = [t for t in operation.reads if t.kind.startswith("FLOAT")]
        wrote = [t for t in operation.makes if t.kind.startswith("FLOAT")]
        scaled = any(t.has_scale for t in operation.reads + operation.makes)
        rim = operation.kind in RIM and bool(reads or wrote)
        if operation.kind in MOVES or rim or not (reads or wrote or scaled):
            continue
        rest = [t for t in operation.reads if t.has_scale or t.is_constant]
        owners = (owner_of(t.name) for t in operation.makes + rest)
        layer = next((o for o in owners if o), operation.makes[0].name)
        # A layer's own parameters are in float because its values are.
        named = {owner_of(t.name) or t.name: None for t in reads if not t.is_constant}
        why = [f"reads {name} in float" for name in named if name != layer]
        if any(t.is_constant and t.rank > 1 for t in reads):
            why.append("its weight is in float")
        why += ["gives its result in float"] if wrote else []
        integers = "no" if reads or wrote else "yes"
        rows.append((operation.kind, layer, integers, "; ".join(why) or None))
    names = ("operation", "layer", "integers", "note")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    count = sum(row[2] == "yes" for row in rows)
    return Table(
        columns, title=f"{caller}: {count} of {len(rows)} operations in integers"
    )


def layer_of(made: bytes, number: int) -> str | None:
    """Whose operation it is that a runtime names by its number."""
    operations = [o for g in _graphs(made)[:1] for o in _operations(made, g)]
    if number >= len(operations):
        return None
    told = operations[number]
    owners = (owner_of(t.name) for t in told.makes + told.reads)
    return next((owner for owner in owners if owner), None)


def _graphs(made: bytes) -> list[Any]:
    from litert_converter import schema_py_generated as schema

    model: Any = schema.Model.GetRootAs(made, 0)
    graphs = [model.Subgraphs(i) for i in range(model.SubgraphsLength())]
    return [g for g in graphs if g is not None]


def _by_number(enum: Any) -> dict[int, str]:
    return {v: k for k, v in vars(enum).items() if not k.startswith("_")}


def _operations(made: bytes, graph: Any) -> Iterator[FileOperation]:
    from litert_converter import schema_py_generated as schema

    model: Any = schema.Model.GetRootAs(made, 0)
    codes = _by_number(schema.BuiltinOperator)
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        code = model.OperatorCodes(operator.OpcodeIndex())
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        reads, makes = (
            [_tensor(made, graph, n) for n in indices if n >= 0]
            for indices in (operator.InputsAsNumpy(), operator.OutputsAsNumpy())
        )
        yield FileOperation(codes[number], reads, makes)


def _tensor(made: bytes, graph: Any, index: int) -> FileTensor:
    from litert_converter import schema_py_generated as schema

    model: Any = schema.Model.GetRootAs(made, 0)
    tensor = graph.Tensors(index)
    grid = tensor.Quantization()
    has_scale = grid is not None and grid.ScaleLength() > 0
    kind = _by_number(schema.TensorType)[tensor.Type()]
    buffer = model.Buffers(tensor.Buffer())
    data = buffer.DataAsNumpy() if buffer.DataLength() else None
    name, rank = tensor.Name().decode(), tensor.ShapeLength()
    return FileTensor(name, kind, has_scale, data, rank)
