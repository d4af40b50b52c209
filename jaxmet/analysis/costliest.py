"""Which quantizers cost most by `jm.noise`, and what more bits would give each of them."""

import math
from typing import NamedTuple

from jaxmet.tree.table import Table

WIDER = {2: 4, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8, 8: 16}
"""The next bit-width that devices have."""


class Costly(NamedTuple):
    """One quantizer: its share of the noise, and with `wider` bits the gain in dB.

    `wider` is None where it has 16 bits already, or none.
    """

    tensor: str
    kind: str
    bits: int | None
    share: float
    wider: int | None
    gain: float

    @property
    def rule(self) -> str | None:
        """The rule that gives it the wider grid, as code."""
        if self.wider is None:
            return None
        return f"jm.Rule({self.tensor!r}, {self.kind}_bits={self.wider})"


def costliest(table: Table, count: int = 3) -> list[Costly]:
    """The quantizers with the largest shares in a table of `jm.noise`, the largest first.

    The gain is that of all outputs if this quantizer alone has more bits:
    -10 log10(1 - share + share of what is left of its noise).

    Args:
        table: a table of `jm.noise`.
        count: how many quantizers; default 3.

    Returns:
        At most `count` of them.
    """
    rows = [row for row in table if row["kind"] in ("weight", "activation")]
    found = []
    for row in sorted(rows, key=lambda row: -row["share"])[:count]:
        wider = WIDER.get(row["bits"])
        wider = wider if f"{wider} bits" in row else None
        gain, share = 0.0, row["share"]
        if wider is not None and share > 0:
            lost = row["SQNR (dB)"] - row[f"{wider} bits"]  # of dB, below zero
            rest = 1 - share + share * 10 ** (lost / 10)
            gain = -10 * math.log10(max(rest, 1e-3))
        found.append(
            Costly(row["tensor"], row["kind"], row["bits"], share, wider, gain)
        )
    return found
