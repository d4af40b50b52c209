"""Rounding by the outputs of each layer: AdaRound, GPTQ and descent over the integers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.layers.arguments import check_keywords, key_of
from jaxmet.layers.checkpoint import Checkpoint, model_of, static_of
from jaxmet.layers.grams import unmasked
from jaxmet.layers.matching import check_quantizers
from jaxmet.transforms.rounding.layer_problems import RoundedWeight
from jaxmet.transforms.rounding.layerwise import LayerwiseRounding
from jaxmet.transforms.rounding.methods import MethodName, check_options, method_of
from jaxmet.transforms.rounding.rounded_layers import Layer, find_layers
from jaxmet.transforms.rounding.solvers import RoundingMethod
from jaxmet.tree.batches import as_batches
from jaxmet.tree.checks import (
    check_choices,
    check_concrete,
    check_counts,
    check_flags,
    check_numbers,
)
from jaxmet.tree.named_leaves import replace_leaves
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.types import P, Rounded, Store

CALLER = "adaround"


@overload
def adaround(
    params: P,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any,
    *,
    method: MethodName | RoundingMethod = ...,
    of: Rounded = ...,
    bias: bool = ...,
    damping: float = ...,
    rows: int | None = ...,
    store: Store = ...,
    checkpoint: Any = ...,
    key: Any = ...,
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
    method: MethodName | RoundingMethod = ...,
    of: Rounded = ...,
    bias: bool = ...,
    damping: float = ...,
    rows: int | None = ...,
    store: Store = ...,
    checkpoint: Any = ...,
    key: Any = ...,
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
    method: MethodName | RoundingMethod = "coordinate",
    of: Rounded = "weights",
    bias: bool = True,
    damping: float = 0.2,
    rows: int | None = None,
    store: Store = "device",
    checkpoint: Any = None,
    key: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
    with_report: bool = False,
    **kwargs: Any,
) -> Any:
    r"""Round each weight up or down so that the outputs of its layer change least.

    Layer after layer,

    $$\min_{\hat W}\ E\,|f(xW + b) - f(\hat x\hat W + b')|^2$$

    where $x$ is what the float model reads there and $\hat x$ what the model reads whose
    earlier layers are rounded already. What is constant of the error goes into the layer's
    bias. Fold and equalize first; activation ranges move, so calibrate the activations again
    afterwards. The method says how the integers are found, and has its own options:

    - `'coordinate'`, `jm.Coordinate(…)`, the default: descent over the integers;
    - `'gptq'`, `jm.Gptq(…)`: one pass with compensation;
    - `'gram'`, `jm.Gram(…)`: AdaRound's smooth choice, on Gram matrices;
    - `'adam'`, `jm.Adam(…)`: AdaRound as published, on rows and through the activation.

    No layer is worse than nearest rounding by its loss on the data. A weight that several
    layers use is chosen once, for what all of them read, and their one bias takes the mean
    error over all of that. A bias that layers with other weights add too is unchanged: the
    first of them is rounded, and later layers see its outputs, before the shift is known. So
    is a bias of its own of a layer that shares only its weight. The report says so, and
    `jm.correct_bias` with the tree from before as `reference` corrects both. Layers that a
    loop stacks are rounded turn by turn, as if the loop were written out. Weights that are
    computed from parameters, used again in a loop, sliced by a loop within a loop or not
    quantized are rounded to nearest, and the report says so.

    Nagel et al., [Up or Down? Adaptive Rounding for Post-Training
    Quantization](https://arxiv.org/abs/2004.10568), ICML 2020.

    Args:
        params: the tree of parameters.
        graph: of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: of `jm.calibrate`. Scales that are numbers already are kept.
        batches: `jm.batched(images)`, or any iterable of batches that can be read again.
        method: a short name, or a method with its options such as `jm.Coordinate(sweeps=5)`.
        of: 'weights' (the default), or 'both': earlier activations are quantized, too.
        bias: whether biases take the constant part of the error; default True.
        damping: what share of the mean of its diagonal is added to the diagonal of the Gram
            matrix, against the error of what few data do not show; default 0.2.
        rows: how many rows of a layer's inputs are used, from all batches together; default
            None: 256 for each input of the layer, at most 65,536; 16,384 for a method that keeps
            them.
        store: where activations between layers are kept, 'device' (the default) or 'host'.
        checkpoint: a folder; a run that was killed resumes after the last finished layer with
            bit-identical results.
        key: draws the rows, in other positions of each batch and layer, and whatever else the
            method draws; default `jax.random.key(0)`.
        inputs: picks the inputs of the model from a batch that holds more.
        mask: a function of a batch that says where its values count, as in `jm.calibrate`.
        progress: whether a progress bar is shown.
        with_report: whether a table is returned, too.
        **kwargs: keyword arguments for the model.

    Returns:
        The tree and the quantizers, with the scales of these weights pinned. With
        `with_report` also a table with one row per layer, and of a layer that a
        loop stacks with one per `turn`: its `loss`, that of nearest
        rounding, what is `inherited` from earlier layers (the loss of the best real weights
        $W^*$), the `ratio` of what rounding adds to what nearest rounding adds, and the
        `curve` of the loss for methods that optimise it step by step.

    Raises:
        ValueError: for quantizers of another model, a layer that `graph.only` named and whose
            weight cannot be chosen, NaN in the inputs of a layer (named), a wrong key, unknown
            options, a checkpoint of another run and too little memory for the rows.

    >>> params, quantizers = jm.adaround(params, graph, quantizers, batches)
    """
    graph, _ = fitted(params, graph, CALLER)
    check_concrete(params, CALLER)
    check_quantizers(quantizers, graph, CALLER)
    chosen = method_of(method, CALLER)
    check_options(kwargs, graph, params, chosen, CALLER)
    check_keywords(kwargs, graph, params, CALLER)
    key = key_of(key, CALLER)
    check_choices(CALLER, of=(of, get_args(Rounded)), store=(store, get_args(Store)))
    check_numbers(CALLER, damping=(damping, 0))
    check_counts(CALLER, optional=True, rows=rows)
    check_flags(CALLER, bias=bias, progress=progress, with_report=with_report)
    layers = find_layers(graph, quantizers, CALLER)
    read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
    run = LayerwiseRounding(
        CALLER,
        graph,
        params,
        quantizers,
        layers,
        chosen,
        damping,
        rows,
        store,
        of == "both",
        bias,
        key,
        kwargs,
    )
    depends_on = (
        params,
        model_of(graph),
        quantizers,
        static_of(quantizers),
        read.first_batch,
        read.length,
        key,
        repr(chosen),
        damping,
        rows,
        of,
        bias,
    )
    kept = Checkpoint(checkpoint, CALLER, depends_on)
    found = run.go(run.begin(read), kept, progress)
    new, pinned = results(run, found)
    return (
        (new, pinned, report(run.layers, found, run.lost, run.kept_biases))
        if with_report
        else (new, pinned)
    )


def results(
    run: LayerwiseRounding, found: Mapping[str, RoundedWeight]
) -> tuple[Any, Quantizers]:
    """The tree and the quantizers with what was chosen."""
    leaves: dict[str, Any] = {}
    weights = dict(run.quantizers.weights)
    for layer in run.layers:
        if layer.node.name not in found:
            continue
        chosen, old = found[layer.node.name], weights[layer.parameter]
        leaves |= run.problems.updated(layer, chosen)
        grid = jax.device_put((chosen.scale, chosen.zero_point))
        weights[layer.parameter] = old.holding(*grid)
    new = replace_leaves(run.params, leaves, caller=run.caller)
    return new, dataclasses.replace(run.quantizers, weights=weights)


def report(
    layers: Sequence[Layer],
    found: Mapping[str, RoundedWeight],
    lost: Mapping[str, str],
    kept_biases: Mapping[str, str],
) -> Table:
    """One row per layer, and of a layer that a loop runs one per turn."""
    rows, ratios, curves = [], [], []
    for layer, turn in _turns(layers):
        chosen = found.get(layer.node.name)
        loss = plain = least = ratio = None
        if chosen is not None:
            sums = (chosen.loss, chosen.nearest_loss, chosen.inherited)
            if turn is not None:
                assert layer.node.layers is not None
                sums = (np.split(v, layer.node.layers)[turn] for v in sums)
            loss, plain, least = (float(v.sum()) for v in sums)
            ratio = max(loss - least, 0.0) / (plain - least) if plain > least else 1.0
            ratios.append(ratio)
        curve = None if chosen is None else chosen.curve
        curve = curve if curve is None or turn is None else curve[turn]
        curves.append(None if curve is None else curve.tolist() or None)
        bias = kept_biases.get(layer.node.name)
        notes = [
            unmasked(lost.get(layer.node.name)),
            bias and f"bias unchanged: {bias}",
        ]
        note = "; ".join(filter(None, notes)) or None
        if layer.why is not None:
            note = f"rounded to nearest: {layer.why}"
        elif chosen is None:
            with_it = next(
                x for x in reversed(layers) if x.parameter == layer.parameter
            )
            note = f"its weight is rounded with {with_it.node.name!r}"
        rows.append((layer.node.name, turn, loss, plain, least, ratio, note))
    names = ("layer", "turn", "loss", "nearest loss", "inherited", "ratio", "note")
    columns: dict[str, Any] = {n: [r[i] for r in rows] for i, n in enumerate(names)}
    if all(turn is None for turn in columns["turn"]):
        del columns["turn"]
    if any(curves):
        columns["curve"] = curves
    middle = (
        f", {np.median(ratios):.3g} of nearest's error in the median" if ratios else ""
    )
    return Table(columns, title=f"{len(ratios)} of {len(rows)} weights rounded{middle}")


def _turns(layers: Sequence[Layer]) -> Iterator[tuple[Layer, int | None]]:
    """Each layer, with the number of each slice where a loop takes slices of its weight."""
    for layer in layers:
        loops = layer.why is None and layer.node.loop is not None
        yield from ((layer, i) for i in range(layer.node.layers or 0) if loops)
        if not loops:
            yield layer, None
