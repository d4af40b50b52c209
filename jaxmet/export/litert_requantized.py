"""A LiteRT file by way of a float one: ai-edge-quantizer with the ranges of our quantizers.

For versions of the converter whose calls for integers are not known, and for models that it
converts in float only.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmet.engine.backend.litert_lowering import owners_of
from jaxmet.engine.graph.graph import Graph
from jaxmet.export.litert_interface import integer_interface
from jaxmet.tree.packages import package
from jaxmet.tree.quantizers import Quantizers

SIGNATURE = "serving_default"


def requantized(
    made: bytes,
    graph: Graph,
    quantizers: Quantizers,
    inputs: Mapping[str, Any],
    caller: str,
    io: str,
) -> bytes:
    """The float file in integers of 8 bits.

    Args:
        made: a float file whose weights are on their grids; its tensors have the names of nodes.
        graph: the graph of the model.
        quantizers: the quantizers of its tree.
        inputs: example inputs by name, arrays or shapes.
        caller: the public function, for errors.
        io: 'int8' or 'float': what goes in and comes out.

    Returns:
        The file with integers.

    Raises:
        ValueError: for grids that ai-edge-quantizer does not make; ImportError without it.
    """
    install = "'.[litert]' ai-edge-quantizer"
    library = package("ai_edge_quantizer.quantizer", caller, install)
    recipe = package("ai_edge_quantizer.recipe", caller, install)
    _check_grids(quantizers, caller)
    examples = {name: _example(x) for name, x in inputs.items()}
    with warnings.catch_warnings():  # it warns of how it reads tensors itself
        warnings.simplefilter("ignore", UserWarning)
        work = library.Quantizer(made, recipe.static_wi8_ai8())
        ranges = work.calibrate({SIGNATURE: [examples]})
        _fill_in(ranges, graph, quantizers, [*inputs])
        result = work.quantize(ranges, enable_progress_report=False)
    integers = bytes(result.quantized_model)
    return integer_interface(integers, caller) if io == "int8" else integers


def _check_grids(quantizers: Quantizers, caller: str) -> None:
    """Refuse weights other than int8 with one scale per channel, and activations of other bits."""
    for name, q in quantizers.weights.items():
        if q.product is None and q.active:
            plain = q.bits == 8 and q.symmetric and q.axis and q.block is None
            if not plain:
                raise ValueError(
                    f"jaxmet.{caller}: the weight {name!r} is not of 8 bits, symmetric, with "
                    "a scale per channel, and ai-edge-quantizer makes no other. Install the "
                    "converter whose integers are known: pip install '.[litert]'."
                )
    for name, q in quantizers.activations.items():
        if q.active and q.bits != 8:
            raise ValueError(
                f"jaxmet.{caller}: the activation {name!r} has {q.bits} bits, and "
                "ai-edge-quantizer makes 8. Use activation_bits=8."
            )


def _example(x: Any) -> np.ndarray:
    """Numbers for an input: its own, or zeros for a shape."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return np.zeros(x.shape, x.dtype)
    return np.asarray(x)


def _fill_in(
    ranges: Any, graph: Graph, quantizers: Quantizers, inputs: list[str]
) -> None:
    """Our ranges in place of those that the examples have."""
    ends = {n.name: n for n in graph.nodes}
    given = [n.name for n in graph.nodes if n.kind == "input"]
    for tensor, found in ranges.items():
        owners = [o for o in owners_of(tensor) if o in ends]
        name = tensor.removeprefix(f"{SIGNATURE}_")
        if not owners and name in inputs and inputs.index(name) < len(given):
            owners = [given[inputs.index(name)]]
        if not owners and name.startswith("output"):
            last = [n for n in graph.nodes if n.kind == "output"]
            sources = last[0].inputs if len(last) == 1 else ()
            owners = [s.node for s in sources if s.node is not None][:1]
        owner = _quantized(graph, quantizers, owners[-1]) if owners else None
        if owner is None:
            continue
        q = quantizers.activation(owner)
        assert q is not None
        scale, zero = (float(np.ravel(a)[0]) for a in q.grid(None))
        low, high = q.ends
        for key, end in (("min", low), ("max", high)):
            shape = np.shape(found[key])
            found[key] = np.full(shape, scale * (end - zero), np.float32)


def _quantized(graph: Graph, quantizers: Quantizers, name: str) -> str | None:
    """The first node from here on that has a grid, where one after the other reads it."""
    while quantizers.activation(name) is None:
        consumers = graph.consumers(name)
        if len(consumers) != 1 or consumers[0].kind == "output":
            return None
        name = consumers[0].name
    return name
