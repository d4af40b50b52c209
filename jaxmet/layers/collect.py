"""Statistics of nodes over many batches: one compiled step, merged as it goes."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm.auto import tqdm

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.programs import program, split_keywords
from jaxmet.engine.run.replay import Hook, evaluate
from jaxmet.layers.arguments import accepting
from jaxmet.tree.batched_data import Batched
from jaxmet.tree.batches import Batches, BatchInfo, inputs_of

Merge = Callable[[Any, Any], Any]
Observer = Callable[[Hook], Callable]


def collect(
    graph: Graph,
    params: Any,
    batches: Batches,
    hook: Hook,
    merge: Merge,
    *,
    caller: str,
    progress: bool = True,
    observer: Callable[[Apply], Observer] | None = None,
    summary: Callable[[Any], Any] | None = None,
    lost: dict[str, str] | None = None,
    key: Hashable | None = None,
    **kwargs: Any,
) -> Any:
    """Merge what a hook observes over all batches: `{node name: statistics}`.

    `merge(one, two)` is associative and takes the whole dict. Batched data runs through
    `lax.scan` in a few compiled chunks, other batches one compiled step each; a shorter last
    batch compiles once more. What is merged is `summary` of the hook's statistics of a batch,
    by default all of them, or `observer(model)(hook)(params, *batch)`. A hook sees the number of
    its batch and, with a mask, where values count; `lost` gets the nodes where that is not
    known, and why. Raises ValueError where a batch runs other nodes than those that the graph was
    traced with.

    `key` says all that hook, merge, summary and observer depend on, none of which may hold a
    model, or an array but a random key: with an equal one the programs are those of the call
    before. None: they are compiled anew.
    """
    arrays, static = split_keywords(kwargs)
    own = None if key is None else (key, static)
    one = partial(_summarized, summary) if observer is None else observer
    step = partial(_step, one, hook, merge, static)
    step = program(graph.apply, own and (*own, "step"), step)
    merged = program(graph.apply, own and (*own, "merge"), lambda _: merge)
    total = None
    with tqdm(total=batches.length, desc=caller, disable=not progress) as bar:
        for part, count in _chunks(batches):
            shapes = jax.tree.map(_without_axis, inputs_of(part)[0])
            traced = graph.called[0]
            with accepting(shapes, caller, graph.apply, params, kwargs, traced=traced):
                found = step(params, part, arrays)
            _check_nodes(graph, found.nodes, caller)
            if lost is not None:
                lost.update(found.lost)
            total = found.value if total is None else merged(total, found.value)
            bar.update(count)
    return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Observed:
    """What some batches showed, and what their trace did: that is static, for each program."""

    value: Any
    nodes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    lost: tuple[tuple[str, str], ...] = dataclasses.field(metadata={"static": True})


def _step(
    of_apply: Callable[[Apply], Observer],
    hook: Hook,
    merge: Merge,
    static: dict[str, Any],
    apply: Apply,
) -> Callable:
    """The statistics of batches along a leading axis, merged."""

    def chunk(params: Any, batch: Any, arrays: dict[str, Any]) -> _Observed:
        seen: dict[str, None] = {}
        lost: dict[str, str] = {}

        def watching(node, run, operands):
            seen[node.name] = None
            if run.lost is not None:
                lost[node.name] = run.lost
            return hook(node, run, operands)

        of_batch = of_apply(apply)(watching)

        def observe(*batch: Any) -> Any:
            return of_batch(params, *batch, **static, **arrays)

        size = jax.tree.leaves(batch)[0].shape[0]
        if size == 1:
            total = observe(*jax.tree.map(lambda x: x[0], batch))
        else:
            every = lax.map(lambda one: observe(*one), batch)
            total = jax.tree.map(lambda x: x[0], every)
            for i in range(1, size):
                total = merge(total, jax.tree.map(lambda x, i=i: x[i], every))
        return _Observed(total, tuple(seen), tuple(lost.items()))

    return chunk


def _summarized(summary: Callable[[Any], Any] | None, apply: Apply) -> Observer:
    """What is kept of the hook's statistics while the model runs on a batch."""

    def observer(hook: Hook) -> Callable:
        run = evaluate(apply, hook)

        def observe(params: Any, *batch: Any, **kwargs: Any) -> Any:
            statistics = run(params, *batch, **kwargs)[1]
            return statistics if summary is None else summary(statistics)

        return observe

    return observer


def _chunks(batches: Batches) -> Any:
    """Batches with a leading axis of how many they are, and the number of each."""
    first = 0
    for part, size in _unnumbered(batches):
        inputs, info = inputs_of(part)
        number = np.arange(first, first + size, dtype=np.int32)
        yield (*inputs, BatchInfo(info.mask, number)), size
        first += size


def _unnumbered(batches: Batches) -> Any:
    source = batches.source
    if isinstance(source, Batched) and source.full is not None:
        number = jax.tree.leaves(source.full)[0].shape[0]
        size = max(k for k in range(1, max(1, number // 8) + 1) if number % k == 0)
        for i in range(0, number, size):
            part = jax.tree.map(lambda x, i=i: x[i : i + size], source.full)
            if batches.masked:  # a mask is a function of one batch
                every = [
                    batches.arguments(jax.tree.map(lambda x, k=k: x[k], part))
                    for k in range(size)
                ]
                yield jax.tree.map(_joined, *every), size
            else:
                yield tuple(batches.arguments(part)), size
        rest = [] if source.rest is None else [batches.arguments(source.rest)]
    else:
        rest = batches
    for batch in rest:
        yield jax.tree.map(lambda x: x[None], tuple(batch)), 1


def _without_axis(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _joined(*arrays: Any) -> Any:
    on_host = all(isinstance(x, np.ndarray) for x in arrays)
    return np.stack(arrays) if on_host else jnp.stack(arrays)


def _check_nodes(graph: Graph, seen: Iterable[str], caller: str) -> None:
    known = {n.name for n in graph.nodes}
    other = sorted(known ^ set(seen))
    if other:
        raise ValueError(
            f"jaxmet.{caller}: the batches run another program than the traced one: "
            f"{other[0]!r} is in only one of them. Trace again with inputs like the "
            "batches (another batch or image size is fine)."
        )
