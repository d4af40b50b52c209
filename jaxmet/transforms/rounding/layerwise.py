"""Wave after wave: each layer is chosen for inputs that come from chosen layers."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.checkpoint import Checkpoint
from jaxmet.layers.inputs import most_rows
from jaxmet.layers.layer import WeightMatrix
from jaxmet.layers.lockstep import Copy, Positions, quantized_copy
from jaxmet.transforms.rounding.input_statistics import (
    InputRows,
    Inputs,
    Look,
    LookStage,
    merged,
)
from jaxmet.transforms.rounding.layer_order import Wave, find_waves
from jaxmet.transforms.rounding.layer_problems import (
    LayerProblems,
    RoundedWeight,
    with_slice,
)
from jaxmet.transforms.rounding.rounded_layers import Layer, loop_axis
from jaxmet.transforms.rounding.size_classes import solve
from jaxmet.transforms.rounding.solvers import (
    Problem,
    RoundingMethod,
)
from jaxmet.tree.batches import Batches, inputs_of
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizers


class Part(NamedTuple):
    """Layers that are rounded in one step, in a loop in one turn of it."""

    stage: LookStage
    layers: tuple[Layer, ...]
    turn: int | None = None


PER_INPUT = 256
"""How many rows of all batches are looked at for each input of a layer, by default."""


@dataclasses.dataclass
class LayerwiseRounding:
    """One call: what is rounded, how, and both copies of the model."""

    caller: str
    graph: Graph
    params: Any
    quantizers: Quantizers
    layers: tuple[Layer, ...]
    method: RoundingMethod
    damping: float
    rows: int | None
    store: str
    both: bool
    bias: bool
    key: jax.Array
    kwargs: dict[str, Any]
    apart: bool = False  # every layer sees float inputs

    def __post_init__(self) -> None:
        self.leaves = named_leaves(self.params)

    def rows_of(self, name: str) -> int:
        """How many rows of a layer's inputs are used."""
        rows = self.method.rows if self.rows is None else self.rows
        return most_rows(rows, self.matrices[name].sizes[1], PER_INPUT)

    @property
    def lost(self) -> dict[str, str]:
        """Layers of which it is not known which of their inputs count, and why."""
        return self.positions.lost

    @functools.cached_property
    def kept_biases(self) -> dict[str, str]:
        """Layers whose bias takes no mean error although they have one, and why."""
        if not self.bias:
            return {}
        rounded = [layer for layer in self.layers if layer.why is None]
        whys = {x.node.name: self.problems.why_bias_kept(x) for x in rounded}
        return {name: why for name, why in whys.items() if why is not None}

    def begin(self, batches: Batches) -> tuple[Wave, ...]:
        """Read the data and cut both copies."""
        found = {
            layer.node.name: WeightMatrix.of(layer.node, self.leaves[layer.parameter])
            for layer in self.layers
            if layer.why is None
        }
        self.matrices = {n: m for n, m in found.items() if m is not None}
        self.layers = tuple(
            dataclasses.replace(layer, why="its product reads a part of it")
            if layer.why is None and layer.node.name not in self.matrices
            else layer
            for layer in self.layers
        )
        self.problems = LayerProblems(
            self.graph,
            self.leaves,
            self.quantizers,
            self.layers,
            self.matrices,
            self.method,
            self.damping,
            self.bias,
        )
        self.last = {x.parameter: x.node.name for x in self.layers if x.why is None}
        self.waiting: dict[str, tuple[Inputs, list[InputRows]]] = {}
        waves = find_waves(self.graph, self.layers)
        cuts = tuple(w.cut for w in waves if w.cut is not None)
        exact = Copy(
            self.caller,
            self.graph,
            self.params,
            cuts,
            self.kwargs,
            self.store == "host",
            loops=tuple(w.layers[0].node.name for w in waves if w.loops),
        )
        self.noisy = dataclasses.replace(exact, lives=[])
        if not self.apart:
            self.noisy = quantized_copy(
                self.graph, self.params, self.quantizers, exact, both=self.both
            )
        self.exact = exact
        names = [layer.node.name for wave in waves for layer in wave.layers]
        self.positions = Positions(self.graph, self.params, names, self.kwargs)
        number, sizes = 0, {}
        for batch in batches:
            given, _ = inputs_of(batch)
            size = max(
                (x.shape[0] for x in jax.tree.leaves(given) if x.ndim), default=1
            )
            exact.read(given)  # first: it names a batch that the model does not accept
            number, sizes[exact.lives[-1][0]] = number + size, size
            self.noisy.read(given)
            self.positions.read(batch)
        self.noisy.order = exact.order
        self.looking = Look(
            exact,
            self.noisy,
            waves,
            {n: self.rows_of(n) for n in self.matrices},
            {shape: size / max(1, number) for shape, size in sizes.items()},
            keep=self.method.keeps_rows,
        )
        return waves

    def go(
        self, waves: Sequence[Wave], checkpoint: Checkpoint, progress: bool
    ) -> dict[str, RoundedWeight]:
        """All waves; what each of their layers came to."""
        try:
            return self.run(waves, checkpoint, progress)
        finally:
            self.looking.close()

    def run(
        self, waves: Sequence[Wave], checkpoint: Checkpoint, progress: bool
    ) -> dict[str, RoundedWeight]:
        found: dict[str, RoundedWeight] = {}
        total = sum(len(w.layers) * w.turns for w in waves)
        steps = itertools.count()
        with tqdm(total=total, desc=self.caller, disable=not progress) as bar:

            def rounded(part: Part) -> dict[str, RoundedWeight]:
                """One step: a part of a wave, in one turn of a loop."""
                step = next(steps)
                kept = checkpoint.load(step)
                data = self.look(step, part)
                if kept is None:
                    new = self.choose(step, part, *data, bar)
                    checkpoint.save(step, _flat(new))
                else:
                    chosen = [x.node.name for x in part.layers if self.is_last(x)]
                    new = {name: _unflat(kept, name) for name in chosen}
                    bar.update(len(part.layers))
                self.put(part, new)
                return new

            for number, wave in enumerate(waves):
                if wave.loops:
                    found |= self.run_loop(number, wave, rounded)
                elif wave.layers:
                    found |= rounded(Part(self.looking.stage(number), wave.layers))
        return found

    def run_loop(
        self,
        number: int,
        wave: Wave,
        rounded: Callable[[Part], dict[str, RoundedWeight]],
    ) -> dict[str, RoundedWeight]:
        """Turn after turn, each with what the turns before it came to."""
        self.advance(self.looking.stage(number, "enter"))
        found: dict[str, dict[int, RoundedWeight]] = {
            layer.node.name: {} for layer in wave.layers
        }
        for turn in self.looking.turns(number):
            for i, layers in enumerate(wave.parts):
                stage = self.looking.stage(number, "look in a turn", i)
                for name, one in rounded(Part(stage, layers, turn)).items():
                    found[name][turn] = one
            self.advance(self.looking.stage(number, "turn"), turn)
        return {
            layer.node.name: self.problems.of_turns(
                layer, [one for _, one in sorted(found[layer.node.name].items())]
            )
            for layer in wave.layers
        }

    def advance(self, stage: LookStage, turn: int = 0) -> None:
        """Take all batches through a stage that looks at nothing."""
        for batch in range(len(self.exact.lives)):
            where = self.positions.batches[batch]
            self.looking(batch, stage, self.key, where, turn)

    def is_last(self, layer: Layer) -> bool:
        """Whether no layer after this one has the same weight: there it is chosen."""
        return self.last[layer.parameter] == layer.node.name

    def look(
        self, step: int, part: Part
    ) -> tuple[dict[str, Inputs], dict[str, list[InputRows]]]:
        """The inputs of layers; of a weight's last layer those of all that have it."""
        keep = self.method.keeps_rows
        self.check_memory(part.layers, keep)
        seen: dict[str, Inputs] = {}
        rows: dict[str, list[InputRows]] = {}
        drawing, _ = jax.random.split(jax.random.fold_in(self.key, step))
        for batch in range(len(self.exact.lives)):
            where = self.positions.batches[batch]
            key = jax.random.fold_in(drawing, batch)
            found, own = self.looking(batch, part.stage, key, where, part.turn or 0)
            for name, one in found.items():
                seen[name] = merged(seen[name], one) if name in seen else one
            for name, one in own.items():
                rows.setdefault(name, []).append(one)
        self.check(seen)
        for layer in part.layers:
            name, parameter = layer.node.name, layer.parameter
            if parameter in self.waiting:
                before, earlier = self.waiting.pop(parameter)
                seen[name] = merged(before, seen[name])
                rows[name] = [*earlier, *rows.get(name, [])]
            if not self.is_last(layer):
                self.waiting[parameter] = seen[name], rows.get(name, [])
        return seen, rows if keep else {}

    def choose(
        self,
        step: int,
        part: Part,
        seen: Mapping[str, Inputs],
        rows: Mapping[str, list[InputRows]],
        bar: Any,
    ) -> dict[str, RoundedWeight]:
        """The weights of these layers, each for all that its layers read."""
        _, solving = jax.random.split(jax.random.fold_in(self.key, step))
        problems = self.problems_of(part)
        groups: dict[Any, list[tuple[Layer, Problem]]] = {}
        layers = [layer for layer in part.layers if self.is_last(layer)]
        bar.update(len(part.layers) - len(layers))
        for layer in layers:
            kind, problem = problems.problem(layer, seen, rows)
            shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(problem))
            structure = jax.tree.structure(problem)
            groups.setdefault((kind, shapes, structure), []).append((layer, problem))
        new: dict[str, RoundedWeight] = {}
        for turn, ((kind, _, _), same) in enumerate(groups.items()):
            solutions = solve(
                [problem for _, problem in same],
                kind,
                self.method,
                jax.random.fold_in(solving, turn),
                partial(_tick, bar, len(same)),
            )
            for (layer, _), solution in zip(same, solutions, strict=True):
                new[layer.node.name] = problems.read(layer, solution)
        return {layer.node.name: new[layer.node.name] for layer in layers}

    def problems_of(self, part: Part) -> LayerProblems:
        """The problems of these layers: in a loop, of one turn."""
        if part.turn is None:
            return self.problems
        return self.problems.in_turn(part.layers, part.turn)

    def check_memory(self, layers: Sequence[Layer], keep: bool) -> None:
        """Refuse, before looking, what the device cannot hold."""
        needed = 0
        for layer in layers:
            groups, ins, outs = self.matrices[layer.node.name].sizes
            groups //= layer.node.layers or 1  # turn by turn
            needed += 4 * 3 * groups * ins * ins
            if keep:
                needed += 4 * self.rows_of(layer.node.name) * groups * (2 * ins + outs)
        free = free_memory()
        if free is not None and needed > free:
            names = ", ".join(repr(layer.node.name) for layer in layers)
            raise ValueError(
                f"jaxmet.{self.caller}: what has to be known of {names} takes "
                f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free. Ask for fewer "
                "rows=, take another method, or leave the largest layers out with "
                "graph.without."
            )

    def check(self, seen: Mapping[str, Inputs]) -> None:
        for name, one in seen.items():
            if not (np.isfinite(one.mean).all() and np.isfinite(one.float_mean).all()):
                raise ValueError(
                    f"jaxmet.{self.caller}: the inputs of {name!r} hold NaN or infinity. "
                    "Look at the batches, and at the layers before it with jm.compare."
                )

    def put(self, part: Part, new: Mapping[str, RoundedWeight]) -> None:
        """Give the quantized copy what was chosen."""
        if self.apart:
            return
        leaves, problems = {}, self.problems_of(part)
        for layer in part.layers:
            if layer.node.name in new:
                leaves |= problems.updated(layer, new[layer.node.name])
        if part.turn is not None:
            old = named_leaves(self.noisy.params)
            axes = {x.parameter: loop_axis(x.node) or 0 for x in part.layers}
            leaves = {
                name: with_slice(old[name], own, part.turn, axes.get(name, 0))
                for name, own in leaves.items()
            }
        self.noisy.params = replace_leaves(self.noisy.params, leaves)


def free_memory() -> int | None:
    """Bytes that the default device has left, None where that is not known."""
    device = jax.devices()[0]
    stats = device.memory_stats() if hasattr(device, "memory_stats") else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
        if all(name in os.sysconf_names for name in names):
            pages, size = map(os.sysconf, names)
            return pages * size
    return None


def _tick(bar: Any, layers: int, share: float, loss: Any) -> None:
    bar.update(share * layers)
    if not bar.disable:
        bar.set_postfix(loss=f"{float(np.asarray(loss).sum()):.3g}")


def _flat(found: Mapping[str, RoundedWeight]) -> dict[str, np.ndarray]:
    return {
        f"{field}:{name}": value
        for name, one in found.items()
        for field, value in one._asdict().items()
    }


def _unflat(arrays: Mapping[str, np.ndarray], name: str) -> RoundedWeight:
    return RoundedWeight(
        *(arrays[f"{field}:{name}"] for field in RoundedWeight._fields)
    )
