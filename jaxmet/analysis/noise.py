"""What every quantizer adds to the error of the outputs, at every width, from one backward pass."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.analysis.cost import ALL
from jaxmet.analysis.noise_sums import (
    CALLER,
    WIDTHS,
    NoiseSums,
    noise_of_weights,
    noise_sums,
)
from jaxmet.analysis.scored_quantizers import ScoredQuantizer, places
from jaxmet.engine.graph.analyse import keeps_examples_apart
from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.pruned.expand import call_of
from jaxmet.engine.run.programs import program, split_keywords
from jaxmet.layers.arguments import check_examples, check_keywords, key_of
from jaxmet.layers.gradients import energies
from jaxmet.transforms.lift import lift
from jaxmet.tree.batches import as_batches, inputs_of
from jaxmet.tree.checks import check_counts, check_flags
from jaxmet.tree.examples import some_examples
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.table import Table

EXAMPLES = 128
SAME = 1e-3  # a relative difference of energies that may be rounding


class Noise(NamedTuple):
    """Energy that a quantizer adds to the outputs: by rounding and by clipping, and at WIDTHS."""

    rounded: float
    clipped: float | None
    widths: Sequence[float]


def noise(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    batches: Any,
    *,
    examples: int = EXAMPLES,
    key: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Table:
    r"""What every quantizer adds to the error of the outputs, predicted from gradients.

    A quantizer moves the values $v$ of a weight or an activation by $e = \hat v - v$, which moves
    the outputs by $\sum_v g_v e_v$, where $g$ is their gradient halfway, every value moved by
    $e / 2$ (the midpoint rule: what is left out is of third order in $e$). With outputs
    projected on random signs, the square of that sum has the squared error of the outputs as
    its expectation: one backward pass an example serves all quantizers. The signs are drawn by
    `key`, by default `jax.random.key(0)`, others for each example. So many `examples` are
    taken, evenly from `batches`; by chance the ratio in dB is uncertain by about
    $6/\sqrt{examples}$ (one standard deviation, were all examples alike).

    One row per quantizer of the nodes that `graph` selects: `tensor`, the `layer` (node)
    and `kind` ('weight', 'activation') of that, its `bits`; `SQNR (dB)`, the energy of the
    outputs over what this quantizer adds, $10 \log_{10}(\sum y^2 / N)$; its `share` of all that
    is added; `clipped`, the part of its own noise that is clipping, not rounding; and
    '2 bits' to '16 bits', its SQNR in dB at that width over the same range: what to expect
    of weights rounded to it, $\sum g_v^2 e_v^2$, and of activations by the square of the
    step. The last row, '(all)', is of all quantizers at once, also those that the graph does not
    select; at other widths their sum.

    `mask`, a function of a batch, says where its values count, as in `jm.calibrate`: outputs
    at padded tokens are no part of the energy and of the error.

    The model runs on one example at a time. Where it makes one result of a whole batch, whose
    shape does not grow with the batch, has a batch norm in training mode, or gives an example
    other outputs in a batch than alone, the first batch is the example, and `examples` counts
    draws of signs.

    Where much is clipped, or at few bits, errors are too large for gradients: `compare` and
    `sensitivity` measure what this predicts. Two programs are compiled, and another one where
    the equations leave open whether examples depend on each other.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        batches: `jm.batched(images)`, or any iterable of batches that can be read again.
        examples: how many examples get a backward pass, at most; default 128.
        key: the `jax.random.key` from which all random numbers come; default
            `jax.random.key(0)`.
        inputs: a function that picks the inputs of the model from a batch; default None: the
            batch is the inputs, a tuple several of them.
        mask: a function of a batch that returns a boolean array, True where values count, along
            the leading axes of the inputs; default None: all values count.
        progress: whether a progress bar is shown; default True.
        **kwargs: keyword arguments for the model.

    Returns:
        A table with one row per quantizer, and '(all)' last.

    Raises:
        ValueError: where no gradient reaches a quantizer from the outputs, where one is not
            finite, and where no quantizer is on.

    >>> table = jm.noise(params, graph, quantizers, batches)
    >>> jm.plot.noise(table)
    """
    graph, _ = fitted(params, graph, CALLER)
    quantizer_of = places(params, graph, quantizers, CALLER)
    check_keywords(kwargs, graph, params, CALLER)
    check_counts(CALLER, examples=examples)
    check_flags(CALLER, progress=progress)
    key = key_of(key, CALLER)
    read = as_batches(batches, CALLER, inputs=inputs, mask=mask)
    of_one, of_batch = check_examples(graph, params, read.first, kwargs, CALLER)
    _check_outputs(of_one)
    whole = _is_one_example(graph, read.first, of_one, of_batch)
    if whole or _examples_meet(graph, params, read.first, kwargs):
        some = _repeated(read.first_batch, examples)
    else:
        some = some_examples(read, examples)
    sums = noise_sums(params, graph, quantizers, some, key, kwargs, progress)
    found = {}
    for name, widths in noise_of_weights(params, quantizers, sums.gains).items():
        here, bits = (
            float(sums.grids[f"weight {name}"][0]),
            quantizers.weights[name].bits,
        )
        exact = [here if b == bits else n for b, n in zip(WIDTHS, widths, strict=True)]
        found["weight", name] = Noise(here, None, exact)
    for label, parts in sums.grids.items():
        kind, name = label.split(" ", 1)
        group = quantizers.weights if kind == "weight" else quantizers.activations
        if (kind, name) not in found:
            rounded, clipped = map(float, parts)
            found[kind, name] = _scaled(rounded, clipped, group[name])
    if float(sums.energy) == 0:
        _refuse_zero(partial(lift(graph.apply), **kwargs), params, read.first)
    _check(found, sums)
    return _table(quantizer_of, found, float(sums.whole), float(sums.energy))


# What an example is


def _is_one_example(
    graph: Graph, batch: tuple[Any, ...], of_one: Any, of_batch: Any
) -> bool:
    """Whether the model makes one result of all the rows of a batch."""
    several = any(x.shape[:1] != (1,) for x in jax.tree.leaves(batch))
    shapes = [[y.shape for y in jax.tree.leaves(out)] for out in (of_one, of_batch)]
    in_training = any(
        n.norm is not None and n.norm.over == "batch" for n in graph.nodes
    )
    return several and (shapes[0] == shapes[1] or in_training)


def _examples_meet(
    graph: Graph, params: Any, batch: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the outputs of an example depend on others of its batch.

    Where axes leave that open, the energy of a batch is compared with that of its examples.
    """
    batch, _ = inputs_of(batch)
    if len({x.shape[:1] for x in jax.tree.leaves(batch)}) != 1:
        return False
    if keeps_examples_apart(call_of(graph.apply, params, batch, dict(kwargs))):
        return False
    arrays, static = split_keywords(kwargs)
    both = program(graph.apply, (CALLER, "apart", static), partial(_energies, static))
    together, apart = both(params, batch, arrays)
    pairs = zip(jax.device_get(together), jax.device_get(apart), strict=True)
    return not all(np.isclose(b, a, rtol=SAME, atol=0.0) for a, b in pairs)


