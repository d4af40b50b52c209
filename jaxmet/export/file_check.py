"""A file that was written, run and compared with the simulation and with float."""

import dataclasses
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.frontends import check_apply, refuse_module
from jaxmet.engine.graph.graph import Graph, fitted, trace
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.lifted import lifted
from jaxmet.engine.run.replay import Run, evaluate
from jaxmet.export.flat_model import input_names, leaf_names
from jaxmet.export.litert_file import litert
from jaxmet.export.onnx_file import onnx
from jaxmet.export.runtimes import (
    ONNX_RUNTIMES,
    LayerIntegers,
    RunningFile,
    has_vnni,
    opened,
    said_by,
)
from jaxmet.layers.arguments import accepting
from jaxmet.layers.fake_quantized import (
    entered_operands,
    fake_quantize_operands,
    fake_quantize_output,
)
from jaxmet.transforms.simulate import round_weights, simulate
from jaxmet.tree.batches import Batches, as_batches
from jaxmet.tree.checks import check_choices, check_flags
from jaxmet.tree.leaves import dense, is_quantized
from jaxmet.tree.named_leaves import named_leaves
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.writing import readable

CALLER = "export.check"
PAIRS = 20
"""At most so many runs of both files are timed, and none is begun after `SECONDS`."""
SECONDS = 3.0


def check(
    path: str | os.PathLike[str],
    apply: Apply,
    params: Any,
    quantizers: Quantizers,
    batches: Any,
    *,
    against_float: bool = True,
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime",
    **kwargs: Any,
) -> Table:
    r"""Run a file that jaxmet wrote: what it computes, its size and its speed.

    The first rows are the outputs of the file: how many of their values are those of
    `jm.simulate(apply, quantizers)`, how many are further from them than one step of the last grid,
    and by how many steps at most; how often the largest of the last axis is the same; and the
    SQNR of both, 10·log10(Σ y² / Σ (y − ŷ)²), against the float model y.

    The other rows, of ONNX files, are the layers, each by itself: the simulation computes one layer
    from the integers that the runtime has before it, and its result is compared with the integers
    that the runtime has after it. A difference there is the layer's own. In a deep network a few
    such differences, at the edge of two steps, move others after them, so that the outputs differ
    more; the SQNR then says whether anything is lost.

    Sizes and times are relative to the float file of the same tree, which is written to a temporary
    folder; of `jm.export.stablehlo` to the parameters and to JAX. Times are medians of pairs on the
    first batch, with the runtime's own number of threads.

    It needs the extra that wrote the file, and for OpenVINO the extra `openvino`. OpenVINO shows no
    layers, and is told to compute in float32 what is not in integers. On a processor without VNNI
    it computes weights of 8 bits wrongly, and `check` warns.

    Args:
        path: a file of `jm.export.onnx` (.onnx), `jm.export.litert` (.tflite) or
            `jm.export.stablehlo` (.jax).
        apply: the model that was written, a pure function `apply(params, *inputs, **kwargs)`.
        params: its parameters, of floats or of `jm.quantize`.
        quantizers: its quantizers.
        batches: the data: `jm.batched(…)`, or an iterable of batches; a tuple is the inputs
            of the model.
        against_float: whether a float file is made, and both are timed; default True.
        runtime: what runs an ONNX file, 'onnxruntime' (the default) or 'openvino'.
        **kwargs: keyword arguments for the model, as they were when it was written.

    Returns:
        A table with a row for each output, and one for each quantized node that the file shows.

    Raises:
        ValueError: for a file of another kind, for one whose inputs or layers are not those of
            the model, of another batch size, and for one that its runtime does not load;
            FileNotFoundError where there is none; ImportError without the extra.

    >>> jm.export.check("model.onnx", apply, params, quantizers, batches)
    """
    check_flags(CALLER, against_float=against_float)
    check_choices(CALLER, runtime=(runtime, ONNX_RUNTIMES))
    path = readable(path, CALLER, "jm.export.onnx")
    if runtime == "openvino" and path.suffix != ".onnx":
        raise ValueError(
            f"jaxmet.{CALLER}: runtime is 'openvino', and {path} is no ONNX file, by its name. "
            "Leave runtime out."
        )
    refuse_module(apply, params, CALLER)
    check_apply(apply, CALLER)
    check_are_quantizers(quantizers, CALLER)
    data = as_batches(batches, CALLER)
    cure = "Give batches of the inputs that the file was written for."
    with accepting(data.first, CALLER, apply, params, kwargs, cure=cure):
        graph = trace(apply, params, *data.first, **kwargs)
    fitted(params, graph, CALLER)
    quantizers.leaves(params, CALLER)
    shown = jax.eval_shape(partial(lifted(apply), **kwargs), params, *data.first)
    outputs = leaf_names(shown, "output")
    if runtime == "openvino" and not has_vnni():
        _warn_of_saturation(quantizers)
    file = opened(path, input_names(data.first), outputs, CALLER, runtime)
    steps = _steps(graph, quantizers, outputs)
    run = _Models(apply, params, quantizers, kwargs)
    found = _compared(file, run, data, outputs, steps)
    ratios = {}
    if against_float:
        ratios = _against_float(path, file, run, data.first, runtime)
    layers = [n.name for n in graph.nodes if n.name in found and n.name not in outputs]
    rows = [found[n].row(n, steps=n in steps, ratios=ratios) for n in outputs]
    rows += [found[n].row(n) for n in layers]
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    return Table(columns, title=f"{CALLER}: {path.name} in {file.runtime}")


