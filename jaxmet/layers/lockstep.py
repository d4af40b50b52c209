"""A float and a quantized copy of a model, run side by side from piece to piece."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Hook, Run, evaluate
from jaxmet.engine.run.segments import Segments, cut
from jaxmet.engine.run.shared_programs import placed
from jaxmet.layers.arguments import accepting
from jaxmet.layers.fake_quantized import (
    fake_quantize_operands,
    fake_quantize_output,
    fake_quantize_params,
)
from jaxmet.numerics.precision import wide
from jaxmet.tree.batches import inputs_of
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.host_rounding import round_in_numpy
from jaxmet.tree.leaves import dense, with_weight
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizers

Live = dict[str, Any]
Step = Callable[..., Any]


@dataclasses.dataclass
class Copy:
    """One copy of a model, cut at the same nodes as the other, and where it stands.

    `lives` are the live values of each batch, `shift` is what is still to be taken from the
    result of the last cut node. The loop around each node of `loops` is a piece of its own.
    `quantizers` are those of the values that the copy computes,
    None where it computes them as the model does; with `both` those of activations.
    """

    caller: str
    graph: Graph
    params: Any
    cuts: tuple[str, ...]
    kwargs: dict[str, Any]
    host: bool = False
    quantizers: Quantizers | None = None
    both: bool = False
    pieces: dict[Any, Segments] = dataclasses.field(default_factory=dict)
    order: list[str] = dataclasses.field(default_factory=list)
    lives: list[tuple[Any, Live]] = dataclasses.field(default_factory=list)
    shift: Any = None
    steps: dict[Any, Step] = dataclasses.field(default_factory=dict)
    loops: tuple[str, ...] = ()

    def read(self, batch: tuple[Any, ...]) -> None:
        """Begin with one batch; the first one of its shape makes the pieces for it."""
        batch, _ = inputs_of(batch)
        leaves, structure = jax.tree.flatten(batch)
        key = (structure, *((x.shape, str(x.dtype)) for x in leaves))
        if key not in self.pieces:
            self.pieces[key] = self._cut(batch)
        pieces = self.pieces[key]
        self.order = [p.name for p in pieces if p.name is not None]
        live = pieces.begin(*batch, **self.kwargs)
        self.lives.append((key, self._waiting(live)))

    def _cut(self, batch: tuple[Any, ...]) -> Segments:
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
            return cut(graph, params, batch, self.kwargs, self.cuts, self.loops)

    def put(self, batch: int, live: Live) -> None:
        """Keep where a batch stands after its next piece."""
        key, _ = self.lives[batch]
        self.lives[batch] = key, self._waiting(live)

    def _waiting(self, live: Live) -> Live:
        """The live values where they wait; traced ones are nowhere."""
        on_host = self.host and all(map(is_concrete, live.values()))
        return jax.device_get(live) if on_host else live

    def step(self, key: Any, piece: int) -> Step:
        """`f(params, quantizers, live, shift)`: the live values after a piece.

        `key` is that of the batch. Copies with the same pieces trace it once.
        """
        if (key, piece) not in self.steps:

            def run(params: Any, quantizers: Any, live: Live, shift: Any) -> Live:
                hook = self._hook(quantizers)
                own = self.pieces[key][piece]
                own = own if hook is None else dataclasses.replace(own, hook=hook)
                return own(params, self._begun(key, piece, quantizers, live, shift))

            # Inlined: what it does not need of the parameters is seen from outside.
            self.steps[key, piece] = jax.jit(run, inline=True)
        return self.steps[key, piece]

    def observer(self, key: Any, piece: int, watch: Callable[[Hook], Hook]) -> Step:
        """The same, but what a hook around this copy's own sees in a piece."""

        def run(params: Any, quantizers: Any, live: Live, shift: Any) -> Any:
            own = self.pieces[key][piece]
            watched = watch(self._hook(quantizers) or own.hook)
            own = dataclasses.replace(own, hook=watched)
            return own.run(params, self._begun(key, piece, quantizers, live, shift))[1]

        return run

    def enter(self, key: Any, piece: int) -> Step:
        """`f(params, quantizers, live)`: the live values before the first turn of a loop."""

        def run(params: Any, quantizers: Any, live: Live) -> Live:
            del quantizers
            return self.pieces[key][piece].enter(params, live)

        return run

    def turn(
        self, key: Any, piece: int, watch: Callable[[Hook], Hook] | None = None
    ) -> Step:
        """`f(params, quantizers, live, number)`: the live values after a turn of a loop.

        With `watch` what a hook around this copy's own sees in it instead.
        """

        def run(params: Any, quantizers: Any, live: Live, number: Any) -> Any:
            own = self.pieces[key][piece]
            hook = self._hook(quantizers) or own.hook
            own = dataclasses.replace(own, hook=watch(hook) if watch else hook)
            after, statistics = own.turn(params, live, number)
            return statistics if watch else after

        return run

    def _begun(
        self, key: Any, piece: int, quantizers: Any, live: Live, shift: Any
    ) -> Live:
        """Live values with the shift taken from the result of the node before a piece."""
        name = self.pieces[key][piece - 1].name if piece else None
        if name is None or name not in live:
            return live
        before = self.graph[name]
        result = live[before.name]
        if shift is not None:
            dtype = wide(result.dtype, shift.dtype)
            result = (result.astype(dtype) - shift.astype(dtype)).astype(result.dtype)
        if self.both:
            run = Run(lambda: result)
            result = fake_quantize_output(before, run, result, quantizers)
        return {**live, before.name: result}

    def _hook(self, quantizers: Quantizers | None) -> Hook | None:
        if quantizers is None:
            return None
        cuts = set(self.cuts)

        def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
            result = run(*fake_quantize_operands(node, run, operands, quantizers))
            # What ends a piece is corrected before it is quantized.
            keep = not self.both or node.name in cuts
            return (
                result if keep else fake_quantize_output(node, run, result, quantizers)
            ), None

        return hook


def quantized_copy(
    graph: Graph,
    params: Any,
    quantizers: Quantizers,
    reference: Copy,
    *,
    both: bool,
) -> Copy:
    """The copy with rounded weights, and with `both` with activations quantized.

    Where only parameters are rounded it has the pieces of the reference.
    """
    weights = {n: q for n, q in quantizers.weights.items() if q.product is None}
    rounded = dataclasses.replace(quantizers, weights=weights)
    copy = dataclasses.replace(
        reference, graph=graph, params=_rounded(params, rounded), lives=[]
    )
    if both or rounded.derived or reference.graph is not graph:
        return dataclasses.replace(
            copy, pieces={}, steps={}, quantizers=rounded, both=both
        )
    return copy


def _rounded(params: Any, quantizers: Quantizers) -> Any:
    """The tree with every quantized parameter on its grid."""
    leaves = named_leaves(params)
    held = {n: q for n, q in quantizers.weights.items() if n in leaves}
    known = np.ndarray, jax.Array
    arrays = [dense(leaves[n]) for n in held]
    simple = all(is_concrete(a) and isinstance(a, known) for a in arrays)
    if placed(params) or not simple:
        return jax.jit(fake_quantize_params)(params, quantizers)
    new = {}
    for name, quantizer in held.items():
        array = round_in_numpy(quantizer, np.asarray(dense(leaves[name])))
        # jnp.asarray would compile a program for each shape
        new[name] = with_weight(leaves[name], jax.device_put(array))
    return replace_leaves(params, new)


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
