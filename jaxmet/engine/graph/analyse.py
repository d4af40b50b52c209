"""From one call of a model to its named nodes: the program that all else reads."""

import dataclasses
from typing import Any

from jaxmet.engine.axes.labels import Atom, carries_batch
from jaxmet.engine.flow.axis_rules import label, label_inputs
from jaxmet.engine.flow.example_mixing import may_meet
from jaxmet.engine.flow.liveness import live_values
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.nodes.grouping import WINDOWS, group
from jaxmet.engine.nodes.naming import name_all
from jaxmet.engine.program import compat
from jaxmet.engine.program.calls import Call
from jaxmet.engine.program.program import (
    DATA,
    PARAM,
    Region,
    Value,
    flatten,
    spread_kinds,
)


@dataclasses.dataclass(eq=False, repr=False)
class Analysis:
    """A program with its nodes found and named, in the order in which they run."""

    call: Call
    region: Region
    leaves: dict[str, Value]
    leaf_atoms: dict[str, tuple[tuple[Atom, ...], ...]]
    inputs: list[Value]
    clusters: list[Cluster]
    unnamed: list[Cluster]
    output_shape: Any


def analyse_structure(call: Call) -> Analysis:
    """The nodes of a model whatever batch it is called with.

    Found at a batch size that tells the axes apart, where the model runs at one; else at
    the sizes that are given (a table of positions along axis 0, one example without a
    batch).
    """
    for other in call.other_batches():
        try:
            analysis = analyse(other)
        except Exception:  # whatever a model raises where it refuses a batch
            continue
        if not _keeps_batch_apart(analysis.region):
            continue
        if _takes_examples(analysis.region):
            # Perhaps each one by itself: then there are as many nodes as examples.
            given = analyse(call)
            same = {c.name for c in given.clusters} == {
                c.name for c in analysis.clusters
            }
            return analysis if same else given
        return analysis
    return analyse(call)


def _keeps_batch_apart(region: Region) -> bool:
    """Whether axis 0 of the inputs can be a batch: no window slides along it."""
    for equation in region.walk():
        if any(0 in v.shape for v in equation.results):
            return False
        if equation.name == "conv_general_dilated":
            lhs = equation.operands[0]
            along = equation.params["dimension_numbers"].lhs_spec[2:]
        elif equation.name in WINDOWS:
            lhs = equation.operands[0]
            sizes = equation.params["window_dimensions"]
            along = [i for i, n in enumerate(sizes) if n != 1]
        else:
            continue
        if lhs.axes and any(carries_batch(lhs.axes[i]) for i in along):
            return False
    return True


def _takes_examples(region: Region) -> bool:
    """Whether some examples of a batch are taken out of it."""
    for equation in region.walk():
        source = equation.operands[0] if equation.operands else None
        if equation.name == "unstack" and source is not None:
            if carries_batch(source.axes[equation.params["axis"]]):
                return True
        if equation.name not in ("slice", "split", "dynamic_slice", "gather"):
            continue
        assert source is not None
        taken = [equation.params.get("slice_sizes", source.shape)]
        if equation.name in ("slice", "split"):
            taken = [v.shape for v in equation.results]
        for i, axis in enumerate(source.axes):
            if carries_batch(axis) and any(n[i] != source.shape[i] for n in taken):
                return True
    return False


def keeps_examples_apart(call: Call) -> bool:
    """Whether a model is known to compute the outputs of each example from it alone."""
    for other in (*call.other_batches(), call):
        try:
            region, _, inputs, _ = _program(other)
        except Exception:  # whatever a model raises where it refuses a batch
            continue
        sizes = {v.shape[:1] for v in inputs if not compat.is_key(v.aval)}
        if len(sizes) != 1 or () in sizes:
            return False
        label_inputs(region)
        label(region)
        return not may_meet(region, *sizes.pop())
    return False


def _program(call: Call) -> tuple[Region, dict[str, Value], list[Value], Any]:
    """The program of a call, its parameters, its inputs and the shapes of its outputs."""
    jaxpr, shape = call.jaxpr()
    region = flatten(jaxpr)
    count = len(call.leaves)
    leaves = dict(zip(call.names, region.inputs[:count], strict=True))
    for name, value in leaves.items():
        value.name, value.kind = name, PARAM
    inputs = region.inputs[count:]
    for value in inputs:
        value.kind = DATA
    spread_kinds(region)
    return region, leaves, inputs, shape


def analyse(call: Call) -> Analysis:
    """Trace a call and find its nodes."""
    region, leaves, inputs, shape = _program(call)
    group(region)
    label_inputs(region)
    atoms = {name: value.axes for name, value in leaves.items()}
    label(region)
    live = live_values(region)
    starts = [
        Cluster("input", _content(v), [], v, operands=[v])
        for v in inputs
        if v in live and not compat.is_key(v.aval)
    ]
    ends = [
        Cluster("output", "output", [], v, v, operands=[v])
        for v in dict.fromkeys(region.outputs)
        if v in live and v.inexact
    ]
    middle, hidden = [], []
    for cluster in dict.fromkeys(
        e.node for e in region.walk() if e.node is not None and _last(e)
    ):
        named = cluster.exit in live and cluster.exit.inexact
        (middle if named else hidden).append(cluster)
    clusters = [*starts, *middle, *ends]
    name_all(clusters, starts, leaves.keys())
    return Analysis(call, region, leaves, atoms, inputs, clusters, hidden, shape)


def _content(value: Value) -> str:
    if value.is_complex:
        return "complex"
    return "values" if value.inexact else "integers"


def _last(equation: Any) -> bool:
    return equation.node.exit in equation.results
