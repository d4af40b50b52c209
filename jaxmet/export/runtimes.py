"""A file in the runtime that runs it: ONNX, LiteRT, or an artefact of `jax.export`."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jaxmet.export.onnx_graph import INTEGERS, OnnxGraph, nodes_of
from jaxmet.tree.packages import package


class LayerIntegers(NamedTuple):
    """What a file computes at one layer: integers and their grid."""

    values: Any
    scale: Any
    zero_point: Any


class RunningFile(NamedTuple):
    """What runs a file, and its own names.

    `run` and `layers` take inputs by name. `layers` returns the integers of each layer, where the
    runtime shows what lies between inputs and outputs. `fixed` says that the batch size is the
    file's.
    """

    runtime: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    run: Callable[[Mapping[str, Any]], list[Any]]
    layers: Callable[[Mapping[str, Any]], dict[str, LayerIntegers]] | None = None
    fixed: bool = False


ONNX_RUNTIMES = ("onnxruntime", "openvino")
"""What runs ONNX files."""


def opened(
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    caller: str,
    runtime: str = "onnxruntime",
) -> RunningFile:
    """The file under `path` in its runtime, with the names of the model's inputs and outputs.

    Args:
        path: the file.
        inputs: the names of the model's inputs.
        outputs: the names of its outputs.
        caller: the public function that opens it, for errors.
        runtime: what runs it if it is an ONNX file.

    Raises:
        ValueError: for a file of another kind, and for one that its runtime does not load.
    """
    onnx = _openvino if runtime == "openvino" else _onnx
    openers = {".onnx": onnx, ".tflite": _litert, ".jax": _jax}
    if path.suffix not in openers:
        raise ValueError(
            f"jaxmet.{caller}: {path} is none of {', '.join(openers)}, by its name. Give a "
            "file of jm.export.onnx, jm.export.litert or jm.export.stablehlo."
        )
    try:
        file = openers[path.suffix](path, inputs, outputs, caller)
    except ImportError:
        raise
    except Exception as error:  # each runtime has its own
        raise ValueError(
            f"jaxmet.{caller}: {path} cannot be loaded ({said_by(error)}). Write it again."
        ) from error
    if sorted(file.inputs) != sorted(inputs):
        raise ValueError(
            f"jaxmet.{caller}: the file has the inputs {', '.join(file.inputs)}, and the model "
            f"{', '.join(inputs)}. Give the model and the batches that it was written for."
        )
    return file


LONGEST = 400


def said_by(error: Exception) -> str:
    """What a runtime's error says, without the lines that say where in the runtime."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith("Exception from")]
    text = " ".join(kept) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _onnx(
    path: Path, inputs: Sequence[str], outputs: Sequence[str], caller: str
) -> RunningFile:
    del inputs
    install = "'.[onnx]'"
    library, onnx = (package(n, caller, install) for n in ("onnxruntime", "onnx"))
    content = path.read_bytes()
    model = onnx.load_from_string(content)
    whole = _session(library, content)
    grids = show_integers(model)

    def run(arrays: Mapping[str, Any]) -> list[Any]:
        return whole.run([*outputs], dict(arrays))

    shown = _session(library, model.SerializeToString()) if grids else None

    def layers(arrays: Mapping[str, Any]) -> dict[str, LayerIntegers]:
        if shown is None:
            return {}
        made = shown.run([*grids], dict(arrays))
        return {
            name.removesuffix(INTEGERS): LayerIntegers(value, *grid)
            for (name, grid), value in zip(grids.items(), made, strict=True)
        }

    sizes = [s for i in whole.get_inputs() for s in i.shape[:1]]
    fixed = any(isinstance(size, int) for size in sizes)
    names = [i.name for i in whole.get_inputs()]
    return RunningFile(_version("onnxruntime"), names, outputs, run, layers, fixed)


