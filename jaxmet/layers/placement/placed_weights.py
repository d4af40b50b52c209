"""Which weights have a quantizer, and along which axes its scales lie."""

import dataclasses
from collections.abc import Iterator

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.eligibility import NOT_SELECTED
from jaxmet.layers.placement.rule_targets import agreed, says_float
from jaxmet.tree.config import QuantConfig
from jaxmet.tree.config_fields import Settings


@dataclasses.dataclass(frozen=True)
class WeightPlace:
    """One parameter (or derived weight) and the nodes that read it."""

    name: str
    nodes: tuple[Node, ...]
    settings: Settings
    axis: tuple[int, ...] | None
    block_axis: int | None
    note: str | None = None
    can_have_blocks: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What a rule may call it: the parameter, and the nodes that read it."""
        return (self.name, *(n.name for n in self.nodes))


def all_weights(
    graph: Graph, config: QuantConfig, caller: str
) -> Iterator[WeightPlace]:
    """Every weight, with what the rules say of it."""
    consumers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.is_layer and node.weight is not None:
            name = node.weight.name or node.name
            consumers.setdefault(name, []).append(node)
    for name, nodes in consumers.items():
        calls = [(name, node.name) for node in nodes]
        lookups = all(node.kind == "lookup" for node in nodes)
        own = config.for_lookups() if lookups else config
        yield _weight(name, tuple(nodes), agreed(own, calls, "weight", caller))


def quantized_weights(
    graph: Graph,
    config: QuantConfig,
    weights: tuple[WeightPlace, ...],
    left: dict[str, str],
) -> Iterator[WeightPlace]:
    for weight in weights:
        if not any(n.name in graph.selected for n in weight.nodes):
            left[weight.name] = NOT_SELECTED
        elif not weight.settings.quantize:
            left[weight.name] = says_float(config, weight.names, "weight")
        elif weight.settings.bits == 32:
            left[weight.name] = "32 bits"
        else:
            yield weight


def _weight(name: str, nodes: tuple[Node, ...], settings: Settings) -> WeightPlace:
    weights = [n.weight for n in nodes if n.weight is not None]
    kept = (0,) if weights[0].stacked else ()
    note = "derived: quantized where it is used" if weights[0].name is None else None
    axis: tuple[int, ...] | None = kept or None
    block_axis = None
    outs = {w.out_axes for w in weights}
    if settings.per_channel or settings.block is not None:
        if len(outs) == 1:
            axis = (*kept, *weights[0].out_axes) or None
        else:
            note = "per tensor: its uses disagree about the channel axis"
    ins = {w.in_axes for w in weights}
    blocks = len(ins) == len(outs) == 1 and len(weights[0].in_axes) == 1
    if settings.block is not None:
        if blocks:
            block_axis = weights[0].in_axes[0]
        else:
            note = "no blocks: it has no single input axis"
            settings = dataclasses.replace(settings, block=None)
    return WeightPlace(name, nodes, settings, axis, block_axis, note, blocks)
