"""Weights in two thin factors: two products with fewer multiplications in place of one."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import jax.numpy as jnp

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.node import Node
from jaxmet.layers.arguments import accepting, key_of
from jaxmet.layers.asked_ratios import asked_for
from jaxmet.layers.eligibility import (
    NOT_SELECTED,
    of,
    skipped,
    why_looped,
    why_no_matrix,
)
from jaxmet.layers.grams import grams, unmasked
from jaxmet.layers.layer import WeightMatrix, kernel_axes
from jaxmet.layers.once import run_once
from jaxmet.numerics import xp
from jaxmet.numerics.low_rank import largest_rank, multiple_above
from jaxmet.transforms.factors import (
    Shape,
    factors_of,
    gram_of_parameter,
    made_of,
    shape_of,
    shapes_on,
)
from jaxmet.tree.batches import as_batches, check_batch_functions
from jaxmet.tree.checks import check_choices, check_concrete, check_counts, check_flags
from jaxmet.tree.leaves import OF_INPUTS, Compressed, dense, is_compressed
from jaxmet.tree.named_leaves import replace_leaves
from jaxmet.tree.structures import LowRank
from jaxmet.tree.table import Table
from jaxmet.tree.types import P

CALLER = "factorize"
Method = Literal["spatial", "weight"]
METHODS = get_args(Method)
COLUMNS = ("layer", "rank", "of", "ratio", "error", "note")


@overload
def factorize(
    params: P,
    graph: Graph,
    *,
    ranks: Mapping[str, int] | None = ...,
    ratios: float | Mapping[str, float] | None = ...,
    method: Method = ...,
    batches: Any = ...,
    multiple: int = ...,
    rows: int | None = ...,
    key: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[False] = False,
) -> P: ...
@overload
def factorize(
    params: P,
    graph: Graph,
    *,
    ranks: Mapping[str, int] | None = ...,
    ratios: float | Mapping[str, float] | None = ...,
    method: Method = ...,
    batches: Any = ...,
    multiple: int = ...,
    rows: int | None = ...,
    key: Any = ...,
    inputs: Callable[[Any], Any] | None = ...,
    mask: Callable[[Any], Any] | None = ...,
    progress: bool = ...,
    with_report: Literal[True],
) -> tuple[P, Table]: ...
def factorize(
    params: Any,
    graph: Graph,
    *,
    ranks: Mapping[str, int] | None = None,
    ratios: float | Mapping[str, float] | None = None,
    method: Method = "spatial",
    batches: Any = None,
    multiple: int = 1,
    rows: int | None = None,
    key: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
    with_report: bool = False,
) -> Any:
    r"""Replace weights by two factors of lower rank.

    A kernel (h, w, in, out) becomes, with `method='spatial'`, one of (h, 1, in, rank) and
    one of (1, w, rank, out); with `'weight'` one of (1, 1, in, rank) and one of
    (h, w, rank, out). Strides, padding and dilation of each window axis go with the factor
    that holds it; the groups of a grouped convolution are factorized each for itself. Dense
    layers and windows of one are the same for both methods. The leaf becomes `Compressed`
    with `LowRank` factors, which `jm.lift` and `jm.simulate` run as two layers, 'stem/in' and
    'stem/out'. The graph serves the new tree too: every function finds both layers in it, and
    `graph.of(params)` shows them. Biases, bounds and what padding holds stay with the factor
    that they belong to.

    `ratios` is the cost of a layer afterwards over its cost before, in multiplications: one
    number for all layers or one per layer; `ranks` gives ranks themselves. Costs are those of
    padding that keeps sizes but for strides: where little is padded ('VALID') the first
    factor runs on more positions than the weight did, and the report has what it comes to
    for inputs like those of `batches`, or of `jm.trace`. Ranks are rounded up to a `multiple`
    where that still saves something. A layer whose factors would cost as much as its weight
    is skipped.

    Without data the product of the factors is the nearest to the weight, by its singular
    values. With `batches` it is the one that changes the layer's output least on them:
    $E\,|x (W - AB)|^2$ is minimised through the Gram matrix of the inputs x, from at most
    `rows` rows per batch, drawn by `key` (by default `jax.random.key(0)`), in other positions
    of each batch; then B is refitted to A over the whole window. `mask`, a function of a
    batch, says where its values count, as in `jm.calibrate`: padded tokens are no rows.

    With `with_report` also a Table: rank and full rank of each layer, the ratio that was
    reached, the relative error of the output (of the weight, without data), or why the
    layer was skipped.

    Jaderberg et al., [Speeding up Convolutional Neural Networks with Low Rank
    Expansions](https://arxiv.org/abs/1405.3866), BMVC 2014; Zhang et al., [Accelerating
    Very Deep Convolutional Networks](https://arxiv.org/abs/1505.06798), 2015, for the
    error of the output.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        ranks: the rank of each layer, by name; default None. Give either `ranks` or `ratios`.
        ratios: cost after over cost before: one number for all layers, or one per layer by
            name; default None.
        method: 'spatial' (the default) splits a convolution into a column and a row, 'weight'
            into two products.
        batches: data that decides which factors change the output least; default None: the
            factors nearest to the weight.
        multiple: ranks or channel counts are rounded up to a multiple of this; default 1.
        rows: how many rows of each layer's inputs are used per batch at most; default None:
            64 for each input of the layer, at most 65,536.
        key: the `jax.random.key` from which all random numbers come; default
            `jax.random.key(0)`.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        progress: whether a progress bar is shown; default True.
        with_report: whether a `Table` is returned as well; default False.

    Returns:
        The tree with `LowRank` leaves; with `with_report` also the table, one row per layer.

    Raises:
        ValueError: for ratios outside (0, 1], ranks that a weight does not have, names of
            layers that are not there or cannot be factorized, and both or neither of `ranks`
            and `ratios`.

    >>> params = jm.factorize(params, graph, ratios=0.5, batches=batches)
    >>> params = jm.prune(params, graph, 0.7, batches=batches)
    """
    graph, leaves = fitted(params, graph, CALLER)
    check_choices(CALLER, method=(method, METHODS))
    check_counts(CALLER, multiple=multiple)
    check_counts(CALLER, optional=True, rows=rows)
    check_flags(CALLER, progress=progress, with_report=with_report)
    check_batch_functions(CALLER, inputs, mask)
    if (ranks is None) == (ratios is None):
        raise ValueError(
            f"jaxmet.{CALLER}: give either ranks= or ratios=: the rank of each layer, or "
            "its cost afterwards over its cost before."
        )
    key = key_of(key, CALLER)
    read, example = None, graph.called
    if batches is not None:
        check_concrete(params, CALLER)
        read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
        example = read.first, {}
    left = {n.name: why for n in graph.layers if (why := unfit(n, leaves))}
    layers = [n for n in graph.layers if n.name not in left]
    shapes = {n.name: shape_of(n, leaves[n.kernel], method) for n in layers}
    sizes, given = example[0], (graph.apply, params, example[1])
    with accepting(sizes, CALLER, *given, traced=graph.called[0]):
        costs = shapes_on(params, graph, layers, leaves, method, *example)
    names = {n.name: left.get(n.name) for n in graph.layers}
    if ranks is not None:
        given = _given(ranks, names, shapes, graph)
        wanted = {
            name: _rounded_up(rank, shapes[name], multiple)
            for name, rank in given.items()
        }
    else:
        asked = asked_for(ratios, names, graph, CALLER)
        wanted = {
            name: rank_at(shapes[name], ratio, multiple)
            for name, ratio in asked.items()
            if ratio < 1
        }
    wanted = _for_all_uses(graph, wanted, left)
    for name in list(wanted):
        if costs[name].cost_of(wanted[name]) >= costs[name].cost:
            left[name] = f"{wanted[name]} of {shapes[name].most} ranks cost no less"
            del wanted[name]
    lost: dict[str, str] = {}
    seen: Mapping[str, Any] = {}
    if read is not None and wanted:
        seen = grams(
            graph,
            params,
            read,
            wanted,
            caller=CALLER,
            key=key,
            rows=rows,
            progress=progress,
            lost=lost,
        )
    chosen = [node for node in graph.layers if node.name in wanted]

    def solve(leaves: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
        return {
            node.name: _factors(
                node, leaves[node.kernel], shapes[node.name], wanted[node.name], seen
            )
            for node in chosen
        }

    kernels = {node.kernel: leaves[node.kernel] for node in chosen}
    made = run_once(solve, kernels, seen)
    found, table = {}, []
    for node in graph.layers:
        if node.name not in wanted:
            table.append({"layer": node.name, "note": skipped(left.get(node.name))})
            continue
        name, shape, rank = node.kernel, shapes[node.name], wanted[node.name]
        first, second, between, error = made[node.name]
        found[name] = _leaf(leaves[name], first, second, between, shape)
        table.append(
            {
                "layer": node.name,
                "rank": rank,
                "of": shape.most,
                "ratio": costs[node.name].cost_of(rank) / shape.cost,
                "error": error,
                "note": unmasked(lost.get(node.name)),
            }
        )
    result = replace_leaves(params, found, caller=CALLER)
    return (result, _table(table)) if with_report else result


def unfit(node: Node, leaves: Mapping[str, Any]) -> str | None:
    """Why a layer's weight has no factors, None where it has."""
    weight = node.weight
    if (why := node.why_kept() or why_looped(node) or why_no_matrix(node)) is not None:
        return why
    assert weight is not None and weight.name is not None
    if node.convolution is not None and kernel_axes(node) is None:
        return "its kernel is reshaped before it is used"
    if node.dot is not None and node.dot.batched:
        return "its weight is read along other axes"
    found = WeightMatrix.of(node, leaves[weight.name])
    if found is None or found.axes is None:
        return "its weight is reshaped across its inputs and outputs"
    if not jnp.issubdtype(dense(leaves[weight.name]).dtype, jnp.floating):
        return "its weight holds no real numbers"
    return None


def _for_all_uses(
    graph: Graph, wanted: Mapping[str, int], left: dict[str, str]
) -> dict[str, int]:
    """One rank per weight, the largest that was asked for; the others go into `left`."""
    found: dict[str, int] = {}
    for name, rank in wanted.items():
        kernel = graph[name].kernel
        uses = [
            n.name
            for n in graph.nodes
            if n.kind == "product" and n.weight is not None and n.weight.name == kernel
        ]
        strange = [use for use in uses if use not in graph.selected]
        if strange:
            left[name] = f"its weight is also that of {of(strange[0], NOT_SELECTED)}"
            continue
        for use in uses:
            found[use] = max(rank, found.get(use, 0))
    return found


def _given(
    ranks: Any,
    names: Mapping[str, str | None],
    shapes: Mapping[str, Shape],
    graph: Graph,
) -> dict[str, int]:
    """The ranks that were asked for by name, each of them one that its weight has."""
    if not isinstance(ranks, Mapping):
        raise ValueError(
            f"jaxmet.{CALLER}: ranks is {ranks!r}. Give the rank of each layer by name: "
            "ranks={'stem': 12}."
        )
    asked_for(dict.fromkeys(ranks, 1.0), names, graph, CALLER)
    wanted = {name: _whole(rank) for name, rank in ranks.items()}
    for name, rank in wanted.items():
        if not 1 <= rank <= shapes[name].most:
            raise ValueError(
                f"jaxmet.{CALLER}: the rank of {name!r} is {ranks[name]!r}. Give a whole number "
                f"from 1 to {shapes[name].most}."
            )
    return wanted


def _whole(rank: Any) -> int:
    """The rank as an integer, one that no weight has if it is none."""
    try:
        return -1 if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        return -1


def rank_at(shape: Shape, ratio: float, multiple: int) -> int:
    """The largest rank that costs no more than this ratio."""
    return largest_rank(ratio, shape.cost_of(1), shape.cost, shape.most, multiple)


def _rounded_up(rank: int, shape: Shape, multiple: int) -> int:
    """A rank up to a multiple, where that still saves something."""
    one = shape.cost_of(1)
    return multiple_above(rank, one, shape.cost, shape.most, multiple) or rank


def _factors(
    node: Node, leaf: Any, shape: Shape, rank: int, seen: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Both factors, what padding holds between them, and their error.

    What padding holds instead of zero, the first makes something of: that is what the
    padding before the second holds.
    """
    gram = None
    if node.name in seen:
        gram = gram_of_parameter(node, leaf, shape, seen[node.name].mean)
    first, second, error = factors_of(xp.asarray(dense(leaf)), shape, rank, gram)
    offset = leaf.input_offset if is_compressed(leaf) else None
    between = None if offset is None else made_of(offset, first, shape)
    return first, second, between, error


def _leaf(leaf: Any, first: Any, second: Any, between: Any, shape: Shape) -> Compressed:
    """The factors with what the leaf stated, each part of it where it belongs."""
    if is_compressed(leaf):
        of_inputs = {name: leaf.stated().get(name) for name in OF_INPUTS}
        if any(stated is not None for stated in of_inputs.values()):
            first = Compressed(first, **of_inputs)
        if not (leaf.lower is leaf.upper is between is None):
            second = Compressed(
                second, lower=leaf.lower, upper=leaf.upper, input_offset=between
            )
    return Compressed(
        LowRank(first, second, shape.method, shape.sizes, shape.in_axes, shape.out_axes)
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = {name: [row.get(name) for row in rows] for name in COLUMNS}
    count = sum(row.get("rank") is not None for row in rows)
    return Table(columns, title=f"{CALLER}: {count} of {len(rows)} layers")
