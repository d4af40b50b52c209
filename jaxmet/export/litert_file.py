"""A model and its quantizers as a LiteRT file (.tflite) in integers."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmet.engine.backend.litert_lowering import litert_text
from jaxmet.engine.graph.graph import trace
from jaxmet.engine.program.calls import Apply
from jaxmet.export.flat_model import FlatModel, flat_model
from jaxmet.export.litert_interface import integer_interface
from jaxmet.export.litert_requantized import requantized
from jaxmet.export.litert_table import check_computable, layer_of, litert_table
from jaxmet.transforms.simulate import round_weights
from jaxmet.tree.checks import check_choices, check_flags
from jaxmet.tree.packages import package
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.writing import check_free, writable, written

CALLER = "export.litert"
INSTALL = "'.[litert]'"
CONVERTER = "0.5.0"
"""The one version of litert-converter whose calls for integers are known."""


def litert(
    path: str | os.PathLike[str],
    apply: Apply,
    params: Any,
    quantizers: Quantizers | None,
    *inputs: Any,
    io: str = "int8",
    overwrite: bool = False,
    **kwargs: Any,
) -> Table:
    r"""Write the model as a LiteRT file (.tflite), in integers where there are quantizers.

    The file computes what `jm.simulate(apply, quantizers)(params, *inputs)` computes: weights are
    int8, one scale per channel, values int8 (uint8 less 128), biases int32 at $s_x s_w$. Norms
    that were folded are the biases that they stand for. TensorFlow is not needed:
    `pip install '.[litert]'` installs LiteRT's own converter and its runtime.

    With another version of the converter than the one whose integers are known, or where that
    refuses the model, the file is made of a float one by ai-edge-quantizer, if it is installed,
    with the ranges of the quantizers: 8 bits and a scale per channel only. The table says so.

    The batch size is that of the examples.

    Args:
        path: the file to write.
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        params: its parameters: any tree that jaxmet makes.
        quantizers: the quantizers of `jm.calibrate` for this tree; None (with io='float') for
            the float model.
        *inputs: example inputs, or `jax.ShapeDtypeStruct`s of them, of the batch size that the
            file will have.
        io: 'int8' (the default), inputs and outputs are the integers of their quantizers, or
            'float', the file quantizes inputs and dequantizes outputs.
        overwrite: whether an existing file is replaced; default False.
        **kwargs: keyword arguments for the model.

    Returns:
        A table with one row per operation that computes: whether it is in integers, and if not,
        what is in float.

    Raises:
        ValueError: for a path that exists, for sizes that are no numbers, and for quantizers that
            LiteRT has no integers for (in loops, of blocks, of 16 bits); ImportError without the
            extra, or with another version of the converter.

    >>> jm.export.litert("model.tflite", apply, params, quantizers, images[:1])
    """
    check_flags(CALLER, overwrite=overwrite)
    check_choices(CALLER, io=(io, ("int8", "float")))
    path = writable(path, CALLER)
    check_free(path, overwrite, CALLER)
    is_known = _check_converter(quantizers)
    _check_sizes(inputs)
    flat = partial(flat_model, CALLER, apply, batch="fixed", named=True)
    model = flat(params, quantizers, inputs, kwargs)
    made, how = None, ""
    if is_known:
        try:
            made = _file(model, io)
        except ValueError:
            if quantizers is None or not _can_requantize():
                raise
    if made is None:
        assert quantizers is not None
        graph = trace(apply, params, *inputs, **kwargs)
        rounded = round_weights(params, quantizers)
        floats = _file(flat(rounded, None, inputs, kwargs), "float")
        leaves = dict(zip(model.inputs, jax.tree.leaves(inputs), strict=True))
        made = requantized(floats, graph, quantizers, leaves, CALLER, io)
        how = " by ai-edge-quantizer"
    written(path, lambda f: f.write(made))
    return litert_table(made, CALLER + how)


def _file(model: FlatModel, io: str) -> bytes:
    """What the converter makes of a model."""
    text = litert_text(model.function, model.shapes, CALLER)
    made = _converted(text, model.inputs, model.outputs)
    check_computable(made, CALLER)
    if io == "int8":
        made = integer_interface(made, CALLER)
    _check_loads(made)
    return made


def _check_converter(quantizers: Quantizers | None) -> bool:
    """Whether the converter that is installed is the one whose integers are known."""
    for name in ("ai_edge_litert", "litert_converter"):
        package(name, CALLER, INSTALL)
    found = importlib.metadata.version("litert-converter")
    if found == CONVERTER or quantizers is None:
        return True
    if not _can_requantize():
        raise ImportError(
            f"jaxmet.{CALLER}: litert-converter is {found}, and only with {CONVERTER} are its "
            f"integers known. Install it: pip install {INSTALL}; or pip install "
            "ai-edge-quantizer, which makes them of a float file."
        )
    return False


def _can_requantize() -> bool:
    return importlib.util.find_spec("ai_edge_quantizer") is not None


def _check_sizes(inputs: Any) -> None:
    """LiteRT's converter ends the process where a size is a symbol."""
    for shape in map(np.shape, jax.tree.leaves(inputs)):
        if not all(isinstance(n, int | np.integer) for n in shape):
            raise ValueError(
                f"jaxmet.{CALLER}: an example has the shape {shape}, and a LiteRT file has a "
                "fixed batch size. Give examples of the size that the file will have."
            )


def _converted(text: str, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """The file of a StableHLO text."""
    package = "litert_converter"  # it has no types
    converter: Any = importlib.import_module(f"{package}.converter_api_ext")
    ir: Any = importlib.import_module(f"{package}.mlir.ir")
    passes: Any = importlib.import_module(f"{package}.mlir.passmanager")
    config = converter.ConvertToTFLConfig()
    config.model_origin_framework = "PYTORCH"  # else it keeps the calls as calls
    config.qdq_conversion_mode = "DYNAMIC"  # inputs and outputs as they are
    config.strict_qdq_mode = True  # else it makes operations of integers and floats
    context = ir.Context()
    converter.prepare_mlir_context(context)
    try:
        with context, ir.Location.unknown():
            module = ir.Module.parse(text)
            converter.set_signature(
                module.operation, "serving_default", [*inputs], [*outputs]
            )
            converter.run_convert_to_tfl_passes(module, passes.PassManager(), config)
            return converter.export_flatbuffer_to_bytes(module.operation)
    except Exception as error:
        raise ValueError(
            f"jaxmet.{CALLER}: LiteRT's converter refuses the model "
            f"({str(error).strip().splitlines()[0]}). Write the part that it names otherwise, or "
            "use jm.export.onnx."
        ) from error


def _check_loads(made: bytes) -> None:
    """Refuse what the converter made and the runtime cannot run."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    try:
        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        loaded = Interpreter(model_content=made, experimental_op_resolver_type=plain)
        loaded.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        said = str(error).strip()
        number = re.search(r"Node number (\d+)", said)
        layer = None if number is None else layer_of(made, int(number[1]))
        where = f" at {layer!r}" if layer else ""
        raise ValueError(
            f"jaxmet.{CALLER}: LiteRT cannot run the file that its converter made{where} "
            f"({said.splitlines()[0]}). Calibrate with jm.QuantConfig.for_target('litert'), leave "
            "that layer in float (quantizers.set(name, enabled=False)), write it otherwise, or use "
            "jm.export.onnx."
        ) from error
