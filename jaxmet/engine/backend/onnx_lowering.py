"""A function's equations as an ONNX model, fake quantization as QuantizeLinear pairs.

jax2onnx lowers the equations; it is given `fake_quant` here, which stays one operation. A
constant on a grid becomes its integers and one DequantizeLinear, any other value a
QuantizeLinear and a DequantizeLinear.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from jaxmet.engine.program.known import with_known_computed
from jaxmet.engine.program.scopes import grid_owner
from jaxmet.numerics.fake_quant import fake_quant_p
from jaxmet.tree.host_rounding import repeated


class WrittenGrid(NamedTuple):
    """A grid of the file: whose it is, its ends, and by how much the file's integers differ."""

    owner: str
    low: int
    high: int
    shift: int = 0


PRODUCTS = ("dot_general", "conv_general_dilated")
_GRIDS: ContextVar[dict[str, WrittenGrid]] = ContextVar("grids")
_PACKED: ContextVar[bool] = ContextVar("packed")


def onnx_model(
    function: Callable[..., Sequence[Any]],
    inputs: Sequence[jax.ShapeDtypeStruct],
    *,
    opset: int,
    input_names: Sequence[str],
    output_names: Sequence[str],
    packed: bool = False,
) -> tuple[Any, dict[str, WrittenGrid]]:
    """The `onnx.ModelProto` of a function of arrays that returns a list of arrays.

    With it come its grids, by the names of their scales. `packed` says that constants of at most
    4 bits are int4, two in a byte.

    The function is traced first: jax2onnx changes flax while it traces, so the model would
    be another one.
    """
    grids: dict[str, WrittenGrid] = {}
    _GRIDS.set(grids)
    _PACKED.set(packed)
    jaxpr = jax.make_jaxpr(lambda *x: list(function(*x)))(*inputs)
    outs = [id(v) for v in jaxpr.jaxpr.outvars]
    if len(outs) > len({*outs} - {id(v) for v in jaxpr.jaxpr.invars}):
        # one value has one name there: those that are given twice, or given back, are copied
        jaxpr = jax.make_jaxpr(lambda *x: [jnp.copy(y) for y in function(*x)])(*inputs)
    _refuse_half_precision(jaxpr)
    # A weight that the model derives, and its grid, are numbers here and integers in the file.
    is_grid = lambda equation: equation.primitive is fake_quant_p
    jaxpr = jax.make_jaxpr(with_known_computed(jaxpr, is_grid))(*inputs)
    run = jaxpr_as_fun(jaxpr)
    one = len(jaxpr.jaxpr.outvars) == 1
    cumsum = jnp.cumsum
    try:
        import jax2onnx

        _register()
        model = jax2onnx.to_onnx(
            lambda *x: run(*x)[0] if one else tuple(run(*x)),
            list(inputs),
            opset=opset,
            model_name="jaxmet",
            input_names=list(input_names),
            output_names=list(output_names),
        )
    finally:  # it leaves its own there, which takes no axis by position
        jnp.cumsum = cumsum
    return model, grids


def _refuse_half_precision(closed: Any) -> None:
    """Refuse products of bfloat16: a file with them does not load."""
    for equation in closed.jaxpr.eqns:
        dtypes = [v.aval.dtype for v in (*equation.invars[:1], *equation.outvars)]
        if equation.primitive.name in PRODUCTS and jnp.bfloat16 in dtypes:
            raise ValueError(
                "jaxmet.export.onnx: the model computes products in bfloat16, for which "
                "onnxruntime has no kernels. Build the model with dtype=float32 and cast its "
                "parameters: jax.tree.map(lambda a: a.astype('float32'), params)."
            )


def _register() -> None:
    """Tell jax2onnx how the primitive is lowered, once."""
    from jax2onnx.plugins import plugin_system

    if fake_quant_p.name in plugin_system.PLUGIN_REGISTRY:
        return

    class FakeQuant(plugin_system.PrimitiveLeafPlugin):
        def lower(self, ctx: Any, eqn: Any) -> None:
            _lower(ctx, eqn)

    plugin_system.register_primitive(
        jaxpr_primitive=fake_quant_p.name,
        jax_doc="",
        onnx=[],
        since="0.17.1",
        context="jaxmet",
        component=fake_quant_p.name,
        testcases=[],
    )(FakeQuant)


def _lower(ctx: Any, eqn: Any) -> None:
    """One fake quantization, with numbers for its grid."""
    x, *grid = eqn.invars
    known = [ctx.try_evaluate_const(v) for v in grid]
    if any(v is None for v in known):
        _lower_open(ctx, eqn, known)
        return
    value, arrays = ctx.try_evaluate_const(x), [*map(np.asarray, known)]
    if value is not None:
        _lower_constant(ctx, eqn, np.asarray(value), *arrays)
    else:
        _lower_value(ctx, eqn, *arrays)


