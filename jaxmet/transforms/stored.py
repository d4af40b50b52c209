"""Where a norm keeps its parameters, and refusals of norms whose statistics are not there."""

from collections.abc import Mapping
from typing import Any

from jaxmet.engine.node import Node, Norm


def roles_of(norm: Norm) -> dict[str, str]:
    """By role (`mean`, `variance`, `scale`, `bias`), the parameters that a norm has."""
    named = {
        role: getattr(norm, role) for role in ("mean", "variance", "scale", "bias")
    }
    return {role: name for role, name in named.items() if name is not None}


def check_mode(node: Node, caller: str, *, where: str = "") -> None:
    """Refuse a norm that was traced in training mode."""
    if node.norm is not None and node.norm.over == "batch":
        raise ValueError(
            f"jaxmet.{caller}: norm {node.name!r}{where} computes its statistics from the "
            "batch, as in training, so the graph does not say where they are kept. Trace "
            "the model in inference mode, with train=False or use_running_average=True."
        )


def check_stored(
    node: Node, leaves: Mapping[str, Any], caller: str, *, where: str = ""
) -> None:
    """`check_mode`, and refuse a tree that lacks what a norm stores."""
    check_mode(node, caller, where=where)
    if node.norm is None or node.norm.over != "stored":
        return
    for role, parameter in roles_of(node.norm).items():
        if parameter not in leaves:
            raise ValueError(
                f"jaxmet.{caller}: the tree has no {parameter!r}, the {role} of norm "
                f"{node.name!r}{where}. Pass the whole variables that the graph was traced "
                "with ({'params': …, 'batch_stats': …}), not the trained parameters alone."
            )
