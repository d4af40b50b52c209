"""How much work the products of a program are."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxmet.engine.graph.analyse import analyse
from jaxmet.engine.graph.describe import describe
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.nodes.records import Weighted
from jaxmet.engine.program.program import RAGGED, Equation, Region
from jaxmet.engine.pruned.expand import call_of


class Work(NamedTuple):
    """Of one product: its node, multiplications, and the operations that XLA counts.

    `macs` counts every tap of a window at every output position, in padding too, as papers
    do; `flops` counts additions and multiplications where a tap meets a value. `extents`
    are the sizes of input and output along each window axis of a convolution's kernel.
    """

    node: Node
    macs: int
    flops: int
    extents: Mapping[int, tuple[int, int]] = {}


def works(graph: Graph, params: Any, inputs: tuple, kwargs: dict) -> list[Work]:
    """The work of every layer and of products without weights, in the order in which they run.

    The inputs have these shapes. What a scan runs counts once per step.
    """
    analysis = analyse(call_of(graph.apply, params, inputs, kwargs))
    times, found = _times(analysis.region), []
    for cluster, node in describe(analysis).items():
        if node.kind == "lookup":
            found.append(Work(node, 0, 0))
        elif node.is_product:
            record = cluster.record
            weighted = isinstance(record, Weighted)
            equation = record.equation if weighted else cluster.equations[0]
            macs, flops = (n * times[equation] for n in _counts(equation))
            found.append(Work(node, macs, flops, _extents(equation)))
    return found


def _times(region: Region, times: int = 1) -> dict[Equation, int]:
    """How often each equation runs, as far as loops say how long they are."""
    found = {}
    for equation in region.equations:
        found[equation] = times
        length = equation.params["length"] if equation.name == "scan" else 1
        for body in equation.bodies:
            found |= _times(body, times * length)
    return found


def _extents(equation: Equation) -> dict[int, tuple[int, int]]:
    if equation.name != "conv_general_dilated":
        return {}
    before, after = equation.operands[0].shape, equation.results[0].shape
    numbers = equation.params["dimension_numbers"]
    axes = (numbers.rhs_spec[2:], numbers.lhs_spec[2:], numbers.out_spec[2:])
    return {axis: (before[i], after[o]) for axis, i, o in zip(*axes, strict=True)}


def _counts(equation: Equation) -> tuple[int, int]:
    if equation.name == "conv_general_dilated":
        return _convolution(equation)
    lhs, rhs = equation.operands[:2]
    if equation.name in RAGGED:  # a row meets one matrix, whichever it is
        macs = math.prod(lhs.shape) * equation.results[0].shape[-1]
        return macs, 2 * macs
    (_, rc), (_, rb) = equation.params["dimension_numbers"]
    free = [n for i, n in enumerate(rhs.shape) if i not in (*rc, *rb)]
    macs = math.prod(lhs.shape) * math.prod(free)
    return macs, 2 * macs


def _convolution(equation: Equation) -> tuple[int, int]:
    p, (x, kernel) = equation.params, equation.operands[:2]
    numbers, out = p["dimension_numbers"], equation.results[0].shape
    inside = kernel.shape[numbers.rhs_spec[1]]
    outside = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    every = met = inside * outside
    for i, axis in enumerate(numbers.rhs_spec[2:]):
        taps, positions = kernel.shape[axis], out[numbers.out_spec[2 + i]]
        every *= taps * positions
        met *= _meetings(
            positions,
            taps,
            x.shape[numbers.lhs_spec[2 + i]],
            stride=p["window_strides"][i],
            low=int(p["padding"][i][0]),
            apart=p["rhs_dilation"][i],
            spread=p["lhs_dilation"][i],
        )
    return every, 2 * met


def _meetings(
    positions: int,
    taps: int,
    size: int,
    *,
    stride: int,
    low: int,
    apart: int,
    spread: int,
) -> int:
    """How often a tap of a window meets a value of the input along one axis."""
    places = (
        o * stride + k * apart - low for o in range(positions) for k in range(taps)
    )
    return sum(0 <= n <= (size - 1) * spread and n % spread == 0 for n in places)