def _lower_value(
    ctx: Any,
    eqn: Any,
    scale: np.ndarray,
    zero_point: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """A value on its grid: a QuantizeLinear and a DequantizeLinear."""
    shape = tuple(eqn.outvars[0].aval.shape)
    blocks = eqn.params["block"] and any(
        n not in (1, m) for n, m in zip(scale.shape, shape, strict=True)
    )
    places = [i for i, n in enumerate(scale.shape) if n != 1]
    if blocks or len(places) > 1:
        raise ValueError(
            "jaxmet.export.onnx: an activation has scales along several axes, or of blocks. Give "
            "it one scale, or one axis."
        )
    written = WrittenGrid(grid_owner(eqn), int(low.min()), int(high.max()))
    if low.min() < 0 and high.max() < 2**7:
        # onnxruntime turns int8 between operations into uint8, and then refuses opset 21
        zero_point, low, high = (a + 2**7 for a in (zero_point, low, high))
        written = written._replace(shift=2**7)
    kind = _integer_type(int(low.min()), int(high.max()))
    _check_opset(ctx, kind, None)
    options = {"axis": places[0]} if places else {}
    step, zero = _written(ctx, written, scale, zero_point, kind)
    made = ctx.get_value_for_var(eqn.invars[0])
    if np.dtype(kind).itemsize > 1:  # onnxruntime has no Max and Min of 16 bits
        ends = (np.max(scale * (a - zero_point)) for a in (low, np.min(high)))
        made = _between(ctx, made, np.float32, shape, *ends)
    integers = _quantized(ctx, made, step, zero, kind, shape, low, high, options)
    _dequantize(ctx, eqn, integers, step, zero, options)


def _lower_constant(
    ctx: Any,
    eqn: Any,
    value: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """A constant on its grid: its integers, and a DequantizeLinear."""
    shape, block = value.shape, eqn.params["block"]
    pairs = list(zip(scale.shape, shape, strict=True))
    axes = [i for i, (n, m) in enumerate(pairs) if n not in (1, m)] if block else []
    block = block if axes else None  # one block is all there is
    s, z = (repeated(a, shape, block) for a in (scale, zero_point))
    integers = np.clip(np.rint(value / s) + z, low, high)
    places = [i for i, n in enumerate(scale.shape) if n != 1]
    if block is None and len(places) > 1:
        first, last = places[0], places[-1]
        whole = all(scale.shape[i] == shape[i] for i in range(first, last + 1))
        if not whole:
            rounded = ((integers - z) * s).astype(value.dtype)
            ctx.bind_const_for_var(eqn.outvars[0], rounded)
            return
        # Axes side by side that have scales are one axis in the file.
        integers = integers.reshape(*shape[:first], -1, *shape[last + 1 :])
        places = [first]
    kind = _integer_type(int(low.min()), int(high.max()), small=_PACKED.get())
    _check_opset(ctx, kind, block)
    options = {"axis": places[0]} if places else {}
    if block is not None:
        options = {"axis": axes[0], "block_size": block}
        sizes = [scale.shape[i] if i == axes[0] else n for i, n in enumerate(shape)]
        scale, zero_point = (np.broadcast_to(a, sizes) for a in (scale, zero_point))
    written = WrittenGrid(grid_owner(eqn), int(low.min()), int(high.max()))
    step, zero = _written(ctx, written, scale, zero_point, kind, flat=block is None)
    weight = ctx.builder.add_initializer_from_array(
        ctx.fresh_name("weight"), integers.astype(kind)
    )
    _dequantize(ctx, eqn, weight, step, zero, options, integers.shape)


def _written(
    ctx: Any,
    grid: WrittenGrid,
    scale: np.ndarray,
    zero_point: np.ndarray,
    kind: Any,
    *,
    flat: bool = True,
) -> tuple[Any, Any]:
    """Scale and zero point as the file has them: a number, a vector, or those of blocks."""
    if flat:
        sizes = () if scale.size == 1 else (-1,)
        scale, zero_point = (
            np.broadcast_to(a, scale.shape).reshape(sizes) for a in (scale, zero_point)
        )
    add = ctx.builder.add_initializer_from_array
    step = add(ctx.fresh_name("scale"), np.array(scale, np.float32))
    _GRIDS.get()[step.name] = grid
    return step, add(ctx.fresh_name("zero_point"), np.array(zero_point).astype(kind))


def _lower_open(ctx: Any, eqn: Any, known: Sequence[Any]) -> None:
    """A grid that is computed: in a loop over layers each has its own."""
    x, *grid = eqn.invars
    shape = tuple(eqn.outvars[0].aval.shape)
    places = [i for i, n in enumerate(grid[0].aval.shape) if n != 1]
    if known[2] is None or known[3] is None or eqn.params["block"] or len(places) > 1:
        raise ValueError(
            "jaxmet.export.onnx: a quantizer lies inside a loop, a branch or jax.checkpoint, where "
            "its grid is no constant. Export the model without it, or that part in float "
            "(quantizers.set(name, enabled=False))."
        )
    kind = _integer_type(int(np.min(known[2])), int(np.max(known[3])))
    _check_opset(ctx, kind, None)
    build = ctx.builder
    sizes = [grid[0].aval.shape[i] for i in places]
    to = build.add_initializer_from_array(
        ctx.fresh_name("sizes"), np.array(sizes, np.int64)
    )
    options = {"axis": places[0]} if places else {}

    def operand(i: int, dtype: Any) -> Any:
        value = ctx.get_value_for_var(grid[i])
        value = build.Reshape(value, to, _outputs=[ctx.fresh_name("grid")])
        _stamp(ctx, value, np.float32, sizes)
        if dtype != np.float32:
            number = int(_onnx_type(dtype).value)
            value = build.Cast(value, _outputs=[ctx.fresh_name("grid")], to=number)
            _stamp(ctx, value, dtype, sizes)
        return value

    step, zero = operand(0, np.float32), operand(1, kind)
    value = ctx.get_value_for_var(x)
    low, high = known[2], known[3]
    integers = _quantized(ctx, value, step, zero, kind, shape, low, high, options)
    _dequantize(ctx, eqn, integers, step, zero, options)


def _quantized(
    ctx: Any,
    value: Any,
    step: Any,
    zero: Any,
    kind: Any,
    shape: Sequence[Any],
    low: Any,
    high: Any,
    options: dict[str, Any],
) -> Any:
    """The integers of a value, of 8 bits no further than the ends of its grid."""
    name = ctx.fresh_name("integers")
    made = ctx.builder.QuantizeLinear(value, step, zero, _outputs=[name], **options)
    _stamp(ctx, made, kind, shape)
    if np.dtype(kind).itemsize > 1:
        return made
    return _between(ctx, made, kind, shape, np.max(low), np.min(high))


def _dequantize(
    ctx: Any,
    eqn: Any,
    integers: Any,
    step: Any,
    zero: Any,
    options: dict[str, Any],
    stored: tuple[int, ...] | None = None,
) -> None:
    """The result of an equation is what integers stand for, that are `stored` in this shape."""
    shape = tuple(eqn.outvars[0].aval.shape)
    stored = shape if stored is None else stored
    build = ctx.builder
    name = ctx.fresh_name("value")
    made = build.DequantizeLinear(integers, step, zero, _outputs=[name], **options)
    _stamp(ctx, made, np.float32, stored)
    if stored != shape:
        to = build.add_initializer_from_array(
            ctx.fresh_name("sizes"), np.array(shape, np.int64)
        )
        made = build.Reshape(made, to, _outputs=[ctx.fresh_name("value")])
        _stamp(ctx, made, np.float32, shape)
    ctx.bind_value_for_var(eqn.outvars[0], made)


def _between(
    ctx: Any, value: Any, kind: Any, shape: Sequence[Any], low: Any, high: Any
) -> Any:
    """A value no further than the ends of its grid, where its type goes on."""
    info = np.iinfo(kind) if np.issubdtype(kind, np.integer) else None
    for operation, end in (("Max", low), ("Min", high)):
        if info is not None and int(end) in (info.min, info.max):
            continue
        bound = ctx.builder.add_initializer_from_array(
            ctx.fresh_name("end"), np.asarray(end).astype(kind)
        )
        make = getattr(ctx.builder, operation)
        value = make(value, bound, _outputs=[ctx.fresh_name("between")])
        _stamp(ctx, value, kind, shape)
    return value


def _check_opset(ctx: Any, kind: Any, block: int | None) -> None:
    plain = np.dtype(kind) in (np.int8, np.uint8, np.int32)
    if ctx.opset < 21 and (not plain or block is not None):
        what = (
            "blocks" if block is not None else "integers of more or fewer than 8 bits"
        )
        raise ValueError(
            f"jaxmet.export.onnx: opset {ctx.opset} has no {what}. Use opset=21 or more."
        )


def _integer_type(low: int, high: int, *, small: bool = False) -> Any:
    """The smallest type of these integers, of less than a byte only if `small`."""
    kinds = (jnp.int4, np.int8, np.uint8, np.int16, np.uint16, np.int32)
    if low >= 0:
        kinds = (jnp.uint4, np.uint8, np.uint16, np.int32)
    kinds = kinds if small else kinds[1:]
    fits = lambda t: jnp.iinfo(t).min <= low and high <= jnp.iinfo(t).max
    return next(t for t in kinds if fits(t))


def _onnx_type(kind: Any) -> Any:
    import onnx_ir as ir

    return ir.DataType.from_numpy(np.dtype(kind))


def _stamp(ctx: Any, value: Any, kind: Any, shape: Sequence[Any]) -> None:
    import onnx_ir as ir
    from jax2onnx.plugins._ir_shapes import (
        _ensure_value_metadata,
        _stamp_type_and_shape,
    )

    value.type = ir.TensorType(_onnx_type(kind))
    _stamp_type_and_shape(value, tuple(shape))
    _ensure_value_metadata(ctx, value)
