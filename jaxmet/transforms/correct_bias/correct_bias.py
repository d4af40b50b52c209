r"""Take back the mean error that rounded weights leave in every channel.

Rounding a weight shifts the mean of what it makes by $E[(\hat W - W)\,x]$, which is rarely
zero: the error of one weight meets every example with the same sign.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import numpy as np

from jaxmet.engine.graph.graph import Graph, fitted, trace
from jaxmet.layers.arguments import check_keywords
from jaxmet.layers.eligibility import skipped
from jaxmet.layers.grams import unmasked
from jaxmet.layers.lockstep import Copy, Positions, quantized_copy
from jaxmet.layers.matching import check_quantizers
from jaxmet.layers.reference import float_model
from jaxmet.transforms.correct_bias.analytic import correct_by_statistics
from jaxmet.transforms.correct_bias.bias_parameters import BiasParameter, find_places
from jaxmet.transforms.correct_bias.sequential_correction import (
    Found,
    correct_in_lockstep,
)
from jaxmet.tree.batches import as_batches, check_batch_functions
from jaxmet.tree.checks import check_choices, check_flags, is_concrete
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.types import P, Rounded, Store

CALLER = "correct_bias"


@overload
def correct_bias(
    params: P,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any = ...,
    *,
    of: Rounded = ...,
    reference: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    store: Store = ...,
    progress: bool = ...,
    with_report: Literal[False] = ...,
    **kwargs: Any,
) -> P: ...
@overload
def correct_bias(
    params: P,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any = ...,
    *,
    of: Rounded = ...,
    reference: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    store: Store = ...,
    progress: bool = ...,
    with_report: Literal[True],
    **kwargs: Any,
) -> tuple[P, Table]: ...
def correct_bias(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any = None,
    *,
    of: Rounded = "weights",
    reference: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    store: Store = "device",
    progress: bool = True,
    with_report: bool = False,
    **kwargs: Any,
) -> Any:
    r"""The same tree with biases that make the quantized model right on average.

    With `batches`, layer after layer in the order of the run: the mean over examples and
    positions of quantized minus float output is subtracted from the layer's bias, a channel
    at a time, and the layers after it see the corrected output. The float model and the
    quantized one each run over the data once, in pieces that are compiled once; what is
    alive between two pieces is kept for all batches, in the device's memory or, with
    `store='host'`, in the host's; where layers share a bias, both run to the last of these
    layers twice. `of='weights'` rounds weights alone, as the paper does;
    `of='both'` quantizes activations too, a layer's own output after its mean is
    measured. `mask`, a function of a batch, says where its values count, as in
    `jm.calibrate`: padded tokens enter no mean.

    Without `batches` the mean inputs come from the statistics of batch norms,
    $b_o \leftarrow b_o - \sum_i \big(\sum_{window} \hat W_{io} - W_{io}\big) E[x_i]$.
    Zeros that pad are not taken into account: the sum is that of the interior. Fold batch
    norms first.

    A layer without a bias gives its shift to the bias of the norm that alone reads it. That
    norm's bias remains the mean of what the tree computes in float; on the grids the mean is
    what it was before. So take data-free ranges and other data-free steps before this one.
    A bias that several layers add is corrected for all of them together, by
    $d = \sum_i n_i e_i / \sum_i n_i$ with $e_i$ the mean error of layer $i$ over $n_i$
    positions (without data, those of the inputs that the model was traced with); all of
    these layers must be selected and quantized. What else reads a layer's weight does not
    matter, since it is unchanged. Layers with neither bias, with stacked weights and those
    inside loops and branches are skipped; the report says so, with the largest shift of each
    layer and that in standard deviations of its channel.

    `reference` is what counts as float: the tree from before rounding or adaptive rounding,
    or `(apply, params)` of another model with the same node names; by default `params`
    itself. A second correction needs the tree from before the first one as `reference`, or
    it takes the same shift again. Equalize before correcting rather than after. Keyword
    arguments go to the model.

    Nagel et al., [Data-Free Quantization Through Weight Equalization and Bias
    Correction](https://arxiv.org/abs/1906.04721), ICCV 2019, section 4.2 and appendix D.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        batches: `jm.batched(images)`, or any iterable of batches; default None: means from the
            statistics of batch norms, without data.
        of: 'weights' (the default) rounds weights alone, 'both' activations too.
        reference: what counts as float: a tree or `(apply, params)`; default None: `params`.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        store: where activations between layers are kept, 'device' (the default) or 'host'.
        progress: whether a progress bar is shown; default True.
        with_report: whether a `Table` is returned as well; default False.
        **kwargs: keyword arguments for the model.

    Returns:
        The tree with corrected biases; with `with_report` also the table, one row per layer.

    Raises:
        ValueError: for unknown options, a layer that `graph.only` named and that cannot be
            corrected, statistics that reach no layer where there is no data, a reference whose
            channels are scaled in another way, and what `calibrate` refuses of batches.

    >>> params = jm.correct_bias(params, graph, quantizers, batches)
    """
    graph, _ = fitted(params, graph, CALLER)
    check_keywords(kwargs, graph, params, CALLER)
    check_quantizers(quantizers, graph, CALLER)
    _check_options(batches, of, store)
    check_flags(CALLER, progress=progress, with_report=with_report)
    check_batch_functions(CALLER, inputs, mask)
    places = find_places(graph, quantizers)
    model = float_model(reference, params, graph, quantizers, CALLER)
    free = {p.at: p for p in places if p.why is None}
    found: dict[str, Found] = {}
    if batches is None:
        params, found = correct_by_statistics(
            params, graph, quantizers, places, model[1]
        )
        _check_found(free, found)
    elif free:
        read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
        other = graph
        if model[0] is not graph.apply:
            other = trace(*model, *read.first, **kwargs)
            _check_nodes(other, tuple(free))
        exact = Copy(CALLER, other, model[1], tuple(free), kwargs, store == "host")
        noisy = quantized_copy(graph, params, quantizers, exact, both=of == "both")
        positions = Positions(other, model[1], tuple(free), kwargs)
        params, found = correct_in_lockstep(
            params,
            free,
            exact,
            noisy,
            read,
            positions,
            spread=with_report,
            progress=progress,
        )
    return (params, _report(places, found)) if with_report else params


def _check_options(batches: Any, of: str, store: str) -> None:
    check_choices(CALLER, of=(of, get_args(Rounded)), store=(store, get_args(Store)))
    if batches is None and of == "both":
        raise ValueError(
            f"jaxmet.{CALLER}: of='both' needs batches: statistics of norms say nothing "
            "about what activation quantizers do. Give batches, or use of='weights'."
        )


def _check_nodes(graph: Graph, cuts: Sequence[str]) -> None:
    names = {n.name for n in graph.nodes}
    missing = [cut for cut in cuts if cut not in names]
    if missing:
        raise ValueError(
            f"jaxmet.{CALLER}: the reference model has no node {missing[0]!r} to compare "
            "with. Give a model with the same node names, or a tree of this one."
        )


def _check_found(free: Mapping[str, BiasParameter], found: Mapping[str, Found]) -> None:
    """Refuse where nothing at all is known: a correction of nothing would be silent."""
    if not free or any(seen.why is None for seen in found.values()):
        return
    listed = "; ".join(f"{name}: {seen.why}" for name, seen in list(found.items())[:5])
    raise ValueError(
        f"jaxmet.{CALLER}: there is no data, and no layer's inputs are known without "
        f"({listed}). Give batches, or fold batch norms first with jm.fold_batch_norm."
    )


def _report(places: Sequence[BiasParameter], found: dict[str, Found]) -> Table:
    rows, done = [], 0
    for place in places:
        seen = found.get(place.layer.name, Found())
        why = place.why or seen.why
        note = skipped(why)
        done += why is None
        rows.append(
            {
                "layer": place.layer.name,
                "into": place.into if why is None else None,
                "largest shift": _largest(seen.shift, 1.0),
                "in deviations": _largest(seen.shift, seen.variance),
                "note": note or unmasked(seen.lost),
            }
        )
    columns = {k: [row[k] for row in rows] for k in rows[0]} if rows else {}
    return Table(columns, title=f"bias corrected at {done} of {len(places)} layers")


def _largest(shift: Any, variance: Any) -> float | None:
    """The largest shift in deviations of its channel; dead channels do not count."""
    if shift is None or variance is None or not is_concrete(shift):
        return None
    size = np.abs(np.asarray(shift, np.float64))
    unit = np.broadcast_to(np.sqrt(np.asarray(variance, np.float64)), size.shape)
    alive = unit > 1e-3 * np.max(unit, initial=0.0)
    return float(np.max(size[alive] / unit[alive], initial=0.0))