def _energies(static: Mapping[str, Any], apply: Apply) -> Callable:
    """The energy of the outputs of a batch, and that of its examples one by one."""

    def both(params: Any, batch: tuple[Any, ...], arrays: Any) -> tuple[Any, Any]:
        def energy(*inputs: Any) -> list[jax.Array]:
            return energies(lift(apply)(params, *inputs, **static, **arrays))

        one = lambda x: energy(*jax.tree.map(lambda a: a[None], x))
        return energy(*batch), jax.tree.map(jnp.sum, jax.lax.map(one, batch))

    return both


def _repeated(batch: tuple[Any, ...], number: int) -> Any:
    """A batch as so many examples, which take no memory: each meets signs of its own."""
    return jax.tree.map(lambda x: np.broadcast_to(x, (number, *x.shape)), batch)


def _scaled(rounded: float, clipped: float, quantizer: Quantizer) -> Noise:
    """Rounding noise grows with the square of the step, clipping stays unchanged."""

    def step(q: Quantizer) -> float:
        low, high = q.ends
        return float(q.margin(q.ends)) / (high - low)

    widths = []
    for bits in WIDTHS:
        own = quantizer.product is None
        other = dataclasses.replace(quantizer, bits=bits) if own else quantizer
        steps = step(other) / step(quantizer)
        widths.append(rounded * steps**2 + clipped)
    return Noise(rounded, clipped, widths)


# The table


