"""A float and a quantized copy of a model, run side by side from site to site."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxmet.engine.collect import refused
from jaxmet.engine.graph import Graph
from jaxmet.engine.node import Node
from jaxmet.engine.replay import Hook, Run
from jaxmet.engine.segments import Segment, Segments, segments
from jaxmet.transforms.correct_bias.places import Place, fits
from jaxmet.transforms.layouts import dense, wide
from jaxmet.transforms.simulate import put_on_grid, round_derived, round_weights
from jaxmet.tree.batches import Batches
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.names import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizers

Live = dict[str, Any]
Finish = Callable[[Node, Any], Any]


class Found(NamedTuple):
    """What was seen at a site: the mean error of each channel, and its own variance."""

    shift: Any = None
    variance: Any = None
    why: str | None = None


@dataclasses.dataclass
class Copy:
    """One copy of a model, cut at the same nodes as the other, and where it stands.

    `lives` are the live values of each batch, `shift` is what is still to be taken from the
    result of the last cut node, `finish` what is done to it behind that.
    """

    graph: Graph
    params: Any
    cuts: tuple[str, ...]
    kwargs: dict[str, Any]
    host: bool = False
    hook: Hook | None = None
    finish: Finish | None = None
    steps: dict[Any, list[Any]] = dataclasses.field(default_factory=dict)
    order: list[str] = dataclasses.field(default_factory=list)
    lives: list[tuple[Any, Live]] = dataclasses.field(default_factory=list)
    shift: Any = None

    def read(self, batch: tuple[Any, ...]) -> None:
        """Begin with one batch; the first one of its shape makes the pieces for it."""
        leaves, structure = jax.tree.flatten(batch)
        key = (structure, *((x.shape, str(x.dtype)) for x in leaves))
        if key not in self.steps:
            pieces = self._cut(batch)
            self.order = [p.name for p in pieces if p.name is not None]
            self.steps[key] = [pieces.begin, *self._steps(list(pieces))]
        self.lives.append((key, self.steps[key][0](*batch, **self.kwargs)))

    def _cut(self, batch: tuple[Any, ...]) -> Segments:
        options = {"cuts": self.cuts, "hook": self.hook, **self.kwargs}
        try:
            return segments(self.graph, self.params, *batch, **options)
        except (TypeError, ValueError, AttributeError) as error:
            if str(error).startswith("jaxmet."):
                raise
            raise ValueError(refused("correct_bias", batch, error)) from error

    def _steps(self, pieces: Sequence[Segment]) -> list[Any]:
        before = [None, *(self.graph[name] for name in self.order)]
        both = zip(pieces, before, strict=True)
        return [jax.jit(_step(p, n, self.finish)) for p, n in both]

    def advance(self, batch: int, piece: int) -> Any:
        """Run one batch through its next piece: the result of the node that ends it."""
        key, live = self.lives[batch]
        live = self.steps[key][1 + piece](self.params, live, self.shift)
        result = live[self.order[piece]]
        self.lives[batch] = key, jax.device_get(live) if self.host else live
        return result


def _step(piece: Segment, before: Node | None, finish: Finish | None) -> Callable:
    """A piece that first takes the shift from the result of the node before it."""

    def step(params: Any, live: Live, shift: Any) -> Live:
        if before is not None and before.name in live:
            result = live[before.name]
            dtype = wide(result.dtype, shift.dtype)
            moved = (result.astype(dtype) - shift.astype(dtype)).astype(result.dtype)
            live = {**live, before.name: finish(before, moved) if finish else moved}
        return piece(params, live)

    return step


def quantized_copy(
    graph: Graph,
    params: Any,
    quantizers: Quantizers,
    reference: Copy,
    *,
    both: bool,
) -> Copy:
    """The copy with rounded weights, and with `both` with activations on their grids.

    Where only parameters are rounded it runs the compiled pieces of the reference.
    """
    weights = {n: q for n, q in quantizers.weights.items() if q.product is None}
    rounded = dataclasses.replace(quantizers, weights=weights)
    cuts = set(reference.cuts)

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
        result = run(*round_derived(node, operands, rounded))
        # What ends a piece is corrected before it is put on its grid.
        keep = not both or node.name in cuts
        return (result if keep else put_on_grid(node, run, result, rounded)), None

    def finish(node: Node, result: Any) -> Any:
        return put_on_grid(node, Run(lambda: result), result, rounded)

    copy = dataclasses.replace(
        reference,
        graph=graph,
        params=jax.jit(round_weights)(params, rounded),
        lives=[],
    )
    if both or rounded.derived or reference.graph is not graph:
        finisher = finish if both else None
        return dataclasses.replace(copy, steps={}, hook=hook, finish=finisher)
    return copy


def correct_in_lockstep(
    params: Any,
    places: dict[str, Place],
    reference: Copy,
    noisy: Copy,
    batches: Batches,
    *,
    spread: bool,
    progress: bool,
) -> tuple[Any, dict[str, Found]]:
    """The tree with every bias corrected, and by site what was found there.

    `places` are keyed by the node at which a site's mean is kept. With `spread` the channels'
    variances are found too.
    """
    for batch in batches:
        reference.read(batch)
        noisy.read(batch)
    noisy.order = reference.order
    compare = jax.jit(_seen, static_argnums=(3, 4))
    correct = jax.jit(_corrected, static_argnums=(2, 3))
    found: dict[str, Found] = {}
    for i, name in enumerate(
        tqdm(reference.order, desc="correct_bias", disable=not progress)
    ):
        features, seen, shape = tuple(sorted(noisy.graph[name].features)), None, ()
        for k in range(len(noisy.lives)):
            results = reference.advance(k, i), noisy.advance(k, i)
            seen = compare(*results, seen, features, spread)
            shape = results[1].shape
        assert seen is not None
        kept = tuple(n if axis in features else 1 for axis, n in enumerate(shape))
        place = places[name]
        leaf, why = named_leaves(params)[place.into], None
        if not fits(leaf.shape, kept):
            why = f"{place.into!r} has not one number a channel"
        new, noisy.shift, reference.shift = correct(leaf, seen.error, kept, why is None)
        params = replace_leaves(params, {place.into: new})
        noisy.params = replace_leaves(noisy.params, {place.into: new})
        found[place.site.name] = Found(seen.error, seen.variance, why)
    return params, found


class Seen(NamedTuple):
    """Of a site's channels the mean error, and mean and square of the exact values."""

    number: jax.Array
    error: jax.Array
    mean: jax.Array | None = None
    square: jax.Array | None = None

    @property
    def variance(self) -> np.ndarray | None:
        """That of the exact values, if they were looked at."""
        if self.mean is None or not is_concrete(self.mean):
            return None
        mean, square = (np.asarray(v, np.float64) for v in (self.mean, self.square))
        return np.maximum(square - mean * mean, 0.0)


