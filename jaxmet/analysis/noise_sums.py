"""What quantizers add to the outputs, summed over examples by one program of gradients."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm.auto import tqdm

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program import compat
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.programs import program, split_keywords
from jaxmet.engine.run.replay import Run, counted_only, evaluate
from jaxmet.layers.fake_quantized import (
    entered_operands,
    quantizer_at,
    quantizer_entering,
)
from jaxmet.layers.gradients import Tap, energies, projected_gradients, squared
from jaxmet.layers.leaf_math import shifted
from jaxmet.numerics.precision import wide
from jaxmet.transforms.simulate import round_weights
from jaxmet.tree.grids import grids
from jaxmet.tree.leaves import dense, with_weight
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizers

CALLER = "noise"
WIDTHS = tuple(range(2, 17))


class NoiseSums(NamedTuple):
    """Over examples: what each quantizer adds by rounding and by clipping, what all of them add.

    `gains` are squared gradients of weights, and `energy` is that of the outputs.
    """

    grids: dict[str, Any]
    gains: dict[str, Any]
    whole: Any
    energy: Any


class Spot(NamedTuple):
    """Where a quantizer lies: on the result of a node, or on one of its operands.

    `owner` is the kind and the name of the quantizer, `derived` says that it is of a weight that
    the model computes.
    """

    node: str
    operand: int | None
    owner: str
    derived: bool


def noise_sums(
    params: Any,
    graph: Graph,
    quantizers: Quantizers,
    examples: Any,
    key: jax.Array,
    kwargs: Mapping[str, Any],
    progress: bool,
) -> NoiseSums:
    leaves = named_leaves(params)
    spots = tuple(
        spot
        for node in graph.nodes
        if "while" not in node.region
        for spot in _spots(node, quantizers)
    )
    rounded = tuple(
        n for n, q in quantizers.weights.items() if q.active and n in leaves
    )
    changes, middle = _moved(params, quantizers, rounded)
    halfway = replace_leaves(params, middle, caller=CALLER)
    keys = dict.fromkeys([f"weight {n}" for n in rounded] + [s.owner for s in spots])
    sums = NoiseSums(
        {name: np.zeros(2, np.float32) for name in keys},
        {n: np.zeros(c.shape, c.dtype) for n, c in changes.items()},
        np.zeros((), np.float32),
        np.zeros((), np.float32),
    )
    number = jax.tree.leaves(examples)[0].shape[0]
    size = max(k for k in range(1, max(1, number // 8) + 1) if number % k == 0)
    arrays, static = split_keywords(kwargs)
    total = program(
        graph.apply,
        (CALLER, spots, rounded, number, static),
        partial(_total, spots, rounded, number, static),
        compiler_options=compat.QUICK,
    )
    with tqdm(total=number, desc=CALLER, disable=not progress) as bar:
        for i in range(0, number, size):
            part = jax.tree.map(lambda x, i=i: x[i : i + size], examples)
            trees = params, halfway, changes, quantizers
            sums = total(trees, sums, part, key, np.int32(i), arrays)
            bar.update(size)
    return jax.device_get(sums)


def _total(
    spots: Sequence[Spot],
    rounded: Sequence[str],
    number: int,
    static: Mapping[str, Any],
    apply: Apply,
) -> Callable:
    """The sums over some examples, added to those before."""

    def total(
        trees: Any, sums: NoiseSums, examples: Any, key: Any, start: Any, arrays: Any
    ) -> NoiseSums:
        params, halfway, changes, quantizers = trees

        def model(params: Any, *inputs: Any) -> Any:
            return apply(params, *inputs, **static, **arrays)

        taps = {
            str(number): Tap(
                s.node, (2,), _split, _error(quantizers, s), s.operand, _halfway
            )
            for number, s in enumerate(spots)
        }
        gradients = projected_gradients(model, taps, rounded)
        run = evaluate(model, _counted)

        def one(sums: NoiseSums, drawn: tuple[Any, Any]) -> tuple[NoiseSums, None]:
            example, own = drawn
            energy = energies(run(params, *example)[0])
            unit = [jnp.ones(()) for _ in energy]
            by_tap, by_weight = gradients(halfway, unit, own, *example)
            errors = {name: jnp.zeros(2) for name in sums.grids}
            for number, spot in enumerate(spots):
                errors[spot.owner] += by_tap[str(number)]
            for n, g in by_weight.items():
                sum_ = jnp.sum(g.astype(changes[n].dtype) * changes[n])
                errors[f"weight {n}"] += jnp.stack([sum_, 0.0]).astype(jnp.float32)
            new = NoiseSums(
                jax.tree.map(jnp.square, errors),
                jax.tree.map(squared, by_weight),
                jnp.square(sum((jnp.sum(e) for e in errors.values()), jnp.zeros(()))),
                sum(energy, jnp.zeros(())),
            )
            return jax.tree.map(jnp.add, sums, new), None

        size = jax.tree.leaves(examples)[0].shape[0]
        # Drawn here, all of them: outside it would be programs of its own.
        signs = lax.dynamic_slice_in_dim(jax.random.split(key, number), start, size)
        return lax.scan(one, sums, (examples, signs))[0]

    return total


def _counted(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
    return counted_only(node, run, run(*operands)), None


def _halfway(x: jax.Array, errors: Any) -> jax.Array:
    return x + (sum(errors, jnp.zeros_like(errors[0])) / 2).astype(x.dtype)


def _spots(node: Node, quantizers: Quantizers) -> list[Spot]:
    """Where quantizers lie at a node: on its result, on what it reads, on a derived weight."""
    found: list[Spot] = []
    quantizer, owner = quantizers.activation(node.name), quantizers.owner(node.name)
    before = [quantizers.owner(edge.node or "") for edge in node.inputs]
    lies_there = bool(before) and all(name == owner for name in before)
    if quantizer is not None and quantizer.active and not lies_there:
        if not quantizer.products_only:
            found.append(Spot(node.name, None, f"activation {owner}", derived=False))
    for operand, name in entered_operands(node, quantizers).items():
        at = quantizers.activation(name)
        if at is not None and at.active:
            label = f"activation {quantizers.owner(name)}"
            found.append(Spot(node.name, operand, label, derived=False))
    weight = quantizers.weights.get(node.name)
    if node.weight is not None and node.weight.name is None and weight is not None:
        operand, label = node.weight.operand, f"weight {node.name}"
        found += [Spot(node.name, operand, label, derived=True)] * weight.active
    return found


def _error(quantizers: Quantizers, spot: Spot) -> Callable:
    """The errors that a quantizer makes by rounding, and by clipping."""

    def error(node: Node, run: Run, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if spot.derived:
            quantizer = quantizers.weights[node.name]
        elif spot.operand is not None:
            quantizer = quantizer_entering(node, run, spot.operand, x.ndim, quantizers)
        else:
            quantizer = quantizer_at(node, run, quantizers, x.ndim)
        assert quantizer is not None
        x = x.astype(wide(x.dtype))
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
    """What the errors of rounding and of clipping do to the projected outputs."""
    del node
    parts = [jnp.sum(gradient.astype(e.dtype) * e) for e in errors]
    return jnp.stack(parts).astype(jnp.float32)


def noise_of_weights(
    params: Any, quantizers: Quantizers, gains: Mapping[str, jax.Array]
) -> dict[str, list[float]]:
    """What weights add at each of WIDTHS, really rounded."""
    names = tuple(gains)
    if not names:
        return {}
    leaves = named_leaves(params)
    if _are_on_host(leaves, quantizers, names):
        widths = np.zeros((len(WIDTHS), len(names)))
        for i, name in enumerate(names):
            gain, old = np.asarray(gains[name]), np.asarray(dense(leaves[name]))
            for row, bits in zip(widths, WIDTHS, strict=True):
                change = quantizers.on_host(name, leaves, bits) - old
                row[i] = np.sum(gain * change**2)
    else:
        widths = np.asarray(_widths(params, quantizers, gains, names))
    return {name: [*map(float, widths[:, i])] for i, name in enumerate(names)}


def _are_on_host(
    leaves: Mapping[str, Any], quantizers: Quantizers, names: Sequence[str]
) -> bool:
    """Whether NumPy can round these weights, for which nothing is compiled."""
    return all(quantizers.on_host(name, leaves) is not None for name in names)


@partial(jax.jit, static_argnames="names")
def _widths(
    params: Any,
    quantizers: Quantizers,
    gains: Mapping[str, jax.Array],
    names: Sequence[str],
) -> jax.Array:
    """What weights add at each of WIDTHS, where only JAX can round them."""

    def at(bits: jax.Array) -> jax.Array:
        ends = grids(quantizers, weight_bits=bits)
        rounded = round_weights(params, quantizers, grids=ends)
        changes = _changes(params, rounded, names)
        return jnp.stack([jnp.sum(gains[n] * changes[n] ** 2) for n in names])

    return lax.map(at, jnp.array(WIDTHS))


def _changes(params: Any, rounded: Any, names: Sequence[str]) -> dict[str, jax.Array]:
    """What rounding does to each of the named weights."""
    old, new = named_leaves(params), named_leaves(rounded)
    found = {}
    for name in names:
        dtype = wide(old[name].dtype)
        one, two = (jnp.asarray(dense(a[name])).astype(dtype) for a in (new, old))
        found[name] = one - two
    return found


def _moved(
    params: Any, quantizers: Quantizers, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What rounding does to each of the named weights, and the weights half rounded."""
    leaves = named_leaves(params)
    if not _are_on_host(leaves, quantizers, names):
        return _moved_by_jax(params, quantizers, names)
    changes, middle = {}, {}
    for name in names:
        new, old = (
            quantizers.on_host(name, leaves),
            np.asarray(dense(leaves[name])),
        )
        changes[name] = new - old
        middle[name] = with_weight(leaves[name], old + changes[name] / 2)
    return changes, middle


@partial(jax.jit, static_argnames="names")
def _moved_by_jax(params: Any, quantizers: Quantizers, names: Sequence[str]) -> Any:
    leaves = named_leaves(params)
    changes = _changes(params, round_weights(params, quantizers), names)
    return changes, {n: shifted(leaves[n], c / 2) for n, c in changes.items()}
