"""An ONNX graph in the form that runtimes fuse: biases, clips and means beside the integers.

The values stay what they are. A bias becomes int32 at the product of the scales, as integer
runtimes hold it. A clip before a QuantizeLinear becomes bounds of the integers, or nothing
where they are those of the grid: rounding is monotone.
"""

from functools import partial
from typing import Any

import numpy as np

from jaxmet.export.onnx_forms import (
    bounded,
    bounds,
    leaky_relus,
    moves,
    repeats,
    scaled_grids,
    softmaxes,
)
from jaxmet.export.onnx_graph import (
    OnnxGraph,
    attribute,
    nodes_of,
    rank_of,
    redirect,
    set_attributes,
    size_of,
)
from jaxmet.export.onnx_products import (
    dense_layers,
    products_of_activations,
    without_zero_biases,
)

PRODUCTS = ("Conv", "Gemm")


def fused(model: Any, *, integers: bool = True) -> Any:
    """The model after all passes, without `integers` with each grid as it was."""
    graph = OnnxGraph(model)
    forms = (
        _copies,
        softmaxes,
        leaky_relus,
        _weights,
        dense_layers,
        products_of_activations,
    )
    values = (_biases, without_zero_biases, _pools, _means)
    grids = (scaled_grids, repeats, moves, _clips, _flat_products) if integers else ()
    for each in (*forms, *values, *grids, partial(bounds, integers=integers)):
        each(graph)
        graph.prune()
    return model


def _copies(graph: OnnxGraph) -> None:
    """Nothing in place of Identity: after it runtimes do not see the integers."""
    for node in nodes_of(graph, "Identity"):
        if node.output[0] not in graph.outputs:
            redirect(graph, node.output[0], node.input[0])


