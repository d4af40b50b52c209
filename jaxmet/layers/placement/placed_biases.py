"""Which biases are int32, and whose scales make theirs."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.folds.folded_shift import folded_norm, norm_to_fold
from jaxmet.layers.placement.placed_weights import WeightPlace
from jaxmet.layers.placement.target_rules import VIEWS, grid_source
from jaxmet.tree.config import QuantConfig


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


def names_of_bias(node: Node, norm: Node | None) -> tuple[str, ...]:
    """What a rule may call the bias of a product: the parameter that holds it is first."""
    holders: list[str | None] = [node.bias]
    if norm is not None and norm.norm is not None:
        holders = [norm.norm.bias or norm.norm.mean, norm.name, node.bias]
    return (*(h for h in holders if h is not None), node.name)


def int32_biases(
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
            both = [names_of_bias(node, n) for n in (norm, None)]
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
        names = names_of_bias(node, norm)
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


def agreed_biases(
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
