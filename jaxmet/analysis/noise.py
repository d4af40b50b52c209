"""What every grid adds to the error of the outputs, at every width, from one backward pass."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm.auto import tqdm

from jaxmet.analysis.cost import ALL
from jaxmet.analysis.grids import Place, places
from jaxmet.engine.gradients import Tap, energies, projected_gradients, squared
from jaxmet.engine.graph import Graph, leaves_of
from jaxmet.engine.node import Node
from jaxmet.engine.replay import Run, evaluate
from jaxmet.transforms.simulate import quantizer_at, round_weights
from jaxmet.tree.batches import as_batches
from jaxmet.tree.examples import some_examples
from jaxmet.tree.leaves import dense
from jaxmet.tree.names import named_leaves
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers, grids
from jaxmet.tree.table import Table

CALLER = "noise"
WIDTHS = tuple(range(2, 17))
EXAMPLES = 64


class Noise(NamedTuple):
    """Energy that a grid adds to the outputs: by rounding and by clipping, and at WIDTHS."""

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
    inputs: Callable[[Any], Any] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Table:
    r"""What every grid alone adds to the error of the outputs, to first order.

    A grid moves the values $v$ of a weight or an activation by $e = \hat v - v$, which adds
    to the squared error of the outputs, in expectation over random signs of the outputs,
    $\sum_c (\sum_{v \in c} g_v e_v)^2$, where $g$ is the gradient of the outputs on these
    signs and $c$ a channel (a value alone where a node's channels are not known): errors add
    up within a channel, such as the shift that rounding gives its mean, and are independent
    from channel to channel. One backward pass an example of the float model serves all
    grids. So many `examples` are taken, evenly from `batches`.

    One row a grid of the nodes that `graph` selects: `what` is put on it, the `site` (node)
    and `kind` ('weight', 'activation') of that, its `bits`; `SQNR (dB)`, the energy of the
    outputs over what this grid adds, $10 \log_{10}(\sum y^2 / N)$; its `share` of all that
    is added; `clipped`, the part of its own noise that is clipping, not rounding; and
    '2 bits' to '16 bits', its SQNR in dB at that width over the same range: what to expect
    of weights rounded to it, $\sum g_v^2 e_v^2$, and of activations by the square of the
    step. The last row, '(all)', is the sum.

    First order means: small errors, independent of each other. Where much is clipped, or at
    few bits, `compare` and `sensitivity` measure what this foretells. Two programs are
    compiled. Raises ValueError where no gradient reaches a grid from the outputs, where one
    is not finite, and where no grid is on.

    >>> table = jm.noise(params, graph, quantizers, batches)
    >>> jm.plot.noise(table)
    """
    leaves_of(params, graph, CALLER)
    grid_of = places(graph, quantizers, CALLER)
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ValueError(
            f"jaxmet.{CALLER}: examples is {examples!r}. Give how many are differentiated."
        )
    read = as_batches(batches, CALLER, inputs=inputs)
    some = some_examples(read, examples)
    sums = _sums(params, graph, quantizers, some, kwargs, progress)
    found = {}
    for name, widths in _weights(params, quantizers, sums.gains).items():
        here, bits = float(sums.weights[name]), quantizers.weights[name].bits
        exact = [here if b == bits else n for b, n in zip(WIDTHS, widths, strict=True)]
        found["weight", name] = Noise(here, None, exact)
    for key, (rounded, clipped) in sums.taps.items():
        kind, owner = _owner(key, quantizers)
        group = quantizers.weights if kind == "weight" else quantizers.activations
        one = _scaled(float(rounded), float(clipped), group[owner])
        found[kind, owner] = _added(found.get((kind, owner)), one)
    _check(found, float(sums.energy))
    return _table(grid_of, found, float(sums.energy))


# What one program sums over examples


class _Sums(NamedTuple):
    """By tap what rounding and clipping add; by weight F, and what its rounding adds."""

    taps: dict[str, jax.Array]
    gains: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    energy: jax.Array


def _sums(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    examples: Any,
    kwargs: Mapping[str, Any],
    progress: bool,
) -> _Sums:
    leaves = named_leaves(params)
    taps = {
        _key(node, kind): Tap(node.name, (2,), _split, _error(quantizers, kind), at)
        for node in graph.nodes
        if "while" not in node.region
        for kind, at in _tapped(node, quantizers)
    }
    rounded = [n for n, q in quantizers.weights.items() if q.active and n in leaves]
    outs = {p: _outs(node, p) for node in graph.nodes for p in node.parameters}

    def apply(params: Any, *inputs: Any) -> Any:
        return graph.apply(params, *inputs, **kwargs)

    gradients = projected_gradients(apply, taps, rounded)
    run = evaluate(apply, lambda node, run, operands: (run(*operands), None))

    @jax.jit
    def total(params: Any, sums: _Sums, examples: Any) -> _Sums:
        changes = _changes(params, round_weights(params, quantizers), rounded)

        def one(sums: _Sums, example: Any) -> tuple[_Sums, None]:
            energy = energies(run(params, *example)[0])
            unit = [jnp.ones(()) for _ in energy]
            by_tap, by_weight = gradients(params, unit, *example)
            added = {
                n: _together(g.astype(changes[n].dtype) * changes[n], outs.get(n, ()))
                for n, g in by_weight.items()
            }
            gains = jax.tree.map(squared, by_weight)
            new = _Sums(by_tap, gains, added, sum(energy, jnp.zeros(())))
            return jax.tree.map(jnp.add, sums, new), None

        return lax.scan(one, sums, examples)[0]

    sums = _Sums(
        {key: jnp.zeros(tap.shape, jnp.float32) for key, tap in taps.items()},
        {n: jnp.zeros(leaves[n].shape, _wide(leaves[n])) for n in rounded},
        {n: jnp.zeros((), _wide(leaves[n])) for n in rounded},
        jnp.zeros(()),
    )
    number = jax.tree.leaves(examples)[0].shape[0]
    size = max(k for k in range(1, max(1, number // 8) + 1) if number % k == 0)
    with tqdm(total=number, desc=CALLER, disable=not progress) as bar:
        for i in range(0, number, size):
            part = jax.tree.map(lambda x, i=i: x[i : i + size], examples)
            sums = total(params, sums, part)
            bar.update(size)
    return sums


def _wide(leaf: Any) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _tapped(node: Node, quantizers: Quantizers) -> list[tuple[str, int | None]]:
    """Where grids lie at a node: on its result, and on a weight that the model derives."""
    found: list[tuple[str, int | None]] = []
    quantizer = quantizers.activation(node.name)
    if quantizer is not None and quantizer.active:
        found.append(("activation", None))
    weight = quantizers.weights.get(node.name)
    if node.weight is not None and node.weight.name is None and weight is not None:
        found += [("weight", node.weight.operand)] * weight.active
    return found


def _key(node: Node, kind: str) -> str:
    return f"{kind} {node.name}"


def _owner(key: str, quantizers: Quantizers) -> tuple[str, str]:
    kind, name = key.split(" ", 1)
    owner = quantizers.owner(name) if kind == "activation" else name
    assert owner is not None
    return kind, owner


def _outs(node: Node, parameter: str) -> tuple[int, ...]:
    """The axes of a parameter that tell outputs apart: each has an error of its own."""
    weight = node.weight
    if weight is None or weight.name != parameter:
        return ()
    return (0, *weight.out_axes) if weight.stacked else weight.out_axes


def _together(x: jax.Array, kept: Sequence[int]) -> jax.Array:
    """The sum of squares, of sums over all axes but the kept ones; of all values if none is."""
    rest = tuple(i for i in range(x.ndim) if i not in kept) if kept else ()
    return jnp.sum(jnp.square(jnp.sum(x, axis=rest)))


def _error(quantizers: Quantizers, kind: str) -> Callable:
    """The errors that a grid makes by rounding, and by clipping."""

    def error(node: Node, run: Run, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = quantizer_at(node, run, quantizers)
        quantizer = at if kind == "activation" else quantizers.weights[node.name]
        assert quantizer is not None
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        change = quantizer(x) - x
        scale = jnp.asarray(quantizer.grid(x)[0], x.dtype)
        if scale.ndim and scale.ndim != x.ndim:
            scale = scale.reshape((1,) * x.ndim)
        if quantizer.block is not None:  # a scale serves so many neighbours
            axis = quantizer.block_axis
            scale = jnp.repeat(scale, quantizer.block, axis=axis)
        inside, none = jnp.abs(change) <= 0.501 * scale, jnp.zeros_like(change)
        return jnp.where(inside, change, none), jnp.where(inside, none, change)

    return error


def _split(node: Node, gradient: jax.Array, errors: Any) -> jax.Array:
    """What reaches the outputs of the errors of rounding and of clipping."""
    same = all(e.shape == gradient.shape for e in errors)
    kept = (*node.batch, *node.features) if same and node.features else ()
    parts = [_together(gradient.astype(e.dtype) * e, kept) for e in errors]
    return jnp.stack(parts).astype(jnp.float32)


# Other widths


def _weights(
    params: Any, quantizers: Quantizers, gains: Mapping[str, jax.Array]
) -> dict[str, list[float]]:
    """What weights add at each of WIDTHS, really rounded."""
    names = list(gains)

    @jax.jit
    def total(params: Any, gains: Mapping[str, jax.Array]) -> jax.Array:
        def at(bits: jax.Array) -> jax.Array:
            ends = grids(quantizers, weight_bits=bits)
            rounded = round_weights(params, quantizers, grids=ends)
            changes = _changes(params, rounded, names)
            return jnp.stack([jnp.sum(gains[n] * changes[n] ** 2) for n in names])

        return lax.map(at, jnp.array(WIDTHS))

    if not names:
        return {}
    widths = np.asarray(total(params, gains))
    return {name: [*map(float, widths[:, i])] for i, name in enumerate(names)}


def _changes(params: Any, rounded: Any, names: Sequence[str]) -> dict[str, jax.Array]:
    """What rounding does to each of the named weights."""
    old, new = named_leaves(params), named_leaves(rounded)
    found = {}
    for name in names:
        dtype = _wide(old[name])
        one, two = (jnp.asarray(dense(a[name])).astype(dtype) for a in (new, old))
        found[name] = one - two
    return found


def _scaled(rounded: float, clipped: float, quantizer: Quantizer) -> Noise:
    """Rounding noise grows with the square of the step, clipping stays as it is."""
    low, high = quantizer.ends
    widths = []
    for bits in WIDTHS:
        other = (
            quantizer.set(bits=bits).ends if quantizer.product is None else (low, high)
        )
        steps = (high - low) / (other[1] - other[0])
        widths.append(rounded * steps**2 + clipped)
    return Noise(rounded, clipped, widths)


def _added(one: Noise | None, two: Noise) -> Noise:
    if one is None:
        return two
    both = [a + b for a, b in zip(one.widths, two.widths, strict=True)]
    clipped = (one.clipped or 0) + (two.clipped or 0)
    return Noise(one.rounded + two.rounded, clipped, both)


# The table


def _check(found: Mapping[tuple[str, str], Noise], energy: float) -> None:
    if not math.isfinite(energy) or energy == 0:
        raise ValueError(
            f"jaxmet.{CALLER}: the outputs of the float model are "
            f"{'zero' if energy == 0 else 'not finite'} on these examples. Check the model "
            "and the data."
        )
    for (_, name), noise in found.items():
        if not math.isfinite(noise.rounded):
            raise ValueError(
                f"jaxmet.{CALLER}: the gradient of the outputs with respect to {name!r} is "
                "NaN or infinite. Run the model in float32, or leave the node out with "
                "graph.without and its grid off."
            )
    weights = [noise for (kind, _), noise in found.items() if kind == "weight"]
    if not any(sum(noise.widths) > 0 for noise in weights or found.values()):
        raise ValueError(
            f"jaxmet.{CALLER}: no gradient reaches the {'weights' if weights else 'grids'} "
            "from the outputs (are they indices, or rounded?). Trace the model to its logits."
        )


def _table(
    grid_of: Sequence[Place], found: Mapping[tuple[str, str], Noise], energy: float
) -> Table:
    known = [p for p in grid_of if (p.kind, p.what) in found]
    whole = sum(_power(found[p.kind, p.what]) for p in known)
    rows = []
    for place in known:
        if place.selected:
            noise = found[place.kind, place.what]
            head = (place.what, place.site, place.kind, place.bits)
            rows.append((*head, *_numbers(noise, whole, energy)))
    every: Noise | None = None
    for place in known:
        every = _added(every, found[place.kind, place.what])
    assert every is not None
    rows.append((ALL, None, None, None, *_numbers(every, whole, energy)))
    names = ("what", "site", "kind", "bits", "SQNR (dB)", "share", "clipped")
    names += tuple(f"{bits} bits" for bits in WIDTHS)
    worst = sorted(rows[:-1], key=lambda row: -row[5])[:3]
    told = ", ".join(f"{row[0]} ({100 * row[5]:.0f} %)" for row in worst)
    return Table(
        dict(zip(names, zip(*rows, strict=True), strict=True)),
        title=f"{CALLER}: outputs {rows[-1][4]:.1f} dB foretold; most comes from {told}",
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
