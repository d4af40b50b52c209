"""Moments of networks whose norms do not tell them all: with inputs of an assumed size."""

from jaxmet.engine.graph.node import Node
from jaxmet.layers.channels import Tensor
from jaxmet.layers.layer import by_channel
from jaxmet.layers.moments.moment_network import MomentNetwork, UnreachedError
from jaxmet.numerics import xp
from jaxmet.numerics.moments import Moments, normal


class UnitInputs(MomentNetwork):
    """Moments of every tensor, where unknown inputs of products are taken to be normal.

    Their mean is zero, and their variance makes the outputs that a norm tells of; without
    a norm it is one, as networks are fed with standardized values.
    """

    def inputs(self, node: Node) -> Moments:
        """Moments of a product's inputs, in the order of its weight."""
        try:
            return super().inputs(node)
        except UnreachedError:
            out = self.axis(node, "out")
            weight = by_channel(node, self.leaves[out.parameter])
            power, consumer = xp.ones((), weight.dtype), self.norms.get(node.name)
            energy = xp.sum(xp.square(weight))
            variance = None
            if consumer is not None and consumer.norm is not None:
                variance = self.vector(consumer.norm.variance)
            if variance is not None:
                power = xp.sum(variance).astype(weight.dtype)
                power = power / xp.where(energy > 0, energy, 1.0)
            every = xp.full(weight.shape[0] * weight.shape[1], power)
            return normal(xp.zeros_like(every), every, self.n_sigma)

    def read(self, node: Node) -> Tensor | str:
        """What is known of the first value that a product reads, by channel group."""
        self.known  # noqa: B018  everything before it is settled first
        try:
            return self.operands(node)[0]
        except UnreachedError as why:
            return str(why)


class Constants(UnitInputs):
    """What every tensor would hold if products read zeros: biases and shifts of norms."""

    def stored(self, node: Node) -> Tensor | None:
        """Statistics of norms do not count."""
        return None

    def inputs(self, node: Node) -> Moments:
        """Zeros."""
        return Moments(*(xp.zeros_like(v) for v in super().inputs(node)))

    def _norm(self, node: Node) -> Tensor:
        """A norm with stored statistics, applied to the constant that it reads."""
        norm = node.norm
        if norm is None or norm.over != "stored" or not norm.plain:
            raise UnreachedError(f"{node.name} stores no statistics")
        variance = self.vector(norm.variance)
        if variance is None:
            raise UnreachedError(f"the tree has no {norm.variance}")
        zero, one = xp.zeros_like(variance), xp.ones_like(variance)
        mean, scale, bias = (
            default if value is None else value
            for value, default in (
                (self.vector(norm.mean), zero),
                (self.vector(norm.scale), one),
                (self.vector(norm.bias), zero),
            )
        )
        share = variance + norm.epsilon
        gain = scale / xp.sqrt(xp.where(share > 0, share, 1.0))
        member = self.axis(node, "variance")
        shift = self.split(node, member, Moments(bias - mean * gain, zero, zero, zero))
        gains = self.split(node, member, Moments(gain, zero, zero, zero))

        def rule(x: Moments, g: Moments) -> Moments:
            return Moments(*(v * g.mean.astype(v.dtype) for v in x))

        scaled = self.both(node, self.only_operand(node), gains, rule)
        return self.both(
            node, scaled, shift, lambda a, b: Moments(a.mean + b.mean, *a[1:])
        )
