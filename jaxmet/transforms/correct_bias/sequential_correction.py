"""The mean error of one layer after the other, each after corrected predecessors."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxmet.engine.run.shared_programs import Program, ProgramSequence, placed
from jaxmet.layers.leaf_math import replaced
from jaxmet.layers.lockstep import Copy, Positions, Where
from jaxmet.numerics.precision import wide
from jaxmet.transforms.correct_bias.bias_parameters import BiasParameter, why_unfit
from jaxmet.transforms.correct_bias.shared_biases import layers_of
from jaxmet.tree.batches import Batches
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.leaves import dense
from jaxmet.tree.named_leaves import named_leaves, replace_leaves


class Found(NamedTuple):
    """The statistics of a layer: the mean error of each channel, and its own variance."""

    shift: Any = None
    variance: Any = None
    why: str | None = None
    lost: str | None = None


def correct_in_lockstep(
    params: Any,
    places: dict[str, BiasParameter],
    reference: Copy,
    noisy: Copy,
    batches: Batches,
    positions: Positions,
    *,
    spread: bool,
    progress: bool,
) -> tuple[Any, dict[str, Found]]:
    """The tree with every bias corrected, and by layer what was found there.

    `places` are keyed by the node at which a layer's mean is kept. With `spread` the channels'
    variances are found too.

    A bias that several layers share is corrected first, for all of them.
    """
    for batch in batches:
        reference.read(batch)
        noisy.read(batch)
        positions.read(batch)
    noisy.order = order = reference.order
    dtypes = {n: dense(named_leaves(params)[p.into]).dtype for n, p in places.items()}
    walk = functools.partial(
        _walk, reference, noisy, positions, dtypes, progress=progress
    )
    shared: dict[str, Any] = {}
    if any(len(names) > 1 for names in layers_of([*places.values()]).values()):
        begun = list(reference.lives), list(noisy.lives)
        shared = _shared_shifts(params, places, reference, noisy, walk)
        reference.lives, noisy.lives = begun
        reference.shift = noisy.shift = None
    for into, shift in shared.items():
        if shift is not None:
            leaf = named_leaves(params)[into]
            new, *_ = _corrected(leaf, shift, tuple(leaf.shape), True)
            params = replace_leaves(params, {into: new})
            noisy.params = replace_leaves(noisy.params, {into: new})
    found: dict[str, Found] = {}
    for name, seen, kept in walk(order, spread=spread):
        place = places[name]
        leaf = named_leaves(params)[place.into]
        shift = shared.get(place.into, seen.error)
        why = why_unfit(place.into, leaf, kept)
        if shift is None and why is None:
            why = f"{place.into!r} has not one number per channel of each layer"
        own = why is None and place.into not in shared
        new, noisy.shift, reference.shift = _corrected(leaf, seen.error, kept, own)
        params = replace_leaves(params, {place.into: new})
        noisy.params = replace_leaves(noisy.params, {place.into: new})
        lost = positions.lost.get(name)
        found[place.layer.name] = Found(shift, seen.variance, why, lost)
    return params, found


def _shared_shifts(
    params: Any,
    places: dict[str, BiasParameter],
    reference: Copy,
    noisy: Copy,
    walk: Callable[..., "Walk"],
) -> dict[str, Any]:
    """By parameter that several layers share the mean error of all, None where one is unfit.

    The copies run to the last of these layers. On the way each layer's own error is taken
    from its result, as if no bias were shared, so that none is the error of another one.
    """
    order = [places[name] for name in reference.order]
    shared = {into for into, names in layers_of(order).items() if len(names) > 1}
    last = max(i for i, place in enumerate(order) if place.into in shared)
    apart: dict[str, list[ResultMeans]] = {into: [] for into in shared}
    unfit: set[str] = set()
    for name, seen, kept in walk(reference.order[: last + 1], spread=False):
        into = places[name].into
        leaf = named_leaves(params)[into]
        fit = why_unfit(into, leaf, kept) is None
        _, noisy.shift, reference.shift = _corrected(leaf, seen.error, kept, fit)
        if into in shared:
            apart[into].append(seen)
            unfit |= set() if fit else {into}
    return {
        k: None if k in unfit else functools.reduce(_merged, v).error
        for k, v in apart.items()
    }


def _walk(
    reference: Copy,
    noisy: Copy,
    positions: Positions,
    dtypes: dict[str, Any],
    names: Sequence[str],
    *,
    spread: bool,
    progress: bool,
) -> "Walk":
    """Node after node what all batches say, and the shape of one number per channel.

    Before the next one is asked for, the copies get what to subtract from this one's result.
    """
    pieces = _Pieces(reference, noisy, positions, dtypes, spread)
    with contextlib.closing(pieces) as run:
        for i, name in enumerate(
            tqdm(names, desc="correct_bias", disable=not progress)
        ):
            every = [run(k, i) for k in range(len(noisy.lives))]
            shape = noisy.lives[-1][1][name].shape
            kept = _kept(shape, noisy.graph[name].features)
            yield name, functools.reduce(_merged, every), kept


class _Pieces:
    """Runs both copies through a piece and compares them where it ends, in one program."""

    def __init__(
        self,
        reference: Copy,
        noisy: Copy,
        positions: Positions,
        dtypes: dict[str, Any],
        spread: bool,
    ) -> None:
        self.copies, self.positions = (reference, noisy), positions
        self.dtypes, self.spread = dtypes, spread
        self.sequences: dict[Any, ProgramSequence] = {}

    def __call__(self, batch: int, piece: int) -> "ResultMeans":
        given = tuple(
            (copy.params, copy.quantizers, copy.lives[batch][1], copy.shift)
            for copy in self.copies
        )
        keys = tuple(copy.lives[batch][0] for copy in self.copies)
        where = self.positions.batches[batch]
        if keys not in self.sequences:
            make = functools.partial(self.program, keys, given, where)
            number = len(self.copies[0].order)
            ahead = not placed(given, where)
            self.sequences[keys] = ProgramSequence(make, number, ahead=ahead)
        program = self.sequences[keys][piece]
        *lives, means = program(*given, self.where(piece, where))
        for copy, live in zip(self.copies, lives, strict=True):
            copy.put(batch, live)
        return means

    def where(self, piece: int, where: dict[str, Where]) -> Any:
        """Where the results count that end a piece."""
        own = where.get(self.copies[0].order[piece])
        return None if own is None else own.result

    def program(
        self,
        keys: tuple[Any, Any],
        given: tuple[Any, ...],
        where: dict[str, Where],
        piece: int,
        before: Program | None,
    ) -> Program:
        """The program of a piece, for arguments like these."""
        if before is not None:
            shift = self.shift(piece - 1, before.shapes[1])
            pairs = zip(given, before.shapes, strict=False)
            given = tuple((*own[:2], live, shift) for own, live in pairs)
        compare = functools.partial(self.compare, keys, piece)
        return Program(compare, *given, self.where(piece, where))

    def shift(self, piece: int, live: Any) -> jax.ShapeDtypeStruct:
        """What is taken from the results that end a piece."""
        name = self.copies[0].order[piece]
        features = self.copies[1].graph[name].features
        kept = _kept(live[name].shape, features)
        return jax.ShapeDtypeStruct(kept, wide(self.dtypes[name]))

    def compare(
        self, keys: tuple[Any, Any], piece: int, exact: Any, noisy: Any, where: Any
    ) -> tuple[Any, Any, "ResultMeans"]:
        both = zip(self.copies, keys, (exact, noisy), strict=True)
        one, two = (copy.step(key, piece)(*given) for copy, key, given in both)
        name = self.copies[0].order[piece]
        features = tuple(sorted(self.copies[1].graph[name].features))
        return one, two, _seen(one[name], two[name], where, features, self.spread)

    def close(self) -> None:
        """Compile nothing more."""
        for sequence in self.sequences.values():
            sequence.close()


def _all_concrete(tree: Any) -> bool:
    return all(map(is_concrete, jax.tree.leaves(tree)))


def _kept(shape: tuple[int, ...], features: Collection[int]) -> tuple[int, ...]:
    return tuple(n if axis in features else 1 for axis, n in enumerate(shape))


class ResultMeans(NamedTuple):
    """Of a layer's channels the mean error, and mean and square of the exact values."""

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


