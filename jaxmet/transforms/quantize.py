"""Weights as the integers of their grids: what is stored and shipped."""

from collections.abc import Mapping
from typing import Any, Literal, overload

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.layers.eligibility import NOT_SELECTED
from jaxmet.tree.bias_scales import INT32_ENDS, bias_scale
from jaxmet.tree.checks import check_flags, is_concrete
from jaxmet.tree.host_rounding import grid_in_numpy, repeated, round_in_numpy
from jaxmet.tree.leaves import Compressed, as_before, dense, is_compressed, is_quantized
from jaxmet.tree.named_leaves import replace_leaves
from jaxmet.tree.quantized import Quantized, stored
from jaxmet.tree.quantizers import Quantizer, Quantizers, check_are_quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.types import P

CALLER = "quantize"
COLUMNS = ("parameter", "bits", "bytes before", "bytes", "note")


@overload
def quantize(
    params: P,
    graph: Graph,
    quantizers: Quantizers,
    *,
    with_report: Literal[False] = False,
) -> P: ...
@overload
def quantize(
    params: P, graph: Graph, quantizers: Quantizers, *, with_report: Literal[True]
) -> tuple[P, Table]: ...
def quantize(
    params: Any, graph: Graph, quantizers: Quantizers, *, with_report: bool = False
) -> Any:
    r"""The tree with the integers of its weights in place of floats: a quarter of the bytes.

    Each parameter with a quantizer becomes a `Compressed` leaf that holds `jm.Quantized`:
    integers $q = \mathrm{clip}(\mathrm{round}(w/s) + z)$, the scale s and the zero
    point z. Widths of 5 to 8 bits take one byte a weight, those of 3 and 4 half a byte, 2 bits
    a quarter. A bias with `bias='int32'` becomes int32 at $s_w s_x$; in a folded norm, where
    it is a sum with the norm's mean, it is rounded to that grid and stays in float. What has no
    quantizer, and weights that the model derives from several parameters, stay in float.

    `jm.lift(apply)(integers, x)` runs the tree, each weight being $s (q - z)$ where it is
    used: activations stay in float. `jm.simulate(apply, quantizers, weights=False)` puts these
    on their grids too: the weights are those of `jm.round_weights(params, quantizers)`, to the
    bit. `jm.save` writes the integers. Do it last: integers are neither trained nor
    changed by other transforms.

    Jacob et al., [Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference](https://arxiv.org/abs/1712.05877), CVPR 2018.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        with_report: whether a `Table` is returned as well; default False.

    Returns:
        The new tree; with `with_report` also a table with one row per parameter: its bits, its
        bytes before and after, and why it stays in float.

    Raises:
        ValueError: for quantizers of another tree, for leaves that are traced (call it outside
            of `jax.jit`), and for a tree that holds integers already.

    >>> integers = jm.quantize(params, graph, quantizers)
    >>> logits = jax.jit(jm.lift(model.apply))(integers, images)
    """
    check_flags(CALLER, with_report=with_report)
    check_are_quantizers(quantizers, CALLER)
    fitted(params, graph, CALLER)
    leaves = quantizers.leaves(params, CALLER)
    _check_leaves(leaves)
    outside = _outside(graph)
    found: dict[str, Any] = {}
    rows = []
    for name, leaf in leaves.items():
        q = quantizers.weights.get(name)
        why = NOT_SELECTED if name in outside else None
        new = None
        if q is not None and why is None:
            new, why = _integers(name, q, leaf, leaves, quantizers)
        if new is not None:
            found[name] = new
        before, after = (_bytes(x) for x in (leaf, leaf if new is None else new))
        bits = new.weight.bits if new is not None and is_quantized(new) else None
        rows.append((name, bits, before, after, why or _reason(name, quantizers, q)))
    result = replace_leaves(params, found, caller=CALLER)
    if not with_report:
        return result
    share = sum(row[3] for row in rows) / max(1, sum(row[2] for row in rows))
    columns = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
    return result, Table(columns, title=f"{CALLER}: {share:.3f} of the bytes")


