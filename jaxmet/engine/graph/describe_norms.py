"""From the equations of a norm to its parameters by role."""

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.views import follow
from jaxmet.engine.flow.liveness import carries
from jaxmet.engine.graph.node import (
    Debias,
    Norm,
)
from jaxmet.engine.nodes.cluster import (
    LINEAR,
    VIEWS,
    Cluster,
    leaf_of,
    leaves_under,
    varying_axes,
)
from jaxmet.engine.nodes.grouping import REDUCTIONS
from jaxmet.engine.nodes.records import DataNorm, Roles, StoredNorm
from jaxmet.engine.nodes.scalar_function import formula_between
from jaxmet.engine.program.program import (
    DATA,
    PARAM,
    Value,
)


def norm_of(cluster: Cluster) -> Norm:
    """The parameters of a norm by role, and what its statistics are."""
    record = cluster.record
    if isinstance(record, StoredNorm):
        return _stored(record)
    assert isinstance(record, DataNorm)
    roles = {}
    for role in ("scale", "bias"):
        value = getattr(record, role)
        leaf = leaf_of(value) if value is not None else None
        roles[role] = leaf.value.name if leaf is not None else None
    labels = _batch_labels(record.spread, cluster)
    mixed = labels is not None and not any(lb.carries_batch(a) for a in labels)
    over = "batch" if carries(cluster.exit) and mixed else "data"
    return Norm(over, **roles, epsilon=_epsilon(record.spread), plain=False)


def _stored(record: StoredNorm) -> Norm:
    """A norm with stored statistics; of the leaves under each role their names."""
    found = record.roles
    roles = {
        role: leaf.name if (leaf := getattr(found, role)) is not None else None
        for role in ("mean", "variance", "scale", "bias")
    }
    debias = _debias(found)
    return Norm(
        "constant" if record.constant else "stored",
        **roles,
        epsilon=found.epsilon,
        plain=found.plain and (found.weight is None) == (debias is None),
        factor=found.factor,
        debias=debias,
    )


def _debias(found: Roles) -> Debias | None:
    """How the weight of stored statistics follows from a count of updates."""
    leaves = leaves_under(found.weight) if found.weight is not None else []
    if found.weight is None or len(leaves) != 1 or leaves[0].ndim:
        return None
    formula, name = formula_between(leaves[0], found.weight), leaves[0].name
    if formula is None or name is None:
        return None
    return Debias(name, formula, not found.inverse)


def _batch_labels(value: Value, norm: Cluster) -> list[lb.Axis] | None:
    """Labels that tell where the batch is in a value inside a norm, None if unknown.

    The rules label a norm from outside only; here fresh atoms go through its statistics.
    """
    equation = value.producer
    if equation is None or equation.node is not norm:
        pairs = zip(value.shape, value.axes or ((),) * value.ndim, strict=True)
        return [(lb.Atom(n, batch=lb.carries_batch(a)),) for n, a in pairs]
    # A mean over an axis that vmap names is a psum along it.
    moves = equation.name in VIEWS or equation.name in (*REDUCTIONS, "psum")
    found = [v for v in equation.data if moves or v.shape == value.shape]
    axes = _batch_labels(found[0], norm) if found else None
    if axes is None or not moves:
        return axes
    if equation.name in VIEWS:
        return follow(axes, [equation])
    return [a for i, a in enumerate(axes) if i not in equation.params["axes"]]


def norm_features(cluster: Cluster) -> tuple[int, ...]:
    """The axes of a norm along which what it subtracts, multiplies and adds differs."""
    wide = [
        v
        for e in cluster.equations
        for v in e.operands
        if e.kind == DATA and v.kind == PARAM and v.ndim == cluster.exit.ndim
    ]
    return tuple(sorted({int(axis) for v in wide for axis in varying_axes(v)}))


def _epsilon(spread: Value) -> float:
    """What is added to a variance under a root."""
    epsilon = 0.0
    while spread.producer is not None:
        equation = spread.producer
        numbers = [v.scalar() for v in equation.operands if v.kind < PARAM]
        if equation.name == "add" and len(numbers) == 1 and numbers[0] is not None:
            epsilon += numbers[0]
            spread = next(v for v in equation.operands if v.kind >= PARAM)
        elif equation.name in LINEAR or equation.name == "broadcast_in_dim":
            spread = equation.operands[0]
        else:
            break
    return epsilon
