"""What each node is called.

A node with parameters is named by their module, others after the nearest product before
them and their kind.
"""

import os
from collections import Counter
from collections.abc import Collection, Sequence

from jaxmet.engine.nodes.cluster import LAYERS, Cluster, leaf_of, leaves_under
from jaxmet.engine.nodes.records import DataNorm, Pointwise, StoredNorm, Weighted
from jaxmet.engine.program.program import DATA, Value

OWN_NAME = (*LAYERS, "norm", "activation")


def modules(cluster: Cluster) -> list[str]:
    """Names of the parameters that give a node its name."""
    values: list[Value | None] = []
    match cluster.record:
        case Weighted(weight):
            values = [weight]
        case StoredNorm(spread, roles):
            values = [roles.scale, roles.bias, roles.mean, spread]
        case DataNorm(spread, scale, bias):
            values = [scale, bias, spread]
        case Pointwise(factor=factor):
            values = [factor]
    known = [v for v in values if v is not None]
    return [leaf.name for v in known for leaf in leaves_under(v) if leaf.name]


def module_of(names: Sequence[str]) -> str:
    """The module of a parameter, or the one that several share."""
    if len(names) == 1:
        return names[0].rpartition("/")[0] or names[0]
    shared = os.path.commonpath([n.rpartition("/")[0] or "." for n in names])
    return (
        shared if shared not in (".", "") else names[0].rpartition("/")[0] or names[0]
    )


def name_all(
    clusters: Sequence[Cluster],
    inputs: Sequence[Cluster],
    parameters: Collection[str],
) -> None:
    """Give every cluster its name; `clusters` in the order in which they run.

    A layer whose weight is computed from parameters has the name of none of these: that
    would be the parameter's quantizer, too.
    """
    _name_layers([c for c in clusters if c.kind in LAYERS], parameters)
    taken = {c.name for c in clusters if c.name}
    _enumerate([c for c in clusters if c.kind == "input"], "input")
    _enumerate([c for c in clusters if c.kind == "output"], "output")
    anchors = _anchors(clusters, inputs)
    count: Counter[str] = Counter(taken)
    for cluster in clusters:
        if cluster.name:
            continue
        own = modules(cluster) if cluster.kind in OWN_NAME else []
        name = module_of(own) if own else ""
        if not name or name in taken:
            kind = cluster.function if cluster.kind == "activation" else cluster.kind
            name = f"{name or anchors[cluster]}/{kind}"
        count[name] += 1
        cluster.name = name if count[name] == 1 else f"{name}:{count[name] - 1}"


def _enumerate(clusters: Sequence[Cluster], name: str) -> None:
    for i, cluster in enumerate(clusters):
        cluster.name = name if len(clusters) == 1 else f"{name}:{i}"


def _name_layers(layers: Sequence[Cluster], parameters: Collection[str]) -> None:
    weights = {c: tuple(modules(c)) for c in layers}
    direct = {c for c in layers if leaf_of(c.weighted.weight) is not None}
    held: dict[str, set[tuple[str, ...]]] = {}
    for cluster in layers:
        held.setdefault(module_of(weights[cluster]), set()).add(weights[cluster])
    names = {}
    for cluster in layers:
        module = module_of(weights[cluster])
        crowded = len(held[module]) > 1 and cluster in direct
        if cluster not in direct and module in parameters:
            module = f"{module}/{cluster.kind}"
        names[cluster] = weights[cluster][0] if crowded else module
    count = Counter(names.values())
    seen: Counter[str] = Counter()
    # One weight used twice is :0 and :1, another's name has none.
    for cluster in layers:
        name = names[cluster]
        number = seen[name] if cluster in direct else seen[name] or None
        alone = count[name] == 1 or number is None
        cluster.name = name if alone else f"{name}:{number}"
        seen[name] += 1


def _anchors(
    clusters: Sequence[Cluster], inputs: Sequence[Cluster]
) -> dict[Cluster, str]:
    """For each cluster the layer that runs last before it among its data ancestors."""
    rank = {c: i for i, c in enumerate(clusters) if c.kind in LAYERS}
    start = inputs[0].name if len(inputs) == 1 else "input"
    memo: dict[Value, int] = {}

    def latest(value: Value) -> int:
        """Rank of the last layer at or before a value, −1 for none."""
        stack, pending = [value], {value}
        while stack:
            top = stack[-1]
            if top in memo:
                stack.pop()
                continue
            needs = [v for v in before(top) if v not in memo]
            if needs and pending.isdisjoint(needs):
                stack += needs
                pending.update(needs)
                continue
            found = [memo.get(v, -1) for v in before(top)]
            memo[top] = max([own(top), *found])
            pending.discard(stack.pop())
        return memo[value]

    def own(value: Value) -> int:
        cluster = value.producer.node if value.producer is not None else None
        return rank.get(cluster, -1) if cluster is not None else -1

    def before(value: Value) -> list[Value]:
        if value.producer is None:
            return [value.source] if value.source is not None else []
        equation = value.producer
        found = [v for v in equation.operands if v.kind == DATA]
        for body in equation.bodies:
            same = len(body.outputs) == len(equation.results)
            if same:
                found.append(body.outputs[equation.results.index(value)])
        return found

    out = {}
    for cluster in clusters:
        values = cluster.operands or [cluster.exit]
        best = max((latest(v) for v in values if v.kind == DATA), default=-1)
        out[cluster] = clusters[best].name if best >= 0 else start
    return out
