r"""Rounding that the data decide: AdaRound, and two solvers of the same problem."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph, leaves_of
from jaxmet.layers.arguments import check_key, check_keywords
from jaxmet.layers.checkpoint import Checkpoint, model_of
from jaxmet.layers.grams import unmasked
from jaxmet.layers.matching import check_quantizers
from jaxmet.transforms.rounding.layers import Layer, find_layers
from jaxmet.transforms.rounding.options import (
    METHODS,
    SCALES,
    Method,
    Scales,
)
from jaxmet.transforms.rounding.sequential import Chosen, Run
from jaxmet.transforms.rounding.solvers import Options
from jaxmet.tree.batches import as_batches
from jaxmet.tree.checks import (
    check_choices,
    check_concrete,
    check_counts,
    check_flags,
    check_numbers,
)
from jaxmet.tree.names import replace_leaves
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.types import P, Rounded, Store

CALLER = "adaround"
ROWS = {"adam": 2**14, "gram": 2**16, "coordinate": 2**16}
ITERATIONS = {"adam": 2000, "gram": 2000, "coordinate": 20}


@overload
def adaround(
    params: P,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any,
    *,
    key: Any,
    method: Method = ...,
    iterations: int | None = ...,
    scales: Scales | None = ...,
    of: Rounded = ...,
    bias: bool = ...,
    damping: float = ...,
    rows: int | None = ...,
    store: Store = ...,
    learning_rate: float = ...,
    regularisation: float = ...,
    beta_range: tuple[float, float] = ...,
    warm_start: float = ...,
    batch: int = ...,
    checkpoint: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[False] = ...,
    **kwargs: Any,
) -> tuple[P, Quantizers]: ...
@overload
def adaround(
    params: P,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any,
    *,
    key: Any,
    method: Method = ...,
    iterations: int | None = ...,
    scales: Scales | None = ...,
    of: Rounded = ...,
    bias: bool = ...,
    damping: float = ...,
    rows: int | None = ...,
    store: Store = ...,
    learning_rate: float = ...,
    regularisation: float = ...,
    beta_range: tuple[float, float] = ...,
    warm_start: float = ...,
    batch: int = ...,
    checkpoint: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[True],
    **kwargs: Any,
) -> tuple[P, Quantizers, Table]: ...
def adaround(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any,
    *,
    key: Any,
    method: Method = "coordinate",
    iterations: int | None = None,
    scales: Scales | None = None,
    of: Rounded = "weights",
    bias: bool = True,
    damping: float = 0.2,
    rows: int | None = None,
    store: Store = "device",
    learning_rate: float = 1e-2,
    regularisation: float = 0.01,
    beta_range: tuple[float, float] = (20.0, 2.0),
    warm_start: float = 0.2,
    batch: int = 256,
    checkpoint: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
    with_report: bool = False,
    **kwargs: Any,
) -> Any:
    r"""The same tree with weights on their grids, rounded so that outputs stay.

    Layer after layer, up or down is chosen so that $E|f(xW + b) - f(\hat x\hat W + b')|^2$
    is small: $x$ is what the float model reads there, $\hat x$ what the model does whose
    earlier layers are rounded already (with `of='both'` activations are on their grids,
    too). With `bias` what is constant of the error goes into the layer's bias. Fold and
    equalize before; activation ranges move, so calibrate activations again behind it.

    `method` is one of

    - 'coordinate' (the default): scales are searched, weights start from GPTQ's rounding
      for the best real weights $W^*$ and then each takes the best integer beside the
      others, for at most `iterations` sweeps (20). $f$ is the identity, and the loss a
      quadratic form in the Gram matrix of the inputs, exact over all rows.
    - 'gram': AdaRound (the rectified sigmoid with an annealed regulariser, by Adam) on the
      same quadratic form, `iterations` steps (2000).
    - 'adam': AdaRound as published: each step draws `batch` of the rows, and $f$ is the
      activation that alone reads the layer.

    `scales` says which grids: 'given', those of `quantizers`; 'search', as
    `jm.search_scales` does; 'refit', searched and then fitted to the integers ('refit' is
    for 'coordinate', where it is the default; the others keep the given ones). Scales that
    `quantizers` hold already as numbers are always kept. `rows` bounds how many rows of a
    layer's inputs are looked at, in all (65,536; of 'adam', which keeps them, 16,384), and
    `store='host'` keeps activations between layers in the host's memory: on the device
    there is one batch, and of 'adam' the rows. Rows are drawn by `key`, in other positions of
    each batch and layer. `mask`, a function of a batch, says where its values count, as in
    `jm.calibrate`: padded tokens are no rows. The error of what few data do not see is
    held by `damping`, a share of the mean of the Gram matrix's diagonal. `learning_rate`,
    `regularisation`, `beta_range` and `warm_start` are AdaRound's; the loss is counted in
    units in which the regulariser of all weights weighs four times what nearest rounding
    costs.

    Returns the tree and the quantizers, with the scales of these weights pinned. No layer
    is worse than nearest rounding by its loss on the data, and weights stay on the grid, at
    most a step from the float weight with 'adam' and 'gram' where it lies in range. With
    `checkpoint`, a folder, a run that was killed goes on behind the last finished layer and
    ends in the same bits. The report has a row a site: its loss, the loss of nearest rounding,
    what is inherited from earlier layers (the loss of the best real weights, $W^*$) and what
    rounding adds to that, as a ratio to what nearest rounding adds; of 'adam' and 'gram' the
    `curve` of what they minimise, the loss of the soft rounding, behind every twentieth of the
    steps too. Weights that are shared, computed
    from parameters, used again in a loop or not quantized are rounded to nearest, and the
    report says so.

    Raises ValueError for quantizers of another model, a site that `graph.only` named and
    whose weight cannot be chosen, NaN in the inputs of a layer (named), a missing key,
    unknown options, a checkpoint of another run and too little memory for the rows.

    Nagel et al., [Up or Down? Adaptive Rounding for Post-Training
    Quantization](https://arxiv.org/abs/2004.10568), ICML 2020; Frantar et al.,
    [GPTQ](https://arxiv.org/abs/2210.17323), ICLR 2023; Zhang et al.,
    [COMQ](https://arxiv.org/abs/2403.07134), 2024.

    >>> params, quantizers = jm.adaround(params, graph, quantizers, batches, key=key)
    """
    leaves_of(params, graph, CALLER)
    check_concrete(params, CALLER)
    check_quantizers(quantizers, graph, CALLER)
    check_keywords(kwargs, graph, params, CALLER)
    key = check_key(key, CALLER)
    check_choices(CALLER, method=(method, METHODS), of=(of, get_args(Rounded)))
    check_choices(CALLER, store=(store, get_args(Store)))
    default = "refit" if method == "coordinate" else "given"
    scales = default if scales is None else scales
    check_choices(CALLER, scales=(scales, SCALES))
    if method != "coordinate" and scales != "given":
        raise ValueError(
            f"jaxmet.{CALLER}: scales={scales!r} is for method='coordinate'. Search them "
            "first: quantizers = jm.search_scales(…)."
        )
    number = ITERATIONS[method] if iterations is None else iterations
    check_numbers(CALLER, iterations=(number, 0), damping=(damping, 0))
    rows = ROWS[method] if rows is None else rows
    check_counts(CALLER, rows=rows, batch=batch)
    check_flags(CALLER, bias=bias, progress=progress, with_report=with_report)
    check_numbers(CALLER, learning_rate=(learning_rate, 0), warm_start=(warm_start, 0))
    check_numbers(CALLER, regularisation=(regularisation, 0))
    if not isinstance(beta_range, tuple | list) or len(beta_range) != 2:
        raise ValueError(
            f"jaxmet.{CALLER}: beta_range is {beta_range!r}. Give where β begins and where "
            "it ends, such as (20.0, 2.0)."
        )
    options = Options(
        method,
        scales,
        iterations=number,
        sweeps=number,
        damping=damping,
        learning_rate=learning_rate,
        regularisation=regularisation,
        beta_range=(float(beta_range[0]), float(beta_range[1])),
        warm_start=warm_start,
        batch=batch,
    )
    if number == 0:  # nothing is chosen: plain rounding, on the grids as they are
        options = dataclasses.replace(options, scales="given", start="nearest")
    layers = find_layers(graph, quantizers, CALLER)
    read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
    run = Run(
        CALLER,
        graph,
        params,
        quantizers,
        layers,
        options,
        rows,
        store,
        of == "both",
        bias and number > 0,
        key,
        kwargs,
    )
    told = (
        params,
        model_of(graph),
        quantizers,
        read.first_batch,
        read.length,
        key,
        repr(options),
        rows,
        of,
        bias,
    )
    kept = Checkpoint(checkpoint, CALLER, told)
    found = run.go(run.begin(read), kept, progress)
    new, pinned = results(run, found)
    return (
        (new, pinned, report(run.layers, found, run.lost))
        if with_report
        else (new, pinned)
    )


def results(run: Run, found: Mapping[str, Chosen]) -> tuple[Any, Quantizers]:
    """The tree and the quantizers with what was chosen."""
    leaves: dict[str, Any] = {}
    weights = dict(run.quantizers.weights)
    for layer in run.layers:
        if layer.node.name not in found:
            continue
        chosen, old = found[layer.node.name], weights[layer.parameter]
        leaves |= run.updated(layer, chosen)
        grid = jnp.asarray(chosen.scale), jnp.asarray(chosen.zero_point)
        weights[layer.parameter] = old.holding(*grid)
    new = replace_leaves(run.params, leaves, caller=run.caller)
    return new, dataclasses.replace(run.quantizers, weights=weights)


def report(
    layers: Sequence[Layer], found: Mapping[str, Chosen], lost: Mapping[str, str]
) -> Table:
    """One row a site."""
    rows, ratios, curves = [], [], []
    for layer in layers:
        chosen = found.get(layer.node.name)
        loss = plain = least = ratio = None
        steps = [] if chosen is None else chosen.curve.tolist()
        curves.append(steps or None)
        if chosen is not None:
            sums = (chosen.loss, chosen.nearest_loss, chosen.inherited)
            loss, plain, least = (float(v.sum()) for v in sums)
            ratio = max(loss - least, 0.0) / (plain - least) if plain > least else 1.0
            ratios.append(ratio)
        note = unmasked(lost.get(layer.node.name))
        note = note if layer.why is None else f"rounded to nearest: {layer.why}"
        rows.append((layer.node.name, loss, plain, least, ratio, note))
    names = ("site", "loss", "nearest loss", "inherited", "ratio", "note")
    columns: dict[str, Any] = {n: [r[i] for r in rows] for i, n in enumerate(names)}
    if any(curves):
        columns["curve"] = curves
    middle = (
        f", {np.median(ratios):.3g} of nearest's error in the median" if ratios else ""
    )
    return Table(columns, title=f"{len(ratios)} of {len(rows)} weights rounded{middle}")
