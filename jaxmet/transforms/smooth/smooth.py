"""The range of activations moved into weights: SmoothQuant, and the same across attention."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

from jaxmet.engine.flow.scale_paths import ScalePath
from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.layers.arguments import check_examples
from jaxmet.layers.collect import collect
from jaxmet.layers.eligibility import skipped
from jaxmet.layers.grams import unmasked
from jaxmet.layers.once import run_once
from jaxmet.numerics import xp
from jaxmet.numerics.xp import Array
from jaxmet.transforms.smooth.carried_scales import with_carried
from jaxmet.transforms.smooth.eligible_paths import check_paths, judged
from jaxmet.transforms.smooth.path_scales import (
    Alpha,
    ends_of,
    merge,
    observe,
    solved,
)
from jaxmet.tree.batches import as_batches, check_batch_functions
from jaxmet.tree.checks import check_flags, is_concrete, shown
from jaxmet.tree.named_leaves import replace_leaves
from jaxmet.tree.table import Table
from jaxmet.tree.types import P

CALLER = "smooth"
COLUMNS = ("producer", "consumers", "channels", "scale min", "scale max", "note")


@overload
def smooth(
    params: P,
    graph: Graph,
    batches: Any,
    *,
    alpha: Alpha = ...,
    input_scales: bool = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[False] = ...,
) -> P: ...
@overload
def smooth(
    params: P,
    graph: Graph,
    batches: Any,
    *,
    alpha: Alpha = ...,
    input_scales: bool = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[True],
) -> tuple[P, Table]: ...
def smooth(
    params: Any,
    graph: Graph,
    batches: Any,
    *,
    alpha: Alpha = "noise",
    input_scales: bool = False,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
    with_report: bool = False,
) -> Any:
    r"""Move the range of a transformer's activations into the weights that read them.

    Channel i of what products read is divided by $s_i = \max|x_i|^\alpha / \max_o |W_{io}|^{1 -
    \alpha}$, with a geometric mean of 1, and row i of their weights multiplied by it. The maximum
    of x is over all batches, that of W over all products that read x. The division costs nothing
    where something upstream takes it, and the function stays, in these four places:

    - A norm over the data (layer norm, RMS norm) that products alone read: its gain and bias,
      where the gain is stored as a vector $\gamma$ or as $\gamma$ of $1 + \gamma$.
    - The values of attention: the outputs of `value` and the inputs of `out`. Attention weights mix
      positions, not channels. Query heads that share a value head share its scales.
    - Queries and keys: the outputs of `query` are divided, those of `key` multiplied, with the
      range of the keys in place of that of weights. Not with rotary embeddings between; of norms
      there the gains are scaled instead.
    - A gated layer, or one with a ReLU: the outputs of `up` and the inputs of `down`, where what is
      between them is a product with a gate, or ReLU.

    The tree keeps plain arrays then. What nothing upstream can divide is skipped: a norm that is
    also a residual stream (post-norm), GELU or SiLU between two layers. With `input_scales` the
    dense layers that read such a value divide it themselves: their weights become
    `jm.Compressed(s·W, input_scale=s)`, of which the product is $(x / s)(s W)$, and a quantizer of
    the input quantizes x / s. All layers that read one value have one scale. It costs a
    multiplication for each value at run time, which files have in front of the quantizer; the
    model runs through `jm.lift(apply)` or `jm.simulate`, and `jm.densify` gives plain arrays
    back. Inputs of the model, convolutions, weights that are shared, and values that other products
    read too are skipped.

    Layers in a loop (`nn.scan`) have scales of their own. Ranges of activations change: calibrate
    afterwards.

    The best `alpha` differs from layer to layer. 'noise' takes, for each set of channels, the one
    from 0 to 1 in steps of 0.05 that minimises what rounding adds to the results of the products,
    predicted for 8 bits, one scale per tensor for activations and one per output channel for
    weights; between queries and keys it is 0.5.

    With `with_report` also a Table: the producer and the consumers of each set of channels, the
    scales, whether weights carry them, or why it was skipped. Norms and layers on both sides must
    be selected in `graph`.

    Xiao et al., [SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models](https://arxiv.org/abs/2211.10438), ICML 2023.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        batches: `jm.batched(tokens)`, or any iterable of batches.
        alpha: how much of the range of activations moves into weights: 0 divides by the range of
            weights alone, 1 by that of activations alone. Default 'noise': it is chosen for
            each set of channels.
        input_scales: whether weights carry the scale of inputs that nothing upstream can divide;
            default False: the tree keeps plain arrays.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        progress: whether a progress bar is shown; default True.
        with_report: whether a `Table` is returned as well; default False.

    Returns:
        The new tree, of the same structure; with `with_report` also the table.

    Raises:
        ValueError: unless `alpha` is a number from 0 to 1 or 'noise', and where `graph.only` named
            a norm or layer none of whose channels can be smoothed.

    >>> params = jm.smooth(params, graph, jm.batched(tokens))
    >>> params = jm.smooth(bert, graph, batches, input_scales=True)
    """
    _check_alpha(alpha)
    flags = {"progress": progress, "with_report": with_report}
    check_flags(CALLER, input_scales=input_scales, **flags)
    check_batch_functions(CALLER, inputs, mask)
    graph, leaves = fitted(params, graph, CALLER)
    paths = [judged(graph, path, leaves) for path in graph.scale_paths]
    if input_scales:
        paths = with_carried(graph, leaves, paths)
    free = [path for path in paths if path.why is None]
    check_paths(graph, paths, leaves, CALLER)
    new, found, lost = {}, [], {}
    read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
    if free:
        check_examples(graph, params, read.first, {}, CALLER)
        ends = ends_of(free, graph, searched=alpha == "noise")
        ranges = collect(
            graph,
            params,
            read,
            partial(observe, ends),
            merge,
            caller=CALLER,
            progress=progress,
            lost=lost,
            key=(CALLER, tuple(ends.items())),
        )
        arrays = {name: leaf for name, leaf in leaves.items() if hasattr(leaf, "dtype")}
        solve = partial(solved, graph, free, alpha)
        new, found = run_once(solve, arrays, ranges)
    result = replace_leaves(params, new, caller=CALLER)
    return (result, _table(paths, found, lost)) if with_report else result


def _check_alpha(alpha: Any) -> None:
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    known = 0 <= alpha <= 1 if number else isinstance(alpha, str) and alpha == "noise"
    if not known:
        raise ValueError(
            f"jaxmet.{CALLER}: alpha is {shown(alpha)}. Give a number from 0 to 1, how much of "
            "the range of activations moves into weights; or 'noise', the default, which chooses "
            "it for each set of channels."
        )


# The report


def _table(
    paths: Sequence[ScalePath], found: Sequence[Array], lost: Mapping[str, str]
) -> Table:
    """One row per path; parts of a layer that are skipped for one reason are one row."""
    rows: dict[Any, dict[str, Any]] = {}
    scales = iter(found)
    for number, path in enumerate(paths):
        row: dict[str, Any] = {
            "producer": ", ".join(dict.fromkeys(s.node for s in path.sources)),
            "channels": path.size,
        }
        if path.why is not None:
            key = row["producer"], path.why
            size = path.size + rows.get(key, {}).get("channels", 0)
            rows[key] = row | {"channels": size, "note": skipped(path.why)}
            continue
        consumers = dict.fromkeys(t.node for t in path.targets)
        masks = [unmasked(lost[n]) for n in consumers if n in lost]
        carried = "carried by the weight" if path.carried else None
        notes = [note for note in (carried, *masks[:1]) if note is not None]
        row |= {"consumers": ", ".join(consumers), "note": "; ".join(notes) or None}
        s = next(scales)
        if is_concrete(s):
            row |= {"scale min": float(xp.min(s)), "scale max": float(xp.max(s))}
        rows[number] = row
    columns = {c: [row.get(c) for row in rows.values()] for c in COLUMNS}
    return Table(columns, f"Smoothed: {len(found)} sets of channels")
