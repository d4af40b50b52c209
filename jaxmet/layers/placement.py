"""What gets a quantizer: every weight, and the values that an integer device would store."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.cached_values import Cache, caches
from jaxmet.layers.eligibility import NOT_SELECTED
from jaxmet.layers.folded_shift import folded_norm, norm_to_fold
from jaxmet.layers.residual_streams import (
    DYNAMIC,
    PRODUCTS,
    STREAM,
    UNREAD,
    entering,
    is_data_norm,
    residual_streams,
)
from jaxmet.layers.rotary_embeddings import inside_rotations
from jaxmet.layers.rule_targets import (
    Tensor,
    agreed,
    check_int32,
    check_rules,
    says_float,
)
from jaxmet.layers.target_rules import (
    KEEPS_GRID,
    MOVES,
    NO_NUMBERS,
    VIEWS,
    fixed_ranges,
    fuses,
    grid_source,
    keeps_grid,
    operation_of,
    requantized_products,
    target_notes,
)
from jaxmet.tree.config import FIELDS, QuantConfig, Settings
from jaxmet.tree.targets.target import UNSTATED, Target


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


@dataclasses.dataclass(frozen=True)
class BiasPlace:
    """A bias held as int32, and the two quantizers whose scales make its own.

    `beside` are the parameters that are added to it in the accumulator, with their signs: of
    a folded norm its mean, and the bias of the product before it. `names` are what a rule
    may call it.
    """

    name: str
    product: tuple[str, str]
    beside: tuple[tuple[str, float], ...] = ()
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Placement:
    """Everything that is quantized, and what is not and why.

    `fixed` are the ranges that a target gives to outputs, `requantized` the weight, input and
    output whose scales s_x s_w / s_y it limits, `notes` what it says of an activation.
    `entering` are the activations that only products read on their grids. Of `caches` zeros
    count in no range, and of `sliced` ones, with a scale for each layer, nothing does.
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
    found = tuple(_weights(graph, config, caller))
    weights = tuple(_quantized(graph, config, found, left))
    device = config.device
    operations = config.placement == "operations"
    wanted = _stored(graph, device) if operations else _entering(graph)
    wanted -= {n for n in wanted if operation_of(graph[n]) in device.no_output}
    wanted -= inside_rotations(graph)
    streams = residual_streams(graph)
    activations, entered = _activations(graph, config, wanted, streams, left)
    cached = caches(graph)
    held = {n: s for n, s in activations.items() if s.dynamic is None}
    for cache in cached:
        if cache.name in held and not held.keys() & {*cache.written}:
            left[cache.name] = (
                f"{cache.written[-1]!r} is written into it: no known range"
            )
            del activations[cache.name], held[cache.name]
    fixed = fixed_ranges(graph, device, held)
    stored = {n: s for n, s in activations.items() if not s.at_products}
    shared = _shared(graph, device, stored, fixed, cached)
    entered -= {*shared, *shared.values()}
    ignored = {
        n: _ignored(n, is_data_norm(graph[n]), streams, activations, config)
        for n in wanted
    }
    tensors = _tensors(graph, config, found, ignored, shared, caller)
    check_rules(graph, config, tensors, caller)
    on_grid = set(activations) | set(shared)
    _floats(graph, on_grid, left)
    dynamic = activations.keys() - held.keys()
    biases = tuple(_biases(graph, config, weights, on_grid, dynamic, leaves, left))
    biases = _agreed(biases, left)
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
        frozenset(_empty(graph, cached, shared)),
        frozenset(c.name for c in cached if _has_layers(graph, c, shared)),
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
            names = _names_of_bias(node, norm)
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


# Weights


def _weights(graph: Graph, config: QuantConfig, caller: str) -> Iterator[WeightPlace]:
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


