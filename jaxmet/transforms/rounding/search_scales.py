"""Weight scales by the outputs that they give: sequential MSE."""

from collections.abc import Callable
from typing import Any, Literal, get_args, overload

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.layers.arguments import check_keywords, key_of
from jaxmet.layers.checkpoint import Checkpoint
from jaxmet.layers.matching import check_quantizers
from jaxmet.transforms.rounding.adaround import report, results
from jaxmet.transforms.rounding.layerwise import LayerwiseRounding
from jaxmet.transforms.rounding.methods.scale_search import CANDIDATES, Search
from jaxmet.transforms.rounding.rounded_layers import find_layers
from jaxmet.tree.batches import as_batches
from jaxmet.tree.checks import check_choices, check_concrete, check_counts, check_flags
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.types import Store

CALLER = "search_scales"
Read = Literal["weights", "both", "float"]


@overload
def search_scales(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any,
    *,
    candidates: int = ...,
    of: Read = ...,
    rows: int | None = ...,
    store: Store = ...,
    key: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[False] = ...,
    **kwargs: Any,
) -> Quantizers: ...
@overload
def search_scales(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any,
    *,
    candidates: int = ...,
    of: Read = ...,
    rows: int | None = ...,
    store: Store = ...,
    key: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[True],
    **kwargs: Any,
) -> tuple[Quantizers, Table]: ...
def search_scales(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any,
    *,
    candidates: int = CANDIDATES,
    of: Read = "weights",
    rows: int | None = None,
    store: Store = "device",
    key: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
    with_report: bool = False,
    **kwargs: Any,
) -> Any:
    r"""Quantizers whose weight scales give the least error of each layer's outputs.

    Layer after layer, of the `candidates` K shares k/K of the range from the smallest to
    the largest weight, the one is pinned whose rounding to nearest has the least
    $E|xW - \hat x\hat W|^2$: for each channel or block, or for the tensor, as the
    quantizer shares its scale. $x$ is what the float model reads there. $\hat x$ is that
    too with `of='float'`; with 'weights' it is what a model reads whose earlier layers are
    rounded, and with 'both' one whose activations are quantized besides. All
    candidates are tried at once, on Gram matrices, exact over the rows that are looked at
    (at most `rows` per layer, drawn by `key`, by default `jax.random.key(0)`, in other
    positions of each batch and layer). `mask`, a function of a batch, says where its values
    count, as in `jm.calibrate`.

    Scales that are numbers already are searched anew. Layers that a loop stacks are searched
    turn by turn; scales that its turns share are kept.

    Sequential MSE as in AIMET; Choukroun et al., [Low-bit Quantization of Neural Networks
    for Efficient Inference](https://arxiv.org/abs/1902.06822), ICCVW 2019.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        batches: `jm.batched(images)`, or any iterable of batches that can be read again.
        candidates: how many shares of the range are tried; default 20.
        of: which model the inputs come from: 'weights' (the default), 'both' or 'float'.
        rows: how many rows of a layer's inputs are used, from all batches together; default
            None: 256 for each input of the layer, at most 65,536.
        store: where activations between layers are kept, 'device' (the default) or 'host'.
        key: the `jax.random.key` from which all random numbers come; default
            `jax.random.key(0)`.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        progress: whether a progress bar is shown; default True.
        with_report: whether a `Table` is returned as well; default False.
        **kwargs: keyword arguments for the model.

    Returns:
        Quantizers with pinned weight scales; with `with_report` also the table, one row per
        layer.

    Raises:
        ValueError: for quantizers of another model, unknown options and what `calibrate`
            refuses of batches.

    >>> quantizers = jm.search_scales(params, graph, quantizers, batches)
    """
    graph, _ = fitted(params, graph, CALLER)
    check_concrete(params, CALLER)
    check_quantizers(quantizers, graph, CALLER)
    check_keywords(kwargs, graph, params, CALLER)
    key = key_of(key, CALLER)
    check_choices(CALLER, of=(of, get_args(Read)), store=(store, get_args(Store)))
    check_counts(CALLER, candidates=candidates)
    check_counts(CALLER, optional=True, rows=rows)
    check_flags(CALLER, progress=progress, with_report=with_report)
    read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
    run = LayerwiseRounding(
        CALLER,
        graph,
        params,
        quantizers,
        find_layers(graph, quantizers, CALLER),
        Search(candidates),
        0.0,  # no damping: nothing is fitted
        rows,
        store,
        of == "both",
        False,
        key,
        kwargs,
        apart=of == "float",
    )
    found = run.go(run.begin(read), Checkpoint(None, CALLER, ()), progress)
    _, pinned = results(run, found)
    return (pinned, report(run.layers, found, run.lost, {})) if with_report else pinned
