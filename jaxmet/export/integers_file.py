"""Each layer's integers and scales as plain arrays: all that code of one's own needs."""

import json
import os
from typing import Any

import numpy as np

from jaxmet.engine.integers.grid_arithmetic import TargetGrid, integer_bounds
from jaxmet.engine.integers.integer_program import IntegerStep
from jaxmet.engine.integers.integer_values import Integers, Total
from jaxmet.engine.program.calls import Apply
from jaxmet.export.flat_model import refuse_dynamic
from jaxmet.export.integer_steps import integer_model, step_table
from jaxmet.tree.checks import check_flags
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.writing import check_free, writable, written

CALLER = "export.integers"


def integers(
    path: str | os.PathLike[str],
    apply: Apply,
    params: Any,
    quantizers: Quantizers,
    *inputs: Any,
    overwrite: bool = False,
    **kwargs: Any,
) -> Table:
    r"""Write each layer's integers, scales and layout as an `.npz`: for C or Verilog of your own.

    For layer L that is computed in integers the file has, as far as the layer has it,
    'L/weight' (int8 or uint8), 'L/bias' (int32 at $s_x s_w$), 'L/multiplier' (float32,
    $s_x s_w / s_y$), 'L/low' and 'L/high' (the bounds of the result's integers), and of each
    value that it reads and of the result 'scale' and 'zero_point', as 'L/input_scale',
    'L/input1_scale', 'L/output_scale'. Vectors go along the output channels. With these
    $q_y = \mathrm{clip}(\mathrm{round}(m\,(\sum (q_x - z_x)\,q_w + b)) + z_y)$, ties to
    even, is the layer, and gives the bits of `jm.lift(apply, quantizers)`.
    A layer whose result is in float (before a GELU, say) has no multiplier, bounds and output
    scale: it is $s_x s_w\,(\sum (q_x - z_x)\,q_w + b)$.

    The text 'operations' is JSON: a list in the order in which they run, each with its
    layer, operation, what it reads and whose grid the result is on, strides, padding,
    dilation, groups and layout, and why it is in float where it is.
    It holds what computes and max pools. Layout operations (reshape, transpose, slice, pad),
    other maxima and minima and float functions that it does not name are not listed, and code
    of your own takes them from the model.

    Jacob et al., [Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference](https://arxiv.org/abs/1712.05877), CVPR 2018.

    Args:
        path: the file to write.
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        params: its parameters: any tree that jaxmet makes, of floats or of `jm.quantize`.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        *inputs: example inputs, or `jax.ShapeDtypeStruct`s of them.
        overwrite: whether an existing file is replaced; default False.
        **kwargs: keyword arguments for the model.

    Returns:
        A table with one row per operation: whether it is in integers, and if not, why.

    Raises:
        ValueError: for a path that exists, and for quantizers of another tree.

    >>> jm.export.integers("layers.npz", apply, params, quantizers, images[:1])
    """
    check_flags(CALLER, overwrite=overwrite)
    path = writable(path, CALLER)
    check_free(path, overwrite, CALLER)
    check_are_quantizers(quantizers, CALLER)
    refuse_dynamic(quantizers, CALLER)
    _, steps = integer_model(CALLER, apply, params, quantizers, inputs, kwargs)
    arrays: dict[str, np.ndarray] = {}
    operations = []
    for name, step in zip(_names(steps), steps, strict=True):
        operations.append(_operation(name, step))
        for key, array in _arrays(step).items():
            arrays[f"{name}/{key}"] = array
    arrays["operations"] = np.array(json.dumps(operations))
    written(path, lambda f: np.savez(f, allow_pickle=False, **arrays))
    return step_table(steps, CALLER)


def _names(steps: list[IntegerStep]) -> list[str]:
    """Layers' names, told apart where several operations have one."""
    found: list[str] = []
    for step in steps:
        name, number = step.layer, 1
        while name in found:
            number += 1
            name = f"{step.layer}:{number}"
        found.append(name)
    return found


def _operation(name: str, step: IntegerStep) -> dict[str, Any]:
    found: dict[str, Any] = {"layer": name, "operation": step.operation}
    if step.why is not None:
        return found | {"float": step.why}
    origin = step.origin
    if origin is None:
        return found
    found["reads"] = [x.layer for x in origin.reads if not x.fixed]
    found["result"] = None if step.result is None else step.result.layer
    params = origin.params
    if origin.equation == "conv_general_dilated":
        spec = params["dimension_numbers"]
        found |= {
            "strides": list(params["window_strides"]),
            "padding": [[int(a), int(b)] for a, b in params["padding"]],
            "dilation": list(params["rhs_dilation"]),
            "input_dilation": list(params["lhs_dilation"]),
            "groups": params["feature_group_count"],
            "layouts": [
                _layout(spec.lhs_spec, "NC"),
                _layout(spec.rhs_spec, "OI"),
                _layout(spec.out_spec, "NC"),
            ],
        }
    elif origin.equation == "dot_general":
        (left, right), (batch, other) = params["dimension_numbers"]
        found["summed"] = [list(left), list(right)]
        found["batched"] = [list(batch), list(other)]
    elif "axes" in params:
        found["axes"] = list(params["axes"])
    elif "window_dimensions" in params:
        found["window"] = list(params["window_dimensions"])
        found["strides"] = list(params["window_strides"])
        found["padding"] = [list(pair) for pair in params["padding"]]
    return found


def _layout(spec: tuple[int, ...], first: str) -> str:
    """The letters of the axes in their order, as in NHWC."""
    letters = [""] * len(spec)
    space = "DHW"[-(len(spec) - 2) :] if len(spec) < 6 else "S" * (len(spec) - 2)
    for letter, axis in zip((*first, *space), spec, strict=True):
        letters[axis] = letter
    return "".join(letters)


def _arrays(step: IntegerStep) -> dict[str, np.ndarray]:
    origin, value = step.origin, step.value
    if step.why is not None or origin is None:
        return {}
    found: dict[str, Any] = {}
    count = 0
    for x in origin.reads:
        if x.fixed:
            what = "weight"
            found[what] = _as_stored(x)
        else:
            what = f"input{count or ''}"
            count += 1
        found[f"{what}_scale"] = x.scale
        found[f"{what}_zero_point"] = np.asarray(x.zero_point) + x.offset
    if origin.bias is not None:
        found["bias"] = origin.bias
    if isinstance(value, Total) and value.rest is not None:
        found["float_bias"] = value.rest
    if step.result is not None and value is not None:
        y = step.result
        found["output_scale"] = y.scale
        found["output_zero_point"] = np.asarray(y.zero_point) + y.offset
        zero_point = np.asarray(y.zero_point) + np.float32(y.offset)
        grid = TargetGrid(y.scale, zero_point, y.low + y.offset, y.high + y.offset)
        found["low"], found["high"] = integer_bounds(grid, value.bounds)
        if isinstance(value, Total):
            below = np.asarray(y.scale) * np.float32(1) * value.divisor
            found["multiplier"] = np.asarray(value.scale) / below
    return {name: _plain(name, array) for name, array in found.items()}


def _plain(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if name == "weight":
        return array
    if name.endswith(("zero_point", "low", "high")):
        array = array.astype(np.int32)
    return array.reshape(-1) if array.size > 1 else array.reshape(())


def _as_stored(w: Integers) -> np.ndarray:
    values = np.asarray(w.values).astype(np.int32) + w.offset
    return values.astype(np.uint8 if w.offset else w.values.dtype)
