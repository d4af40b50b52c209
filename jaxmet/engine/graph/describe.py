"""From clusters of equations to static nodes: layouts, parameter roles, edges."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.views import CASTS, follow, holding, move_of, numbered
from jaxmet.engine.flow.bias_targets import BiasTargets, bias_targets
from jaxmet.engine.graph.analyse import Analysis
from jaxmet.engine.graph.describe_norms import norm_features, norm_of
from jaxmet.engine.graph.node import (
    DIVIDES,
    MASKED,
    SELECTS,
    Activation,
    Convolution,
    Dot,
    LayerSpec,
    Matmul,
    Node,
    Norm,
    Weight,
)
from jaxmet.engine.graph.operand_sources import Origins
from jaxmet.engine.nodes.attention_masks import AttentionMasks
from jaxmet.engine.nodes.cluster import (
    LINEAR,
    Cluster,
    Leaf,
    leaf_of,
    leaves_under,
    through_views,
)
from jaxmet.engine.nodes.divisors import Divisors
from jaxmet.engine.nodes.products import ragged_numbers
from jaxmet.engine.nodes.scalar_function import formula_of
from jaxmet.engine.program.program import (
    DATA,
    PARAM,
    Equation,
    Region,
    Value,
)
from jaxmet.tree.leaves import input_signs_of


def describe(analysis: Analysis) -> dict[Cluster, Node]:
    """The static node of every named cluster, in the order in which they run."""
    regions = _regions(analysis.region)
    shared = _shared(analysis)
    origins, reasons = Origins(analysis), _Reasons(analysis.region)
    nodes, named = {}, set(analysis.clusters)
    norms = {c.exit: c for c in named if c.kind == "norm"}
    loops: dict[Equation, int] = {}
    for cluster in analysis.clusters:
        place = regions.get(cluster.exit.producer, ()) if cluster.equations else ()
        parameters = tuple(n for v in cluster.operands for n in _parameters(v))
        nodes[cluster] = Node(
            cluster.name,
            cluster.kind,
            cluster.function,
            tuple(origins.edges(cluster)),
            parameters,
            batch=_batch_axes(cluster.exit),
            only_consumers=_only_consumers(cluster.exit, named),
            shared=tuple(n for n in dict.fromkeys(parameters) if n in shared),
            region=tuple(e.name for e in place),
            layers=_layers(place),
            loop=_loop(place, loops),
            in_float=reasons.of(cluster),
            features=_features(cluster),
            details=_details(cluster, shared, named, norms),
        )
    nodes = _completed(nodes, shared, _rotated(analysis))
    for cluster, producer in _carriers(nodes).items():
        clip = nodes[cluster]
        assert clip.activation is not None
        details = dataclasses.replace(clip.activation, carrier=producer.name)
        nodes[cluster] = dataclasses.replace(
            clip, features=producer.features, details=details
        )
    return nodes


class _Reasons:
    """Why the results of nodes stay in float, whatever the configuration."""

    def __init__(self, region: Region):
        self.masks, self.divisors = AttentionMasks(region), Divisors(region)

    def of(self, cluster: Cluster) -> str | None:
        """The first reason that holds for a result."""
        if self.masks.hidden(cluster):
            return MASKED
        if self.masks.selects(cluster):
            return SELECTS
        return DIVIDES if self.divisors.divides(cluster) else None


def _parameters(value: Value) -> list[str]:
    return [leaf.name for leaf in leaves_under(value) if leaf.name]


def _batch_axes(value: Value) -> tuple[int, ...]:
    axes = enumerate(value.axes or ())
    return tuple(i for i, axis in axes if lb.carries_batch(axis))


Place = tuple[Equation, ...]


def _only_consumers(value: Value, named: set[Cluster]) -> tuple[str, ...] | None:
    """The named nodes that read a value as it is, if nothing else uses it."""
    found: dict[str, None] = {}
    for use in value.uses:
        if use is not None and use.node in named:
            found[use.node.name] = None
            continue
        if use is None or use.name not in CASTS or len(use.operands) != 1:
            return None
        deeper = _only_consumers(use.results[0], named)
        if deeper is None or not use.results[0].inexact:
            return None
        found |= dict.fromkeys(deeper)
    return tuple(found)


def _bias_targets(
    cluster: Cluster, named: set[Cluster], norms: dict[Value, Cluster]
) -> BiasTargets | None:
    """The products that a constant reaches that an activation of a norm loses by channel."""
    if cluster.entry is None:
        return None
    norm = norms.get(through_views(cluster.entry, CASTS))
    if norm is None:
        return None
    axes = [cluster.exit.axes[i] for i in norm_features(norm)]
    channels = {atom for axis in axes for atom in lb.leaves(axis)}
    return bias_targets(cluster, named, channels)


def _regions(region: Region, path: Place = ()) -> dict[Any, Place]:
    """For each equation the loops and branches around it, outermost first."""
    found: dict[Any, Place] = {}
    for equation in region.equations:
        found[equation] = path
        for body in equation.bodies:
            found |= _regions(body, (*path, equation))
    return found


def _layers(place: Place) -> int | None:
    """The length of the one loop around a node, if that loop slices parameters."""
    loops = [e for e in place if e.name in ("scan", "while")]
    if len(loops) != 1 or loops[0].name != "scan":
        return None
    sliced = [v for v in loops[0].bodies[0].inputs if v.sliced and v.kind == PARAM]
    return loops[0].params["length"] if sliced else None


def _loop(place: Place, numbers: dict[Equation, int]) -> int | None:
    """The number of the outermost `scan` around a node; a new one gets the next number."""
    outermost = next((e for e in place if e.name == "scan"), None)
    return None if outermost is None else numbers.setdefault(outermost, len(numbers))


def _shared(analysis: Analysis) -> dict[str, int]:
    """How many equations read a parameter, if more than one; those of a norm are one."""
    uses: Counter[str] = Counter()
    norms: set[tuple[Cluster, str]] = set()
    for value in analysis.region.outputs:
        if (
            value.kind == PARAM and leaf_of(value) is None
        ):  # a penalty, not the leaf itself
            uses.update(_parameters(value))
    for equation in analysis.region.walk():
        if equation.kind != DATA:
            continue
        for value in equation.operands:
            for leaf in leaves_under(value) if value.kind == PARAM else ():
                name = leaf.name or ""
                if equation.node is not None and equation.node.kind == "norm":
                    norms.add((equation.node, name))
                else:
                    uses[name] += not equation.bodies
    uses.update(name for _, name in norms)
    return {name: n for name, n in uses.items() if n > 1}


def _rotated(analysis: Analysis) -> set[str]:
    """The parameters whose leaves say that what their layers read is rotated."""
    leaves = zip(analysis.call.names, analysis.call.leaves, strict=True)
    return {name for name, leaf in leaves if input_signs_of(leaf) is not None}


def _completed(
    nodes: dict[Cluster, Node], shared: Mapping[str, int], rotated: Collection[str]
) -> dict[Cluster, Node]:
    """The nodes, with `rotated` set, and `tied` for weights and biases that only layers read.

    Of products those that read a weight in one way, and outside of loops.
    """
    users: dict[str, list[Node]] = {}
    for node in nodes.values():
        name = node.weight.name if node.weight is not None else None
        if name is not None and name in shared:
            users.setdefault(name, []).append(node)
    tied = {
        name
        for name, mine in users.items()
        if len(mine) == shared[name]
        and len({_reading(n) for n in mine if n.kind != "lookup"}) == 1
        and not any(n.loops for n in mine)
    }
    added = Counter(n.bias for n in nodes.values() if not n.loops)

    def completed(node: Node) -> Node:
        spec = node.layer
        if spec is None:
            return node
        bias = spec.bias is not None and added[spec.bias] == shared.get(spec.bias)
        name = spec.weight.name
        weight = dataclasses.replace(
            spec.weight, tied=name in tied, rotated=name in rotated
        )
        details = dataclasses.replace(spec, weight=weight, tied_bias=bias)
        return dataclasses.replace(node, details=details)

    return {cluster: completed(node) for cluster, node in nodes.items()}


def _reading(node: Node) -> Any:
    """How a product reads its weight: equal ones have the same matrix of it."""
    conv, weight = node.convolution, node.weight
    assert weight is not None
    if conv is not None:
        return weight.moves, conv.kernel_axes, conv.groups
    dot = node.dot
    if dot is None:
        return node.kind, node.name
    axes = [tuple(w for _, w in pairs) for pairs in (dot.summed, dot.batched)]
    return node.kind, weight.moves, *axes


def _features(cluster: Cluster) -> tuple[int, ...]:
    """The axes of a result that its weight makes, or along which a norm differs."""
    match cluster.kind:
        case "product":
            return cluster.weighted.features
        case "ragged":
            return (cluster.exit.ndim - 1,)
        case "lookup":
            numbers = cluster.equations[0].params["dimension_numbers"]
            return tuple(numbers.offset_dims)
        case "norm":
            return norm_features(cluster)
    return ()


def _details(
    cluster: Cluster,
    shared: Mapping[str, int],
    named: set[Cluster],
    norms: dict[Value, Cluster],
) -> LayerSpec | Norm | Activation | Matmul | None:
    match cluster.kind:
        case "matmul":
            return _matmul(cluster)
        case "product":
            return _product(cluster, shared)
        case "ragged":
            return _ragged(cluster, shared)
        case "lookup":
            leaf = leaf_of(cluster.weighted.weight)
            numbers = cluster.equations[0].params["dimension_numbers"]
            rows = numbers.collapsed_slice_dims
            return LayerSpec(_weight(cluster, leaf, rows, (), shared))
        case "norm":
            return norm_of(cluster)
        case "activation":
            form = cluster.pointwise
            leaf = leaf_of(form.factor) if form.factor is not None else None
            return Activation(
                formula_of(cluster),
                bounds=form.bounds if cluster.function == "clip" else None,
                slope=form.slope,
                factor=leaf.value.name if leaf else None,
                bias_targets=_bias_targets(cluster, named, norms),
            )
    return None


def _matmul(cluster: Cluster) -> Matmul:
    (equation,) = (e for e in cluster.equations if e.name == "dot_general")
    sides, _ = equation.params["dimension_numbers"]
    found: dict[Value, tuple[int, ...]] = {}
    for value, axes in zip(equation.operands, sides, strict=True):
        both = found.get(value, tuple(axes))  # the product of a value with itself
        found[value] = both if both == tuple(axes) else ()
    return Matmul(tuple(found.get(v, ()) for v in cluster.operands))


def _ragged(cluster: Cluster, shared: Mapping[str, int]) -> LayerSpec:
    """Of its weight each matrix has its own outputs; the group axis counts as one of them."""
    weight = cluster.weighted.weight
    numbers = ragged_numbers(cluster.weighted.equation).dot_dimension_numbers
    (lc, rc), _ = numbers
    outs = tuple(i for i in range(weight.ndim) if i not in rc)
    read = _weight(cluster, leaf_of(weight), outs, tuple(rc), shared)
    return LayerSpec(read, in_features=tuple(lc))


def _product(cluster: Cluster, shared: Mapping[str, int]) -> LayerSpec:
    equation, bias = cluster.weighted.equation, cluster.weighted.bias
    weight = cluster.weighted.weight
    first, p = equation.operands[0], equation.params
    numbers = p["dimension_numbers"]
    convolution = dot = None
    if cluster.function == "conv":
        out_axes, in_axes = (numbers.rhs_spec[0],), (numbers.rhs_spec[1],)
        in_features = (numbers.lhs_spec[1],)
        convolution = Convolution(
            p["feature_group_count"],
            tuple(p["window_strides"]),
            tuple(p["lhs_dilation"]),
            tuple(p["rhs_dilation"]),
            tuple((int(low), int(high)) for low, high in p["padding"]),
            tuple(numbers.lhs_spec),
            tuple(numbers.rhs_spec),
            p["batch_group_count"],
        )
    else:
        (lc, rc), (lb_, rb) = numbers
        summed, batched = (lc, lb_) if weight is first else (rc, rb)
        out_axes = tuple(i for i in range(weight.ndim) if i not in (*summed, *batched))
        in_axes, in_features = tuple(summed), tuple(rc if weight is first else lc)
        pairs = [
            (l, r)[:: -1 if weight is first else 1] for l, r in ((lc, rc), (lb_, rb))
        ]
        dot = Dot(*(tuple(zip(data, own, strict=True)) for data, own in pairs))
    leaf = leaf_of(weight)
    bias_leaf = leaf_of(bias) if bias is not None else None
    return LayerSpec(
        _weight(cluster, leaf, out_axes, in_axes, shared),
        bias_leaf.value.name if bias_leaf else None,
        bias is not None and bias_leaf is None,
        convolution=convolution,
        dot=dot,
        in_features=in_features,
    )


def _weight(
    cluster: Cluster,
    leaf: Leaf | None,
    out_axes: tuple[int, ...],
    in_axes: tuple[int, ...],
    shared: Mapping[str, int],
) -> Weight:
    value = cluster.weighted.weight
    names, operand = tuple(_parameters(value)), cluster.operands.index(value)
    if leaf is None:
        return Weight(None, names, out_axes=out_axes, in_axes=in_axes, operand=operand)
    before = numbered(leaf.value)
    after = follow(before, leaf.views)
    outs = set(holding(before, [after[i] for i in out_axes]))
    ins = set(holding(before, [after[i] for i in in_axes]))
    known = outs | ins | ({0} if leaf.stacked else set())
    return Weight(
        leaf.value.name,
        names,
        tuple(map(move_of, leaf.views)),
        leaf.stacked,
        shared=leaf.value.name in shared,
        out_axes=tuple(sorted(outs)),
        in_axes=tuple(sorted(ins)),
        window_axes=tuple(i for i in range(leaf.value.ndim) if i not in known),
        operand=operand,
    )


# Clips and the products that carry their bounds


def _carriers(nodes: dict[Cluster, Node]) -> dict[Cluster, Node]:
    """For each clip the one product that reaches it through norms alone."""
    producers = {c.exit: c for c in nodes}
    found: dict[Cluster, Node] = {}
    for cluster, node in nodes.items():
        if node.bounds is None or node.region:
            continue
        value = cluster.entry
        while value is not None:
            value = through_views(value, LINEAR)
            before = producers.get(value)
            if before is None or before.kind == "product":
                break
            value = before.entry if before.kind == "norm" else None
        else:
            before = None
        producer = nodes.get(before) if before is not None else None
        if (
            producer is not None
            and producer.weight is not None
            and producer.weight.name
        ):
            if not (
                producer.weight.shared or producer.weight.stacked or producer.region
            ):
                found[cluster] = producer
    count = Counter(n.name for n in found.values())
    return {name: n for name, n in found.items() if count[n.name] == 1}
