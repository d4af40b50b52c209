"""Which way weights happen to round: how good scales are once everything is rounded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.run.replay import counted_only, evaluate
from jaxmet.numerics.chance import Rounded, added_noise
from jaxmet.numerics.precision import wide
from jaxmet.numerics.scaling import log_scales
from jaxmet.transforms.equalize.channels import (
    Channels,
    Stack,
    Weight,
    in_a_row,
    stacks,
)
from jaxmet.transforms.equalize.measured import Seen
from jaxmet.transforms.equalize.statistics import Observed
from jaxmet.transforms.simulate import round_weights
from jaxmet.tree.config import QuantConfig, Settings
from jaxmet.tree.names import replace_leaves
from jaxmet.tree.quantizers import Quantizer, Quantizers

Value = Callable[[jax.Array], jax.Array]


def tried(
    graph: Graph,
    params: Any,
    leaves: Mapping[str, Any],
    applied: Callable[[jax.Array], dict[str, Any]],
    quantizers: Quantizers,
    pictures: Any,
) -> Value:
    """The error of the outputs with rounded weights, as a share of their energy.

    `applied(x)` are the leaves that log scales change.
    """
    run = evaluate(
        graph.apply,
        lambda node, run, operands: (counted_only(node, run, run(*operands)), None),
    )

    def outputs(new: Mapping[str, Any]) -> list[jax.Array]:
        tree = replace_leaves(params, {**leaves, **new}, caller="equalize")
        tree = round_weights(tree, quantizers if new else Quantizers())
        every = jax.lax.map(lambda one: run(tree, *one)[0], pictures)
        real = [
            y for y in jax.tree.leaves(every) if jnp.issubdtype(y.dtype, jnp.floating)
        ]
        return [y.astype(wide(y.dtype)) for y in real]

    exact = outputs({})
    energy = [jnp.sum(jnp.square(y)) for y in exact]

    def value(x: jax.Array) -> jax.Array:
        total = jnp.zeros((), x.dtype)
        for y, wanted, unit in zip(outputs(applied(x)), exact, energy, strict=True):
            error = jnp.sum(jnp.square(y - wanted)) / jnp.where(unit > 0, unit, 1.0)
            total = total + error.astype(x.dtype)
        return total

    return value


def foreseen(
    channels: Channels,
    weights: Sequence[Weight],
    leaves: Mapping[str, Any],
    seen: Mapping[str, Seen],
    observed: Mapping[str, Observed],
    config: QuantConfig,
) -> Value:
    """What the norms say that rounded weights add, as a share of each product's signal."""
    known = [w for w in weights if w.node.name in seen]
    every = stacks(known, leaves)
    order = [w for stack in every for w in stack.weights]
    inputs = in_a_row([w.inputs for w in order], channels.size)
    outputs = in_a_row([w.outputs for w in order], channels.size)
    rounded = [_rounded(stack, leaves, seen, observed, config) for stack in every]

    def value(x: jax.Array) -> jax.Array:
        return added_noise(rounded, log_scales(x, inputs), log_scales(x, outputs))

    return value


def _rounded(
    stack: Stack,
    leaves: Mapping[str, Any],
    seen: Mapping[str, Seen],
    observed: Mapping[str, Observed],
    config: QuantConfig,
) -> Rounded:
    """Weights of one shape, with what is known of them."""
    weight = stack.matrix(leaves)
    names = [w.node.name for w in stack.weights]
    settings = [_settings(w, config) for w in stack.weights]

    def each(of: Callable[[str], jax.Array], *shape: int) -> jax.Array:
        return jnp.stack([of(n).reshape(shape).astype(weight.dtype) for n in names])

    ins = weight.shape[1:3]
    mean = each(lambda n: observed[n].inputs.mean, *ins)
    variance = each(lambda n: observed[n].inputs.variance, *ins)
    gain = jnp.sum(each(lambda n: seen[n].gain, *weight.shape[1:4]), axis=2)
    power = weight.shape[4] * jnp.sum(jnp.square(mean) + variance, axis=2)[..., None]
    return Rounded(
        weight,
        mean,
        variance,
        jnp.where(power > 0, gain / jnp.where(power > 0, power, 1.0), 0.0),
        np.array([2.0 ** (s.bits - 1) - 1 for s in settings]),
        np.array([s.per_channel for s in settings]),
    )


def _settings(weight: Weight, config: QuantConfig) -> Settings:
    return config.resolve((weight.parameter, weight.node.name), "weight")


def plain(weights: Sequence[Weight], config: QuantConfig) -> dict[str, Weight]:
    """The weights whose grid the scales alone decide, by parameter.

    Symmetric, from the largest magnitude of the tensor or of an output.
    """
    found = {}
    for weight in weights:
        s = _settings(weight, config)
        decided = s.symmetric and s.block is None and s.calibrator == "minmax"
        if s.quantize and s.bits < 32 and decided:
            found[weight.parameter] = weight
    return found


def grids(weights: Mapping[str, Weight], config: QuantConfig) -> Quantizers:
    """The grids of plain weights."""
    found = {}
    for name, weight in weights.items():
        s, how = _settings(weight, config), weight.node.weight
        assert how is not None
        found[name] = Quantizer(
            bits=s.bits, axis=how.out_axes if s.per_channel else None
        )
    return Quantizers(found)
