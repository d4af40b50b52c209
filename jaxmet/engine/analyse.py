"""From one call of a model to its named nodes: the program that all else reads."""

import dataclasses
from typing import Any

from jaxmet.engine import compat
from jaxmet.engine.calls import Call
from jaxmet.engine.cluster import Cluster
from jaxmet.engine.grouping import group
from jaxmet.engine.labels import Atom
from jaxmet.engine.liveness import live_values
from jaxmet.engine.naming import name_all
from jaxmet.engine.program import DATA, PARAM, Region, Value, flatten, spread_kinds
from jaxmet.engine.rules import label, label_inputs


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


def analyse(call: Call) -> Analysis:
    """Trace a call and find its nodes."""
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
    group(region)
    label_inputs(region)
    atoms = {name: value.axes for name, value in leaves.items()}
    label(region)
    live = live_values(region)
    starts = [
        Cluster("input", "values" if v.inexact else "integers", [], v, operands=[v])
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
    name_all(clusters, starts)
    return Analysis(call, region, leaves, atoms, inputs, clusters, hidden, shape)


def _last(equation: Any) -> bool:
    return equation.node.exit in equation.results
