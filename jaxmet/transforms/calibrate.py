"""Ranges of activations over data, and the quantizers that follow from them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.layers.arguments import check_keywords
from jaxmet.layers.new_quantizers import activation_quantizer, weight_quantizer
from jaxmet.layers.observed_ranges import (
    Range,
    check_samples,
    is_signed,
    observed_ranges,
)
from jaxmet.layers.placement.placement import place
from jaxmet.numerics.ranges import grid_between, grid_on_host
from jaxmet.transforms.data_free_ranges import WHY, data_free_ranges
from jaxmet.tree.batches import as_batches, check_batch_functions
from jaxmet.tree.checks import check_flags, is_concrete
from jaxmet.tree.config import QuantConfig, config_of
from jaxmet.tree.config_fields import Settings
from jaxmet.tree.leaves import dense
from jaxmet.tree.quantizers import Quantizer, Quantizers, along_bias, along_scale

SAMPLES = 2**14
"""How many values of a node and batch a histogram counts, unless told otherwise."""


ROOM = 2.0**30
"""The largest bias in units of its scale when it is calibrated: half of what int32 holds."""


ZEROS = "all of its values were zero: a range of zeros is none for other values"
"""A scale of nothing would clip to nothing what comes later."""


def calibrate(
    params: Any,
    graph: Graph,
    batches: Any = None,
    config: QuantConfig | None = None,
    *,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    samples: int | None = SAMPLES,
    weights: Quantizers | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Quantizers:
    """Quantizers for a model, with activation ranges from a pass over `batches`.

    `batches` is `jm.batched(images, batch_size=32)` or any iterable of batches; a tuple is
    splatted into the model's inputs and `inputs=` chooses them from a batch that holds
    more. The default configuration is W8A8: symmetric weights with one scale per output
    channel that follow the weight, asymmetric activations with one scale per tensor, from
    the smallest and largest value seen in float; with 16 bits, twice that range. Keyword
    arguments go to the model.

    The other choices of `QuantConfig.activation_range` look at histograms. Of a node's
    values in a batch these count about `samples` at most, evenly strided over all axes, and
    the smallest and largest: what one value in n exceeds is known from samples / n values per
    batch, in other positions of each batch. `samples=None` counts all of them.

    `mask` is a function of a batch (of what the loader yields, as `inputs` is) that says where
    values count: a boolean array, True where they do, along the leading axes of the inputs,
    as (batch, tokens). Padded tokens then count in no range: what is made of tokens one by
    one counts where they do, scores of attention where both of their tokens do, what is summed
    over tokens where any of them does. Where an operation moves tokens in a way that cannot be
    followed, all values count, and `quantizers.skipped` says so.

    An input into which the model writes values and which it returns, as a key/value cache, has
    the quantizer of what is written; its zeros count in no range. Of what was zero everywhere
    no range is known: it stays in float, and `quantizers.skipped` says so.

    Without `batches` (None, or `jax.ShapeDtypeStruct`s in their place) activation ranges come
    from batch norms: mean ± 6 standard deviations after each, carried on through the layers.
    What no norm tells, as the model's input, stays in float and is listed in
    `quantizers.skipped`. Weights need no data.

    `weights`, quantizers of the same model, keeps the quantizers of its weights: activations of a
    tree that `jm.adaround` made are calibrated with what it returned.

    Jacob et al., [Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference](https://arxiv.org/abs/1712.05877), CVPR 2018.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        batches: `jm.batched(images)` or any iterable of batches; default None: ranges from the
            statistics of batch norms, without data.
        config: the `jm.QuantConfig`; default None: W8A8, one scale per output channel of a
            weight, one per activation.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        samples: how many values of a node and batch enter its histogram, about; default 16,384,
            None for all.
        weights: quantizers of the same model whose weight scales are kept; default None: all
            are new.
        progress: whether a progress bar is shown; default True.
        **kwargs: keyword arguments for the model.

    Returns:
        The quantizers, one per weight and one per quantized activation.

    Raises:
        ValueError: before any pass over the data, for a rule that matches nothing, a tree that is
            not the graph's, NaN or infinity in parameters or in the first batch, empty batches,
            a bare array, and no batches where no norm tells any range; after the first batch
            for one that runs other nodes than the traced ones; at the end for a node whose
            values overflow, by name.

    >>> quantizers = jm.calibrate(params, graph, jm.batched(images, batch_size=32))
    >>> print(quantizers)
    """
    config = config_of(config, "calibrate")
    graph, leaves = fitted(params, graph, "calibrate")
    check_keywords(kwargs, graph, params, "calibrate", config=True)
    placement = place(graph, config, leaves, "calibrate")
    grids = {w.name: weight_quantizer(w) for w in placement.weights}
    grids |= _kept(weights, grids)
    for bias in placement.biases:
        grids[bias.name] = Quantizer(bits=32, product=bias.product, beside=bias.beside)
    check_samples(samples)
    check_flags("calibrate", progress=progress)
    check_batch_functions("calibrate", inputs, mask)
    if batches is not None:
        batches = as_batches(
            batches, "calibrate", inputs=inputs, mask=mask, abstract=True
        )
    lost: dict[str, str] = {}
    zeros: set[str] = set()
    whole, placement = placement, placement.held()
    if not placement.activations:
        absent, ranges = "", {}
    elif batches is None or batches.abstract:
        absent = WHY
        ranges = data_free_ranges(graph, params, placement)
    else:
        absent = "its branch was never taken"
        if batches.masked:
            absent += ", or none of its values counts"
        ranges = observed_ranges(
            graph,
            params,
            batches,
            placement,
            samples=samples,
            progress=progress,
            lost=lost,
            **kwargs,
        )
        zeros = {n for n, ends in ranges.items() if not any(map(np.any, ends))}
    ranges = {n: ends for n, ends in ranges.items() if n not in zeros}
    ranges |= {n: tuple(map(np.float32, r)) for n, r in placement.fixed.items()}
    activations = {
        name: _of_range(ranges[name], settings, name in placement.entering)
        for name, settings in placement.activations.items()
        if name in ranges
    }
    activations |= {
        name: activation_quantizer(settings, products_only=name in whole.entering)
        for name, settings in whole.activations.items()
        if settings.dynamic is not None
    }
    owners = {name: name for name in placement.activations} | placement.shared
    why = {n: ZEROS if n in zeros else absent for n in owners.values()}
    never = {n: why[o] for n, o in owners.items() if o not in ranges}
    shared = tuple((n, o) for n, o in whole.shared.items() if n not in never)
    quantizers = Quantizers(grids, activations, shared)
    never |= {
        f"input of {node.name}": f"stays in float: {edge.node!r} has no quantizer"
        for node in graph.nodes
        for edge in node.inputs
        if edge.node in never and edge.node in placement.entering
        if node.is_product
    }
    never |= {
        name: f"{q.product[1]!r} has no quantizer: {why[owners[q.product[1]]]}"
        for name, q in grids.items()
        if q.product is not None and q.product[1] in never
    }
    raised, unfit = _with_room_for_biases(quantizers, leaves, set(never))
    never |= unfit
    requantized = [r for r in placement.requantized if not set(r) & set(never)]
    limited = _with_room_for_shifts(
        raised, leaves, requantized, config.device.least_multiplier
    )
    more = _raised(quantizers, raised, leaves, BIAS_FITS)
    more |= _raised(raised, limited, leaves, MULTIPLIER_FITS)
    raised = limited
    grids = {n: q for n, q in raised.weights.items() if n not in never}
    unmasked = {
        f"mask of {name}": f"all values count in its range: {lost[name]} moves tokens"
        for name, owner in owners.items()
        if name in lost and owner in ranges
    }
    skipped = tuple((placement.skipped | never | more | unmasked).items())
    derived = tuple(w.name for w in placement.weights if w.name not in leaves)
    return dataclasses.replace(
        quantizers, weights=grids, skipped=skipped, derived=derived
    )


def _with_room_for_biases(
    quantizers: Quantizers, leaves: dict[str, Any], without: set[str]
) -> tuple[Quantizers, dict[str, str]]:
    """Weight scales of at least |b| / (2^30 s_x), so that biases fit int32; which cannot.

    A channel that is nearly dead would have a scale at which its bias overflows. A power of
    two is left for what corrections add to it.
    """
    weights, unfit = dict(quantizers.weights), {}
    for name, q in quantizers.weights.items():
        if q.product is None or name in without:
            continue
        q_w, q_x = weights[q.product[0]], quantizers.activation(q.product[1])
        bias = quantizers.whole_bias(name, leaves)
        s_w = q_w.grid(dense(leaves[q.product[0]]))[0]
        assert q_x is not None
        try:
            along_bias(s_w, bias, name)
        except ValueError:
            unfit[name] = "the scales of its weight lie along other axes than it does"
            continue
        size = jnp.abs(bias).astype(s_w.dtype)
        least = along_scale(size / (ROOM * q_x.grid(None)[0].astype(s_w.dtype)), s_w)
        if not is_concrete(least) or bool(jnp.any(least > s_w)):
            least = least if q_w.least is None else jnp.maximum(least, q_w.least)
            weights[q.product[0]] = dataclasses.replace(q_w, least=least)
    return dataclasses.replace(quantizers, weights=weights), unfit


def _with_room_for_shifts(
    quantizers: Quantizers,
    leaves: dict[str, Any],
    requantized: list[tuple[str, str, str]],
    limit: float,
) -> Quantizers:
    """Weight scales of at least 2 · limit · s_y / s_x, so that s_x s_w / s_y is above the limit."""
    weights = dict(quantizers.weights)
    for name, x, y in requantized:
        if name not in weights or name not in leaves:
            continue
        q_w, q_x, q_y = (
            weights[name],
            quantizers.activation(x),
            quantizers.activation(y),
        )
        assert q_x is not None and q_y is not None
        s_w = q_w.grid(dense(leaves[name]))[0]
        s_x, s_y = (q.grid(None)[0].astype(s_w.dtype) for q in (q_x, q_y))
        least = jnp.broadcast_to(2 * limit * jnp.max(s_y) / jnp.min(s_x), s_w.shape)
        if not is_concrete(least) or bool(jnp.any(least > s_w)):
            least = least if q_w.least is None else jnp.maximum(least, q_w.least)
            weights[name] = dataclasses.replace(q_w, least=least)
    return dataclasses.replace(quantizers, weights=weights)


BIAS_FITS = "|bias| / (2^30 s_x), so that the bias of the product fits int32"
MULTIPLIER_FITS = "2 · limit · s_y / s_x: the target limits s_x s_w / s_y"


def _raised(
    old: Quantizers, new: Quantizers, leaves: dict[str, Any], least: str
) -> dict[str, str]:
    """Which channels of weights have a larger scale, to be listed with the reason."""
    said = {}
    for name, q in new.weights.items():
        if q.least is old.weights[name].least or not is_concrete(q.least):
            continue
        weight = dense(leaves[name])
        wider = q.grid(weight)[0] > old.weights[name].grid(weight)[0]
        which = np.flatnonzero(np.asarray(wider))
        channels = ", ".join(map(str, which[:20])) + (", …" if len(which) > 20 else "")
        what = "channels" if wider.size > 1 else "scale"
        said[f"{name} ({what})"] = f"raised to {least}" + (
            f": channels {channels}" if wider.size > 1 else ""
        )
    return said


def _kept(weights: Quantizers | None, grids: dict[str, Quantizer]) -> dict[str, Any]:
    """The quantizers of weights that are taken over."""
    if weights is None:
        return {}
    if not isinstance(weights, Quantizers):
        raise ValueError(
            f"jaxmet.calibrate: weights is of type {type(weights).__name__}. Pass the "
            "Quantizers whose weight quantizers are to be kept."
        )
    kept = {n: q for n, q in weights.weights.items() if q.product is None}
    strange = [name for name in kept if name not in grids]
    if strange:
        raise ValueError(
            f"jaxmet.calibrate: weights= has a quantizer for {strange[0]!r}, which this "
            "configuration does not quantize. Pass quantizers of this model."
        )
    return kept


def _of_range(extremes: Range, s: Settings, products_only: bool) -> Quantizer:
    signed = is_signed(s, extremes[0])
    quantizer = activation_quantizer(s, signed=signed, products_only=products_only)
    between = grid_on_host if all(map(is_concrete, extremes)) else grid_between
    grid = between(*extremes, *quantizer.ends, symmetric=s.symmetric)
    scale, zero_point = (a.astype(np.float32) for a in grid)
    scale = scale * np.float32(quantizer.margin(quantizer.ends))
    return quantizer.holding(*map(jax.device_put, (scale, zero_point)))
