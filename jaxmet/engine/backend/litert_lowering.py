"""A function's equations as StableHLO for LiteRT's converter, fake quantization as its own calls.

The converter reads `uniform_quantize` and `uniform_dequantize` as calls whose configuration is a
type of MLIR's quant dialect. JAX writes them as foreign calls; all else it lowers itself.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxmet.engine.program import compat
from jaxmet.engine.program.known import with_known_computed
from jaxmet.engine.program.scopes import END, LAYER, SCOPE
from jaxmet.numerics.fake_quant import fake_quant_p

LAYOUTS = re.compile(
    r"(, )?(operand|result)_layouts = \[(?:dense<[^>]*> : tensor<[^>]*>(?:, )?)*\]"
)
UINT8 = 2**7
"""By how much int8 is less than uint8."""


def litert_text(
    function: Callable[..., Sequence[Any]],
    inputs: Sequence[jax.ShapeDtypeStruct],
    caller: str,
) -> str:
    """The StableHLO text of a function of arrays that returns a list of arrays.

    Locations are in it, and say whose result an equation is.
    """
    closed = jax.make_jaxpr(lambda *x: list(function(*x)))(*inputs)
    # A weight that the model derives, and its grid, are numbers here and integers in the file.
    is_grid = lambda equation: equation.primitive is fake_quant_p
    closed = jax.make_jaxpr(with_known_computed(closed, is_grid))(*inputs)
    jaxpr, constants = compat.open_jaxpr(closed)

    def run(*values: Any) -> list[Any]:
        # The converter loses a value that is given back untouched, or twice.
        return [jnp.copy(y) for y in _ran(jaxpr, constants, values, caller)]

    traced = jax.jit(run, keep_unused=True).trace(*inputs)
    text = traced.lower(lowering_platforms=("cpu",)).as_text(debug_info=True)
    return LAYOUTS.sub("", text)  # the converter has no place for layouts


def owners_of(name: str) -> list[str]:
    """The nodes or parameters that the name of a tensor of the file speaks of."""
    return re.findall(f"{LAYER}([^;{END}]+)", name)


def owner_of(name: str) -> str | None:
    """The node or parameter whose tensor it is."""
    # Of a layer with what is fused to it the last part is the layer.
    found = owners_of(name)
    return found[-1] if found else None


def _ran(
    jaxpr: Any, constants: Sequence[Any], values: Sequence[Any], caller: str
) -> list[Any]:
    """The results of equations, with calls of the converter for fake quantization."""
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=True))
    get = lambda v: v.val if isinstance(v, Literal) else known[v]
    for equation in jaxpr.eqns:
        operands = [*map(get, equation.invars)]
        scope = jax.named_scope(LAYER + _owner(equation) + END)
        if equation.primitive is fake_quant_p:
            with scope:
                found = [_quantized(equation, operands, caller)]
        elif _has_fake_quant(equation):
            found = _body(equation, operands, caller)
        elif any(isinstance(x, Tracer) for x in operands) or equation.effects:
            with scope:
                found = compat.bind(equation.primitive, equation.params, operands)
        else:  # a weight that is spread out is still an equation, and integers need its numbers
            with jax.ensure_compile_time_eval():
                found = compat.bind(equation.primitive, equation.params, operands)
        known.update(zip(equation.outvars, found, strict=True))
    return [*map(get, jaxpr.outvars)]


def _owner(equation: Any) -> str:
    """The parameter or node that an equation belongs to, as the name scope says."""
    stack = str(equation.source_info.name_stack)
    begin = SCOPE if equation.primitive is fake_quant_p else LAYER
    return stack.rpartition(begin)[2].partition(END)[0]


def _has_fake_quant(equation: Any) -> bool:
    bodies = [compat.open_jaxpr(j)[0] for j in compat.sub_jaxprs(equation.params)]
    inner = [e for body in bodies for e in body.eqns]
    return any(e.primitive is fake_quant_p or _has_fake_quant(e) for e in inner)


def _body(equation: Any, operands: Sequence[Any], caller: str) -> list[Any]:
    """What an equation computes whose body has grids: a call or a checkpoint is its body."""
    if equation.primitive.name not in compat.CALLS + compat.REMAT:
        raise ValueError(
            f"jaxmet.{caller}: a quantizer lies inside a loop or a branch "
            f"({equation.primitive.name}), for which LiteRT has no integers. Export that part in "
            "float (quantizers.set(name, enabled=False)), or write the loop out."
        )
    body, constants = compat.open_jaxpr(compat.call_body(equation.params))
    return _ran(body, constants, operands, caller)


def _quantized(equation: Any, operands: Sequence[Any], caller: str) -> Any:
    """A value on its grid: integers, and what they stand for."""
    x, *grid = operands
    refuse = lambda what, cure: _refuse(caller, _owner(equation), what, cure)
    if any(isinstance(a, Tracer) for a in grid):
        refuse("has a grid that is computed from data", "Calibrate it")
    scale, zero, low, high = (np.asarray(a, np.float32) for a in grid)
    sizes = zip(scale.shape, x.shape, strict=True)
    if equation.params["block"] and any(n not in (1, m) for n, m in sizes):
        refuse("has a scale per block", "Use block=None")
    if x.dtype != np.float32:
        refuse(f"is {x.dtype}", "Cast the model to float32")
    least, most = int(low.min()), int(high.max())
    if most - least > 2**8 - 1:
        refuse("has more than 8 bits", "Use 8")
    axes = [i for i, n in enumerate(scale.shape) if n != 1]
    is_constant = not isinstance(x, Tracer)
    if axes and not is_constant:
        refuse("is an activation with several scales", "Give it one")
    if is_constant and np.any(zero):
        refuse("is a weight with a zero point", "Use symmetric_weights=True")
    if not is_constant and most - least < 2**8 - 2:
        refuse("is an activation of less than 8 bits", "Use activation_bits=8")
    if is_constant:  # rounded here: the converter breaks ties otherwise
        x = np.clip(np.rint(np.asarray(x) / scale), low, high) * scale
    shape = x.shape
    if len(axes) > 1:
        first, last = axes[0], axes[-1]
        if scale.shape[first : last + 1] != shape[first : last + 1]:
            return jnp.asarray(
                x
            )  # there are no such integers: it is on its grid in float
        # Axes side by side that have scales are one axis in the file.
        x, scale, zero = (
            np.reshape(a, (*a.shape[:first], -1, *a.shape[last + 1 :]))
            for a in (x, scale, np.broadcast_to(zero, scale.shape))
        )
        axes = [first]
    shift = UINT8 if most >= UINT8 else 0
    kind = _type(x.shape, scale, zero - shift, least - shift, most - shift, axes)
    made = _call("dequantize", _call("quantize", x, jnp.int8, kind), x.dtype, kind)
    return made.reshape(shape)


def _refuse(caller: str, owner: str, what: str, cure: str) -> None:
    raise ValueError(
        f"jaxmet.{caller}: {owner!r} {what}, for which LiteRT has no integers. {cure}, or leave "
        f"it in float: quantizers.set({owner!r}, enabled=False)."
    )


def _call(name: str, x: Any, dtype: Any, kind: str) -> Any:
    call = jax.ffi.ffi_call(
        f"odml_torch.uniform_{name}",
        jax.ShapeDtypeStruct(x.shape, dtype),
        custom_call_api_version=1,
        legacy_backend_config=kind,
    )
    return call(x)


def _type(
    shape: Sequence[int],
    scale: np.ndarray,
    zero: np.ndarray,
    low: int,
    high: int,
    axes: Sequence[int],
) -> str:
    """A tensor type of MLIR's quant dialect."""
    zero = np.broadcast_to(zero, scale.shape)
    pairs = zip(scale.ravel(), zero.ravel(), strict=True)
    steps = [f"{float(s):.17e}:{int(z)}" for s, z in pairs]
    axis = f":{axes[0]}" if axes else ""
    numbers = f"{{{', '.join(steps)}}}" if axes else steps[0]
    sizes = "".join(f"{n}x" for n in shape)
    kind = f"!quant.uniform<i8<{low}:{high}>:f32{axis}, {numbers}>"
    return f"tensor<{sizes}{kind}>"