def _openvino(
    path: Path, inputs: Sequence[str], outputs: Sequence[str], caller: str
) -> RunningFile:
    """An ONNX file in OpenVINO on the processor, which shows no layers: its fusion would change.

    Where the processor has bfloat16, OpenVINO computes in it by default.
    """
    del inputs
    library = package("openvino", caller, "'.[openvino]'")
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    model = library.Core().compile_model(path, "CPU", options)

    dtypes = {i.any_name: np.dtype(i.element_type.to_dtype()) for i in model.inputs}

    def run(arrays: Mapping[str, Any]) -> list[Any]:
        for name, array in arrays.items():  # OpenVINO would convert it without a word
            if array.dtype != dtypes[name]:
                raise TypeError(f"{name} is {dtypes[name]} there, {array.dtype} here")
        made = model(dict(arrays))
        return [made[name] for name in outputs]

    sizes = [i.partial_shape[0] for i in model.inputs if len(i.partial_shape)]
    fixed = any(size.is_static for size in sizes)
    names = [i.any_name for i in model.inputs]
    return RunningFile(_version("openvino"), names, outputs, run, fixed=fixed)


def show_integers(model: Any) -> dict[str, list[Any]]:
    """Make the integers of all layers outputs of an ONNX model; scale and zero point of each."""
    import onnx

    graph, grids = OnnxGraph(model), {}
    for node in nodes_of(graph, "QuantizeLinear", "Max", "Min"):
        name, source = node.output[0], node
        if not name.endswith(INTEGERS):
            continue
        while source.op_type != "QuantizeLinear":  # before bounds of the integers
            source = graph.producers[source.input[0]]
        grids[name] = [graph.constant(n) for n in source.input[1:3]]
        graph.graph.output.append(onnx.ValueInfoProto(name=name))
    return grids


def _session(library: Any, content: bytes) -> Any:
    options = library.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    make = lambda: library.InferenceSession(content, options, providers=providers)
    if has_vnni():
        return make()
    # Without VNNI sums of two 8-bit products saturate in 16 bits, unless it is told not to;
    # then it loads no file in which one weight is read twice.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return make()
    except Exception:
        options.add_session_config_entry("session.x64quantprecision", "0")
        return make()


def has_vnni() -> bool:
    """Whether an x86 processor is known to add 8-bit products in 32 bits."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "vnni" in flags.read_text()


def _litert(
    path: Path, inputs: Sequence[str], outputs: Sequence[str], caller: str
) -> RunningFile:
    del inputs
    library = package("ai_edge_litert.interpreter", caller, "'.[litert]'")
    interpreter = library.Interpreter(model_path=str(path))
    runner = interpreter.get_signature_runner()
    given, made = runner.get_input_details(), runner.get_output_details()

    def run(arrays: Mapping[str, Any]) -> list[Any]:
        found = runner(**{n: _rounded(x, given[n]) for n, x in arrays.items()})
        return [_plain(found[name], made[name]) for name in outputs]

    return RunningFile(_version("ai-edge-litert"), [*given], outputs, run, fixed=True)


def _rounded(x: Any, details: Any) -> np.ndarray:
    """Floats as the integers of an input of integers."""
    kind = np.dtype(details["dtype"])
    step, zero = details["quantization"]
    if not step or np.issubdtype(np.asarray(x).dtype, np.integer):
        return np.asarray(x, kind)
    ends = np.iinfo(kind)
    return np.clip(np.rint(x / np.float32(step)) + zero, ends.min, ends.max).astype(
        kind
    )


def _plain(x: np.ndarray, details: Any) -> np.ndarray:
    """The integers of an output as floats."""
    step, zero = details["quantization"]
    return (x.astype(np.float32) - zero) * np.float32(step) if step else x


def _jax(
    path: Path, inputs: Sequence[str], outputs: Sequence[str], caller: str
) -> RunningFile:
    package("flatbuffers", caller, "'.[stablehlo]'")
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    call = jax.jit(exported.call)

    def run(arrays: Mapping[str, Any]) -> list[Any]:
        leaves = [arrays[name] for name in inputs]
        positions, keywords = jax.tree.unflatten(exported.in_tree, leaves)
        return [np.asarray(x) for x in jax.tree.leaves(call(*positions, **keywords))]

    sizes = [s.shape[0] for s in exported.in_avals if s.shape]
    fixed = any(isinstance(size, int) for size in sizes)
    count = len(exported.in_avals)  # it has no names
    names = inputs if count == len(inputs) else list(map(str, range(count)))
    return RunningFile(_version("jax"), names, outputs, run, fixed=fixed)


def _version(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"