def _check_outputs(outputs: Any) -> None:
    if not any(jnp.issubdtype(y.dtype, jnp.inexact) for y in jax.tree.leaves(outputs)):
        raise ValueError(
            f"jaxmet.{CALLER}: no output of the model has gradients: they are integers or "
            "booleans. Trace the model to its logits."
        )


def _refuse_zero(model: Callable, params: Any, batch: tuple[Any, ...]) -> None:
    """Raise, the outputs of single examples being zero, and say whether those of a batch are."""
    if any(np.any(y) for y in jax.tree.leaves(jax.jit(model)(params, *batch))):
        raise ValueError(
            f"jaxmet.{CALLER}: the outputs of the float model are zero for single examples "
            "and not for a batch: the examples of a batch depend on each other (a mean over "
            "the batch?), and gradients are taken of one example at a time. Trace the model "
            "in inference mode, or use jm.compare or jm.sensitivity."
        )
    raise ValueError(
        f"jaxmet.{CALLER}: the outputs of the float model are zero on these examples. Check "
        "the model and the data."
    )


def _check(found: Mapping[tuple[str, str], Noise], sums: NoiseSums) -> None:
    if not math.isfinite(float(sums.energy)):
        raise ValueError(
            f"jaxmet.{CALLER}: the outputs of the float model are not finite on these "
            "examples. Check the model and the data."
        )
    for (_, name), noise in found.items():
        if not math.isfinite(noise.rounded):
            raise ValueError(
                f"jaxmet.{CALLER}: the gradient of the outputs with respect to {name!r} is "
                "NaN or infinite. Run the model in float32, or leave the node out with "
                "graph.without and its quantizer off."
            )
    # A weight whose values are grid points has a gradient, and no error at any width.
    on_weights = [bool(np.any(np.asarray(g) > 0)) for g in sums.gains.values()]
    on_weights += [
        sum(noise.widths) > 0
        for (kind, name), noise in found.items()
        if kind == "weight" and name not in sums.gains  # the model derives it
    ]
    if not any(on_weights or [sum(noise.widths) > 0 for noise in found.values()]):
        raise ValueError(
            f"jaxmet.{CALLER}: no gradient reaches the {'weights' if on_weights else 'quantizers'} "
            "from the outputs (are they indices, or rounded?). Trace the model to its logits."
        )


def _table(
    quantizer_of: Sequence[ScoredQuantizer],
    found: Mapping[tuple[str, str], Noise],
    whole: float,
    energy: float,
) -> Table:
    known = [
        (p, found[p.kind, p.tensor])
        for p in quantizer_of
        if (p.kind, p.tensor) in found
    ]
    total = sum((_power(noise) for _, noise in known), 0.0)
    rows: list[tuple[Any, ...]] = [
        (p.tensor, p.layer, p.kind, p.bits, *_numbers(noise, total, energy))
        for p, noise in known
        if p.selected
    ]
    clipped = sum(noise.clipped or 0.0 for _, noise in known) / total if total else 0.0
    sums = [sum(noise.widths[i] for _, noise in known) for i in range(len(WIDTHS))]
    ratios = [_decibel(energy, power) for power in (whole, *sums)]
    rows.append((ALL, None, None, None, ratios[0], 1.0, clipped, *ratios[1:]))
    names = ("tensor", "layer", "kind", "bits", "SQNR (dB)", "share", "clipped")
    names += tuple(f"{bits} bits" for bits in WIDTHS)
    worst = sorted(rows[:-1], key=lambda row: -row[5])[:3]
    largest = ", ".join(f"{row[2]} {row[0]} ({100 * row[5]:.0f} %)" for row in worst)
    which = "" if len(rows) > len(known) else " of the selected quantizers"
    return Table(
        dict(zip(names, zip(*rows, strict=True), strict=True)),
        title=f"{CALLER}: outputs {ratios[0]:.1f} dB predicted; most{which} comes from {largest}",
    )


def _power(noise: Noise) -> float:
    return noise.rounded + (noise.clipped or 0.0)


def _numbers(noise: Noise, whole: float, energy: float) -> tuple[Any, ...]:
    power = _power(noise)
    clipped = None if noise.clipped is None else noise.clipped / power if power else 0.0
    decibels = [_decibel(energy, power), *(_decibel(energy, n) for n in noise.widths)]
    return decibels[0], power / whole if whole else 0.0, clipped, *decibels[1:]


def _decibel(signal: float, power: float) -> float:
    return 10 * math.log10(signal / power) if power else math.inf