def _warn_of_saturation(quantizers: Quantizers) -> None:
    """Without VNNI OpenVINO has sums of two products of 8 bits in 16 bits."""
    bits = (q.bits for q in quantizers.weights.values() if q.product is None)
    if any(b == 8 for b in bits):
        warnings.warn(
            f"jaxmet.{CALLER}: this processor has no VNNI, and on such OpenVINO computes weights "
            "of 8 bits wrongly: sums of two products saturate. Check the file on a processor "
            "with VNNI, or calibrate with weight_bits=7.",
            stacklevel=3,
        )


# What JAX computes


class _Models:
    """The model in float, simulated, and layer by layer from the integers of a file."""

    def __init__(
        self, apply: Apply, params: Any, quantizers: Quantizers, kwargs: Any
    ) -> None:
        self.apply, self.params, self.kwargs = apply, params, kwargs
        stored = any(map(is_quantized, named_leaves(params).values()))
        self._rounded = params if stored else round_weights(params, quantizers)
        simulated = simulate(apply, quantizers, weights=False)

        def layers(
            params: Any, values: Mapping[str, LayerIntegers], *inputs: Any
        ) -> Any:
            run = evaluate(apply, _after_the_file(quantizers, values))
            found = run(params, *inputs, **kwargs)[1]
            return {name: parts for x in found.values() for name, parts in x.items()}

        self._exact = jax.jit(partial(lifted(apply), **kwargs))
        self._simulated = jax.jit(partial(simulated, **kwargs))
        self._layers = jax.jit(layers)

    def exact(self, *inputs: Any) -> list[np.ndarray]:
        return _arrays(self._exact(self.params, *inputs))

    def simulated(self, *inputs: Any) -> list[np.ndarray]:
        return _arrays(self._simulated(self._rounded, *inputs))

    def layers(
        self, values: Mapping[str, LayerIntegers], *inputs: Any
    ) -> dict[str, Any]:
        """How far the file is from what each layer makes of the file's own integers."""
        return jax.device_get(self._layers(self._rounded, values, *inputs))


def _arrays(tree: Any) -> list[np.ndarray]:
    """The leaves in the types that JAX gives them, as the model of the file was traced."""
    return [np.asarray(jnp.asarray(x)) for x in jax.tree.leaves(tree)]


