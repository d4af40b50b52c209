"""What gets a quantizer: every weight, and the values that an integer device would store."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.folds.folded_shift import norm_to_fold
from jaxmet.layers.placement.cached_values import caches
from jaxmet.layers.placement.placed_activations import (
    empty_at_first,
    explain_float_inputs,
    has_sliced_quantizer,
    placed_activations,
    product_inputs,
    shared_quantizers,
    stored_results,
)
from jaxmet.layers.placement.placed_biases import (
    BiasPlace,
    agreed_biases,
    int32_biases,
    names_of_bias,
)
from jaxmet.layers.placement.placed_weights import (
    WeightPlace,
    all_weights,
    quantized_weights,
)
from jaxmet.layers.placement.residual_streams import is_data_norm, residual_streams
from jaxmet.layers.placement.rotary_embeddings import inside_rotations
from jaxmet.layers.placement.rule_targets import (
    Tensor,
    agreed,
    check_int32,
    check_rules,
)
from jaxmet.layers.placement.target_rules import (
    fixed_ranges,
    operation_of,
    requantized_products,
    target_notes,
)
from jaxmet.layers.placement.transformed_inputs import transformed_inputs
from jaxmet.tree.config import QuantConfig
from jaxmet.tree.config_fields import FIELDS, Settings


@dataclasses.dataclass(frozen=True)
class Placement:
    """Everything that is quantized, and what is not and why.

    `fixed` are the ranges that a target gives to outputs, `requantized` the weight, input and
    output whose scales s_x s_w / s_y it limits, `notes` what it says of an activation.
    `entering` are the activations that only products read on their grids. Of `caches` zeros
    count in no range, and of `sliced` ones, with a scale for each layer, nothing does. What
    `scaled` layers divide has the range of what enters these layers.
    """

    weights: tuple[WeightPlace, ...]
    biases: tuple[BiasPlace, ...]
    activations: dict[str, Settings]
    shared: dict[str, str]
    skipped: dict[str, str]
    fixed: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    requantized: tuple[tuple[str, str, str], ...] = ()
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    entering: frozenset[str] = frozenset()
    caches: frozenset[str] = frozenset()
    sliced: frozenset[str] = frozenset()
    scaled: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def held(self) -> "Placement":
        """The same without activations whose ranges are found at every call."""
        kept = {n: s for n, s in self.activations.items() if s.dynamic is None}
        shared = {n: o for n, o in self.shared.items() if o in kept}
        return dataclasses.replace(self, activations=kept, shared=shared)


def place(
    graph: Graph, config: QuantConfig, leaves: Mapping[str, Any], caller: str
) -> Placement:
    """Decide where the quantizers go.

    Raises ValueError for a rule that names nothing or reaches nothing, and for rules that
    disagree about one weight.
    """
    names = [n.name for n in graph.nodes]
    parameters = [*graph.parameters, *(p for n in graph.nodes for p in n.parameters)]
    for rule in config.unused([*names, *parameters]):
        raise ValueError(
            f"jaxmet.{caller}: {rule!r} means no node and no parameter of this model. "
            "Correct its glob (print(graph) lists the names) or drop the rule."
        )
    left: dict[str, str] = {}
    found = tuple(all_weights(graph, config, caller))
    weights = tuple(quantized_weights(graph, config, found, left))
    device = config.device
    operations = config.placement == "operations"
    wanted = stored_results(graph, device) if operations else product_inputs(graph)
    wanted -= {n for n in wanted if operation_of(graph[n]) in device.no_output}
    wanted -= inside_rotations(graph)
    streams = residual_streams(graph)
    scaled = transformed_inputs(graph, leaves)
    activations, entered = placed_activations(
        graph, config, wanted, streams, scaled.keys(), left
    )
    cached = caches(graph)
    held = {n: s for n, s in activations.items() if s.dynamic is None}
    for cache in cached:
        if cache.name in held and not held.keys() & {*cache.written}:
            left[cache.name] = (
                f"{cache.written[-1]!r} is written into it: no known range"
            )
            del activations[cache.name], held[cache.name]
    apart = {n: s for n, s in held.items() if n not in scaled}
    fixed = fixed_ranges(graph, device, apart)
    stored = {
        n: s for n, s in activations.items() if not (s.at_products or n in scaled)
    }
    shared = shared_quantizers(graph, device, stored, fixed, cached)
    entered -= {*shared, *shared.values()}
    ignored = {
        n: _ignored(n, is_data_norm(graph[n]), streams, activations, config)
        for n in wanted
    }
    tensors = _tensors(graph, config, found, ignored, shared, caller)
    check_rules(graph, config, tensors, caller)
    on_grid = set(activations) | set(shared)
    explain_float_inputs(graph, on_grid, left)
    dynamic = activations.keys() - held.keys()
    biases = tuple(int32_biases(graph, config, weights, on_grid, dynamic, leaves, left))
    biases = agreed_biases(biases, left)
    check_int32(config, tensors, [b.name for b in biases], left, caller)
    for bias in biases:
        left |= {p: f"in the int32 bias {bias.name}" for p, _ in bias.beside}
    activations = {k: v for k, v in activations.items() if k not in shared}
    _parameters(graph, weights, biases, left)
    requantized = requantized_products(
        graph, device, {w.name for w in weights}, on_grid - dynamic
    )
    notes = target_notes(graph, config.target, on_grid, fixed, left)
    return Placement(
        weights,
        biases,
        activations,
        shared,
        left,
        fixed,
        requantized,
        notes,
        entered,
        frozenset(empty_at_first(graph, cached, shared)),
        frozenset(c.name for c in cached if has_sliced_quantizer(graph, c, shared)),
        {n: layers for n, layers in scaled.items() if n in activations},
    )


def _tensors(
    graph: Graph,
    config: QuantConfig,
    weights: tuple[WeightPlace, ...],
    wanted: Mapping[str, frozenset[str]],
    shared: dict[str, str],
    caller: str,
) -> list[Tensor]:
    """Everything that a rule can say something about."""
    biases: dict[str, list[tuple[str, ...]]] = {}
    found = [
        Tensor(w.name, "weight", w.names, w.settings, blocks=w.can_have_blocks)
        for w in weights
    ]
    for node in graph.nodes:
        name = node.name
        if name in wanted:
            settings = config.resolve(name, "activation")
            owner = shared.get(name)
            found.append(
                Tensor(
                    name, "activation", (name,), settings, owner, ignores=wanted[name]
                )
            )
        norm = norm_to_fold(graph, node)
        if node.kind == "product" and (node.bias is not None or norm is not None):
            names = names_of_bias(node, norm)
            biases.setdefault(names[0], []).append(names)
    for name, calls in biases.items():
        settings = agreed(config, calls, "bias", caller)
        names = tuple(dict.fromkeys(n for names in calls for n in names))
        found.append(Tensor(name, "bias", names, settings))
    return found


def _ignored(
    name: str,
    is_norm: bool,
    streams: Collection[str],
    activations: Mapping[str, Settings],
    config: QuantConfig,
) -> frozenset[str]:
    """The fields that say nothing of an activation, by whether it is in a residual stream."""
    if name not in streams and not is_norm:
        return frozenset({"residual_bits"})
    if config.resolve(name, "activation").residual_bits != 32:
        return frozenset({"activation_bits"} if name in streams else ())
    only = {"residual_bits", "quantize_activations", "quantize"}
    return frozenset() if name in activations else FIELDS["activation"] - only


def _parameters(
    graph: Graph,
    weights: tuple[WeightPlace, ...],
    biases: tuple[BiasPlace, ...],
    left: dict[str, str],
) -> None:
    """Account for every parameter that no quantizer and no reason mentions yet."""
    said = {w.name for w in weights} | {b.name for b in biases} | set(left)
    said |= {
        p for w in weights for n in w.nodes if n.weight for p in n.weight.parameters
    }
    for node in graph.nodes:
        rest = [p for p in node.parameters if p not in said]
        if rest and node.kind == "norm":
            held = [b.name for b in biases if b.beside and node.name in b.names]
            why = "the parameters of a norm stay in float"
            if held:
                why = f"folded: the identity, and a shift in the int32 bias {held[0]}"
            left.setdefault(node.name, why)
        elif rest:
            left.update(dict.fromkeys(rest, f"used by {node.name} ({node.kind})"))
        said |= set(rest)
    for name, why in graph.unread:
        left.setdefault(name, why)
