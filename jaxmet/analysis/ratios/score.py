"""The score of a network with one layer compressed, for every layer and every ratio."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxmet.analysis.cost import ALL, cost
from jaxmet.analysis.ratios.masked import MaskedLayer, layers_of
from jaxmet.analysis.ratios.spending import BUDGETS
from jaxmet.analysis.scoring import (
    Runner,
    Score,
    check_finite_score,
    check_score,
    is_traceable,
    number_of,
    runner,
)
from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.run.lifted import replayed
from jaxmet.layers.arguments import key_of
from jaxmet.layers.asked_ratios import asked_for
from jaxmet.layers.checkpoint import Checkpoint, model_of
from jaxmet.layers.once import run_once
from jaxmet.tree.batches import as_batches
from jaxmet.tree.checks import check_choices, check_counts, check_flags
from jaxmet.tree.table import Table

CALLER = "score_ratios"
Method = Literal["spatial", "weight", "prune"]
METHODS = get_args(Method)
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = ("layer", "tied", "ratio", "kept", "of", *BUDGETS, "score", "costs")

Cell = tuple[str, int] | None


def score_ratios(
    params: Any,
    graph: Graph,
    score: Score,
    *,
    batches: Any,
    method: Method = "spatial",
    ratios: Sequence[float] = RATIOS,
    multiple: int = 1,
    rows: int | None = None,
    together: int = 1,
    checkpoint: Any = None,
    key: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Table:
    """How the network scores with one layer alone compressed, for every layer and ratio.

    `score(apply, params)` is a number, higher is better; `apply(params, *inputs)` is the
    model. If it can be traced (a sum over arrays at hand) one compiled program runs every
    row; if not (it loops over files) it is called for every row on the host, with an
    `apply` that is compiled once. What a traced score computes before the changed layer is
    kept from row to row. Nothing is rebuilt either way: a row is the original
    network with singular values cut off ('spatial', 'weight'), which scores as the small one
    would but for what `factorize` wins back by refitting the second factor to the data, or
    with channels set to zero and their consumers refitted ('prune'), which scores as the small
    one does.

    `batches` are the data by which factors are whitened and channels chosen, or
    `jax.ShapeDtypeStruct`s of the inputs for neither. Where they are few, score other inputs:
    a layer fitted to fewer examples than it has inputs loses nothing on those. Of a batch at
    most `rows` rows are looked at, drawn by `key` (by default `jax.random.key(0)`); `mask`
    says where its values count, as in `jm.calibrate`. Costs are
    those of one example. Ratios are those of `factorize` and `prune`, rounded to a `multiple`
    of ranks or channels. So many rows as `together` says are computed at once (`jax.vmap`)
    where the score can be traced: an accelerator with the memory for it is faster then. With
    `checkpoint`, a folder, a run that was killed goes on after its last finished row; it
    knows the model, the first batch and the code of the score again, but not the data that
    the score looks at.

    Columns of the table: `layer`, and the layers that are `tied` to it because they read the
    same channels and take the same ratio; `ratio`; how many ranks or channels are `kept`
    and `of` how many; `score`; `costs`, the macs and the entries of the weight of each layer
    that gets cheaper (of channels, those that read and those that make them), and `macs`
    and `parameters`, their sums. Rows with ratio 1 are the layer as it is, and the row
    '(all)' the network. `jm.select_ratios` reads it.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        score: a function `score(apply, params)` that returns a scalar, higher is better.
        batches: data by which factors are whitened and channels are chosen, or
            `jax.ShapeDtypeStruct`s for none.
        method: 'spatial' (the default), 'weight' or 'prune'.
        ratios: the ratios to score, each in (0, 1); default 0.1, 0.2, … 0.9.
        multiple: ranks or channel counts are rounded up to a multiple of this; default 1.
        rows: how many rows of each layer's inputs are used per batch at most; default None:
            64 for each input of the layer, at most 65,536.
        together: how many rows are computed at once (`jax.vmap`), where the score can be
            traced; default 1.
        checkpoint: a folder; a run that was killed resumes after its last finished row; default
            None.
        key: the `jax.random.key` from which all random numbers come; default
            `jax.random.key(0)`.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        progress: whether a progress bar is shown; default True.

    Returns:
        A table with one row per layer and ratio, and '(all)' last.

    Raises:
        ValueError: for a score that is NaN, no scalar, or keeps a traced array, for ratios
            outside (0, 1), `together` below 1, and where no layer can be compressed.

    >>> score = lambda apply, params: jnp.mean(apply(params, images).argmax(-1) == labels)
    >>> table = jm.score_ratios(params, graph, score, batches=batches)
    >>> ratios = jm.select_ratios(table, 0.5)
    >>> small = jm.factorize(params, graph, ratios=ratios, batches=batches)
    """
    graph, leaves = fitted(params, graph, CALLER)
    check_choices(CALLER, method=(method, METHODS))
    check_counts(CALLER, multiple=multiple, together=together)
    check_counts(CALLER, optional=True, rows=rows)
    check_flags(CALLER, progress=progress)
    check_score(CALLER, score)
    ratios = _checked(ratios)
    key = key_of(key, CALLER)
    read = as_batches(
        batches, CALLER, inputs=inputs, mask=mask, passes=2, abstract=True
    )
    traceable = is_traceable(score, graph, params, CALLER)
    leaves = run_once(lambda leaves: leaves, leaves)
    layers, left = layers_of(
        params,
        graph,
        leaves,
        method,
        read,
        rows,
        ratios=ratios,
        multiple=multiple,
        key=key,
        progress=progress,
    )
    asked_for(1.0, {**dict.fromkeys(layers), **left}, graph, CALLER)
    if not layers:
        whys = [f"{n}: {why}" for n, why in list(left.items())[:3]]
        raise ValueError(
            f"jaxmet.{CALLER}: no selected layer can be compressed by {method!r}: "
            f"{'; '.join(whys) or 'no layer is selected'}. Look at print(graph)."
        )
    cells = [(n, r, s.amount(r, multiple)) for n, s in layers.items() for r in ratios]
    data = None if read.abstract else (read.first_batch, read.length)
    options = (method, ratios, multiple, rows, list(layers), key)
    depends_on = (params, model_of(graph), data, options, score)
    kept = Checkpoint(checkpoint, CALLER, depends_on)
    apply = replayed(graph.apply)
    run = runner(
        score,
        params,
        graph,
        apply_of=lambda *_: apply,
        traceable=traceable,
        together=together,
        leaves_of=lambda cell: _leaves_of(layers, leaves, cell),
        changing=set().union(*(layer.names for layer in layers.values())),
    )
    scores = _scores(run, layers, cells, kept, progress=progress)
    return _table(params, leaves, graph, read.first, layers, cells, scores)


def _checked(ratios: Any) -> tuple[float, ...]:
    found = tuple(ratios) if not isinstance(ratios, int | float) else (ratios,)
    bad = [r for r in found if not isinstance(r, int | float) or not 0 < r < 1]
    if bad or not found:
        raise ValueError(
            f"jaxmet.{CALLER}: ratios holds {bad[:1] or 'nothing'}. Give numbers between 0 "
            "and 1: costs afterwards over costs before."
        )
    return tuple(sorted({float(r) for r in found}))


def _scores(
    run: Runner,
    layers: Mapping[str, MaskedLayer],
    cells: Sequence[tuple[str, float, int]],
    kept: Checkpoint,
    *,
    progress: bool,
) -> dict[Cell, float]:
    """The score of every cell, and of the network as it is: those not kept are run."""
    # Another ratio may have as many ranks: one cell for both.
    every = list(dict.fromkeys([None, *((name, amount) for name, _, amount in cells)]))
    found = {i: kept.load(i) for i in range(len(every))}
    scores = {every[i]: float(row["score"]) for i, row in found.items() if row}
    missing = [i for i, row in found.items() if not row]
    with tqdm(total=len(every), desc=CALLER, disable=not progress) as bar:
        bar.update(len(scores))
        settings = [(None, every[i]) for i in missing]
        for i, came in zip(missing, run(settings), strict=True):
            number = check_finite_score(
                number_of(came, CALLER), _named(every[i]), CALLER
            )
            scores[every[i]] = number
            kept.save(i, {"score": np.float64(number)})
            bar.update()
    return scores


def _leaves_of(
    layers: Mapping[str, MaskedLayer], leaves: Mapping[str, Any], cell: Cell
) -> dict[str, Any]:
    """The leaves of a row that are not those of the network as it is."""
    if cell is None or cell[1] >= layers[cell[0]].most:
        return {}
    return layers[cell[0]].changed(leaves, cell[1])


def _named(cell: Cell) -> str:
    return "the model as it is" if cell is None else f"{cell[0]!r} cut to {cell[1]}"


def _table(
    params: Any,
    leaves: Mapping[str, Any],
    graph: Graph,
    batch: tuple[Any, ...],
    layers: Mapping[str, MaskedLayer],
    cells: Sequence[tuple[str, float, int]],
    scores: Mapping[Cell, float],
) -> Table:
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch
    )
    costs = {row["layer"]: row for row in cost(params, graph, *one)}
    entries = {
        n.name: math.prod(leaves[n.kernel].shape)
        for n in graph.nodes
        if n.is_layer and n.weight is not None and n.weight.name in leaves
    }
    rows = []
    for name, layer in layers.items():
        asked = [(r, a) for n, r, a in cells if n == name]
        for ratio, amount in [*asked, (1.0, layer.most)]:
            each = {
                n: {
                    "macs": round(costs[n]["macs"] * share.macs),
                    "parameters": round(entries[n] * share.parameters),
                }
                for n, share in layer.shares(amount).items()
            }
            worth = [sum(c[key] for c in each.values()) for key in BUDGETS]
            found = scores[(name, amount)] if ratio < 1 else scores[None]
            tied = ", ".join(layer.tied) or None
            rows.append((name, tied, ratio, amount, layer.most, *worth, found, each))
    whole = [costs[ALL][key] for key in BUDGETS]
    rows.append((ALL, None, 1.0, None, None, *whole, scores[None], {}))
    columns: dict[str, Any] = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    return Table(columns, title=f"{CALLER}: {len(layers)} layers")
