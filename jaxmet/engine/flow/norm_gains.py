"""How a norm over the data multiplies and adds at its end: a stored gain and bias."""

import dataclasses

from jaxmet.engine.axes.views import CASTS
from jaxmet.engine.nodes.cluster import VIEWS, Cluster, Leaf, leaf_of, through_views
from jaxmet.engine.nodes.records import DataNorm
from jaxmet.engine.program.program import CONST, DATA, PARAM, Value


@dataclasses.dataclass(frozen=True)
class StoredGain:
    """The parameters of a norm that multiplies by `name` plus `offset` along one axis."""

    name: str
    offset: float
    shift: str | None
    axis: int


def stored_gain(cluster: Cluster) -> StoredGain | None:
    """How a norm over the data is scaled at its end, None where that is not known."""
    record, exit = cluster.record, cluster.exit
    assert isinstance(record, DataNorm)
    if record.scale is None:
        return None
    wanted = [v for v in (record.scale, record.bias) if v is not None]
    read = [
        v
        for e in cluster.equations
        if e.kind == DATA
        for v in e.operands
        if v.kind == PARAM
    ]
    if len(read) != len(wanted) or not all(any(v is w for w in wanted) for v in read):
        return None
    value = through_views(exit, CASTS)
    if record.bias is not None:
        last = value.producer
        if last is None or last not in cluster.equations or len(last.operands) != 2:
            return None
        one, two = last.operands
        if two is not record.bias and one is record.bias and last.name != "sub":
            one, two = two, one
        if two is not record.bias or last.name not in ("add", "add_any", "sub"):
            return None
        value = one
    if not _multiplies(value, record.scale, cluster):
        return None
    gain, shift = _offset(record.scale), None
    if record.bias is not None:
        leaf = leaf_of(record.bias)
        if leaf is None or not _is_vector(leaf):
            return None
        shift = leaf.value.name
    axes = [i for i, n in enumerate(record.scale.shape) if n != 1]
    if gain is None or len(axes) != 1 or record.scale.ndim != exit.ndim:
        return None
    name, offset = gain
    return StoredGain(name, offset, shift, axes[0])


def _multiplies(value: Value, scale: Value, cluster: Cluster) -> bool:
    """Whether a value is a product one factor of which is the scale."""
    stack = [value]
    while stack:
        value = stack.pop()
        if value is scale:
            return True
        equation = value.producer
        if equation is None or equation.node is not cluster:
            continue
        if equation.name in VIEWS or equation.name == "div":
            stack.append(equation.operands[0])
        elif equation.name == "mul":
            stack += equation.operands
    return False


def _offset(scale: Value) -> tuple[str, float] | None:
    """The parameter of a gain and the number that is added to it."""
    leaf = leaf_of(scale)
    if leaf is not None:
        name = leaf.value.name
        return (name, 0.0) if name is not None and _is_vector(leaf) else None
    equation = through_views(scale).producer
    if equation is None or equation.name != "add":
        return None
    numbers = [v for v in equation.operands if v.kind == CONST]
    others = [v for v in equation.operands if v.kind == PARAM]
    if len(numbers) != 1 or len(others) != 1:
        return None
    number, leaf = through_views(numbers[0]).scalar(), leaf_of(others[0])
    if number is None or leaf is None or not _is_vector(leaf):
        return None
    return None if leaf.value.name is None else (leaf.value.name, number)


def _is_vector(leaf: Leaf) -> bool:
    """Whether a parameter has one axis, beside that of a loop, and is read in its order."""
    reversed_ = any(e is not None and e.name == "rev" for e in leaf.views)
    return leaf.value.ndim - leaf.stacked == 1 and not reversed_
