"""The shift of a folded norm, which is the bias of the product that it was folded into."""

from collections.abc import Mapping
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.folds.fold_plans import plan_of
from jaxmet.layers.folds.norm_parameters import roles_of
from jaxmet.numerics import xp
from jaxmet.numerics.norm import is_one, norm_gain
from jaxmet.numerics.precision import wide
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.leaves import dense


def norm_to_fold(graph: Graph, product: Node) -> Node | None:
    """The norm whose gain `fold_batch_norm` moves into this product, None if there is none."""
    consumers = product.only_consumers or ()
    node = graph[consumers[0]] if len(consumers) == 1 else None
    if product.kind != "product" or node is None or node.norm is None:
        return None
    plan = plan_of(graph, node)
    before = plan.side == "before" and plan.products == (product.name,)
    return node if plan.why is None and before else None


def folded_norm(node: Node, leaves: Mapping[str, Any]) -> bool:
    """Whether the gain of a norm is one in every channel: x − mean + bias is left of it.

    Not where the numbers are not known.
    """
    assert node.norm is not None
    roles = roles_of(node.norm)
    arrays = {r: dense(leaves[n]) for r, n in roles.items() if n in leaves}
    if arrays.keys() != roles.keys() or not all(map(is_concrete, arrays.values())):
        return False
    variance, scale = arrays["variance"], arrays.get("scale")
    stored = (variance.dtype, (variance if scale is None else scale).dtype)
    variance = xp.asarray(variance).astype(wide(variance.dtype))
    scale = None if scale is None else xp.asarray(scale).astype(variance.dtype)
    gain = norm_gain(variance, scale, node.norm.epsilon)
    return bool(xp.all(is_one(gain, stored)))
