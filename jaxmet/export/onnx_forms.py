"""What JAX writes as several operations as the one operation that ONNX has, and grids that go on.

A softmax is found by its maximum, exponentials and their sum, a leaky ReLU by its comparison. A
value that is spread or looked up stays on its grid, and a grid times a number is another grid.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmet.export.onnx_graph import (
    LAYOUT,
    OnnxGraph,
    nodes_of,
    rank_of,
    redirect,
    sizes_of,
)

SPREADS = ("Identity", "Expand", "Reshape", "Unsqueeze")
MOVES = ("Expand", "Gather", "Tile")
TAKERS = ("MatMul", "Gemm", "Conv", "Softmax")
"""Operations that take any grid for their operands."""


def softmaxes(graph: OnnxGraph) -> None:
    """exp(x − max x) / Σ exp(x − max x) along one axis as Softmax."""
    for node in nodes_of(graph, "Div"):
        exp = graph.producers.get(node.input[0])
        sub = None if exp is None else graph.producers.get(exp.input[0])
        if exp is None or sub is None or (exp.op_type, sub.op_type) != ("Exp", "Sub"):
            continue
        x = sub.input[0]
        total = _before(graph, node.input[1], SPREADS)
        most = _before(graph, sub.input[1], SPREADS)
        while most is not None and most.op_type == "Max" and _is_lowest(graph, most):
            other = [n for n in most.input if graph.constant(n) is None]
            most = _before(graph, other[0], SPREADS) if len(other) == 1 else None
        rank = rank_of(graph, x)
        axes = [_axes(graph, n, rank) for n in (total, most)]
        kinds = [n.op_type if n is not None else "" for n in (total, most)]
        if kinds != ["ReduceSum", "ReduceMax"] or axes[0] != axes[1]:
            continue
        assert total is not None and most is not None
        if axes[0] is None or len(axes[0]) != 1:
            continue
        if total.input[0] != exp.output[0] or most.input[0] != x:
            continue
        spread = node.input[1], sub.input[1]
        if not all(_lies_along(graph, name, axes[0][0]) for name in spread):
            continue
        made = graph.insert(node, "Softmax", x, axis=axes[0][0])
        redirect(graph, node.output[0], made)
        graph.prune()


def leaky_relus(graph: OnnxGraph) -> None:
    """x where x ≥ 0, else a x, as LeakyRelu."""
    for node in nodes_of(graph, "Where"):
        test, scaled = (graph.producers.get(node.input[i]) for i in (0, 2))
        kinds = [n.op_type if n is not None else "" for n in (test, scaled)]
        if kinds[1] != "Mul" or kinds[0] not in ("GreaterOrEqual", "Greater"):
            continue
        assert test is not None and scaled is not None
        x = node.input[1]
        slope = _number(graph, [n for n in scaled.input if n != x])
        zero = _number(graph, test.input[1:])
        if x not in scaled.input or test.input[0] != x or slope is None or zero != 0:
            continue
        made = graph.insert(node, "LeakyRelu", x, alpha=slope)
        redirect(graph, node.output[0], made)
        graph.prune()


def bounds(graph: OnnxGraph, *, integers: bool = True) -> None:
    """Maxima and minima of a value and numbers as Relu or Clip, which quantizers know.

    With `integers` a ReLU before a grid is a Clip: OpenVINO 2026.4 drops a Relu there, and
    crashes on two grids in a row.
    """
    for node in reversed([*nodes_of(graph, "Max", "Min", "Relu")]):
        if graph.producers.get(node.output[0]) is not node:
            continue  # within another one
        source, steps = bounded(graph, node.output[0], numbers=True)
        if not steps:
            continue
        low, high = -np.inf, np.inf
        for bound in steps:
            low, high = (float(np.squeeze(bound(end))) for end in (low, high))
        is_relu = (low, high) == (0, np.inf)
        if is_relu and not (integers and _is_quantized(graph, node.output[0])):
            made = graph.insert(node, "Relu", source)
        else:
            ends = [_end(graph, node, end) for end in (low, high)]
            made = graph.insert(node, "Clip", source, *ends)
        redirect(graph, node.output[0], made)
        graph.prune()


Bound = Callable[[Any], Any]
"""A maximum or a minimum with a constant."""


def bounded(
    graph: OnnxGraph, name: str, *, numbers: bool = False
) -> tuple[str, list[Bound]]:
    """What maxima, minima and ReLUs bound that nothing else reads, and these from there on.

    Only those with a single number each where `numbers` is True.
    """
    steps: list[Bound] = []
    while (found := _bound(graph, name)) is not None:
        source, bound, size = found
        if numbers and size != 1 or steps and graph.only_consumer(name) is None:
            break
        name = source
        steps.insert(0, bound)
    return name, steps


def _bound(graph: OnnxGraph, name: str) -> tuple[str, Bound, int] | None:
    """What a maximum or minimum with a constant is of, its function, the constant's size."""
    node = graph.producers.get(name)
    if node is None or node.op_type not in ("Max", "Min", "Relu"):
        return None
    if node.op_type == "Relu":
        return node.input[0], lambda x: np.maximum(x, np.float32(0)), 1
    known = [graph.constant(n) for n in node.input]
    i = next((i for i, a in enumerate(known) if a is not None), None)
    constant = None if i is None else known[i]
    if i is None or constant is None or len(known) != 2:
        return None
    if constant.dtype != np.float32:
        return None
    function = np.maximum if node.op_type == "Max" else np.minimum
    return node.input[1 - i], lambda x: function(x, constant), constant.size


def _is_quantized(graph: OnnxGraph, name: str) -> bool:
    """Whether a QuantizeLinear reads a value, after layout operations."""
    return any(
        c.op_type == "QuantizeLinear"
        or (c.op_type in LAYOUT and _is_quantized(graph, c.output[0]))
        for c in graph.consumers.get(name, [])
    )


