"""Normalizations, found by what they compute rather than by how they are written.

roots         what a root is taken of, however it is written
affine_chain  values that are a·x + c of one value, with a and c of parameters
stored_norms  norms whose statistics are parameters or constants
data_norms    norms whose statistics are computed from what they normalize
"""

from collections.abc import Iterable

from jaxmet.engine.nodes.cluster import Cluster, is_free, order_of
from jaxmet.engine.nodes.norms.data_norms import data_norm
from jaxmet.engine.nodes.norms.roots import root_of
from jaxmet.engine.nodes.norms.stored_norms import stored_norms_of
from jaxmet.engine.program.program import DATA, NOISE, Region


def norms(region: Region) -> Iterable[Cluster]:
    """Every norm of a region, by the root that it divides by."""
    order = order_of(region)
    for equation in region.equations:
        root = root_of(equation) if is_free(equation) else None
        if root is None or not root.spread.shape or root.spread.scalar() is not None:
            continue
        if equation.kind < NOISE:
            yield from stored_norms_of(equation, root.spread, order)
        elif equation.kind == DATA:
            found = data_norm(equation, root.spread, order)
            if found is not None:
                yield found
