"""Normalizations, found by what they compute rather than by how they are written.

affine_chain  values that are a·x + c of one value, with a and c of parameters
stored_norms  norms whose statistics are parameters or constants
data_norms    norms whose statistics are computed from what they normalize
"""

from collections.abc import Iterable

from jaxmet.engine.cluster import Cluster, is_free, order_of
from jaxmet.engine.norms.data_norms import data_norm
from jaxmet.engine.norms.stored_norms import stored_norms_of
from jaxmet.engine.program import DATA, NOISE, Equation, Region


def norms(region: Region) -> Iterable[Cluster]:
    """Every norm of a region, by the root that it divides by."""
    order = order_of(region)
    for equation in region.equations:
        if not is_free(equation) or not _is_root(equation):
            continue
        spread = equation.operands[0]
        if not spread.shape or spread.scalar() is not None:
            continue
        if equation.kind < NOISE:
            yield from stored_norms_of(equation, order)
        elif equation.kind == DATA:
            found = data_norm(equation, order)
            if found is not None:
                yield found


def _is_root(equation: Equation) -> bool:
    if equation.name in ("rsqrt", "sqrt"):
        return True
    power = equation.operands[1].scalar() if equation.name == "pow" else None
    return power in (0.5, -0.5)
