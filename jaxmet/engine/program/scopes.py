"""Whose equation it is: nodes and parameters as the name scopes of what is traced for a target."""

from typing import Any

SCOPE = "jaxmet:"
"""What begins the name scope that says whose grid an equation is."""
LAYER = "layer:"
"""What begins the name scope that says whose equation it is, on a grid or not."""
END = "|"
"""What ends the name in the scope of an equation: scopes of the model come after it."""


def grid_owner(equation: Any) -> str:
    """The node or parameter whose grid a fake quantization is, or nothing."""
    return str(equation.source_info.name_stack).rpartition(SCOPE)[2]
