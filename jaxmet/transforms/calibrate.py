"""Ranges of activations over data, and the quantizers that follow from them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.collect import collect
from jaxmet.engine.graph import Graph, leaves_of
from jaxmet.engine.node import Node
from jaxmet.engine.replay import Counted, Run, dense
from jaxmet.numerics.ranges import grid_of_range, split_shape
from jaxmet.transforms.placement import Placement, WeightPlace, place
from jaxmet.tree.batches import as_batches
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.config import QuantConfig, Settings
from jaxmet.tree.quantizers import Quantizer, Quantizers, along_bias

Range = tuple[Any, Any]


def calibrate(
    params: Any,
    graph: Graph,
    batches: Any,
    config: QuantConfig | None = None,
    *,
    inputs: Callable[[Any], Any] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Quantizers:
    """Quantizers for a model, with activation ranges from a pass over `batches`.

    `batches` is `jm.stacked(images, batch_size=32)` or any iterable of batches; a tuple is
    splatted into the model's inputs and `inputs=` chooses them from a batch that holds
    more. The default configuration is W8A8: symmetric weights with one scale an output
    channel that follow the weight, asymmetric activations with one scale a tensor, from
    the smallest and largest value seen in float. Keyword arguments go to the model.

    Raises ValueError, before any pass over the data, for a rule that means nothing, a tree
    that is not the graph's, NaN or infinity in parameters or in the first batch, empty
    batches and a bare array; and after the first batch for one that runs other nodes than
    the traced ones; at the end for a node whose values overflow, by name.

    Jacob et al., [Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference](https://arxiv.org/abs/1712.05877), CVPR 2018.

    >>> quantizers = jm.calibrate(params, graph, jm.stacked(images, batch_size=32))
    >>> print(quantizers)
    """
    config = config or QuantConfig()
    leaves = leaves_of(params, graph, "calibrate")
    placement = place(graph, config, "calibrate")
    weights = {w.name: _weight_quantizer(w, leaves) for w in placement.weights}
    for bias in placement.biases:
        weights[bias.name] = Quantizer(bits=32, product=bias.product)
    for settings in placement.activations.values():
        _only_minmax(settings, "activation_range")
    read = as_batches(batches, "calibrate", inputs=inputs)
    wanted = {*placement.activations, *placement.shared}
    ranges = collect(
        graph,
        params,
        read,
        _ranges_of(wanted),
        _merge,
        caller="calibrate",
        progress=progress,
        **kwargs,
    )
    extremes = _settle(graph, ranges, placement)
    activations = {
        name: _activation_quantizer(extremes[name], settings)
        for name, settings in placement.activations.items()
        if name in extremes
    }
    never = {n: "its branch was never taken" for n in wanted if n not in extremes}
    shared = tuple((n, o) for n, o in placement.shared.items() if n not in never)
    quantizers = Quantizers(weights, activations, shared)
    for name, q in quantizers.weights.items():
        if q.product is None:
            continue
        if q.product[1] in never:
            never[name] = f"the branch of {q.product[1]!r} was never taken"
        elif not _fits_int32(name, quantizers, leaves):
            never[name] = "it does not fit int32 at the product of its scales"
    weights = {name: q for name, q in weights.items() if name not in never}
    left = tuple((placement.left | never).items())
    derived = tuple(w.name for w in placement.weights if w.name not in leaves)
    return dataclasses.replace(quantizers, weights=weights, left=left, derived=derived)


def _fits_int32(name: str, quantizers: Quantizers, leaves: dict[str, Any]) -> bool:
    """Whether a bias survives its integer grid: dead channels have tiny weight scales."""
    bias = dense(leaves[name])
    weight, node = quantizers.weights[name].product or ("", "")
    q_x = quantizers.activation(node)
    if not is_concrete(bias) or q_x is None:
        return True
    s_w, _ = quantizers.weights[weight].grid(dense(leaves[weight]))
    s_x = q_x.scale.astype(s_w.dtype)
    scale = along_bias(s_w, bias, name) * along_bias(s_x, bias, name)
    return bool(jnp.all(jnp.abs(bias).astype(scale.dtype) < 2.0**31 * scale))


def _weight_quantizer(place: WeightPlace, leaves: dict[str, Any]) -> Quantizer:
    s = place.settings
    _only_minmax(s, "weight_range")
    if s.block is not None and place.block_axis is not None and place.name in leaves:
        split_shape(leaves[place.name].shape, place.block_axis, s.block)
    return Quantizer(
        bits=s.bits,
        symmetric=s.symmetric,
        signed=s.symmetric,
        axis=place.axis,
        block=s.block,
        block_axis=place.block_axis,
        calibrator=s.calibrator,
    )


def _only_minmax(settings: Settings, field: str) -> None:
    if settings.calibrator != "minmax":
        raise ValueError(
            f"jaxmet.calibrate: {field}={settings.calibrator!r} is not there yet. "
            "Use 'minmax'."
        )


def _ranges_of(wanted: set[str]) -> Callable:
    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result = run(*operands)
        if node.name not in wanted:
            return result, None
        wide = jnp.float32 if result.dtype.itemsize < 4 else result.dtype
        values = result.astype(wide)
        return result, (jnp.min(values), jnp.max(values))

    return hook


def _merge(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Join what two batches saw; a branch that was not taken saw nothing."""

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, Counted):
            taken = a.count > 0, b.count > 0
            both = join(a.value, b.value)
            value = jax.tree.map(
                lambda x, y, z: jnp.where(
                    taken[0] & taken[1], z, jnp.where(taken[0], x, y)
                ),
                a.value,
                b.value,
                both,
            )
            return Counted(value, a.count + b.count)
        return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])

    return {name: join(one[name], two[name]) for name in one}


