"""What rows of a table cost alone, and what they cost together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

Budget = Literal["macs", "parameters"]
BUDGETS = get_args(Budget)


@dataclasses.dataclass(frozen=True)
class Spending:
    """Costs of a network of which each row of a table makes some layers cheaper.

    `alone` (rows, ratios) is what the layers that a row touches cost if it were the only
    one; `own` what each layer costs as it is, `shares` what is left of it by row and ratio.
    """

    total: float
    own: Mapping[str, float]
    shares: tuple[tuple[Mapping[str, float], ...], ...]
    alone: np.ndarray

    @staticmethod
    def of(
        rows: Sequence[Sequence[Mapping[str, Any]]], total: float, budget: str
    ) -> "Spending":
        """From the rows of each layer, the last of them the layer as it is."""
        costs = [
            [
                {n: c[budget] for n, c in row["costs"].items()}
                if "costs" in row
                else {row["layer"]: row[budget]}
                for row in each
            ]
            for each in rows
        ]
        own = {n: float(c) for each in costs for n, c in each[-1].items()}
        shares = tuple(
            tuple(
                {n: c / own[n] if own[n] else 1.0 for n, c in row.items()}
                for row in each
            )
            for each in costs
        )
        alone = np.array([[sum(row.values()) for row in each] for each in costs])
        return Spending(total, own, shares, alone.astype(np.float64))

    @property
    def separate(self) -> bool:
        """Whether no layer is touched by two rows, so that costs add up."""
        return len(self.own) == sum(len(each[-1]) for each in self.shares)

    def together(self, chosen: Sequence[int] | np.ndarray) -> float:
        r"""What a choice costs: of a layer what all shares leave, $c_s \prod_r f_{rs}$.

        Never less than the network that is built: where rows remove different entries of
        one axis, their shares would add up to less.
        """
        left = dict.fromkeys(self.own, 1.0)
        for each, at in zip(self.shares, chosen, strict=True):
            for name, share in each[at].items():
                left[name] *= share
        gone = sum(self.own[name] * (1 - share) for name, share in left.items())
        return self.total - gone
