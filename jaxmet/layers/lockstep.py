"""A float and a quantized copy of a model, run side by side from piece to piece."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Hook, Run, evaluate
from jaxmet.engine.run.segments import Segment, Segments, segments
from jaxmet.layers.arguments import accepting
from jaxmet.layers.fake_quantized import (
    fake_quantize_derived,
    fake_quantize_output,
    fake_quantize_params,
)
from jaxmet.numerics.precision import wide
from jaxmet.tree.batches import inputs_of
from jaxmet.tree.quantizers import Quantizers

Live = dict[str, Any]
Finish = Callable[[Node, Any], Any]


@dataclasses.dataclass
class Copy:
    """One copy of a model, cut at the same nodes as the other, and where it stands.

    `lives` are the live values of each batch, `shift` is what is still to be taken from the
    result of the last cut node, `finish` what is done to it after that.
    """

    caller: str
    graph: Graph
    params: Any
    cuts: tuple[str, ...]
    kwargs: dict[str, Any]
    host: bool = False
    hook: Hook | None = None
    finish: Finish | None = None
    steps: dict[Any, list[Any]] = dataclasses.field(default_factory=dict)
    pieces: dict[Any, list[Segment]] = dataclasses.field(default_factory=dict)
    order: list[str] = dataclasses.field(default_factory=list)
    lives: list[tuple[Any, Live]] = dataclasses.field(default_factory=list)
    shift: Any = None

    def read(self, batch: tuple[Any, ...]) -> None:
        """Begin with one batch; the first one of its shape makes the pieces for it."""
        batch, _ = inputs_of(batch)
        leaves, structure = jax.tree.flatten(batch)
        key = (structure, *((x.shape, str(x.dtype)) for x in leaves))
        if key not in self.steps:
            pieces = self._cut(batch)
            self.order = [p.name for p in pieces if p.name is not None]
            self.pieces[key] = list(pieces)
            self.steps[key] = [pieces.begin, *self._steps(list(pieces))]
        self.lives.append((key, self.steps[key][0](*batch, **self.kwargs)))

    def _cut(self, batch: tuple[Any, ...]) -> Segments:
        options = {"cuts": self.cuts, "hook": self.hook, **self.kwargs}
        graph, params = self.graph, self.params
        refused = accepting(
            batch,
            self.caller,
            graph.apply,
            params,
            self.kwargs,
            traced=graph.called[0],
        )
        with refused:
            return segments(graph, params, *batch, **options)

    def _steps(self, pieces: Sequence[Segment]) -> list[Any]:
        before = [None, *(self.graph[name] for name in self.order)]
        both = zip(pieces, before, strict=True)
        return [jax.jit(self._step(p.__call__, n)) for p, n in both]

    def advance(self, batch: int, piece: int) -> Any:
        """Run one batch through its next piece: the result of the node that ends it."""
        key, live = self.lives[batch]
        live = self.steps[key][1 + piece](self.params, live, self.shift)
        self.lives[batch] = key, jax.device_get(live) if self.host else live
        return live[self.order[piece]] if piece < len(self.order) else None

    def observer(self, batch: int, piece: int, watch: Callable[[Hook], Hook]) -> Any:
        """`f(params, live, shift)`: what a hook around this copy's own sees in a piece."""
        own = self.pieces[self.lives[batch][0]][piece]
        watched = dataclasses.replace(own, hook=watch(own.hook))
        before = self.graph[self.order[piece - 1]] if piece else None
        step = self._step(watched.run, before)
        return lambda *args: step(*args)[1]

    def _step(self, run: Callable, before: Node | None) -> Callable:
        """A piece that first takes the shift from the result of the node before it."""
        finish = self.finish

        def step(params: Any, live: Live, shift: Any) -> Any:
            if before is not None and before.name in live:
                result = live[before.name]
                if shift is not None:
                    dtype = wide(result.dtype, shift.dtype)
                    moved = result.astype(dtype) - shift.astype(dtype)
                    result = moved.astype(result.dtype)
                result = finish(before, result) if finish else result
                live = {**live, before.name: result}
            return run(params, live)

        return step


def quantized_copy(
    graph: Graph,
    params: Any,
    quantizers: Quantizers,
    reference: Copy,
    *,
    both: bool,
) -> Copy:
    """The copy with rounded weights, and with `both` with activations quantized.

    Where only parameters are rounded it runs the compiled pieces of the reference.
    """
    weights = {n: q for n, q in quantizers.weights.items() if q.product is None}
    rounded = dataclasses.replace(quantizers, weights=weights)
    cuts = set(reference.cuts)

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
        result = run(*fake_quantize_derived(node, operands, rounded))
        # What ends a piece is corrected before it is quantized.
        keep = not both or node.name in cuts
        return (
            result if keep else fake_quantize_output(node, run, result, rounded)
        ), None

    def finish(node: Node, result: Any) -> Any:
        return fake_quantize_output(node, Run(lambda: result), result, rounded)

    copy = dataclasses.replace(
        reference,
        graph=graph,
        params=jax.jit(fake_quantize_params)(params, rounded),
        lives=[],
    )
    if both or rounded.derived or reference.graph is not graph:
        finisher = finish if both else None
        return dataclasses.replace(
            copy, steps={}, pieces={}, hook=hook, finish=finisher
        )
    return copy


class Where(NamedTuple):
    """Where the values of a node's result and of its first operand count, None: everywhere."""

    result: Any
    operand: Any


class Positions:
    """Where the values of some nodes count, batch by batch; nothing where there is no mask.

    `lost` names the nodes of which it is not known, and why. Only the masks are computed: the
    values that the model would have are not needed.
    """

    def __init__(
        self, graph: Graph, params: Any, names: Collection[str], kwargs: dict[str, Any]
    ) -> None:
        self.params, self.names = params, set(names)
        self.lost: dict[str, str] = {}
        run = evaluate(graph.apply, self.hook)
        self.run = jax.jit(lambda params, *batch: run(params, *batch, **kwargs)[1])
        self.batches: list[dict[str, Where]] = []

    def hook(self, node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result = run(*operands)
        if node.name not in self.names:
            return result, None
        if run.lost is not None:
            self.lost[node.name] = run.lost
        return result, Where(run.counts, run.reads[0] if run.reads else None)

    def read(self, batch: tuple[Any, ...]) -> None:
        """Look at one more batch."""
        _, info = inputs_of(batch)
        none = info.mask is None
        self.batches.append({} if none else self.run(self.params, *batch))
