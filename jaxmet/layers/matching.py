"""Whether quantizers are those of a graph."""

from typing import Any

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.tree.globs import suggestion
from jaxmet.tree.named_leaves import named_leaves
from jaxmet.tree.quantizers import check_are_quantizers


def check_quantizers(
    quantizers: Any, graph: Graph, caller: str, params: Any = None
) -> None:
    """Refuse what jm.calibrate did not make, or made for another model.

    With `params` also scales that lie along channels which their weight does not have.
    """
    check_are_quantizers(quantizers, caller)
    nodes = {node.name for node in graph.nodes}
    for group, known in (
        (quantizers.weights, nodes | set(graph.parameters)),
        (quantizers.activations, nodes),
    ):
        for name in group:
            if name not in known:
                raise ValueError(
                    f"jaxmet.{caller}: the quantizers have one for {name!r}, which this "
                    f"graph does not have. {suggestion(name, known)} Calibrate again for it."
                )
    leaves = {} if params is None else named_leaves(params)
    for name, q in quantizers.weights.items():
        scale = (
            np.shape(jax.tree.leaves(q)[0]) if not q.follows and q.block is None else ()
        )
        if name not in leaves or len(scale) != len(leaves[name].shape):
            continue
        if any(n not in (1, m) for n, m in zip(scale, leaves[name].shape, strict=True)):
            raise ValueError(
                f"jaxmet.{caller}: the quantizer of {name!r} has scales of shape {scale}, and "
                f"the weight has shape {tuple(leaves[name].shape)}. It is of another model: "
                "calibrate again for this one."
            )