def _after_the_file(
    quantizers: Quantizers, values: Mapping[str, LayerIntegers]
) -> Callable[[Node, Run, tuple[Any, ...]], tuple[Any, Any]]:
    """A hook that simulates a node, and goes on with what the file has there.

    That is the node's result, or what enters a product, where that alone is quantized.
    """
    compared: set[str] = set()

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        found, read = {}, [*fake_quantize_operands(node, run, operands, quantizers)]
        for i, source in entered_operands(node, quantizers).items():
            name = quantizers.owner(source) or source
            if name not in values or values[name].values.shape != read[i].shape:
                continue
            read[i], parts = _beside(values[name], read[i])
            if name not in compared:  # several products may read it
                compared.add(name)
                found[name] = parts
        result = fake_quantize_output(node, run, run(*read), quantizers)
        quantizer = quantizers.activations.get(node.name)
        entering = quantizer is not None and quantizer.products_only
        if node.name in values and not entering:
            given = values[node.name]
            if given.values.shape != result.shape:
                raise ValueError(
                    f"jaxmet.{CALLER}: {node.name!r} has the shape {given.values.shape} in the "
                    f"file and {result.shape} in the model. Give the model that the file was "
                    "written from."
                )
            result, found[node.name] = _beside(given, result)
        return result, found or None

    return hook


def _beside(given: LayerIntegers, simulated: Any) -> tuple[Any, tuple[Any, ...]]:
    """The numbers that integers of the file stand for, and how far those simulated are."""
    q, scale, zero_point = (jnp.asarray(a, jnp.float32) for a in given)
    seen = ((q - zero_point) * scale).astype(simulated.dtype)
    apart = jnp.round(jnp.abs(seen - simulated) / scale.astype(simulated.dtype))
    return seen, (jnp.sum(apart == 0), jnp.sum(apart <= 1), jnp.max(apart), q.size)


# The comparison


