"""What the score loses to each quantizer: alone, and when all the others are on as well."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxmet.analysis.cost import ALL
from jaxmet.analysis.scored_quantizers import ScoredQuantizer, places
from jaxmet.analysis.scoring import (
    Score,
    check_finite_score,
    is_traceable,
    number_of,
    runner,
)
from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.numerics.grid import check_bits
from jaxmet.transforms.simulate import simulate
from jaxmet.tree.checks import check_counts, check_flags
from jaxmet.tree.grids import Grids, grids
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table

CALLER = "sensitivity"
KINDS = ("weight", "activation")


def sensitivity(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    score: Score,
    *,
    bits: Sequence[int] | None = None,
    together: int = 1,
    progress: bool = True,
) -> Table:
    """The score with one quantizer alone on, and with all but this one, for every quantizer.

    `score(apply, params)` is a number, higher is better; `apply(params, *inputs)` is the
    model with some of its quantizers on. Which ones, and how wide they are, is data: if the score
    can be traced one compiled program runs every row, if not (it loops over files) it is
    called for every row on the host with an `apply` that is compiled once. What a traced score
    computes before the quantizer is kept from row to row. So many rows as
    `together` says are computed at once (`jax.vmap`) where the score can be traced.

    One row per quantizer of the nodes that `graph` selects: `tensor` (a parameter, or the
    result of a node), the `layer` (the node whose weight or result that is), the `kind`
    ('weight' or 'activation'), its `bits`, the score with `only this` quantizer on, and with
    `all but this` one. With `bits=(4, 8)` there is a row for each width, the other quantizers as
    they are. The last rows, named '(all)', are all weights, all activations, and all of both, also
    of nodes that the graph does not select: of the last one `only this` is the score of the
    quantized network and `all but this` that of float.

    A score that is not finite stays in the table, unless float has it.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        score: a function `score(apply, params)` that returns a scalar, higher is better.
        bits: bit-widths to score one by one; default None: each quantizer as it is.
        together: how many rows are computed at once (`jax.vmap`), where the score can be
            traced; default 1.
        progress: whether a progress bar is shown; default True.

    Returns:
        A table with one row per quantizer and width, and '(all)' last.

    Raises:
        ValueError: where the float score is not finite, for a score that is no scalar or keeps
            a traced array, for impossible widths, and where no quantizer is on.

    >>> score = lambda apply, params: jnp.mean(apply(params, images).argmax(-1) == labels)
    >>> table = jm.sensitivity(params, graph, quantizers, score)
    >>> jm.plot.sensitivity(table)
    """
    graph, _ = fitted(params, graph, CALLER)
    quantizer_of = places(params, graph, quantizers, CALLER)
    widths = None if bits is None else _widths(bits)
    check_counts(CALLER, together=together)
    check_flags(CALLER, progress=progress)
    traceable = is_traceable(score, graph, params, CALLER)
    every = [
        (at, width)
        for at, place in enumerate(quantizer_of)
        if place.selected
        for width in ((place.bits,) if widths is None or place.fixed else widths)
    ]
    settings = _Settings(quantizer_of)
    asked = [settings.kind(*kinds) for kinds in ((), KINDS, KINDS[:1], KINDS[1:])]
    # One after the other in the order of the network: what comes before is computed once.
    asked += [settings.only(at, width) for at, width in every]
    asked += [settings.but(at) for at, _ in every]
    run = runner(
        score,
        params,
        graph,
        apply_of=lambda how, quantizers: simulate(
            graph.apply, quantizers, grids=_grids(quantizers, quantizer_of, how)
        ),
        traceable=traceable,
        together=together,
        shared=quantizers,
    )
    scores = _scores(run, asked, progress)
    return _table(quantizer_of, every, scores)


def _widths(bits: Any) -> list[int]:
    if (
        isinstance(bits, str)
        or not isinstance(bits, Iterable)
        or not (found := [*bits])
    ):
        raise ValueError(
            f"jaxmet.{CALLER}: bits is {bits!r}. Give the widths to try: bits=(4, 8)."
        )
    return [*dict.fromkeys(check_bits(b, caller=CALLER) for b in found)]


Setting = tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]


class _Settings:
    """Which quantizers are on and how wide they are, a number for each in two tuples."""

    def __init__(self, quantizer_of: Sequence[ScoredQuantizer]) -> None:
        self.kinds = [place.kind for place in quantizer_of]
        self.bits = [place.bits for place in quantizer_of]

    def kind(self, *kinds: str) -> Setting:
        return _setting([kind in kinds for kind in self.kinds], self.bits)

    def only(self, at: int, width: int) -> Setting:
        on = [i == at for i in range(len(self.bits))]
        return _setting(
            on, [width if here else b for here, b in zip(on, self.bits, strict=True)]
        )

    def but(self, at: int) -> Setting:
        return _setting([i != at for i in range(len(self.bits))], self.bits)


def _setting(on: Sequence[bool], bits: Sequence[int]) -> Setting:
    return tuple(map(np.asarray, on)), tuple(np.asarray(b, np.int32) for b in bits)


def _grids(
    quantizers: Quantizers, quantizer_of: Sequence[ScoredQuantizer], how: Any
) -> Grids:
    on, bits = how
    found: dict[str, dict[str, dict[str, jax.Array]]] = {
        kind: {"on": {}, "bits": {}} for kind in KINDS
    }
    for i, place in enumerate(quantizer_of):
        found[place.kind]["on"][place.tensor] = on[i]
        found[place.kind]["bits"][place.tensor] = bits[i]
    weight, activation = (found[kind] for kind in KINDS)
    return grids(
        quantizers,
        weights=weight["on"],
        activations=activation["on"],
        weight_bits=weight["bits"],
        activation_bits=activation["bits"],
    )


def _scores(run: Any, asked: list[Any], progress: bool) -> list[float]:
    found: list[float] = []
    with tqdm(total=len(asked), desc=CALLER, disable=not progress) as bar:
        for came in run([(how, None) for how in asked]):
            number = number_of(came, CALLER)
            if not found:
                check_finite_score(number, "the float model", CALLER)
            found.append(number)
            bar.update()
    return found


def _table(
    quantizer_of: Sequence[ScoredQuantizer],
    every: list[tuple[int, int]],
    scores: list[float],
) -> Table:
    exact, whole, *kinds = scores[:4]
    rows: list[tuple[Any, ...]] = [
        (
            quantizer_of[at].tensor,
            quantizer_of[at].layer,
            quantizer_of[at].kind,
            width,
            only,
            but,
        )
        for (at, width), only, but in zip(
            every, scores[4 : 4 + len(every)], scores[4 + len(every) :], strict=True
        )
    ]
    rows += [
        (ALL, None, kind, None, only, but)
        for kind, only, but in zip(KINDS, kinds, reversed(kinds), strict=True)
    ]
    rows.append((ALL, None, None, None, whole, exact))
    names = ("tensor", "layer", "kind", "bits", "only this", "all but this")
    worst = sorted(
        (r for r in rows[:-3] if not r[4] >= exact),
        key=lambda r: r[4] if np.isfinite(r[4]) else -np.inf,
    )
    largest = ", ".join(f"{r[2]} {r[0]} ({r[4]:.4g})" for r in worst[:3])
    return Table(
        dict(zip(names, zip(*rows, strict=True), strict=True)),
        title=f"{CALLER}: float {exact:.4g}, quantized {whole:.4g}"
        + (f"; most is lost alone at {largest}" if largest else ""),
    )
