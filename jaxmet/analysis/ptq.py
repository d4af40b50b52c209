"""The one call: fold, equalize, calibrate, and what each step was worth."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxmet.engine.calls import Apply
from jaxmet.engine.graph import trace
from jaxmet.transforms.calibrate import calibrate
from jaxmet.transforms.equalize import equalize
from jaxmet.transforms.fold import fold_batch_norm
from jaxmet.transforms.simulate import simulate
from jaxmet.tree.batches import as_batches
from jaxmet.tree.config import QuantConfig
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table


def ptq(
    apply: Apply,
    params: Any,
    batches: Any,
    config: QuantConfig | None = None,
    *,
    key: jax.Array | None = None,
    reference: tuple[Apply, Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> tuple[Any, Quantizers, Table]:
    """Quantize a trained model: `(params, quantizers, table)`.

    Folds batch norms, equalizes, and calibrates on `batches`; the model is not touched. Run
    the result with `jm.simulate(apply, quantizers)(params, …)`. The table has a row a step:
    the signal-to-noise ratio of the quantized outputs against the float ones over
    `batches`, 10·log10(Σ y² / Σ (y − ŷ)²) dB, and what the step did. `reference=(apply,
    params)` compares with another float model. Static keyword arguments (`train=False`) go to
    the model. No step is random yet, so `key` is unused.

    The data is read once a step: a one-shot iterator is refused. Raises what `trace`,
    `fold_batch_norm`, `equalize` and `calibrate` raise.

    >>> params, quantizers, table = jm.ptq(model.apply, variables, jm.stacked(images))
    >>> print(table)
    """
    del key
    config = config or QuantConfig()
    read = as_batches(batches, "ptq", passes=2, inputs=inputs)
    graph = trace(apply, params, *read.first, **kwargs)
    apply = graph.apply
    float_apply, float_params = reference or (simulate(apply, Quantizers()), params)
    rows: list[dict[str, Any]] = []

    def measure(step: str, params: Any, what: str) -> Quantizers:
        found = calibrate(
            params, graph, batches, config, inputs=inputs, progress=progress
        )
        again = as_batches(batches, "ptq", inputs=inputs)
        bar = tqdm(
            again, total=again.length, desc=f"measure {step}", disable=not progress
        )
        ratio = sqnr((float_apply, float_params), (simulate(apply, found), params), bar)
        rows.append({"step": step, "SQNR (dB)": ratio, "what": what})
        return found

    measure("as trained", params, f"{len(graph.sites)} sites quantized as they are")
    params, folded = fold_batch_norm(params, graph, with_report=True)
    measure("fold_batch_norm", params, _summary(folded, "into"))
    params, equalized = equalize(
        params,
        graph,
        config=config,
        batches=batches,
        inputs=inputs,
        progress=progress,
        with_report=True,
    )
    quantizers = measure("equalize", params, _summary(equalized, "scale min"))
    table = Table({k: [r[k] for r in rows] for k in rows[0]}, title="ptq")
    return params, quantizers, table


def sqnr(reference: tuple[Apply, Any], other: tuple[Apply, Any], batches: Any) -> float:
    """Signal-to-noise ratio of one model's outputs against another's, in dB.

    10·log10(Σ y² / Σ (y − ŷ)²), summed over batches and over all inexact outputs.
    """
    (apply, params), (noisy, noisy_params) = reference, other

    @jax.jit
    def powers(params: Any, noisy_params: Any, batch: tuple[Any, ...]) -> Any:
        outputs = jax.tree.leaves(apply(params, *batch))
        found = jax.tree.leaves(noisy(noisy_params, *batch))
        signal, noise = jnp.float32(0), jnp.float32(0)
        for y, z in zip(outputs, found, strict=True):
            if jnp.issubdtype(y.dtype, jnp.inexact):
                y, z = y.astype(jnp.float32), z.astype(jnp.float32)
                signal += jnp.sum(jnp.square(y))
                noise += jnp.sum(jnp.square(y - z))
        return signal, noise

    total = np.zeros(2)
    for batch in batches:
        total += np.asarray(powers(params, noisy_params, tuple(batch)), np.float64)
    return float(10 * np.log10(total[0] / max(total[1], np.finfo(np.float64).tiny)))


def _summary(report: Table, outcome: str) -> str:
    """How many rows of a report say that something was done."""
    done = sum(value is not None for value in report[outcome])
    rest = len(report) - done
    return f"{done} done" + (f", {rest} left alone" if rest else "")