@dataclasses.dataclass
class _Parity:
    """How near values of a file are to those of the simulation, over all batches."""

    values: int = 0
    same: int = 0
    near: int = 0
    most: float = 0.0
    rows: int = 0
    same_top: int = 0
    power: float = 0.0
    noise: float = 0.0
    simulated_noise: float = 0.0

    def add(self, same: Any, near: Any, most: Any, values: Any) -> None:
        self.values += int(values)
        self.same += int(same)
        self.near += int(near)
        self.most = max(self.most, float(most))

    def add_outputs(self, made: Any, wanted: Any, exact: Any, step: Any) -> None:
        apart = np.abs(made.astype(np.float64) - wanted)
        apart = np.rint(apart / step) if step is not None else apart != 0
        self.add(
            np.sum(apart == 0), np.sum(apart <= 1), apart.max(initial=0), apart.size
        )
        if made.ndim > 1 and made.shape[-1] > 1:
            top = made.argmax(-1) == wanted.argmax(-1)
            self.rows, self.same_top = (
                self.rows + top.size,
                self.same_top + int(top.sum()),
            )
        exact = exact.astype(np.float64)
        self.power += float(np.sum(exact**2))
        self.noise += float(np.sum((exact - made) ** 2))
        self.simulated_noise += float(np.sum((exact - wanted) ** 2))

    def row(
        self,
        name: str,
        *,
        steps: bool = True,
        ratios: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        share = lambda part, whole: 100 * part / whole if whole else None
        return {
            "value": name,
            "values": self.values,
            "identical (%)": share(self.same, self.values),
            "differing": self.values - self.same,
            "beyond one step": self.values - self.near if steps else None,
            "largest (steps)": self.most if steps else None,
            "top-1 (%)": share(self.same_top, self.rows),
            "SQNR (dB)": _decibel(self.power, self.noise),
            "simulated (dB)": _decibel(self.power, self.simulated_noise),
            "size / float": (ratios or {}).get("size"),
            "time / float": (ratios or {}).get("time"),
        }


def _decibel(power: float, noise: float) -> float | None:
    return 10 * float(np.log10(power / noise)) if power and noise else None


def _compared(
    file: RunningFile,
    run: _Models,
    data: Batches,
    outputs: Sequence[str],
    steps: Mapping[str, float],
) -> dict[str, _Parity]:
    """The outputs and the layers of a file beside those of the simulation."""
    found: dict[str, _Parity] = defaultdict(_Parity)
    for inputs in data:
        arrays = dict(zip(input_names(inputs), _arrays(inputs), strict=True))
        made = _ran(file.run, arrays)
        parts = zip(
            outputs, made, run.simulated(*inputs), run.exact(*inputs), strict=True
        )
        for name, here, wanted, exact in parts:
            found[name].add_outputs(here, wanted, exact, steps.get(name))
        if file.layers is None:
            continue
        seen = run.layers(file.layers(arrays), *inputs)
        for name, parts in seen.items():
            found[name].add(*parts)
    return found


def _ran(run: Callable[[Any], Any], arrays: Mapping[str, np.ndarray]) -> Any:
    try:
        return run(arrays)
    except Exception as error:  # each runtime has its own
        sizes = ", ".join(str(a.shape) for a in arrays.values())
        raise ValueError(
            f"jaxmet.{CALLER}: the file does not run on a batch of shape {sizes} "
            f"({said_by(error)}). Give batches of the size and dtype that it was written for, "
            "all of them: jm.batched(x[:n], batch_size)."
        ) from error


def _steps(
    graph: Graph, quantizers: Quantizers, outputs: Sequence[str]
) -> dict[str, float]:
    """The step of the grid on which each output lies, where it lies on one."""
    ends = [n for n in graph.nodes if n.kind == "output"]
    found = {}
    for name, node in zip(outputs, ends, strict=len(ends) == len(outputs)):
        source = node.inputs[0].node if len(node.inputs) == 1 else None
        if source is None or node.inputs[0].affine != (1.0, 0.0):
            continue
        quantizer = quantizers.activation(source)
        scale = None if quantizer is None else np.asarray(quantizer.grid(None)[0])
        if scale is not None and scale.size == 1:
            found[name] = float(scale.ravel()[0])
    return found


# Size and time


def _against_float(
    path: Path, file: RunningFile, run: _Models, inputs: tuple[Any, ...], runtime: str
) -> dict[str, float]:
    """The size and the time of the file over those of the float one."""
    arrays = dict(zip(input_names(inputs), _arrays(inputs), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / f"float{path.suffix}"
        given = run.apply, run.params, None, *inputs
        if path.suffix == ".onnx":
            batch = "fixed" if file.fixed else "dynamic"
            onnx(other, *given, batch=batch, **run.kwargs)
        elif path.suffix == ".tflite":
            litert(other, *given, io="float", **run.kwargs)
        else:
            leaves = map(dense, named_leaves(run.params).values())
            size = sum(np.asarray(a).nbytes for a in leaves)
            times = _times(lambda: file.run(arrays), lambda: run.exact(*inputs))
            return {"size": path.stat().st_size / size, "time": times}
        floats = opened(other, file.inputs, file.outputs, CALLER, runtime)
        times = _times(lambda: file.run(arrays), lambda: floats.run(arrays))
        return {"size": path.stat().st_size / other.stat().st_size, "time": times}


def _times(one: Callable[[], Any], two: Callable[[], Any]) -> float:
    """The time of one function over that of another, run in turn after a first time."""
    one()
    two()
    ratios: list[float] = []
    begun = time.perf_counter()
    while len(ratios) < PAIRS and (not ratios or time.perf_counter() - begun < SECONDS):
        start = time.perf_counter()
        one()
        between = time.perf_counter()
        two()
        ratios.append((between - start) / (time.perf_counter() - between))
    return float(np.median(ratios))
