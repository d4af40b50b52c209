"""The one ratio of all layers that leaves a network a share of its multiplications."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.operations import works
from jaxmet.layers.asked_ratios import check_ratio
from jaxmet.transforms.prune.coupled_channels import CoupledChannels
from jaxmet.transforms.prune.pruned_leaves import without_channels
from jaxmet.transforms.prune.select_channels import kept_counts, left_of
from jaxmet.tree.checks import shown
from jaxmet.tree.named_leaves import replace_leaves

STEPS = 128


def check_one_of(ratios: Any, macs: Any, caller: str) -> None:
    """Refuse both of two ways of saying how much is removed, neither, and impossible shares."""
    if (ratios is None) == (macs is None):
        raise ValueError(
            f"jaxmet.{caller}: ratios is {shown(ratios)} and macs is {shown(macs)}. Give one of "
            "them: the share of its input channels that each layer keeps, or the share of the "
            "multiplications that the network keeps."
        )
    if macs is not None:
        check_ratio("share of macs", macs, caller)


def ratio_for_macs(
    params: Any,
    graph: Graph,
    leaves: Mapping[str, Any],
    bundles: Sequence[CoupledChannels],
    names: Sequence[str],
    macs: float,
    multiple: int,
    caller: str,
) -> float:
    """The largest ratio of these layers, in 128ths, that keeps at most `macs` of all macs.

    Which channels stay makes no difference to their number, so the first ones do. Multiplications
    are counted for the inputs that the graph was traced with.
    """
    empty = {name: _without_numbers(leaf) for name, leaf in leaves.items()}

    def share(ratio: float) -> float:
        kept = kept_counts(graph, bundles, dict.fromkeys(names, ratio), multiple)
        masks: dict[int, np.ndarray] = {}
        for bundle in bundles:
            left = left_of(np.arange(bundle.size), kept[bundle.index])
            masks |= dict.fromkeys(bundle.indices, left)
        return total(without_channels(graph, empty, masks)) / before

    def total(some: Mapping[str, Any]) -> int:
        tree = replace_leaves(params, some, caller=caller)
        inputs, kwargs = graph.called
        return sum(work.macs for work in works(graph, tree, inputs, kwargs))

    before = total(empty)
    low, high = 0, STEPS  # of 128ths: too much is left at `high`, not at `low`
    if share(1.0) <= macs:
        return 1.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle / STEPS) <= macs else (low, middle)
    if low == 0:
        least = share(1 / STEPS)
        raise ValueError(
            f"jaxmet.{caller}: macs is {macs}, and what can be removed leaves {least:.3f} of the "
            "multiplications. Give more, or factorize layers that keep their channels."
        )
    return low / STEPS


def _without_numbers(leaf: Any) -> Any:
    """Zeros in place of the arrays of a leaf, which take no memory."""
    return jax.tree.map(
        lambda a: np.broadcast_to(np.zeros((), a.dtype), np.shape(a)), leaf
    )
