"""What will be quantized, how, and what not and why, before any data is seen."""

from typing import Any

from jaxmet.engine.graph import Graph, leaves_of
from jaxmet.transforms.placement import place
from jaxmet.tree.config import QuantConfig
from jaxmet.tree.table import Table


def plan(params: Any, graph: Graph, config: QuantConfig | None = None) -> Table:
    """What `calibrate` with this configuration would quantize.

    One row a weight, bias, activation, and thing that stays in float: `name`, `what`,
    `bits`, `symmetric`, `one scale per`, `shape` of a parameter, and `note`, which says
    with whom a grid is shared or why there is none.

    Raises ValueError for a rule that means nothing, and for a tree that is not the graph's.

    >>> print(jm.plan(params, graph, jm.QuantConfig(weight_bits=4)))
    """
    config = config or QuantConfig()
    leaves = leaves_of(params, graph, "plan")
    placement = place(graph, config, "plan")
    rows = []

    def row(
        name: str, what: str, settings: Any = None, per: Any = None, note: Any = None
    ):
        shape = leaves[name].shape if name in leaves else None
        rows.append(
            {
                "name": name,
                "what": what,
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

    for w in placement.weights:
        per = "channel" if w.axis else "tensor"
        per = f"block of {w.settings.block}" if w.settings.block else per
        row(w.name, "weight", w.settings, per, w.note)
    for b in placement.biases:
        settings = config.resolve(b.name, "bias")
        row(
            b.name,
            "bias",
            settings,
            "channel",
            f"scales of {b.product[0]} and {b.product[1]}",
        )
    for name, settings in placement.activations.items():
        row(name, "activation", settings, "tensor")
    for name, owner in placement.shared.items():
        row(
            name,
            "activation",
            placement.activations.get(owner),
            "tensor",
            f"as {owner}",
        )
    for name, why in placement.left.items():
        row(name, "float", note=why)
    columns = {k: [r[k] for r in rows] for k in rows[0]} if rows else {}
    counts = (
        f"{len(placement.weights)} weights, {len(placement.activations)} activations"
    )
    return Table(columns, title=f"plan: {counts}")
