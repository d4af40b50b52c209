"""What will be quantized, how, and what not and why, before any data is read."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.layers.placement.placed_weights import WeightPlace
from jaxmet.layers.placement.placement import place
from jaxmet.tree.config import QuantConfig, config_of
from jaxmet.tree.config_fields import Kind, Settings
from jaxmet.tree.table import Table


def plan(params: Any, graph: Graph, config: QuantConfig | None = None) -> Table:
    """What `calibrate` with this configuration would quantize.

    One row per weight, bias, activation, and thing that stays in float: `name`, `kind`,
    `bits`, `symmetric`, `one scale per`, `shape` of a parameter, and `note`, which says
    with whom a quantizer is shared or why there is none. With a target in the configuration the
    note also says what it computes in float and which ranges it fixes. With rules, `rules` lists
    the globs of those that say something about the tensor: a name without a wildcard, as
    'conv1', covers that node and everything below it, so the weight 'conv1/kernel', the bias
    'conv1/bias' and the activation 'conv1/relu'.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        config: the `jm.QuantConfig`; default None: W8A8, one scale per output channel of a
            weight, one per activation.

    Returns:
        A table with one row per weight, bias and activation, and per value that stays in float.

    Raises:
        ValueError: for a rule that names or reaches nothing, for rules that disagree about a
            shared weight, and for a tree that is not the graph's.

    >>> print(jm.plan(params, graph, jm.QuantConfig(weight_bits=4)))
    """
    config = config_of(config, "plan")
    graph, leaves = fitted(params, graph, "plan")
    placement = place(graph, config, leaves, "plan")
    rows = []

    def row(
        name: str,
        what: Kind | Literal["float"],
        settings: Any = None,
        per: Any = None,
        note: Any = None,
        names: tuple[str, ...] = (),
    ) -> None:
        rules = () if what == "float" else config.rules_for(names or name, what)
        shape = leaves[name].shape if name in leaves else None
        rows.append(
            {
                "name": name,
                "kind": what,
                "bits": settings.bits if settings else None,
                "symmetric": None
                if not settings
                else "yes"
                if settings.symmetric
                else "no",
                "one scale per": per,
                "shape": None
                if shape is None
                else "×".join(map(str, shape)) or "scalar",
                "note": note,
            }
        )
        if config.rules:
            rows[-1]["rules"] = ", ".join(r.glob for r in rules) or None

    for w in placement.weights:
        row(w.name, "weight", w.settings, _granularity(w, leaves), w.note, w.names)
    for b in placement.biases:
        settings = config.resolve(b.names, "bias")
        row(
            b.name,
            "bias",
            settings,
            "channel",
            f"scales of {b.product[0]} and {b.product[1]}"
            + (f", with {', '.join(n for n, _ in b.beside)} in it" if b.beside else ""),
            b.names,
        )
    for name, settings in placement.activations.items():
        per = _rows_of(settings) if name in placement.entering else "tensor"
        row(name, "activation", settings, per, placement.notes.get(name))
    for name, owner in placement.shared.items():
        row(
            name,
            "activation",
            placement.activations.get(owner),
            "tensor",
            "; ".join(filter(None, (f"as {owner}", placement.notes.get(name)))),
        )
    for name, why in placement.skipped.items():
        row(name, "float", note=why)
    columns = {k: [r[k] for r in rows] for k in rows[0]} if rows else {}
    counts = (
        f"{len(placement.weights)} weights, {len(placement.activations)} activations"
    )
    return Table(columns, title=f"plan: {counts}")


def _rows_of(settings: Settings) -> str:
    """What has a range of its own where a product reads it."""
    if settings.dynamic in (None, "tensor"):
        return "tensor"
    block = settings.dynamic
    return "token" if block == "token" else f"block of {block}"


def _granularity(place: WeightPlace, leaves: Mapping[str, Any]) -> str:
    """What has a scale of its own, in a few words."""
    weight, block = place.nodes[0].weight, place.settings.block
    if block is not None and place.block_axis is not None:
        size = leaves[place.name].shape[place.block_axis] if place.name in leaves else 0
        rest = size % block
        return f"block of {block}" + (f", the last of {rest}" if rest else "")
    if place.axis is None:
        return "tensor"
    return "layer" if weight and weight.stacked and len(place.axis) == 1 else "channel"
