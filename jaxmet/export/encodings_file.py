"""A float ONNX file with its grids beside it, as AIMET's encodings."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxmet.engine.backend.onnx_lowering import WrittenGrid
from jaxmet.engine.program.calls import Apply
from jaxmet.export.encodings_reader import VERSIONS
from jaxmet.export.onnx_file import lowered
from jaxmet.export.onnx_graph import OnnxGraph, attribute, nodes_of, redirect
from jaxmet.export.onnx_passes import fused
from jaxmet.tree.checks import check_choices, check_flags
from jaxmet.tree.host_rounding import repeated
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.writing import check_free, writable, written

WRITER = "export.encodings"


class _Encoding(NamedTuple):
    name: str
    kind: str
    bits: int
    symmetric: bool
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None
    block_size: int | None


def encodings(
    folder: str | os.PathLike[str],
    apply: Apply,
    params: Any,
    quantizers: Quantizers,
    *inputs: Any,
    version: Literal["2.0.0", "1.0.0", "0.6.1"] = "2.0.0",
    batch: str = "dynamic",
    overwrite: bool = False,
    **kwargs: Any,
) -> Table:
    r"""Write a float ONNX file and its grids: what AIMET and the tools after it read.

    `model.onnx` is the model in float, its weights and biases already on their grids, so that
    whoever rounds them gets these integers; `model.encodings` has the grid of each weight, by the
    name of its initializer, and of each value that enters a quantizer. Values have the names of the
    nodes of `jm.trace`, weights those of the parameters. Biases have no entry: they are
    int32 at $s_x s_w$ in integer runtimes. The file's offset is $-z$, less $2^{b-1}$ for a
    signed grid, in versions 0.6.1 and 1.0.0. Scales are float32 written as decimals of float64:
    reading gives the same bits. A signed grid of AIMET has one integer more at its low end
    than a narrow one has here.

    It needs `pip install '.[onnx]'`.

    Args:
        folder: where the two files go.
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        params: its parameters: any tree that jaxmet makes.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        *inputs: example inputs, or `jax.ShapeDtypeStruct`s of them.
        version: of the encodings; default '2.0.0', which alone says axes and has blocks.
        batch: 'dynamic' (the default), the first axis of every input has any size, or 'fixed'.
        overwrite: whether existing files are replaced; default False.
        **kwargs: keyword arguments for the model.

    Returns:
        A table with one row per grid.

    Raises:
        ValueError: for files that exist, for blocks in an older version, and for what
            `jm.export.onnx` refuses; ImportError without the extra.

    >>> jm.export.encodings("folder", apply, params, quantizers, images[:1])
    """
    check_flags(WRITER, overwrite=overwrite)
    check_choices(WRITER, version=(version, VERSIONS))
    paths = []
    if isinstance(folder, str | os.PathLike):
        paths = [Path(folder) / f"model.{end}" for end in ("onnx", "encodings")]
    else:
        writable(folder, WRITER)  # says what it is
    paths = [writable(path, WRITER) for path in paths]
    for path in paths:
        check_free(path, overwrite, WRITER)
    model, grids = lowered(WRITER, apply, params, quantizers, inputs, batch, 21, kwargs)
    model = fused(model, integers=False)
    found = list(_taken_out(OnnxGraph(model), grids))
    blocks = [e.name for e in found if e.block_size is not None]
    if blocks and version != "2.0.0":
        raise ValueError(
            f"jaxmet.{WRITER}: {blocks[0]!r} has blocks, which version {version} has no place "
            "for. Use version='2.0.0'."
        )
    import onnx

    onnx.checker.check_model(model)
    text = json.dumps(_WRITERS[version](found), indent=1)
    written(paths[0], lambda f: f.write(model.SerializeToString()))
    written(paths[1], lambda f: f.write(text.encode()))
    columns = {
        "tensor": [e.name for e in found],
        "kind": [e.kind for e in found],
        "bits": [e.bits for e in found],
        "symmetric": ["yes" if e.symmetric else "no" for e in found],
        "scales": [e.scale.size for e in found],
    }
    return Table(columns, title=f"{WRITER}: {len(found)} grids, version {version}")


def _taken_out(
    graph: OnnxGraph, grids: Mapping[str, WrittenGrid]
) -> Iterator[_Encoding]:
    """Every pair of operations out of the graph, and the grid that it was."""
    seen: dict[str, tuple[Any, ...]] = {}
    for node in nodes_of(graph, "DequantizeLinear"):
        scale, zero = (graph.constant(n) for n in (*node.input[1:], "")[:2])
        given = grids.get(node.input[1])
        constant = graph.constant(node.input[0])
        if scale is None or (given is None and constant is None):
            raise ValueError(
                f"jaxmet.{WRITER}: a quantizer lies inside a loop or a branch, where its grid is "
                "no constant. Export the model without it."
            )
        zero = np.zeros(scale.shape, np.int64) if zero is None else np.asarray(zero)
        zero = zero.astype(np.int64)
        if scale.size == 1:
            scale, zero = scale.reshape(()), zero.reshape(())
        block = attribute(node, "block_size") or None
        axis = attribute(node, "axis", 1) if scale.size > 1 else None
        out = node.output[0]
        if constant is not None:
            name = given.owner if given is not None else f"{out}_bias"
            name = graph.add_constant(
                name or out, _floats(constant, scale, zero, axis, block)
            )
            graph.replace(out, name)
        else:
            first = graph.producers[node.input[0]]
            while first.op_type != "QuantizeLinear":
                first = graph.producers[first.input[0]]
            name = first.input[0]
            if out not in graph.outputs:
                graph.replace(out, name)
            elif name in graph.producers and name not in graph.outputs:
                graph.graph.node.remove(node)
                graph.read()
                producer = graph.producers[name]
                producer.output[list(producer.output).index(name)] = out
                graph.replace(name, out)
                name = out
            else:
                copied = graph.insert(node, "Identity", name)
                redirect(graph, out, copied)
        graph.prune()
        if given is None:
            continue
        key = (scale.tobytes(), zero.tobytes(), given.low, given.high)
        if seen.setdefault(name, key) != key:
            raise ValueError(
                f"jaxmet.{WRITER}: {given.owner!r} has two grids in a row, and one tensor has "
                "one grid there. Switch one off: quantizers.set(name, enabled=False)."
            )
        if constant is None:
            renamed = graph.rename(name, given.owner)
            seen[renamed] = seen.pop(name)
            name = renamed
        yield _Encoding(
            name,
            "activation" if constant is None else "weight",
            (given.high - given.low).bit_length(),
            given.low < 0,
            scale.astype(np.float32),
            zero - given.shift,
            None if axis is None else int(axis),
            block,
        )


def _floats(
    integers: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    axis: int | None,
    block: int | None,
) -> np.ndarray:
    """What integers stand for, in float32 as DequantizeLinear computes it."""
    if axis is not None and block is None:
        sizes = [-1 if i == axis % integers.ndim else 1 for i in range(integers.ndim)]
        scale, zero = scale.reshape(sizes), zero.reshape(sizes)
    scale, zero = (repeated(a, integers.shape, block) for a in (scale, zero))
    return (integers.astype(np.int64) - zero).astype(np.float32) * scale


def _offsets(e: _Encoding) -> list[int]:
    least = 2 ** (e.bits - 1) if e.symmetric else 0
    return [-int(z) - least for z in np.broadcast_to(e.zero_point, e.scale.shape).flat]


def _scales(e: _Encoding) -> list[float]:
    return [float(s) for s in e.scale.flat]


def _version_2(found: list[_Encoding]) -> dict[str, Any]:
    entries = []
    for e in found:
        kind = f"{'int' if e.symmetric else 'uint'}{e.bits}"
        entry: dict[str, Any] = {"name": e.name, "output_dtype": kind}
        entry["y_scale"] = e.scale.astype(np.float64).tolist()
        if np.any(e.zero_point):
            zero = np.broadcast_to(e.zero_point, e.scale.shape)
            entry["y_zero_point"] = zero.tolist()
        if e.axis is not None:
            entry["axis"] = e.axis
        if e.block_size is not None:
            entry["block_size"] = e.block_size
        entries.append(entry)
    return {"version": "2.0.0", "encodings": entries}


def _version_1(found: list[_Encoding]) -> dict[str, Any]:
    groups: dict[str, list[Any]] = {"activation": [], "weight": []}
    for e in found:
        groups[e.kind].append(
            {
                "name": e.name,
                "dtype": "INT",
                "bw": e.bits,
                "is_sym": e.symmetric,
                "scale": _scales(e),
                "offset": _offsets(e),
                "enc_type": "PER_TENSOR" if e.axis is None else "PER_CHANNEL",
            }
        )
    return _with_arguments("1.0.0", found, groups)


def _version_0(found: list[_Encoding]) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {"activation": {}, "weight": {}}
    for e in found:
        most = 2**e.bits - 1
        groups[e.kind][e.name] = [
            {
                "bitwidth": e.bits,
                "dtype": "int",
                "is_symmetric": str(e.symmetric),
                "max": scale * (offset + most),
                "min": scale * offset,
                "offset": offset,
                "scale": scale,
            }
            for scale, offset in zip(_scales(e), _offsets(e), strict=True)
        ]
    return _with_arguments("0.6.1", found, groups)


def _with_arguments(
    version: str, found: list[_Encoding], groups: Mapping[str, Any]
) -> dict[str, Any]:
    bits = {e.kind: e.bits for e in reversed(found)}
    return {
        "version": version,
        "activation_encodings": groups["activation"],
        "param_encodings": groups["weight"],
        "excluded_layers": [],
        "quantizer_args": {
            "activation_bitwidth": bits.get("activation", 8),
            "param_bitwidth": bits.get("weight", 8),
            "dtype": "int",
            "is_symmetric": all(e.symmetric for e in found if e.kind == "weight"),
            "per_channel_quantization": any(e.axis is not None for e in found),
            "quant_scheme": "min_max",
        },
    }


_WRITERS = dict(zip(VERSIONS, (_version_2, _version_1, _version_0), strict=True))