def _settle(
    graph: Graph, ranges: dict[str, Any], placement: Placement
) -> dict[str, Range]:
    """One finite range a node: a pair a layer in a loop over layers, else one pair.

    A node whose branch was never taken has none.
    """
    found: dict[str, Range] = {}
    for node in graph.nodes:
        if node.name not in ranges:
            continue
        low, high, taken = _taken(jax.device_get(ranges[node.name]))
        if not taken.any():
            continue
        if not (np.isfinite(low[taken]).all() and np.isfinite(high[taken]).all()):
            raise ValueError(
                f"jaxmet.calibrate: the values of {node.name!r} hold NaN or infinity. "
                "Either a batch holds them, or the model overflows there, as float16 "
                "does: clean the data, or calibrate in bfloat16 or float32."
            )
        low, high = np.where(taken, low, 0.0), np.where(taken, high, 0.0)
        found[node.name] = (low, high) if node.layers else (low.min(), high.max())
    for name, owner in placement.shared.items():
        pairs = [found[n] for n in (owner, name) if n in found]
        if pairs:
            low, high = (
                np.min([p[0].min() for p in pairs]),
                np.max([p[1].max() for p in pairs]),
            )
            found[owner] = (low, high)
    return found


def _taken(value: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smallest and largest values, and where a branch was taken at all."""
    taken: Any = np.True_
    while isinstance(value, Counted):
        taken = taken & (np.asarray(value.count) > 0)
        value = value.value
    low, high = np.asarray(value[0]), np.asarray(value[1])
    return low, high, np.broadcast_to(taken, low.shape)


def _activation_quantizer(extremes: Range, s: Settings) -> Quantizer:
    low, high = (jnp.asarray(e, jnp.float32) for e in extremes)
    signed = not s.symmetric or bool(np.min(extremes[0]) < 0)
    scale, zero_point = grid_of_range(
        low, high, bits=s.bits, symmetric=s.symmetric, signed=signed, narrow=False
    )
    return Quantizer(
        scale,
        None if s.symmetric else zero_point,
        bits=s.bits,
        symmetric=s.symmetric,
        signed=signed and s.symmetric,
        narrow=False,
        calibrator=s.calibrator,
    )
