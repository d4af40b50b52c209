"""The model in integers as a StableHLO artefact of `jax.export`."""

import os
from typing import Any

import jax
import jax.export

from jaxmet.engine.program.calls import Apply
from jaxmet.export.flat_model import example_shapes, needs_batch_size
from jaxmet.export.integer_steps import integer_model, step_table
from jaxmet.tree.checks import check_choices, check_flags
from jaxmet.tree.packages import package
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.writing import check_free, writable, written

CALLER = "export.stablehlo"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def stablehlo(
    path: str | os.PathLike[str],
    apply: Apply,
    params: Any,
    quantizers: Quantizers,
    *inputs: Any,
    batch: str = "dynamic",
    platforms: tuple[str, ...] | list[str] = ("cpu", "tpu", "cuda"),
    overwrite: bool = False,
    **kwargs: Any,
) -> Table:
    """Write the model in integers as a file that JAX runs without jaxmet and without the model.

    It computes what `jm.lift(apply, quantizers)` computes, with the weights as int8 inside:
    `jax.export.deserialize(bytearray(path.read_bytes())).call(*inputs)`. JAX promises to read it
    for six months, and other compilers of [StableHLO](https://openxla.org/stablehlo) its module.
    It needs `pip install '.[stablehlo]'`.

    Args:
        path: the file to write.
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        params: its parameters: any tree that jaxmet makes, of floats or of `jm.quantize`.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        *inputs: example inputs, or `jax.ShapeDtypeStruct`s of them.
        batch: 'dynamic' (the default), the first axis of every input has any size, or 'fixed',
            it has that of the examples.
        platforms: what it is lowered for: of 'cpu', 'tpu', 'cuda' and 'rocm'; default the
            first three.
        overwrite: whether an existing file is replaced; default False.
        **kwargs: keyword arguments for the model.

    Returns:
        A table with one row per operation that computes: whether it is in integers, and if
        not, why.

    Raises:
        ValueError: for a path that exists, an unknown platform, quantizers of another tree, and
            a model that needs to know its batch size; ImportError without the extra.

    >>> jm.export.stablehlo("model.jax", apply, params, quantizers, images[:1])
    """
    package("flatbuffers", CALLER, "'.[stablehlo]'")  # jax.export writes in it
    check_choices(CALLER, batch=(batch, ("dynamic", "fixed")))
    for platform in platforms:
        check_choices(CALLER, platforms=(platform, PLATFORMS))
    check_flags(CALLER, overwrite=overwrite)
    path = writable(path, CALLER)
    check_free(path, overwrite, CALLER)
    function, steps = integer_model(CALLER, apply, params, quantizers, inputs, kwargs)
    shapes = example_shapes(inputs, batch)
    try:
        found = jax.export.export(jax.jit(function), platforms=list(platforms))(*shapes)
    except (jax.errors.JAXTypeError, ValueError, TypeError) as error:
        if batch == "fixed":
            raise
        raise needs_batch_size(CALLER, error) from error
    artefact = found.serialize()
    written(path, lambda f: f.write(artefact))
    return step_table(steps, CALLER)