def _end(graph: OnnxGraph, node: Any, end: float) -> str:
    """The name of a bound of a Clip, nothing for none."""
    if not np.isfinite(end):
        return ""
    return graph.add_constant(f"{node.output[0]}_end", np.asarray(end, np.float32))


def scaled_grids(graph: OnnxGraph) -> None:
    """A value on a grid times a number as the grid with that scale, where any will do."""
    for node in nodes_of(graph, "Mul", "Div"):
        found = [graph.producers.get(n) for n in node.input]
        i = next(
            (i for i, n in enumerate(found) if n and n.op_type == "DequantizeLinear"), 2
        )
        if i > 1 or (node.op_type == "Div" and i == 1):
            continue
        dequantize, factor = found[i], _number(graph, [node.input[1 - i]])
        assert dequantize is not None
        scale = graph.constant(dequantize.input[1])
        if scale is None or scale.size != 1 or factor is None or not factor > 0:
            continue
        if not _any_grid_will_do(graph, node.output[0]):
            continue
        new = scale * factor if node.op_type == "Mul" else scale / factor
        name = graph.add_constant(
            f"{node.output[0]}_scale", np.asarray(new, np.float32)
        )
        grid = [dequantize.input[0], name, *dequantize.input[2:]]
        redirect(graph, node.output[0], graph.insert(node, "DequantizeLinear", *grid))
        graph.prune()


def repeats(graph: OnnxGraph) -> None:
    """A value on a grid that is repeated along one axis as Tile.

    OpenVINO 2026.4 gives other integers for an Expand there, and for a Tile of several axes.
    """
    for node in nodes_of(graph, "Expand"):
        source = _before(graph, node.input[0], LAYOUT)
        if source is None or source.op_type != "DequantizeLinear":
            continue
        given, wanted = (sizes_of(graph, n) for n in (node.input[0], node.output[0]))
        if given is None or wanted is None or len(given) != len(wanted):
            continue
        pairs = list(zip(given, wanted, strict=True))
        if any(n != m and (n != 1 or m == 0) for n, m in pairs):  # 0 is a symbol
            continue
        counts = [1 if n == m else m for n, m in pairs]
        if sum(n > 1 for n in counts) > 1:
            continue
        if max(counts) > 1:
            name = graph.add_constant("repeats", np.asarray(counts, np.int64))
            made = graph.insert(node, "Tile", node.input[0], name)
        else:
            made = node.input[0]
        redirect(graph, node.output[0], made)
        graph.prune()


def moves(graph: OnnxGraph) -> None:
    """A value on a grid that is spread or looked up as one on that grid again."""
    for node in nodes_of(graph, *MOVES):
        source = _before(graph, node.input[0], LAYOUT)
        if source is None or source.op_type != "DequantizeLinear":
            continue
        arrays = [graph.constant(n) for n in source.input[1:]]
        if any(a is None or a.size != 1 for a in arrays):
            continue
        name = node.output[0]
        consumers = graph.consumers.get(name, [])[:]
        if name in graph.outputs or not consumers:
            continue
        if all(c.op_type == "QuantizeLinear" for c in consumers):
            continue
        copies = zip(source.input[1:], arrays, strict=True)
        grid = [graph.add_constant(f"{n}_again", np.asarray(a)) for n, a in copies]
        first = min(consumers, key=lambda c: [*graph.graph.node].index(c))
        integers = graph.insert(first, "QuantizeLinear", name, *grid)
        value = graph.insert(first, "DequantizeLinear", integers, *grid)
        for consumer in consumers:
            for i, given in enumerate(consumer.input):
                if given == name:
                    consumer.input[i] = value
        graph.read()


def _before(graph: OnnxGraph, name: str, passed: Sequence[str]) -> Any | None:
    """What makes a value, through operations of these kinds."""
    node = graph.producers.get(name)
    while node is not None and node.op_type in passed:
        node = graph.producers.get(node.input[0])
    return node


def _lies_along(graph: OnnxGraph, name: str, axis: int) -> bool:
    """Whether what a reduction gave has size 1 at its axis, before it is spread out."""
    node = graph.producers.get(name)
    while node is not None and node.op_type in ("Identity", "Expand"):
        name = node.input[0]
        node = graph.producers.get(name)
    sizes = sizes_of(graph, name)
    return sizes is not None and len(sizes) > axis and sizes[axis] == 1


def _axes(graph: OnnxGraph, node: Any, rank: int | None) -> list[int] | None:
    """The axes that a reduction sums over."""
    if node is None or rank is None or len(node.input) < 2:
        return None
    axes = graph.constant(node.input[1])
    return None if axes is None else sorted(int(a) % rank for a in axes.ravel())


def _is_lowest(graph: OnnxGraph, node: Any) -> bool:
    """Whether one operand of a maximum is below every number."""
    known = [a for a in map(graph.constant, node.input) if a is not None]
    return len(known) == 1 and bool(np.all(known[0] <= np.finfo(np.float32).min))


def _number(graph: OnnxGraph, names: Sequence[str]) -> float | None:
    """The one number that a constant is."""
    array = graph.constant(names[0]) if len(names) == 1 else None
    if array is None or array.size != 1:
        return None
    return float(array.ravel()[0])


def _any_grid_will_do(graph: OnnxGraph, name: str) -> bool:
    consumers = graph.consumers.get(name, [])
    if name in graph.outputs or not consumers:
        return False
    return all(
        c.op_type in TAKERS
        or (c.op_type in LAYOUT and _any_grid_will_do(graph, c.output[0]))
        for c in consumers
    )