def _weights(graph: OnnxGraph) -> None:
    """Integers of a weight transposed, in place of a Transpose after their DequantizeLinear."""
    for node in nodes_of(graph, "Transpose"):
        dequantize = graph.producers.get(node.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        integers = graph.constant(dequantize.input[0])
        if integers is None or attribute(dequantize, "block_size"):
            continue
        order = attribute(node, "perm")
        name = graph.add_constant(
            f"{dequantize.input[0]}_{node.output[0]}", integers.transpose(order)
        )
        options = {}
        scale = graph.constant(dequantize.input[1])
        if scale is not None and scale.size > 1:
            axis = attribute(dequantize, "axis", 1) % integers.ndim
            options["axis"] = list(order).index(axis)
        new = graph.insert(
            node, "DequantizeLinear", name, *dequantize.input[1:], **options
        )
        graph.replace(node.output[0], new)


def _biases(graph: OnnxGraph) -> None:
    """Constants added after a product are its bias."""
    for node in nodes_of(graph, *PRODUCTS):
        has_bias = len(node.input) > 2 and node.input[2]
        if has_bias and (node.op_type == "Conv" or attribute(node, "beta", 1.0)):
            continue
        size, last = _outputs(graph, node), node
        weight = graph.constant(_source(graph, node.input[1]))
        if size is None or weight is None:
            continue
        axis, rank = 1, weight.ndim
        consumer = graph.only_consumer(last.output[0])
        if consumer is not None and consumer.op_type == "Transpose":
            last, axis = consumer, list(attribute(consumer, "perm")).index(1)
            consumer = graph.only_consumer(consumer.output[0])
        total, value = np.zeros(size), last.output[0]
        while consumer is not None and consumer.op_type == "Add":
            here = list(consumer.input).index(value)
            bias = graph.constant(consumer.input[1 - here])
            if bias is None or not _along_channels(bias, size, axis - rank):
                break
            total, value = (
                total + bias.astype(np.float64).reshape(-1),
                consumer.output[0],
            )
            consumer = graph.only_consumer(value)
        if value == last.output[0]:
            continue
        name = _int32(graph, node, total)
        if name is None:
            continue
        if len(node.input) > 2:
            node.input[2] = name
        else:
            node.input.append(name)
        if node.op_type == "Gemm":
            set_attributes(node, beta=1.0)
        graph.read()
        redirect(graph, value, last.output[0])
        graph.prune()


def _along_channels(bias: np.ndarray, size: int, axis: int) -> bool:
    """Whether a constant is one number, or one a channel; `axis` counts from the end."""
    if bias.size == 1:
        return True
    sizes = [n for n in bias.shape if n != 1]
    return sizes == [size] and bias.ndim >= -axis and bias.shape[axis] == size


def _outputs(graph: OnnxGraph, node: Any) -> int | None:
    """How many channels a product makes."""
    weight = graph.constant(_source(graph, node.input[1]))
    if weight is None:
        return None
    if node.op_type == "Conv":
        return weight.shape[0]
    return weight.shape[0 if attribute(node, "transB", 0) else 1]


def _source(graph: OnnxGraph, name: str) -> str:
    """What a DequantizeLinear reads."""
    node = graph.producers.get(name)
    is_one = node is not None and node.op_type == "DequantizeLinear"
    return node.input[0] if is_one else name  # pyright: ignore[reportOptionalMemberAccess]


def _int32(graph: OnnxGraph, node: Any, bias: np.ndarray) -> str | None:
    """A bias as int32 after a DequantizeLinear where the product is one of integers.

    None where it does not fit, as in a channel of hardly any weights: it stays an addition.
    """
    scales = [_scale(graph, name) for name in node.input[:2]]
    if any(s is None for s in scales):
        return graph.add_constant(f"{node.output[0]}_bias", bias.astype(np.float32))
    step = np.float32(scales[0]) * np.asarray(scales[1], np.float32)
    step = np.broadcast_to(step.reshape(-1), bias.shape) if step.size > 1 else step
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = np.rint(bias.astype(np.float64) / step)
    if not np.all(np.abs(numbers) < 2.0**31):
        return None
    integers = graph.add_constant(f"{node.output[0]}_bias", numbers.astype(np.int32))
    scale = graph.add_constant(f"{node.output[0]}_bias_scale", np.asarray(step))
    options = {"axis": 0} if np.ndim(step) else {}
    return graph.insert(node, "DequantizeLinear", integers, scale, **options)


def _scale(graph: OnnxGraph, name: str) -> np.ndarray | None:
    """The scale of a value that comes from integers of 8 bits, through transposes."""
    node = graph.producers.get(name)
    while node is not None and node.op_type in ("Transpose", "Reshape"):
        node = graph.producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return None if attribute(node, "block_size") else graph.constant(node.input[1])


def _pools(graph: OnnxGraph) -> None:
    """Windows over the positions of an image as MaxPool and AveragePool, channels first.

    They come as windows over all axes of a value with two more axes in front, which
    runtimes do not have.
    """
    for node in nodes_of(graph, "MaxPool", "Conv"):
        first = graph.producers.get(node.input[0])
        second = graph.producers.get(first.input[0]) if first is not None else None
        after = graph.only_consumer(node.output[0])
        kinds = [n.op_type if n is not None else "" for n in (second, first, after)]
        if kinds != ["Unsqueeze", "Unsqueeze", "Squeeze"] or second is None:
            continue
        window = attribute(node, "kernel_shape")
        if node.op_type == "Conv":
            ones = graph.constant(node.input[1])
            if ones is None or np.any(ones != 1):
                continue
            window = ones.shape[2:]
        rank = len(window)
        steps = attribute(node, "strides", [1] * rank)
        pads = attribute(node, "pads", [0] * 2 * rank)
        apart = attribute(node, "dilations", [1] * rank)
        around = [window[i] == steps[i] == 1 for i in (0, -1)]
        padded = [pads[i] for i in (0, rank - 1, rank, 2 * rank - 1)]
        sums = node.op_type == "Conv"
        if rank < 3 or not all(around) or any(padded) or (sums and set(apart) != {1}):
            continue
        inner = slice(1, rank - 1)
        options: dict[str, Any] = {
            "kernel_shape": list(window[inner]),
            "strides": list(steps[inner]),
            "pads": [*pads[:rank][inner], *pads[rank:][inner]],
        }
        order = [0, rank - 1, *range(1, rank - 1)]
        x = graph.insert(node, "Transpose", second.input[0], perm=order)
        if sums:
            y = graph.insert(node, "AveragePool", x, count_include_pad=1, **options)
        else:
            y = graph.insert(
                node, "MaxPool", x, dilations=list(apart[inner]), **options
            )
        y = graph.insert(node, "Transpose", y, perm=[0, *range(2, rank), 1])
        out = after.output[0]  # pyright: ignore[reportOptionalMemberAccess]
        if sums:
            count = float(np.prod(window))
            divide = graph.only_consumer(out)
            by = None
            if divide is not None and divide.op_type == "Div":
                by = graph.constant(divide.input[1])
            if by is not None and by.size == 1 and float(by.ravel()[0]) == count:
                out = divide.output[0]  # pyright: ignore[reportOptionalMemberAccess]
            else:
                name = graph.add_constant(f"{y}_count", np.asarray(count, np.float32))
                y = graph.insert(node, "Mul", y, name)
        redirect(graph, out, y)
        graph.prune()


def _means(graph: OnnxGraph) -> None:
    """A mean over all positions of an image as GlobalAveragePool."""
    for node in nodes_of(graph, "Div"):
        total, count = graph.producers.get(node.input[0]), graph.constant(node.input[1])
        if total is None or total.op_type != "ReduceSum" or count is None:
            continue
        axes = graph.constant(total.input[1]) if len(total.input) > 1 else None
        rank = rank_of(graph, total.input[0])
        if axes is None or rank is None or rank < 3 or count.size != 1:
            continue
        if sorted(a % rank for a in axes.ravel()) != list(range(1, rank - 1)):
            continue
        if size_of(graph, total.input[0], range(1, rank - 1)) != float(
            count.ravel()[0]
        ):
            continue
        if graph.only_consumer(total.output[0]) is None:
            continue
        order = [0, rank - 1, *range(1, rank - 1)]
        x = graph.insert(node, "Transpose", total.input[0], perm=order)
        last = graph.add_constant(f"{x}_last", np.asarray([3], np.int64))
        if rank == 3:  # OpenVINO's mean over one axis is wrong, and right over two
            x = graph.insert(node, "Unsqueeze", x, last)
        mean = graph.insert(node, "GlobalAveragePool", x)
        quantize = graph.only_consumer(node.output[0])
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            # once more before the axes are dropped: what is fused is pool and rounding
            grid = list(quantize.input[1:])
            mean = graph.insert(node, "QuantizeLinear", mean, *grid)
            mean = graph.insert(node, "DequantizeLinear", mean, *grid)
        if attribute(total, "keepdims", 1):
            if rank == 3:
                mean = graph.insert(node, "Squeeze", mean, last)
            back = [0, *range(2, rank), 1]
            flat = graph.insert(node, "Transpose", mean, perm=back)
        else:
            flat = graph.insert(node, "Flatten", mean, axis=1)
        redirect(graph, node.output[0], flat)
        graph.prune()


def _clips(graph: OnnxGraph) -> None:
    """Bounds before a QuantizeLinear as bounds of its integers, or none."""
    for quantize in nodes_of(graph, "QuantizeLinear"):
        if graph.only_consumer(quantize.input[0]) is None:
            continue
        source, steps = bounded(graph, quantize.input[0])
        producer = graph.producers.get(source)
        while producer is not None and producer.op_type in ("Transpose", "Reshape"):
            producer = graph.producers.get(producer.input[0])
        # without the clip two grids would follow each other, and runtimes drop the first
        if not steps or producer is None or producer.op_type == "DequantizeLinear":
            continue
        scale, zero = (graph.constant(name) for name in quantize.input[1:3])
        if scale is None or zero is None or scale.size != 1 or zero.itemsize > 1:
            continue
        info = np.iinfo(zero.dtype)
        low, high = -np.inf, np.inf
        for bound in steps:
            low, high = bound(low), bound(high)
        low, high = (
            np.clip(
                np.rint(np.float32(v) / np.float32(scale)) + np.float64(zero),
                info.min,
                info.max,
            ).astype(zero.dtype)
            for v in (low, high)
        )
        quantize.input[0] = source
        graph.read()
        integers = quantize.output[0]
        consumers = graph.consumers[integers][:]
        for kind, bound, end in (("Max", low, info.min), ("Min", high, info.max)):
            if np.all(bound == end) or not consumers:
                continue
            name = graph.add_constant(f"{integers}_{kind.lower()}", np.asarray(bound))
            integers = graph.insert(consumers[0], kind, integers, name)
        for consumer in consumers:
            if consumer.output[0] != integers and integers != quantize.output[0]:
                consumer.input[0] = integers
        graph.read()


def _flat_products(graph: OnnxGraph) -> None:
    """The grid of a dense layer without a bias before the Reshape that follows it, too.

    OpenVINO 2026.4 computes wrong integers for one that is only after the Reshape.
    """
    for reshape in nodes_of(graph, "Reshape"):
        product = graph.producers.get(reshape.input[0])
        quantize = graph.only_consumer(reshape.output[0])
        kinds = [n.op_type if n is not None else "" for n in (product, quantize)]
        if kinds != ["Gemm", "QuantizeLinear"]:
            continue
        assert product is not None and quantize is not None
        if len(product.input) > 2:
            continue
        scale = graph.constant(quantize.input[1])
        if scale is None or scale.size != 1:
            continue
        grid = list(quantize.input[1:])
        flat = graph.insert(reshape, "QuantizeLinear", reshape.input[0], *grid)
        reshape.input[0] = graph.insert(reshape, "DequantizeLinear", flat, *grid)
        graph.read()
