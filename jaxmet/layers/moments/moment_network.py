"""What batch norms know of the network, carried on through it as normal values.

A norm with stored statistics says mean and variance of what it reads, and so of what it
makes: bias and scale². From there moments go on through activations, poolings, additions,
concatenations and products without a norm. Products add their inputs up as if they knew
nothing of each other, additions and multiplications do too; a pool keeps the moments of
what it pools. No data is needed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxmet.engine.graph.channel_groups import Member, layout_size
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Edge, Node
from jaxmet.engine.nodes.scalar_function import compute
from jaxmet.layers.channels import Tensor, join, split
from jaxmet.layers.eligibility import of, why_looped
from jaxmet.layers.folds.norm_parameters import statistics_weight
from jaxmet.layers.layer import by_channel
from jaxmet.numerics import xp
from jaxmet.numerics.hadamard import block_means, hadamard
from jaxmet.numerics.moments import (
    N_SIGMA,
    Moments,
    added,
    affine,
    clipped,
    either,
    leaky,
    multiplied,
    normal,
    through,
)
from jaxmet.numerics.precision import wide
from jaxmet.numerics.xp import Array
from jaxmet.tree.leaves import dense, input_scale_of, input_signs_of, is_compressed

KEEPING = (
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "split",
    "pad", "rev", "copy", "convert_element_type", "reduce_precision", "stop_gradient",
    "sharding_constraint", "neg", "mul", "div", "add", "sub",
)  # fmt: skip
POOLS = ("mean", "max_pool", "avg_pool")


class UnreachedError(Exception):
    """Nothing is known of a value; the message says why."""


class MomentNetwork:
    """Moments of every tensor, in the order of the run; a text where there are none.

    `known` has for each node its moments by channel group, or why nothing is known, found
    when it is first asked for. `leaves` may be traced.
    """

    def __init__(
        self, graph: Graph, leaves: Mapping[str, Any], n_sigma: float = N_SIGMA
    ) -> None:
        self.graph, self.leaves, self.n_sigma = graph, leaves, n_sigma
        self.members: dict[str, list[Member]] = {}
        for member in graph.members:
            self.members.setdefault(member.node, []).append(member)
        self.norms: dict[str, Node] = {}
        for node in graph.nodes:
            norm = node.norm
            if norm is not None and norm.over == "stored" and norm.plain:
                edge = node.inputs[0]
                if edge.node is not None and not edge.moves:
                    self.norms.setdefault(edge.node, node)
        self.settled: dict[str, Tensor | str] = {}

    @property
    def known(self) -> dict[str, Tensor | str]:
        """By node what is known of its result, in the order of the run."""
        for node in self.graph.nodes[len(self.settled) :]:
            self.settled[node.name] = self.settle(node)
        return self.settled

    def settle(self, node: Node) -> Tensor | str:
        """What is known of a node's result."""
        if (why := of(node.name, why_looped(node))) is not None:
            return why
        try:
            stored = self.stored(node)
            if stored is not None:
                return stored
            rule = getattr(self, f"_{node.kind}", None)
            if rule is None:
                raise UnreachedError(f"nothing is known of {node.name}, a {node.kind}")
            return rule(node)
        except UnreachedError as why:
            return str(why)

    def into(self, node: Node) -> Moments | str:
        """Moments of a product's inputs, or why they are not known."""
        try:
            self.known  # noqa: B018  everything before it is settled first
            return self.inputs(node)
        except UnreachedError as why:
            return str(why)

    def member(
        self, node: str, role: str, parameter: str | None = None
    ) -> Member | None:
        """The only axis of a node's parameter that has this role."""
        mine = [m for m in self.members.get(node, ()) if m.role == role]
        mine = [m for m in mine if parameter in (None, m.parameter)]
        return mine[0] if len(mine) == 1 else None

    def axis(self, node: Node, role: str, parameter: str | None = None) -> Member:
        """The same, for something that cannot go on without."""
        found = self.member(node.name, role, parameter)
        if found is None:
            raise UnreachedError(f"the channels of {node.name} are on no single axis")
        return found

    def vector(self, name: str | None) -> Array | None:
        """A parameter as a row of numbers."""
        if name is None or name not in self.leaves:
            return None
        array = xp.asarray(dense(self.leaves[name]))
        return array.reshape(-1).astype(wide(array.dtype))

    def operand(self, edge: Edge) -> Tensor:
        """What arrives along an edge."""
        if edge.node is None:
            raise UnreachedError("an operation without a rule makes it")
        tensor = self.settled.get(edge.node, f"{edge.node} runs later")
        if isinstance(tensor, str):
            raise UnreachedError(tensor)
        bad = [move for move in edge.moves if move not in KEEPING]
        if bad or edge.affine is None:
            raise UnreachedError(f"{(bad or edge.moves)[-1]} after {edge.node}")
        if edge.affine == (1.0, 0.0):
            return tensor
        scale, shift = edge.affine
        return _each(tensor, lambda x: affine(x, scale, shift))

    def operands(self, node: Node) -> list[Tensor]:
        """What arrives at a node."""
        if len({edge.operand for edge in node.inputs}) != len(node.inputs):
            raise UnreachedError(f"{node.name} may read several values")
        return [self.operand(edge) for edge in node.inputs]

    def only_operand(self, node: Node) -> Tensor:
        """What arrives at a node that reads one value."""
        tensors = self.operands(node)
        if len(tensors) != 1:
            raise UnreachedError(f"{node.name} reads {len(tensors)} values")
        return tensors[0]

    # One rule per kind of node

    def stored(self, node: Node) -> Tensor | None:
        """The moments of a node's result that a norm that reads it stores."""
        consumer = self.norms.get(node.name)
        if consumer is None or consumer.norm is None or consumer.loops:
            return None
        mean = self.vector(consumer.norm.mean)
        variance = self.vector(consumer.norm.variance)
        member = self.member(consumer.name, "variance")
        if mean is None or variance is None or member is None:
            return None
        weight = statistics_weight(consumer.norm, self.leaves, mean.dtype)
        moments = normal(mean * weight, variance * weight, self.n_sigma)
        return split(member.layout, moments)

    def inputs(self, node: Node) -> Moments:
        """Moments of what a product multiplies, in the order of its weight."""
        tensors = self.operands(node)
        if (why := node.why_kept()) is not None:
            raise UnreachedError(f"{node.name}: {why}")
        member = self.axis(node, "in")
        found = join(member.layout, tensors[0]) if tensors else None
        if found is None:
            raise UnreachedError(f"{node.name} reads channels that nothing ties")
        scale = self.input_scale(node)
        if scale is not None:
            inverse = (1 / scale.reshape(-1)).astype(found.mean.dtype)
            mean, variance, low, high = found
            found = Moments(
                mean * inverse, variance * inverse**2, low * inverse, high * inverse
            )
        signs = input_signs_of(self.leaves.get(node.kernel))
        if signs is None:
            return found
        mean = found.mean * xp.asarray(signs).reshape(-1).astype(found.mean.dtype)
        return normal(hadamard(mean), block_means(found.variance), self.n_sigma)

    def input_scale(self, node: Node) -> Array | None:
        """What a product's inputs are divided by."""
        scale = input_scale_of(self.leaves.get(node.kernel))
        return None if scale is None else xp.asarray(scale)

    def implied(self, node: Node) -> Moments | str:
        """Moments of a product's unknown inputs that make what is known of its outputs.

        The means are those that explain the outputs' means best, and all inputs have one
        variance. Only where there are at least as many outputs as inputs, or a guess would
        do as well.
        """
        tensor, out = self.known[node.name], self.member(node.name, "out")
        made = None
        if out is not None and not isinstance(tensor, str):
            made = join(out.layout, tensor)
        if made is None or out is None or self.member(node.name, "in") is None:
            return f"nothing is known of what {node.name} makes"
        weight = by_channel(node, self.leaves[out.parameter])
        groups, ins, outs, _ = weight.shape
        if ins > outs:
            return f"{node.name} has fewer outputs than inputs"
        bias = self.vector(node.bias)
        mean = made.mean if bias is None else made.mean - bias.astype(made.mean.dtype)
        inverse = xp.inverse(xp.swapaxes(xp.sum(weight, axis=3), 1, 2))
        mean = xp.einsum(
            "gio,go->gi", inverse, mean.reshape(groups, outs), precision="highest"
        )
        energy = xp.sum(xp.square(weight))
        variance = xp.sum(made.variance) / xp.where(energy > 0, energy, 1.0)
        return normal(mean.reshape(-1), xp.full(groups * ins, variance), self.n_sigma)

    def _input(self, node: Node) -> Tensor:
        raise UnreachedError(f"{node.name} comes from outside")

    def _product(self, node: Node) -> Tensor:
        x, out = self.inputs(node), self.axis(node, "out")
        weight = by_channel(node, self.leaves[out.parameter])
        x = [v.reshape(weight.shape[:2]) for v in (x.mean, x.variance)]
        total = lambda w, v: xp.einsum("giow,gi->go", w, v, precision="highest")
        mean = total(weight, x[0]).reshape(-1)
        variance = total(xp.square(weight), x[1]).reshape(-1)
        if node.convolution is not None:  # of a dilated input most places are empty
            for step in node.convolution.input_dilation:
                mean, variance = mean / step, variance / step
        bias = self.vector(node.bias)
        if bias is not None and bias.size == mean.size:
            mean = mean + bias.astype(mean.dtype)
        return self.split(node, out, normal(mean, variance, self.n_sigma))

    def split(self, node: Node, member: Member, x: Moments) -> Tensor:
        found = split(member.layout, x)
        if found is None:
            raise UnreachedError(f"several channels share the axis of {node.name}")
        return found

    def made_by(self, node: Node) -> Tensor | str:
        """What a norm with stored statistics makes, whatever it reads."""
        try:
            return self._norm(node)
        except UnreachedError as why:
            return str(why)

    def _norm(self, node: Node) -> Tensor:
        norm = node.norm
        if norm is None or norm.over != "stored" or not norm.plain:
            raise UnreachedError(f"{node.name} stores no statistics")
        member, variance = self.axis(node, "variance"), self.vector(norm.variance)
        if variance is None:
            raise UnreachedError(f"the tree has no {norm.variance}")
        scale, bias = self.vector(norm.scale), self.vector(norm.bias)
        bias = xp.zeros_like(variance) if bias is None else bias
        variance = variance * statistics_weight(norm, self.leaves, variance.dtype)
        share = variance + norm.epsilon
        share = xp.where(share > 0, variance / xp.where(share > 0, share, 1.0), 0.0)
        share = share if scale is None else share * scale * scale
        share = share * norm.factor**2
        return self.split(node, member, normal(bias, share, self.n_sigma))

    def _activation(self, node: Node) -> Tensor:
        tensor = self.only_operand(node)
        if node.function == "relu":
            return _each(tensor, lambda x: clipped(x, *_like(x, 0.0, xp.inf)))
        if node.function == "clip" and node.bounds is not None:
            return self.clip(node, tensor)
        if node.function == "prelu":
            return self.prelu(node, tensor)
        assert node.activation is not None
        slope, formula = node.activation.slope, node.activation.formula
        if node.function == "leaky_relu" and slope is not None:
            return _each(tensor, lambda x: leaky(x, *_like(x, slope)))
        if node.function == "abs":
            return _each(tensor, lambda x: leaky(x, *_like(x, -1.0)))
        if formula is None:
            raise UnreachedError(f"{node.name} is no function of single numbers")
        return _each(tensor, lambda x: through(x, lambda v: compute(formula, v)))

    def prelu(self, node: Node, tensor: Tensor) -> Tensor:
        factor = self.vector(node.activation.factor if node.activation else None)
        if factor is None:
            raise UnreachedError(f"the slope of {node.name} is computed")
        if len(tensor) == 1:
            size = next(iter(tensor.values())).mean.size
            if factor.size == size:
                return _each(
                    tensor, lambda x: leaky(x, xp.asarray(factor, x.mean.dtype))
                )
        return _each(tensor, lambda x: leaky(x, *_like(x, xp.mean(factor))))

    def clip(self, node: Node, tensor: Tensor) -> Tensor:
        """Through a clip, with the bounds that a leaf states in place of its own."""
        bounds, member = node.bounds, None
        assert bounds is not None
        stated: list[Any] = [None, None]
        if node.carrier is not None:
            weight = self.graph[node.carrier].weight
            leaf = self.leaves.get(weight.name or "") if weight is not None else None
            if leaf is not None and is_compressed(leaf):
                stated = [leaf.lower, leaf.upper]
                member = self.member(node.carrier, "out")
        if member is None or all(s is None for s in stated):
            return _each(tensor, lambda x: clipped(x, *_like(x, *bounds)))
        size = layout_size(member.layout)
        ends = [
            xp.broadcast_to(xp.asarray(own if s is None else s), (size,))
            for s, own in zip(stated, bounds, strict=True)
        ]
        ends = [e.astype(wide(e.dtype)) for e in ends]
        found = self.split(node, member, Moments(*ends, *ends))
        if set(found) != set(tensor):
            raise UnreachedError(f"the bounds of {node.name} are of other channels")
        return {
            g: clipped(
                x, found[g].low.astype(x.mean.dtype), found[g].high.astype(x.mean.dtype)
            )
            for g, x in tensor.items()
        }

    def _add(self, node: Node) -> Tensor:
        tensors = self.operands(node)
        if node.function not in ("add", "add_any", "sub"):
            raise UnreachedError(f"{node.name} is a {node.function}")
        if len(tensors) == 1:
            return self.shifted(node, tensors[0])
        one, two = tensors
        if node.function == "sub":
            two = _each(two, lambda x: affine(x, -1.0, 0.0))
        return self.both(node, one, two, lambda a, b: added(a, b, self.n_sigma))

    def both(
        self,
        node: Node,
        one: Tensor,
        two: Tensor,
        rule: Callable[[Moments, Moments], Moments],
    ) -> Tensor:
        """Two values met channel by channel."""
        if set(one) != set(two):
            raise UnreachedError(f"{node.name} joins channels that nothing ties")
        return {g: rule(one[g], two[g]) for g in one}

    def shifted(self, node: Node, tensor: Tensor) -> Tensor:
        """A value and a parameter, added."""
        member = self.axis(node, "shift")
        shift = self.vector(member.parameter)
        if shift is None or node.function == "sub":
            raise UnreachedError(f"{node.name} subtracts a parameter")
        zero = xp.zeros_like(shift)
        by = self.split(node, member, Moments(shift, zero, shift, shift))
        return self.both(node, tensor, by, lambda a, b: added(a, b, self.n_sigma))

    def _multiply(self, node: Node) -> Tensor:
        tensors = self.operands(node)
        if len(tensors) != 2 or node.function != "mul":
            raise UnreachedError(f"{node.name} is a {node.function}")
        one, two = tensors
        scales = {g.index: g.scales for g in self.graph.groups}
        for kept, gate in ((one, two), (two, one)):
            moved = {k: m for g, m in gate.items() for k in scales[g] if k in kept}
            if moved and set(moved) == set(kept):
                return self.both(node, kept, moved, multiplied)
        return self.both(node, one, two, multiplied)

    def _concat(self, node: Node) -> Tensor:
        joined: Tensor = {}
        for tensor in self.operands(node):
            for g, x in tensor.items():
                joined[g] = either(joined[g], x) if g in joined else x
        return joined

    def _pool(self, node: Node) -> Tensor:
        if node.function not in POOLS:
            raise UnreachedError(f"{node.name} is a {node.function}")
        return self.only_operand(node)

    def _resize(self, node: Node) -> Tensor:
        return self.only_operand(node)

    def _output(self, node: Node) -> Tensor:
        return self.only_operand(node)


def _each(tensor: Tensor, function: Callable[[Moments], Moments]) -> Tensor:
    return {g: function(x) for g, x in tensor.items()}


def _like(x: Moments, *numbers: Any) -> list[Array]:
    return [xp.full_like(x.mean, number) for number in numbers]
