"""The one call: fold, equalize, calibrate, round, correct, and what each step was worth."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxmet.analysis.costliest import costliest
from jaxmet.analysis.noise import noise
from jaxmet.engine.frontends import check_apply, refuse_module
from jaxmet.engine.graph.graph import Graph, WithArguments, trace
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.programs import split_keywords
from jaxmet.engine.run.replay import output_masks
from jaxmet.engine.run.shared_programs import share_programs
from jaxmet.layers.arguments import accepting, key_of, refuse_options
from jaxmet.numerics.grid import check_bits
from jaxmet.transforms.calibrate import calibrate
from jaxmet.transforms.correct_bias import correct_bias
from jaxmet.transforms.equalize import equalize
from jaxmet.transforms.fold import fold_batch_norm
from jaxmet.transforms.rounding import adaround
from jaxmet.transforms.simulate import round_weights, simulate
from jaxmet.tree.batches import as_batches, inputs_of
from jaxmet.tree.checks import check_flags, shown
from jaxmet.tree.config import QuantConfig, config_of
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.types import P


def ptq(
    apply: Apply,
    params: P,
    batches: Any,
    config: QuantConfig | None = None,
    *,
    bits: int | None = None,
    key: jax.Array | None = None,
    rounding: bool = True,
    reference: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> tuple[P, Quantizers, Table]:
    """Quantize a trained model: `(params, quantizers, table)`.

    Folds batch norms, equalizes, calibrates on `batches`, rounds by `adaround` if any weight
    has 8 bits or less, and corrects biases; the model is not touched. `rounding=False` rounds
    to nearest and corrects biases only.
    `key`, by default `jax.random.key(0)`, is split between the steps. `mask`, a function of a
    batch, says where its values count, as in `jm.calibrate`, in every step and in the ratios.
    Run the result with `jm.simulate(apply, quantizers)(params, …)`. The table has one row per step:
    the signal-to-noise ratio of the quantized outputs against the float ones over `batches`,
    10·log10(Σ y² / Σ (y − ŷ)²) dB, and what the step did. Equalization or a correction of
    biases that loses more than 0.1 dB is undone. `reference=(apply, params)`, or another tree of
    the same model, is what counts as float there. Static keyword arguments (`train=False`) go to
    the model.

    With `jax.ShapeDtypeStruct`s of the inputs in place of batches no data is needed: ranges,
    scales and mean errors come from the batch norms (data-free quantization), what they do not
    tell stays in float, nothing is rounded by data, and the table has no ratios.

    A result that is more than 1 dB below that of an earlier step is warned of, and so are outputs
    that keep less than 10 dB, with the three quantizers that `jm.noise` finds to cost most.

    The data is read several times per step: a one-shot iterator is refused.

    Nagel et al., [Data-Free Quantization Through Weight Equalization and Bias
    Correction](https://arxiv.org/abs/1906.04721), ICCV 2019.

    Args:
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        params: the parameter tree, whatever the model takes first; not changed.
        batches: `jm.batched(images)`, any iterable of batches, or `jax.ShapeDtypeStruct`s for
            no data.
        config: the `jm.QuantConfig`; default None: W8A8, one scale per output channel of a
            weight, one per activation, and `bias="int32"` as on integer runtimes.
        bits: the bit-width of weights, 2 to 16, where no `config` is given; default None: 8.
        key: the `jax.random.key` from which all random numbers come; default
            `jax.random.key(0)`.
        rounding: whether weights are rounded by `jm.adaround` where there is data; default
            True.
        reference: what outputs are compared with: a tree or `(apply, params)`; default None:
            the model as it came.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        progress: whether a progress bar is shown; default True.
        **kwargs: keyword arguments for the model.

    Returns:
        The tree, its quantizers, and a table with one row per step.

    Raises:
        ValueError: for a key that is none, for `bits` beside a `config`, and what `trace`,
            `fold_batch_norm`, `equalize`, `calibrate`, `correct_bias` and `adaround` raise.

    >>> params, quantizers, table = jm.ptq(model.apply, variables, jm.batched(images), bits=4)
    >>> print(table)
    """
    refuse_module(apply, params, "ptq")
    check_apply(apply, "ptq")
    given = {}
    if bits is not None:
        if config is not None:
            raise ValueError(
                f"jaxmet.ptq: bits is {shown(bits)}, and a config is given too. Give one of them: "
                "jm.QuantConfig(weight_bits=…) says more than bits does."
            )
        given["weight_bits"] = check_bits(bits, caller="ptq", name="bits")
    config = config_of(config, "ptq", bias="int32", **given)
    check_flags("ptq", rounding=rounding, progress=progress)
    read = as_batches(batches, "ptq", passes=2, inputs=inputs, mask=mask, abstract=True)
    refuse_options(kwargs, apply, params, read.first, "ptq")
    arrays, kwargs = split_keywords(kwargs)
    if arrays:  # like settings: each step then runs one model
        apply = WithArguments(apply, arrays)
    whole = key_of(key, "ptq")
    of_noise = jax.random.fold_in(whole, 1)
    of_scales, of_rounding = jax.random.split(whole)
    with accepting(read.first, "ptq", apply, params, kwargs):
        graph = trace(apply, params, *read.first, **kwargs)
    data = None if read.abstract else batches
    rounds = rounding and data is not None and _is_coarse(graph, config)
    options: dict[str, Any] = {
        "inputs": inputs,
        "mask": mask,
        "progress": progress,
    }
    ratio_of = _ratios(graph.apply, *_float_model(reference, graph.apply, params))
    rows: list[dict[str, Any]] = []

    def measure(
        step: str, params: Any, what: str, weights: Quantizers | None = None
    ) -> Quantizers:
        found = calibrate(params, graph, data, config, weights=weights, **options)
        ratio = None
        if data is not None:
            again = as_batches(data, "ptq", inputs=inputs, mask=mask)
            title = f"measure {step}"
            bar = tqdm(again, total=again.length, desc=title, disable=not progress)
            ratio = ratio_of(found, params, bar)
        rows.append({"step": step, "SQNR (dB)": ratio, "note": what})
        return found

    measure("as trained", params, f"{len(graph.layers)} layers quantized as they are")
    params, report = fold_batch_norm(params, graph, with_report=True)
    quantizers = measure("fold_batch_norm", params, _summary(report, "into"))
    equalized, report = equalize(
        params,
        graph,
        config=config,
        batches=data,
        key=of_scales,
        with_report=True,
        **options,
    )
    found = measure("equalize", equalized, _summary(report, "scale min"))
    if not _undone(rows):
        params, quantizers = equalized, found
    weights = None
    if rounds:
        params, weights, report = adaround(
            params,
            graph,
            quantizers,
            data,
            key=of_rounding,
            with_report=True,
            **options,
        )
        quantizers = measure("adaround", params, _summary(report, "loss"), weights)
    # After rounding too: adaround shifts a layer's own bias only, not that of its norm.
    corrected, report = correct_bias(
        params, graph, quantizers, data, with_report=True, **options
    )
    found = measure("correct_bias", corrected, _summary(report, "into"), weights)
    if not _undone(rows):
        params, quantizers = corrected, found
    if data is not None:
        advice = lambda: _advice(params, graph, quantizers, data, of_noise, options)
        for text in _losses(rows, advice):
            warnings.warn(f"jaxmet.ptq: {text}", stacklevel=2)
    table = Table({k: [r[k] for r in rows] for k in rows[0]}, title="ptq")
    return params, quantizers, table


LOW, LOST = 10.0, 1.0
"""Below this ratio, and so far below an earlier step, in dB, a result is warned of."""
TOLERATED = 0.1
"""What equalization and the correction of biases may lose, in dB: chance may be as much."""


def _undone(rows: list[dict[str, Any]]) -> bool:
    """Whether the last step lost: its row then says so, with the ratio of the step before.

    Scales are chosen by predicted errors, and mean errors of a layer are corrected for its own
    outputs, which is not always what the outputs of the model need.
    """
    before, after = (row["SQNR (dB)"] for row in rows[-2:])
    if after is None or after >= before - TOLERATED:
        return False
    rows[-1] |= {"SQNR (dB)": before, "note": f"undone: it gave {after:.2f} dB"}
    return True


def _losses(
    rows: Sequence[Mapping[str, Any]], advice: Callable[[], str]
) -> Iterator[str]:
    """What a user should hear of: steps whose loss stayed, and outputs that are mostly noise."""
    ratios = [row["SQNR (dB)"] for row in rows]
    if ratios[-1] < max(ratios) - LOST:
        best = ratios.index(max(ratios))
        later = range(best + 1, len(ratios))
        worst = min(later, key=lambda i: ratios[i] - ratios[i - 1])
        yield (
            f"the result has {ratios[-1]:.1f} dB, and after the step {rows[best]['step']} it was "
            f"{ratios[best]:.1f}. Run the steps one by one, without {rows[worst]['step']}."
        )
    if ratios[-1] < LOW:
        yield f"the outputs keep {ratios[-1]:.1f} dB of the float ones.{advice()}"


def _advice(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    data: Any,
    key: jax.Array,
    options: Mapping[str, Any],
) -> str:
    """The quantizers that cost most by `jm.noise`, and what more bits would give each."""
    try:
        table = noise(params, graph, quantizers, data, key=key, **options)
    except ValueError:  # of some models no gradient tells it
        return " jm.sensitivity tells which quantizers cost most."
    gains = [
        f"{one.gain:+.1f} dB with {one.rule}"
        for one in costliest(table)
        if one.rule is not None
    ]
    if not gains:
        return ""
    return f" Predicted for single tensors: {', '.join(gains)}."


def _is_coarse(graph: Graph, config: QuantConfig) -> bool:
    """Whether any weight is to have 8 bits or less."""
    weights = ((layer.weight, layer.name) for layer in graph.layers)
    found = (config.resolve((w.name, n), "weight") for w, n in weights if w and w.name)
    return any(one.quantize and one.bits <= 8 for one in found)


def _float_model(reference: Any, apply: Apply, params: Any) -> tuple[Apply, Any]:
    """What outputs are compared with: the model as it came unless told otherwise."""
    if isinstance(reference, tuple) and len(reference) == 2 and callable(reference[0]):
        return reference
    return simulate(apply, Quantizers()), params if reference is None else reference


def _ratios(apply: Apply, reference: Apply, params: Any) -> Callable[..., float]:
    """`f(quantizers, params, batches)`: the signal-to-noise ratio of the outputs in dB.

    10·log10(Σ y² / Σ (y − ŷ)²), summed over batches and over all inexact outputs where they
    count. Weights are rounded once, and quantizers are data: steps that leave trees of the same
    form share a program.
    """
    masks = output_masks(apply)

    def wanted(params: Any, batch: tuple[Any, ...]) -> list[Any]:
        return jax.tree.leaves(reference(params, *inputs_of(batch)[0]))

    def powers(
        outputs: list[Any], quantizers: Quantizers, params: Any, batch: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        inputs, info = inputs_of(batch)
        noisy = simulate(apply, quantizers, weights=False)
        found = jax.tree.leaves(noisy(params, *inputs))
        where: list[Any] = [None for _ in outputs]
        if info.mask is not None:
            where = masks(params, *batch)
        signal, noise = jnp.float32(0), jnp.float32(0)
        for y, z, w in zip(outputs, found, where, strict=True):
            if jnp.issubdtype(y.dtype, jnp.inexact):
                y, z = y.astype(jnp.float32), z.astype(jnp.float32)
                signal += jnp.sum(jnp.square(y), where=w)
                noise += jnp.sum(jnp.square(y - z), where=w)
        return signal, noise

    wanted_of, powers_of = share_programs(wanted), share_programs(powers)

    def ratio(quantizers: Quantizers, tree: Any, batches: Any) -> float:
        rounded, total = round_weights(tree, quantizers), np.zeros(2)
        for batch in map(tuple, batches):
            found = powers_of(wanted_of(params, batch), quantizers, rounded, batch)
            total += np.asarray(found, np.float64)
        power, error = map(float, total)
        if not (power and error):  # the same outputs, or nothing but zeros to lose
            return -math.inf if error else math.inf
        return 10 * math.log10(power / error)

    return ratio


def _summary(report: Table, outcome: str) -> str:
    """How many rows of a report say that something was done."""
    done = sum(value is not None for value in report[outcome])
    rest = len(report) - done
    return f"{done} done" + (f", {rest} skipped" if rest else "")
