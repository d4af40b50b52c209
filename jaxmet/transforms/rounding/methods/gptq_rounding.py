"""GPTQ: one pass over the inputs, each error made good by the weights still to come."""

import dataclasses
from typing import ClassVar, Literal, get_args

import jax

from jaxmet.transforms.rounding.methods.coordinate_rounding import (
    Coordinate,
    descended,
)
from jaxmet.transforms.rounding.solvers import (
    Kind,
    Problem,
    RoundingMethod,
    Solution,
    Tick,
)
from jaxmet.tree.checks import check_choices

Scales = Literal["given", "search"]


@dataclasses.dataclass(frozen=True)
class Gptq(RoundingMethod):
    r"""GPTQ: weights are rounded one input after the other, and later ones compensate.

    With the Cholesky factor $U$ of the Gram matrix $G$ of the layer's inputs (damped, by
    `jm.adaround`'s `damping`; the paper takes 0.01), rounding the weights $w_i$ of one input
    changes those that follow by $-\frac{w_i - \hat w_i}{[G^{-1}]_{ii}} [G^{-1}]_{i,:}$, the
    least-squares answer to the error. Inputs with most energy come first (`act_order`). It
    aims at the best real weights $W^*$ for the inputs that the rounded layers before give.

    Frantar et al., [GPTQ](https://arxiv.org/abs/2210.17323), ICLR 2023.

    Args:
        scales: 'given' (the default, as published) keeps the scales of the quantizers;
            'search' searches them first, as `jm.search_scales` does. Scales that are numbers
            already are always kept.

    Raises:
        ValueError: for an unknown word.

    >>> jm.adaround(params, graph, quantizers, batches, method=jm.Gptq(), damping=0.01)
    """

    scales: Scales = "given"
    pads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choices("Gptq", scales=(self.scales, get_args(Scales)))

    def solve(
        self, problem: Problem, kind: Kind, key: jax.Array, tick: Tick
    ) -> Solution:
        """Layers of one kind and shape side by side."""
        del key
        # GPTQ is what coordinate descent starts from.
        start = Coordinate(sweeps=0, start="gptq", scales=self.scales)
        found = descended(problem, kind=kind, method=start)
        tick(1.0, found.loss)
        return found