def _check_leaves(leaves: Mapping[str, Any]) -> None:
    for name, leaf in leaves.items():
        if is_quantized(leaf):
            raise ValueError(
                f"jaxmet.{CALLER}: {name!r} holds integers already. Pass the tree of floats."
            )
        if not is_concrete(dense(leaf)):
            raise ValueError(
                f"jaxmet.{CALLER}: {name!r} is traced. Call it outside of jax.jit."
            )


def _outside(graph: Graph) -> set[str]:
    """The parameters of layers that the user left out."""
    mine, others = set(), set()
    for node in graph.nodes:
        names = {node.weight.name} if node.weight is not None else set()
        (mine if node.name in graph.selected else others).update(names | {node.bias})
    return {name for name in others - mine if name is not None}


def _integers(
    name: str,
    q: Quantizer,
    leaf: Any,
    leaves: Mapping[str, Any],
    quantizers: Quantizers,
) -> tuple[Any, str | None]:
    """The leaf with integers, or rounded in float, or None; and the note of the report."""
    if q.product is not None:
        return _int32_bias(name, q, leaf, leaves, quantizers)
    if not q.active:
        return None, None
    array = np.asarray(dense(leaf))
    floats = array.astype(np.result_type(array.dtype, np.float32), copy=False)
    scale, zero_point = (np.asarray(a) for a in grid_in_numpy(q, floats))
    rounded = round_in_numpy(q, floats)
    s, z = (repeated(a, floats.shape, q.block) for a in (scale, zero_point))
    values = np.rint(rounded.astype(np.float64) / s + z).astype(np.int64)
    low = q.ends[0]
    integers = Quantized(
        as_before(stored(values, q.bits, low), dense(leaf)),
        as_before(scale, dense(leaf)),
        None if q.symmetric else as_before(zero_point, dense(leaf)),
        q.bits,
        low,
        array.shape,
        array.dtype.name,
        q.block,
    )
    return _holding(leaf, integers), None


def _int32_bias(
    name: str,
    q: Quantizer,
    leaf: Any,
    leaves: Mapping[str, Any],
    quantizers: Quantizers,
) -> tuple[Any, str | None]:
    rounded = quantizers.quantize_weight(name, leaves)
    assert q.product is not None
    weight, node = q.product
    x = quantizers.activation(node)
    if x is None or x.follows or not (q.active and x.active):
        return None, None
    if q.beside:
        others = " and ".join(repr(other) for other, _ in q.beside)
        return rounded, f"int32, as a sum with {others}: rounded in float"
    array = np.asarray(dense(leaf))
    of_w = np.asarray(dense(leaves[weight]))
    s_w, _ = grid_in_numpy(quantizers.weights[weight], of_w)
    s_x, _ = grid_in_numpy(x, of_w)
    scale = bias_scale(s_w, s_x, array, name)
    values = np.rint(np.asarray(dense(rounded), np.float64) / scale).astype(np.int32)
    integers = Quantized(
        as_before(values, dense(leaf)),
        as_before(scale.astype(s_w.dtype), dense(leaf)),
        bits=32,
        low=int(INT32_ENDS[0]),
        shape=array.shape,
        stands_for=array.dtype.name,
    )
    return _holding(leaf, integers), None


def _holding(leaf: Any, integers: Quantized) -> Compressed:
    return (
        leaf.replace(weight=integers) if is_compressed(leaf) else Compressed(integers)
    )


def _reason(name: str, quantizers: Quantizers, q: Quantizer | None) -> str | None:
    """Why a parameter is in float."""
    if q is not None and (q.active or q.product is not None):
        return None
    return "32 bits" if q is not None else dict(quantizers.skipped).get(name)


def _bytes(leaf: Any) -> int:
    """What the arrays of a leaf take."""
    return sum(int(np.asarray(a).nbytes) for a in jax.tree.leaves(leaf))