Walk = Iterator[tuple[str, ResultMeans, tuple[int, ...]]]


def _seen(
    exact: jax.Array,
    noisy: jax.Array,
    where: jax.Array | None,
    features: tuple[int, ...],
    spread: bool,
) -> ResultMeans:
    """The statistics of a batch."""
    dtype = wide(exact.dtype)
    exact, noisy = exact.astype(dtype), noisy.astype(dtype)
    rest = tuple(i for i in range(exact.ndim) if i not in features)
    values = [noisy - exact] + ([exact, jnp.square(exact)] if spread else [])
    if where is None:
        means = [_mean(v, rest).reshape(-1) for v in values]
        number = jnp.asarray(exact.size / max(1, means[0].size), dtype)
    else:
        sizes = [n if i in rest else 1 for i, n in enumerate(exact.shape)]
        where = jnp.any(where, axis=features, keepdims=True)
        number = jnp.sum(jnp.broadcast_to(where, sizes)).astype(dtype)
        means = [_mean_where(v, where, number, rest).reshape(-1) for v in values]
    return ResultMeans(number, *means)


def _merged(one: ResultMeans, two: ResultMeans) -> ResultMeans:
    """The statistics of the batches before, and of this one; in NumPy unless traced."""
    xp: Any = jnp
    if _all_concrete((one, two)):
        xp, (one, two) = np, (jax.tree.map(np.asarray, v) for v in (one, two))
    total = one.number + two.number
    share = two.number / xp.maximum(total, 1)
    return jax.tree.map(lambda a, b: a + (b - a) * share, one, two)._replace(
        number=total
    )


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean, of each example first: a sum over all at once rounds too often."""
    return jnp.mean(jnp.mean(x, axes[1:], keepdims=True), axes[:1], keepdims=True)


def _mean_where(
    x: jax.Array, where: jax.Array, number: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """The mean over what counts."""
    x = jnp.where(where, x, jnp.zeros((), x.dtype))
    total = jnp.sum(jnp.sum(x, axes[1:], keepdims=True), axes[:1], keepdims=True)
    return total / jnp.maximum(number, 1.0)


def _corrected(
    leaf: Any, error: Any, kept: tuple[int, ...], fit: bool
) -> tuple[Any, Any, Any]:
    """The new bias, and what it takes from the quantized and from the float result.

    What a narrow bias cannot hold stays in the network, where later layers see it.
    """
    bias = dense(leaf)
    if _all_concrete((bias, error)) and not placed(leaf):  # nothing to compile
        bias, error = np.asarray(bias), np.asarray(error)
    dtype = wide(bias.dtype)
    none = np.zeros(kept, dtype)
    if not fit:
        return leaf, none, none
    precise = wide(bias.dtype, error.dtype)
    new = bias.astype(precise) - error.astype(precise).reshape(bias.shape)
    new = new.astype(bias.dtype)
    taken = (bias.astype(dtype) - new.astype(dtype)).reshape(kept)
    return replaced(leaf, new), taken, none
