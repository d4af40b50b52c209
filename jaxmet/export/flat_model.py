"""A model as converters take it: a function of arrays that returns arrays, all of them named."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jaxmet.engine.frontends import check_apply, refuse_module
from jaxmet.engine.graph.graph import fitted, trace
from jaxmet.engine.program.calls import Apply
from jaxmet.layers.deployed import deployed, fake_quantized_weights
from jaxmet.transforms.lift import lift
from jaxmet.tree.named_leaves import path_parts
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers


class FlatModel(NamedTuple):
    """The function, the shapes that it takes, and the names of inputs and outputs."""

    function: Callable[..., list[Any]]
    shapes: list[jax.ShapeDtypeStruct]
    inputs: list[str]
    outputs: list[str]


def flat_model(
    caller: str,
    apply: Apply,
    params: Any,
    quantizers: Quantizers | None,
    inputs: tuple[Any, ...],
    kwargs: Any,
    *,
    batch: str,
    named: bool = False,
) -> FlatModel:
    """The simulation with its parameters inside; the model alone for no quantizers."""
    refuse_module(apply, params, caller)
    check_apply(apply, caller)
    quantizers = Quantizers() if quantizers is None else quantizers
    check_are_quantizers(quantizers, caller)
    refuse_dynamic(quantizers, caller)
    fitted(params, trace(apply, params, *inputs, **kwargs), caller)
    quantizers.leaves(params, caller)
    structure = jax.tree.structure(inputs)
    run = deployed(apply, params, quantizers, kwargs, named=named)
    weights = fake_quantized_weights(params, quantizers)

    def function(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(run(weights(), *jax.tree.unflatten(structure, leaves)))

    shown = lift(apply)
    outputs = jax.eval_shape(lambda *x: shown(params, *x, **kwargs), *inputs)
    return FlatModel(
        function,
        jax.tree.leaves(example_shapes(inputs, batch)),
        input_names(inputs),
        leaf_names(outputs, "output"),
    )


def refuse_dynamic(quantizers: Quantizers, caller: str) -> None:
    """Raise for activations whose ranges are found at every call: a file states its scales."""
    for name, q in quantizers.activations.items():
        if q.follows and q.active:
            raise ValueError(
                f"jaxmet.{caller}: the range of {name!r} is found at every call, and a file states "
                "the scales. Calibrate with dynamic=None, or export weights alone "
                "(activation_bits=32)."
            )


def example_shapes(inputs: Any, batch: str) -> Any:
    """What a function is traced for: a symbol along first axes where `batch` is 'dynamic'."""
    symbol = jax.export.symbolic_shape("batch")[0] if batch == "dynamic" else None

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        sizes = np.shape(x)
        sizes = (symbol, *sizes[1:]) if symbol is not None and sizes else sizes
        return jax.ShapeDtypeStruct(sizes, jax.numpy.result_type(x))

    return jax.tree.map(shape, inputs)


def needs_batch_size(caller: str, error: Exception) -> ValueError:
    """What to raise for a model that does not export with a symbol for its batch size."""
    return ValueError(
        f"jaxmet.{caller}: the model cannot be exported for any batch size "
        f"({str(error).splitlines()[0]}). Pass batch='fixed' and inputs of that size."
    )


def input_names(inputs: tuple[Any, ...]) -> list[str]:
    """A name for each array that a model takes."""
    return leaf_names(inputs if len(inputs) != 1 else inputs[0], "input")


def leaf_names(tree: Any, what: str) -> list[str]:
    """A name for each leaf: what it is, and its path."""
    found: list[str] = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        name = "_".join((what, *path_parts(path)))
        while name in found:
            name += "_"
        found.append(name)
    return found
