"""What dense layers read, rotated by a Hadamard transform: outliers are spread over channels."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

import jax

from jaxmet.engine.flow.scale_paths import ScalePath
from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.layers.arguments import key_of
from jaxmet.layers.eligibility import check_floats, check_named, skipped
from jaxmet.layers.layer import WeightMatrix
from jaxmet.layers.leaf_math import replaced
from jaxmet.layers.once import run_once
from jaxmet.layers.transformed_layers import carried_paths
from jaxmet.numerics import xp
from jaxmet.numerics.hadamard import hadamard_size, random_signs, rotated
from jaxmet.numerics.precision import wide
from jaxmet.tree.checks import check_flags
from jaxmet.tree.leaves import Compressed, dense, is_compressed
from jaxmet.tree.named_leaves import replace_leaves
from jaxmet.tree.table import Table
from jaxmet.tree.types import P

CALLER = "rotate"
CANNOT = "have rotated inputs"
COLUMNS = ("producer", "consumers", "channels", "block", "note")


@overload
def rotate(
    params: P, graph: Graph, *, key: Any = ..., with_report: Literal[False] = ...
) -> P: ...
@overload
def rotate(
    params: P, graph: Graph, *, key: Any = ..., with_report: Literal[True]
) -> tuple[P, Table]: ...
def rotate(
    params: Any, graph: Graph, *, key: Any = None, with_report: bool = False
) -> Any:
    r"""Rotate what dense layers read by a Hadamard transform, and their weights to undo it.

    $$x W = (x D H)\,(H^\top D W)$$

    D are random signs and H an orthogonal matrix whose entries have one magnitude: a channel
    that is a hundred times as large as the others becomes as many channels of one size, and a
    quantizer of 8 or 4 bits wastes no levels on it. The function stays. Weights become
    `jm.Compressed(…, input_signs=D)`; the transform is computed at run time, in $O(n \log n)$ for
    n channels, and a quantizer of the input quantizes what was rotated. Layers that read one value
    share its transform. The model runs through `jm.lift(apply)` or `jm.simulate`, and `jm.densify`
    gives the plain weights back. No data is needed.

    H is a Kronecker product of matrices of Sylvester and Paley, of the largest size $2^k m$, m in
    1, 12, 20, 28, 36, 44, 60, that divides the number of channels, in blocks of that size.

    Inputs of the model, convolutions, weights that are shared, and values that other products
    read too are skipped, as in `jm.smooth` with `input_scales=True`. What works channel by channel
    comes before it: single channels of rotated inputs are not scaled, folded into or removed.
    Ranges of activations change: calibrate afterwards.

    With `with_report` also a Table: the producer and the consumers of each value, the number of
    channels, the size of the blocks, or why it was skipped.

    Ashkboos et al., [QuaRot: Outlier-Free 4-Bit Inference in Rotated
    LLMs](https://arxiv.org/abs/2404.00456), NeurIPS 2024.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        key: the `jax.random.key` from which the signs come; default `jax.random.key(0)`.
        with_report: whether a `Table` is returned as well; default False.

    Returns:
        The new tree, of the same structure; with `with_report` also the table.

    Raises:
        ValueError: where `graph.only` named a layer whose inputs cannot be rotated.

    >>> params = jm.rotate(params, graph)
    >>> quantizers = jm.calibrate(params, graph, batches)
    """
    check_flags(CALLER, with_report=with_report)
    key = key_of(key, CALLER)
    graph, leaves = fitted(params, graph, CALLER)
    paths = [_judged(path) for path in carried_paths(graph, leaves, ())]
    for path in paths:
        if path.why is not None:
            for target in path.targets:
                check_named(target.node, path.why, graph, CALLER, CANNOT)
            continue
        name = path.sources[0].node
        every = [p for t in path.targets for p in graph[t.node].parameters]
        check_floats(leaves, every, CALLER, name, "Rotate")
    free = [path for path in paths if path.why is None]
    signs = [
        random_signs(jax.random.fold_in(key, i), (path.size,))
        for i, path in enumerate(free)
    ]
    arrays = {name: leaf for name, leaf in leaves.items() if hasattr(leaf, "dtype")}
    new = run_once(partial(_turned, graph, free), arrays, signs)
    result = replace_leaves(params, new, caller=CALLER)
    return (result, _table(paths)) if with_report else result


def _judged(path: ScalePath) -> ScalePath:
    if path.why is None and hadamard_size(path.size) == 1:
        why = f"no known Hadamard matrix has a size that divides its {path.size} inputs"
        return dataclasses.replace(path, why=why)
    return path


def _turned(
    graph: Graph,
    paths: Sequence[ScalePath],
    leaves: Mapping[str, Any],
    signs: Sequence[Any],
) -> dict[str, Any]:
    """The weights of all layers of the paths, rotated along their inputs."""
    found: dict[str, Any] = {}
    for path, drawn in zip(paths, signs, strict=True):
        shared: dict[tuple[int, ...], Any] = {}
        for target in path.targets:
            node = graph[target.node]
            leaf = leaves[node.kernel]
            matrix, array = WeightMatrix.of(node, leaf), xp.asarray(dense(leaf))
            assert matrix is not None and matrix.axes is not None
            stack = {0} if node.layers else set()  # one row of signs for all turns
            shape = tuple(
                1 if i in matrix.axes[1] or i in stack else n
                for i, n in enumerate(array.shape)
            )
            # Layers that hold the same array share its transform at run time.
            mine = shared.setdefault(shape, drawn.reshape(shape).astype(array.dtype))
            array = array.astype(wide(array.dtype))
            turned = rotated(array, mine.astype(array.dtype))
            leaf = leaf if is_compressed(leaf) else Compressed(leaf)
            found[node.kernel] = replaced(leaf, turned).replace(input_signs=mine)
    return found


def _table(paths: Sequence[ScalePath]) -> Table:
    """One row per value that dense layers read."""
    rows = [
        {
            "producer": ", ".join(dict.fromkeys(s.node for s in path.sources)),
            "consumers": ", ".join(dict.fromkeys(t.node for t in path.targets)) or None,
            "channels": path.size or None,
            "block": hadamard_size(path.size) if path.why is None else None,
            "note": skipped(path.why),
        }
        for path in paths
    ]
    done = sum(path.why is None for path in paths)
    columns = {c: [row[c] for row in rows] for c in COLUMNS}
    return Table(columns, f"Rotated: {done} values that layers read")