def _quantized(
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


# Activations


def _activations(
    graph: Graph,
    config: QuantConfig,
    wanted: Collection[str],
    streams: Collection[str],
    left: dict[str, str],
) -> tuple[dict[str, Settings], frozenset[str]]:
    """What is quantized of what is wanted, and of that what only products read on its grid."""
    activations: dict[str, Settings] = {}
    floats: dict[str, str] = {}
    for node in graph.nodes:
        if node.name not in wanted:
            continue
        settings = config.resolve(node.name, "activation")
        norm = is_data_norm(node) and settings.residual_bits == 32
        if settings.at_products:
            floats[node.name] = DYNAMIC
        elif node.name in streams and settings.residual_bits != 32:
            settings = dataclasses.replace(settings, bits=settings.residual_bits)
        elif node.name in streams or norm:
            floats[node.name] = STREAM if node.name in streams else UNREAD
        if node.in_float is not None:
            left[node.name] = node.in_float
        elif node.name not in graph.selected:
            left[node.name] = NOT_SELECTED
        elif not settings.quantize:
            left[node.name] = says_float(config, node.name, "activation")
        elif settings.bits == 32:
            left[node.name] = "32 bits"
        else:
            activations[node.name] = settings
    floats = {n: why for n, why in floats.items() if n in activations}
    read = _entering(graph)
    for name in floats.keys() - read:
        left[name] = floats[name]
        del activations[name]
    return activations, entering(graph, floats.keys() & read, activations)


def _stored(graph: Graph, device: Target) -> set[str]:
    """The nodes whose results a device would store, groups of operations fused."""
    counts = Counter(name for n in graph.nodes for name in {e.node for e in n.inputs})
    return {
        node.name
        for node in graph.nodes
        if node.kind != "output"
        and node.function not in KEEPS_GRID
        and node.function not in NO_NUMBERS
        and not (
            counts[node.name] == 1
            and fuses(node, graph.consumers(node.name)[0], device)
        )
    }


def _entering(graph: Graph) -> set[str]:
    """The nodes whose results enter a product, or a matmul of activations."""
    wanted: set[str] = set()
    for node in graph.nodes:
        if node.kind in PRODUCTS and node.name in graph.selected:
            edges = [e for e in node.inputs if keeps_grid(e) and e.node is not None]
            wanted |= {grid_source(graph, e.node) for e in edges if e.node is not None}
    return {name for name in wanted if graph[name].function not in NO_NUMBERS}


def _shared(
    graph: Graph,
    device: Target,
    activations: dict[str, Settings],
    fixed: Mapping[str, Any],
    cached: Collection[Cache],
) -> dict[str, str]:
    """What an operation with shared scales reads uses that operation's quantizer.

    So does a cache that of what is written into it.
    """
    owner: dict[str, str] = {}
    demands = device is not UNSTATED

    def last(name: str) -> str:
        while name in owner:
            name = owner[name]
        return name

    for node in reversed(graph.nodes):
        if operation_of(node) not in device.shares or node.name not in activations:
            continue
        mine = last(node.name)
        for edge in node.inputs:
            source = grid_source(graph, edge.node) if edge.node else None
            if source is None or source not in activations or not keeps_grid(edge):
                continue
            if source in fixed:  # the runtime requantizes it
                continue
            if demands:  # a value that two of them read ties both
                source, mine = last(source), last(mine)
            if source not in owner and source != mine:  # a loop's carry may be its own
                owner[source] = mine
    for cache in cached:
        *others, mine = [n for n in cache.written if n in activations] or [cache.name]
        for name in (cache.name, *others):
            source, mine = last(name), last(mine)
            if name in activations and source != mine and source not in fixed:
                owner[source] = mine
    return {name: last(name) for name in owner}


def _empty(
    graph: Graph, cached: Collection[Cache], shared: Mapping[str, str]
) -> Iterator[str]:
    """What holds zeros where nothing was written yet: caches, and what they are joined to."""
    for cache in cached:
        if cache.name in shared:
            yield cache.name
            yield from (n for n in cache.written if graph[n].kind == "concat")


def _has_layers(graph: Graph, cache: Cache, shared: Mapping[str, str]) -> bool:
    owner = shared.get(cache.name)
    return cache.sliced and owner is not None and bool(graph[owner].layers)


def _floats(graph: Graph, on_grid: set[str], left: dict[str, str]) -> None:
    """Say which products compute on a value that has no quantizer."""
    for node in graph.nodes:
        if node.kind not in PRODUCTS or node.name not in graph.selected:
            continue
        for edge in node.inputs:
            source = grid_source(graph, edge.node) if edge.node else None
            if source in on_grid and keeps_grid(edge):
                continue
            if edge.node is not None and not keeps_grid(edge):
                bad = next(m for m in edge.moves if m not in MOVES)
                why = f"{edge.node!r} comes through {bad}"
            elif edge.node is None:
                why = f"it comes through {', '.join(edge.moves) or 'no named node'}"
            else:
                why = f"{edge.node!r} has no quantizer"
            left.setdefault(f"input of {node.name}", f"stays in float: {why}")


# Biases and the rest


def _names_of_bias(node: Node, norm: Node | None) -> tuple[str, ...]:
    """What a rule may call the bias of a product: the parameter that holds it is first."""
    holders: list[str | None] = [node.bias]
    if norm is not None and norm.norm is not None:
        holders = [norm.norm.bias or norm.norm.mean, norm.name, node.bias]
    return (*(h for h in holders if h is not None), node.name)


def _biases(
    graph: Graph,
    config: QuantConfig,
    weights: tuple[WeightPlace, ...],
    on_grid: set[str],
    dynamic: Collection[str],
    leaves: Mapping[str, Any],
    left: dict[str, str],
) -> Iterator[BiasPlace]:
    quantized = {w.name: w for w in weights}
    for node in graph.nodes:
        norm = norm_to_fold(graph, node)
        if node.kind != "product" or node.name not in graph.selected:
            continue
        if norm is not None:
            both = [_names_of_bias(node, n) for n in (norm, None)]
            wanted = [config.resolve(names, "bias").quantize for names in both]
            folded = any(wanted) and folded_norm(norm, leaves)
            if wanted[0] and not folded:
                left[norm.name] = (
                    "the parameters of a norm stay in float: it is not folded "
                    "(jm.fold_batch_norm)"
                )
            norm = norm if folded else None
        if norm is None and node.bias is None:
            continue
        names = _names_of_bias(node, norm)
        name, beside = names[0], _beside(node, norm)
        if not config.resolve(names, "bias").quantize:
            for held in {name, node.bias} - {None}:
                left.setdefault(held, "a bias stays in float")
            continue
        weight, edges = node.weight, [e for e in node.inputs if e.operand == 0]
        sources = {grid_source(graph, e.node) if e.node else None for e in edges}
        source = sources.pop() if len(sources) == 1 else None
        exact = all(m in VIEWS for e in edges for m in e.moves)
        if weight is None or weight.name not in quantized:
            why = "its weight stays in float"
        elif quantized[weight.name].settings.block is not None:
            why = "the weight of its product has several scales an output: blocks"
        elif source not in on_grid or not exact or source is None:
            why = "the input of its product has no quantizer of known scale"
        elif source in dynamic:
            why = "the scale of its product's input is found at every call"
        elif graph[source].layers or node.layers:
            why = "the grid of its product's input changes from layer to layer"
        else:
            yield BiasPlace(name, (weight.name, source), beside, names)
            continue
        left[name] = why
        if node.bias is not None:
            left[node.bias] = why


def _beside(node: Node, norm: Node | None) -> tuple[tuple[str, float], ...]:
    """What a folded norm and its product add to the parameter that holds the bias.

    The norm is x − mean + bias of the product's x + b: where it has a bias that holds the sum,
    else its mean holds the sum's negative.
    """
    if norm is None or norm.norm is None:
        return ()
    own = () if node.bias is None else ((node.bias, 1.0),)
    mean = norm.norm.mean
    if norm.norm.bias is None:
        return tuple((name, -sign) for name, sign in own)
    return (*(((mean, -1.0),) if mean is not None else ()), *own)


def _agreed(
    biases: tuple[BiasPlace, ...], left: dict[str, str]
) -> tuple[BiasPlace, ...]:
    """The biases that have one quantizer, whichever of their products reads them."""
    products: dict[str, set[Any]] = {}
    for bias in biases:
        products.setdefault(bias.name, set()).add((bias.product, bias.beside))
    for name, several in products.items():
        if len(several) > 1:
            left[name] = "the inputs of its products are on different quantizers"
    return tuple({b.name: b for b in biases if b.name not in left}.values())


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
