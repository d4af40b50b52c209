"""What is known of the inputs and outputs of products: from data, or from norms."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.channels import Joined, Layout, Member, Span, layout_size
from jaxmet.engine.collect import collect
from jaxmet.engine.graph import Graph
from jaxmet.engine.node import Edge, Node
from jaxmet.numerics.moments import (
    Measured,
    Moments,
    added,
    clipped,
    either,
    leaky,
    measure,
    merge,
    normal,
)
from jaxmet.transforms.equalize.channels import Channels, Weight, dense, wide
from jaxmet.tree.batches import Batches
from jaxmet.tree.leaves import is_compressed

LOOPS = ("scan", "while", "cond")
KEEPING = (
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "split",
    "pad", "rev", "copy", "convert_element_type", "reduce_precision", "stop_gradient",
    "sharding_constraint",
)  # fmt: skip
POOLS = ("mean", "max_pool", "avg_pool")

Tensor = dict[int, Moments]  # by channel group


class Observed(NamedTuple):
    """Moments of a product's inputs, and the variance of its outputs."""

    inputs: Moments
    variance: jax.Array


# From data


def measured(
    graph: Graph,
    params: Any,
    weights: tuple[Weight, ...],
    batches: Batches,
    progress: bool,
) -> dict[str, Observed]:
    """What the products see on data, one pass over it."""
    wanted = {w.node.name for w in weights if not set(w.node.region) & set(LOOPS)}

    def hook(node: Node, run: Any, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result = run(*operands)
        if node.name not in wanted:
            return result, None
        inputs = measure(operands[0], node.in_features)
        return result, (inputs, measure(result, node.features))

    def merged(one: Any, two: Any) -> Any:
        leaf = lambda x: isinstance(x, Measured)
        return jax.tree.map(merge, one, two, is_leaf=leaf)

    found = collect(
        graph, params, batches, hook, merged, caller="equalize", progress=progress
    )
    every = {}
    for weight in weights:
        if weight.node.name not in found:
            continue
        inputs, outputs = found[weight.node.name]
        sizes = (weight.inputs[0].size, weight.outputs[0].size)
        if (inputs.mean.size, outputs.mean.size) == sizes:
            every[weight.node.name] = Observed(inputs.moments, outputs.moments.variance)
    return every


# From norms


def predicted(
    channels: Channels, leaves: Mapping[str, Any], weights: tuple[Weight, ...]
) -> dict[str, Observed]:
    """What the norms' statistics say, carried on through the network as normal values.

    Products add their inputs up as if they knew nothing of each other; additions do too.
    Where only the output of a product is known and nothing rescales its inputs, these are
    taken to be what would make such outputs, all of one size.
    """
    network = _Network(channels, leaves)
    tensors = network.tensors()
    found = {}
    for weight in weights:
        name = weight.node.name
        tensor, inputs = tensors[name], network.into(weight.node, tensors)
        outputs = join(weight.outs[0].layout, tensor) if tensor else None
        if outputs is None or len(weight.outs) != 1:
            continue
        if inputs is None and np.all(weight.inputs == channels.size):
            inputs = _white(weight, leaves[weight.parameter], outputs.variance)
        if inputs is not None and inputs.mean.size == weight.inputs[0].size:
            found[name] = Observed(inputs, outputs.variance)
    return found


def _white(weight: Weight, leaf: Any, variance: jax.Array) -> Moments:
    total = jnp.sum(jnp.square(weight.matrix(leaf)))
    power = jnp.sum(variance) / jnp.where(total > 0, total, 1.0)
    every = jnp.full(weight.inputs[0].size, power)
    return normal(jnp.zeros_like(every), every)


class _Network:
    """Moments of every tensor that a norm's statistics reach, in the order of the run."""

    def __init__(self, channels: Channels, leaves: Mapping[str, Any]) -> None:
        self.channels, self.graph, self.leaves = channels, channels.graph, leaves
        self.members: dict[str, list[Member]] = {}
        for member in self.graph.members:
            self.members.setdefault(member.node, []).append(member)

    def tensors(self) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        for node in self.graph.nodes:
            rule = getattr(self, f"_{node.kind}", None)
            looped = set(node.region) & set(LOOPS)
            found[node.name] = None if rule is None or looped else rule(node, found)
        return found

    def member(
        self, node: str, role: str, parameter: str | None = None
    ) -> Member | None:
        """The only axis of a node's parameter that has this role."""
        mine = [m for m in self.members.get(node, ()) if m.role == role]
        mine = [m for m in mine if parameter in (None, m.parameter)]
        return mine[0] if len(mine) == 1 else None

    def vector(self, name: str | None) -> jax.Array | None:
        if name is None or name not in self.leaves:
            return None
        array = jnp.asarray(dense(self.leaves[name]))
        return array.reshape(-1).astype(wide(array.dtype))

    def operand(self, edge: Edge, found: Mapping[str, Tensor | None]) -> Tensor | None:
        if edge.node is None or any(move not in KEEPING for move in edge.moves):
            return None
        return found.get(edge.node)

    def operands(
        self, node: Node, found: Mapping[str, Tensor | None]
    ) -> list[Tensor] | None:
        tensors = [self.operand(edge, found) for edge in node.inputs]
        numbers = {edge.operand for edge in node.inputs}
        if len(numbers) != len(tensors) or any(t is None for t in tensors):
            return None
        return tensors  # pyright: ignore[reportReturnType]

    def into(self, node: Node, found: Mapping[str, Tensor | None]) -> Moments | None:
        """Moments of a product's inputs, in the order of its weight."""
        tensors, member = self.operands(node, found), self.member(node.name, "in")
        if not tensors or member is None:
            return None
        return join(member.layout, tensors[0])

    # One rule a kind of node

    def _product(self, node: Node, found: Mapping[str, Tensor | None]) -> Tensor | None:
        readers = [n for n in self.graph.readers(node.name) if n.norm is not None]
        for reader in readers:
            norm = reader.norm
            direct = not reader.inputs[0].moves
            if norm is None or norm.over != "stored" or not norm.plain or not direct:
                continue
            mean, variance = self.vector(norm.mean), self.vector(norm.variance)
            member = self.member(reader.name, "variance")
            if mean is not None and variance is not None and member is not None:
                return split(member.layout, normal(mean, variance))
        return self._through_weight(node, found)

    def _through_weight(
        self, node: Node, found: Mapping[str, Tensor | None]
    ) -> Tensor | None:
        inputs, out = self.into(node, found), self.member(node.name, "out")
        member = self.member(node.name, "in")
        if inputs is None or out is None or member is None:
            return None
        weight = Weight.of(node, self.members[node.name], self.channels)
        matrix = weight.matrix(
            self.leaves[out.parameter]
        )  # (groups, ins, outs, window)
        grouped = [v.reshape(matrix.shape[:2]) for v in (inputs.mean, inputs.variance)]
        mean = jnp.einsum("giow,gi->go", matrix, grouped[0]).reshape(-1)
        variance = jnp.einsum("giow,gi->go", jnp.square(matrix), grouped[1]).reshape(-1)
        bias = self.vector(node.bias)
        if bias is not None and bias.size == mean.size:
            mean = mean + bias.astype(mean.dtype)
        return split(out.layout, normal(mean, variance))

    def _norm(self, node: Node, found: Mapping[str, Tensor | None]) -> Tensor | None:
        norm = node.norm
        if norm is None or norm.over != "stored" or not norm.plain:
            return None
        variance, member = (
            self.vector(norm.variance),
            self.member(node.name, "variance"),
        )
        if variance is None or member is None:
            return None
        scale, bias = self.vector(norm.scale), self.vector(norm.bias)
        bias = jnp.zeros_like(variance) if bias is None else bias
        spread = variance / (variance + norm.epsilon)
        spread = spread if scale is None else spread * scale * scale
        return split(member.layout, normal(bias, spread))

    def _activation(
        self, node: Node, found: Mapping[str, Tensor | None]
    ) -> Tensor | None:
        tensors = self.operands(node, found)
        if tensors is None or len(tensors) != 1:
            return None
        infinite = jnp.float32(jnp.inf)
        if node.function == "relu":
            return _each(tensors[0], lambda x: clipped(x, *_like(x, 0.0, infinite)))
        if node.function == "clip" and node.bounds is not None:
            return self._clip(node, tensors[0])
        factor = self.vector(node.factor)
        slope = jnp.mean(factor) if factor is not None else node.slope
        if node.function in ("leaky_relu", "prelu") and slope is not None:
            return _each(tensors[0], lambda x: leaky(x, *_like(x, slope)))
        if node.function == "abs":
            return _each(tensors[0], lambda x: leaky(x, *_like(x, -1.0)))
        return None

    def _clip(self, node: Node, tensor: Tensor) -> Tensor | None:
        bounds, member = node.bounds, None
        assert bounds is not None
        stated: list[Any] = [None, None]
        if node.carrier is not None:
            weight = self.graph[node.carrier].weight
            leaf = self.leaves.get(weight.name or "") if weight is not None else None
            if leaf is not None and is_compressed(leaf):
                stated = [leaf.lower, leaf.upper]
                member = self.member(node.carrier, "out")
        if member is None:
            return _each(tensor, lambda x: clipped(x, *_like(x, *bounds)))
        size = layout_size(member.layout)
        ends = [
            jnp.broadcast_to(jnp.asarray(own if s is None else s, jnp.float32), (size,))
            for s, own in zip(stated, bounds, strict=True)
        ]
        found = split(member.layout, Moments(*ends, *ends))
        if found is None or set(found) != set(tensor):
            return None
        return {
            g: clipped(
                x, found[g].low.astype(x.mean.dtype), found[g].high.astype(x.mean.dtype)
            )
            for g, x in tensor.items()
        }

    def _add(self, node: Node, found: Mapping[str, Tensor | None]) -> Tensor | None:
        tensors = self.operands(node, found)
        if (
            not tensors
            or len(tensors) > 2
            or node.function not in ("add", "add_any", "sub")
        ):
            return None
        if len(tensors) == 1:
            return self._shifted(node, tensors[0])
        one, two = tensors
        if set(one) != set(two):
            return None
        if node.function == "sub":
            two = _each(two, lambda x: Moments(-x.mean, x.variance, -x.high, -x.low))
        return {g: added(one[g], two[g]) for g in one}

    def _shifted(self, node: Node, tensor: Tensor) -> Tensor | None:
        member = self.member(node.name, "shift")
        shift = self.vector(member.parameter) if member is not None else None
        if member is None or shift is None or node.function == "sub":
            return None
        zero = jnp.zeros_like(shift)
        by = split(member.layout, Moments(shift, zero, shift, shift))
        if by is None or set(by) != set(tensor):
            return None
        return {g: added(tensor[g], by[g]) for g in tensor}

    def _concat(self, node: Node, found: Mapping[str, Tensor | None]) -> Tensor | None:
        tensors = self.operands(node, found)
        if tensors is None:
            return None
        joined: Tensor = {}
        for tensor in tensors:
            for g, x in tensor.items():
                joined[g] = either(joined[g], x) if g in joined else x
        return joined

    def _pool(self, node: Node, found: Mapping[str, Tensor | None]) -> Tensor | None:
        tensors = self.operands(node, found)
        return tensors[0] if tensors and node.function in POOLS else None

    def _resize(self, node: Node, found: Mapping[str, Tensor | None]) -> Tensor | None:
        tensors = self.operands(node, found)
        return tensors[0] if tensors else None


def _each(tensor: Tensor, function: Any) -> Tensor:
    return {g: function(x) for g, x in tensor.items()}


def _like(x: Moments, *numbers: Any) -> list[jax.Array]:
    return [jnp.full_like(x.mean, number) for number in numbers]


# Between axes and channel groups


def split(layout: Layout, x: Moments) -> Tensor | None:
    """By group what stands along an axis; None where several groups share a place."""
    found: Tensor = {}
    if len(layout) == 1 and isinstance(layout[0], Joined):
        start = 0
        for part in layout[0].parts:
            stop = start + layout_size(part)
            inner = split(part, Moments(*(v[start:stop] for v in x)))
            if inner is None:
                return None
            found |= inner
            start = stop
        return found
    if len(layout) == 1 and isinstance(layout[0], Span):
        group = layout[0].group
        return {} if group is None else {group: x}
    return None if layout else {}


def join(layout: Layout, tensor: Tensor) -> Moments | None:
    """What stands along an axis; positions repeat what is known of their channel."""
    if len(layout) == 1 and isinstance(layout[0], Joined):
        parts = [join(part, tensor) for part in layout[0].parts]
        known = [p for p in parts if p is not None]
        if len(known) != len(parts):
            return None
        return Moments(*(jnp.concatenate(v) for v in zip(*known, strict=True)))
    if any(isinstance(item, Joined) for item in layout):
        return None
    places = [
        i
        for i, item in enumerate(layout)
        if isinstance(item, Span) and item.group in tensor
    ]
    if len(places) != 1:
        return None
    at, total = places[0], layout_size(layout)
    own = layout[at]
    assert isinstance(own, Span) and own.group is not None
    after = layout_size(layout[at + 1 :])

    def along(v: jax.Array) -> jax.Array:
        return jnp.tile(jnp.repeat(v, after), total // (own.size * after))

    return Moments(*(along(v) for v in tensor[own.group]))