def _seen(
    exact: jax.Array,
    noisy: jax.Array,
    before: Seen | None,
    features: tuple[int, ...],
    spread: bool,
) -> Seen:
    """What was seen of the batches before, and of this one."""
    dtype = wide(exact.dtype)
    exact, noisy = exact.astype(dtype), noisy.astype(dtype)
    rest = tuple(i for i in range(exact.ndim) if i not in features)
    values = [noisy - exact] + ([exact, jnp.square(exact)] if spread else [])
    means = [_mean(v, rest).reshape(-1) for v in values]
    number = jnp.asarray(exact.size / max(1, means[0].size), dtype)
    if before is None:
        return Seen(number, *means)
    total = before.number + number
    old = [v for v in before[1:] if v is not None]
    share = number / total
    pairs = zip(old, means, strict=True)
    return Seen(total, *(one + (two - one) * share for one, two in pairs))


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean, of each example first: a sum over all at once rounds too often."""
    return jnp.mean(jnp.mean(x, axes[1:], keepdims=True), axes[:1], keepdims=True)


def _corrected(
    leaf: Any, error: jax.Array, kept: tuple[int, ...], fit: bool
) -> tuple[Any, jax.Array, jax.Array]:
    """The new bias, and what it takes from the quantized and from the float result.

    What a narrow bias cannot hold stays in the network, where later sites see it.
    """
    bias = jnp.asarray(dense(leaf))
    dtype = wide(bias.dtype)
    none = jnp.zeros(kept, dtype)
    if not fit:
        return leaf, none, none
    new = bias.astype(dtype) - error.astype(dtype).reshape(bias.shape)
    new = new.astype(bias.dtype)
    taken = (bias.astype(dtype) - new.astype(dtype)).reshape(kept)
    return (leaf.replace(weight=new) if is_compressed(leaf) else new), taken, none
