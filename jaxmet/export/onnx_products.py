"""Products of an ONNX graph as the operations that runtimes have integer kernels for.

A dense layer on more than two axes, an Einsum, becomes a Gemm between Reshapes, and a product of
two activations a MatMul between Transposes.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxmet.export.onnx_graph import (
    OnnxGraph,
    attribute,
    nodes_of,
    redirect,
    set_attributes,
    sizes_of,
)


def dense_layers(graph: OnnxGraph) -> None:
    """Einsum and MatMul with a stored matrix as Gemm, with the bias that follows."""
    for node in nodes_of(graph, "Einsum", "MatMul"):
        labels = _labels(graph, node)
        sizes = sizes_of(graph, node.input[0])
        if labels is None or sizes is None:
            continue
        rest, summed, free = labels.left_only, labels.shared, labels.right_only
        in_order = labels.left == rest + summed and labels.out == rest + free
        plain = labels.right == summed + free and not labels.batch
        if not (in_order and plain and summed and free):
            continue
        kept = sizes[1 : len(rest)]
        if len(rest) < 2 or not all(kept):
            continue
        matrix = _matrix(graph, node, len(summed))
        if matrix is None:
            continue
        name, (many, outputs), tail = matrix
        x = _reshape(graph, node, node.input[0], [-1, many])
        bias, last = _bias_after(graph, node, outputs)
        y = graph.insert(node, "Gemm", x, name)
        if bias is not None:
            y = graph.insert(node, "Add", y, bias)
        y = _reshape(graph, node, y, [-1, *kept, *tail])
        redirect(graph, last, y)
        graph.prune()


def products_of_activations(graph: OnnxGraph) -> None:
    """Einsum of two activations as MatMul, with Transposes where labels are in another order."""
    for node in nodes_of(graph, "Einsum"):
        labels = _labels(graph, node)
        if labels is None or any(_stored(graph, name) for name in node.input):
            continue
        batch, shared = labels.batch, labels.shared
        left, right = labels.left_only, labels.right_only
        if not (len(shared) == len(left) == len(right) == 1):
            continue
        a = _transpose(graph, node, node.input[0], labels.left, batch + left + shared)
        b = _transpose(graph, node, node.input[1], labels.right, batch + shared + right)
        y = graph.insert(node, "MatMul", a, b)
        y = _transpose(graph, node, y, batch + left + right, labels.out)
        redirect(graph, node.output[0], y)
        graph.prune()


def without_zero_biases(graph: OnnxGraph) -> None:
    """Gemm without a third input that counts nothing: with one in float nothing is fused."""
    for node in nodes_of(graph, "Gemm"):
        if len(node.input) > 2 and attribute(node, "beta", 1.0) == 0:
            del node.input[2]
            set_attributes(node, beta=1.0)
    graph.read()


class _Labels(NamedTuple):
    """The axes of an Einsum of two by letters: those of all three, of both inputs, of one."""

    left: str
    right: str
    out: str

    @property
    def batch(self) -> str:
        return "".join(c for c in self.left if c in self.right and c in self.out)

    @property
    def shared(self) -> str:
        return "".join(c for c in self.left if c in self.right and c not in self.out)

    @property
    def left_only(self) -> str:
        return "".join(c for c in self.left if c not in self.right)

    @property
    def right_only(self) -> str:
        return "".join(c for c in self.right if c not in self.left)


def _labels(graph: OnnxGraph, node: Any) -> _Labels | None:
    """The axes of both inputs and of the result; None for other products."""
    if node.op_type == "Einsum":
        equation = attribute(node, "equation").decode().replace(" ", "")
        inputs, _, out = equation.partition("->")
        sides = inputs.split(",")
        repeated = any(len(set(s)) < len(s) for s in (*sides, out))
        if len(sides) != 2 or "." in equation or not out or repeated:
            return None
        found = _Labels(sides[0], sides[1], out)
        apart = set(found.left_only + found.right_only + found.batch)
        return found if apart == set(out) else None
    sizes = sizes_of(graph, node.input[0])
    if sizes is None or len(_shape(graph, node.input[1]) or ()) != 2:
        return None
    rest = "abcdefgh"[: len(sizes) - 1]
    return _Labels(rest + "y", "yz", rest + "z")


def _matrix(
    graph: OnnxGraph, node: Any, contracted: int
) -> tuple[str, tuple[int, int], tuple[int, ...]] | None:
    """A stored weight as a matrix, its two sizes, and how outputs are laid."""
    shape = _shape(graph, node.input[1])
    dequantize = _stored(graph, node.input[1])
    if shape is None or dequantize is None:
        return None
    sizes = math.prod(shape[:contracted]), math.prod(shape[contracted:])
    integers = graph.constant(dequantize.input[0])
    scale = graph.constant(dequantize.input[1])
    if integers is None or scale is None or attribute(dequantize, "block_size"):
        return None
    options = {}
    if scale.size > 1:
        axis = attribute(dequantize, "axis", 1) % integers.ndim
        before = math.prod(integers.shape[:axis])
        if scale.size != sizes[1] or before != sizes[0]:
            return None
        options["axis"] = 1
    if integers.shape == sizes:
        return dequantize.output[0], sizes, tuple(shape[contracted:])
    name = graph.add_constant(f"{dequantize.input[0]}_matrix", integers.reshape(sizes))
    made = graph.insert(
        node, "DequantizeLinear", name, *dequantize.input[1:], **options
    )
    return made, sizes, tuple(shape[contracted:])


def _stored(graph: OnnxGraph, name: str) -> Any | None:
    """The DequantizeLinear of a stored weight, through a Reshape."""
    node = graph.producers.get(name)
    if node is not None and node.op_type == "Reshape":
        node = graph.producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return node if graph.constant(node.input[0]) is not None else None


def _shape(graph: OnnxGraph, name: str) -> tuple[int, ...] | None:
    """The sizes of a stored weight."""
    node = graph.producers.get(name)
    if node is not None and node.op_type == "Reshape":
        to = graph.constant(node.input[1])
        return None if to is None or np.any(to < 1) else tuple(map(int, to))
    dequantize = _stored(graph, name)
    if dequantize is None:
        return None
    integers = graph.constant(dequantize.input[0])
    return None if integers is None else integers.shape


def _bias_after(graph: OnnxGraph, node: Any, outputs: int) -> tuple[str | None, str]:
    """A constant that is added to the result, one number an output, and what holds the sum."""
    add = graph.only_consumer(node.output[0])
    if add is None or add.op_type != "Add":
        return None, node.output[0]
    other = add.input[1 - list(add.input).index(node.output[0])]
    bias = graph.constant(other)
    if bias is None or bias.size != outputs or bias.dtype != np.float32:
        return None, node.output[0]
    sizes = [n for n in bias.shape if n != 1]
    tail = list(bias.shape[bias.ndim - len(sizes) :])
    if sizes != tail:
        return None, node.output[0]
    name = graph.add_constant(f"{other}_flat", bias.reshape(-1))
    return name, add.output[0]


def _reshape(graph: OnnxGraph, before: Any, name: str, sizes: list[int]) -> str:
    to = graph.add_constant("sizes", np.asarray(sizes, np.int64))
    return graph.insert(before, "Reshape", name, to)


def _transpose(
    graph: OnnxGraph, before: Any, name: str, labels: str, wanted: str
) -> str:
    if labels == wanted:
        return name
    order = [labels.index(c) for c in wanted]
    return graph.insert(before, "Transpose", name, perm=order)
