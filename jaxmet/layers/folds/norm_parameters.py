"""Where a norm keeps its parameters, and refusals of norms whose statistics are not there."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmet.engine.graph.node import Node, Norm
from jaxmet.engine.nodes.scalar_function import compute
from jaxmet.numerics import xp
from jaxmet.numerics.xp import Array
from jaxmet.tree.leaves import dense


def roles_of(norm: Norm) -> dict[str, str]:
    """By role (`mean`, `variance`, `scale`, `bias`), the parameters that a norm has."""
    named = {
        role: getattr(norm, role) for role in ("mean", "variance", "scale", "bias")
    }
    return {role: name for role, name in named.items() if name is not None}


def statistics_weight(
    norm: Norm, leaves: Mapping[str, Any], dtype: Any
) -> Array | float:
    """What a norm multiplies its stored mean and variance by.

    1, but for a running average that started from zero: that is divided by the sum of its
    weights.
    """
    if norm.debias is None:
        return 1.0
    count = xp.asarray(dense(leaves[norm.debias.count]), np.float32)
    total = compute(norm.debias.formula, count)
    return (total if norm.debias.multiplies else 1.0 / total).astype(dtype)


def check_mode(node: Node, caller: str, *, where: str = "") -> None:
    """Refuse a norm that was traced in training mode."""
    if node.norm is not None and node.norm.over == "batch":
        raise ValueError(
            f"jaxmet.{caller}: norm {node.name!r}{where} computes its statistics from the "
            "batch, as in training, so the graph does not say where they are kept. Trace "
            "the model in inference mode: with train=False or use_running_average=True, or "
            "after module.eval() or eqx.nn.inference_mode(module)."
        )


def check_stored(
    node: Node, leaves: Mapping[str, Any], caller: str, *, where: str = ""
) -> None:
    """`check_mode`, and refuse a tree that lacks what a norm stores."""
    check_mode(node, caller, where=where)
    if node.norm is None or node.norm.over != "stored":
        return
    needed = roles_of(node.norm)
    if node.norm.debias is not None:
        needed["count of updates"] = node.norm.debias.count
    for role, parameter in needed.items():
        if parameter not in leaves:
            raise ValueError(
                f"jaxmet.{caller}: the tree has no {parameter!r}, the {role} of norm "
                f"{node.name!r}{where}. Pass the whole variables that the graph was traced "
                "with ({'params': …, 'batch_stats': …}), not the trained parameters alone."
            )
