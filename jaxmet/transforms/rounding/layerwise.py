"""Wave after wave: each layer is chosen for inputs that come from chosen layers."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.nodes.scalar_function import Formula, compute
from jaxmet.engine.run.compressed import bounds_of
from jaxmet.layers.checkpoint import Checkpoint
from jaxmet.layers.inputs import most_rows
from jaxmet.layers.layer import WeightMatrix
from jaxmet.layers.leaf_math import replaced
from jaxmet.layers.lockstep import Copy, Positions, quantized_copy
from jaxmet.numerics.precision import wide
from jaxmet.transforms.rounding.input_statistics import InputRows, Inputs, Look, merged
from jaxmet.transforms.rounding.layer_order import Wave, find_waves
from jaxmet.transforms.rounding.rounded_layers import (
    Layer,
    LeafGrid,
    Sharing,
    grid_in_blocks,
    grid_of_leaf,
    sharing,
    sharing_weight,
    why_bias_kept,
)
from jaxmet.transforms.rounding.size_classes import solve
from jaxmet.transforms.rounding.solvers import (
    Kind,
    Problem,
    RoundingMethod,
    Solution,
)
from jaxmet.tree.batches import Batches, inputs_of
from jaxmet.tree.host_rounding import round_in_numpy
from jaxmet.tree.leaves import dense
from jaxmet.tree.names import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizers


class RoundedWeight(NamedTuple):
    """A layer's new leaves and grid, and its losses."""

    weight: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    loss: np.ndarray
    nearest_loss: np.ndarray
    inherited: np.ndarray
    shift: np.ndarray
    curve: np.ndarray


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
        rounded = [layer.node for layer in self.layers if layer.why is None]
        whys = {n.name: why_bias_kept(self.graph, self.layers, n) for n in rounded}
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
            [wave.layers for wave in waves],
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
        total = sum(len(w.layers) for w in waves)
        with tqdm(total=total, desc=self.caller, disable=not progress) as bar:
            for number, wave in enumerate(waves):
                kept = checkpoint.load(number)
                chosen = [x.node.name for x in wave.layers if self.is_last(x)]
                data = self.look(number, wave)
                if kept is None:
                    new = self.choose(number, wave, *data, bar)
                    checkpoint.save(number, _flat(new))
                else:
                    new = {name: _unflat(kept, name) for name in chosen}
                    bar.update(len(wave.layers))
                found |= new
                self.put(wave, new)
        return found

    def is_last(self, layer: Layer) -> bool:
        """Whether no layer after this one has the same weight: there it is chosen."""
        return self.last[layer.parameter] == layer.node.name

    def look(
        self, number: int, wave: Wave
    ) -> tuple[dict[str, Inputs], dict[str, list[InputRows]]]:
        """The inputs of a wave; of a weight's last layer those of all that have it."""
        keep = self.method.keeps_rows
        self.check_memory(wave, keep)
        seen: dict[str, Inputs] = {}
        rows: dict[str, list[InputRows]] = {}
        drawing, _ = jax.random.split(jax.random.fold_in(self.key, number))
        for batch in range(len(self.exact.lives)):
            where = self.positions.batches[batch]
            key = jax.random.fold_in(drawing, batch)
            found, own = self.looking(batch, number, key, where)
            for name, one in found.items():
                seen[name] = merged(seen[name], one) if name in seen else one
            for name, one in own.items():
                rows.setdefault(name, []).append(one)
        self.check(seen)
        for layer in wave.layers:
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
        number: int,
        wave: Wave,
        seen: Mapping[str, Inputs],
        rows: Mapping[str, list[InputRows]],
        bar: Any,
    ) -> dict[str, RoundedWeight]:
        """The weights of a wave, each for all that its layers read."""
        _, solving = jax.random.split(jax.random.fold_in(self.key, number))
        groups: dict[Any, list[tuple[Layer, Problem]]] = {}
        layers = [layer for layer in wave.layers if self.is_last(layer)]
        bar.update(len(wave.layers) - len(layers))
        for layer in layers:
            kind, problem = self.problem(layer, seen, rows)
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
                new[layer.node.name] = self.read(layer, solution)
        return {layer.node.name: new[layer.node.name] for layer in layers}

    def check_memory(self, wave: Wave, keep: bool) -> None:
        """Refuse, before looking, what the device cannot hold."""
        needed = 0
        for layer in wave.layers:
            groups, ins, outs = self.matrices[layer.node.name].sizes
            needed += 4 * 3 * groups * ins * ins
            if keep:
                needed += 4 * self.rows_of(layer.node.name) * groups * (2 * ins + outs)
        free = free_memory()
        if free is not None and needed > free:
            names = ", ".join(repr(layer.node.name) for layer in wave.layers)
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

    def problem(
        self,
        layer: Layer,
        seen: Mapping[str, Inputs],
        rows: Mapping[str, list[InputRows]],
    ) -> tuple[Kind, Problem]:
        """A layer in terms of its matrix."""
        name = layer.node.name
        leaf = np.asarray(dense(self.leaves[layer.parameter]))
        leaf = leaf.astype(wide(leaf.dtype))
        quantizer = self.quantizers.weights[layer.parameter]
        grid = LeafGrid.of(quantizer, leaf)
        how: Sharing = sharing(self.matrices[name], grid)
        weight = self.matrices[name].matrix(np.asarray(leaf))
        bias = self.bias_of(layer, weight.shape)
        inputs = jax.tree.map(np.asarray, seen[name])
        problem = Problem(
            weight,
            jax.tree.map(np.float32, grid_in_blocks(self.matrices[name], grid, how)),
            inputs,
            np.zeros((weight.shape[0], weight.shape[2]), weight.dtype)
            if bias is None
            else bias,
            inputs.mean.dtype.type(self.damping),
        )
        activation = None
        if rows:
            parts = [_that_count(one) for one in rows[name]]
            both = [np.concatenate(v, axis=1) for v in zip(*parts, strict=True)]
            activation, bounds = self.activation(layer.node, problem.bias.shape, bias)
            problem = problem._replace(rows=tuple(both), bounds=bounds)
        kind = Kind(
            quantizer.symmetric,
            how.blocks,
            how.shared,
            centred=self.bias and bias is not None,
            free=quantizer.follows or self.method.searches_pinned,
            activation=activation,
        )
        return kind, _filled(problem, how.blocks * how.length - weight.shape[1])

    def bias_of(self, layer: Layer, shape: Sequence[int]) -> np.ndarray | None:
        """The layer's own bias as (groups, outs), None where no mean can be put."""
        name = layer.node.bias
        if name is None or why_bias_kept(self.graph, self.layers, layer.node):
            return None
        bias = np.asarray(dense(self.leaves[name]))
        if bias.size != shape[0] * shape[2]:
            return None
        return bias.astype(wide(bias.dtype)).reshape(shape[0], shape[2])

    def activation(
        self, node: Node, shape: Sequence[int], bias: Any
    ) -> tuple[Callable | None, tuple[Any, Any]]:
        """What alone reads a layer and acts on each number, and its bounds by output."""
        nothing = None, (None, None)
        if node.derived_bias or (node.bias is not None and bias is None):
            return nothing
        after = self.consumer(node)
        formula = after.activation.formula if after and after.activation else None
        if after is None or formula is None:
            return nothing
        uses = map(self.function_of, sharing_weight(self.graph, node))
        if any(use != self.function_of(node) for use in uses):
            return nothing  # one function is for the rows of all uses
        if after.bounds is not None:
            stated = bounds_of(self.graph.nodes, self.leaves)
            own = stated.get(after.carrier or "", (None, None))
            pair = zip(own, after.bounds, strict=True)
            bounds = [
                np.broadcast_to(np.reshape(b if s is None else s, -1), math.prod(shape))
                for s, b in pair
            ]
            lower, upper = (np.float32(b.reshape(tuple(shape))) for b in bounds)
            return None, (lower, upper)
        return _computing(formula), (None, None)

    def consumer(self, node: Node) -> Node | None:
        """What alone reads a layer."""
        consumers = node.only_consumers or ()
        return self.graph[consumers[0]] if len(consumers) == 1 else None

    def function_of(self, node: Node) -> tuple[Any, ...]:
        """The bias that is added to the product of a layer, and the function that follows."""
        after = self.consumer(node)
        act = after.activation if after is not None else None
        return node.bias, node.derived_bias, act and (act.formula, act.bounds)

    def read(self, layer: Layer, solution: Solution) -> RoundedWeight:
        """A solution in terms of the leaves; weights exactly on the grid of the leaf."""
        name, quantizer = layer.node.name, self.quantizers.weights[layer.parameter]
        leaf = np.asarray(dense(self.leaves[layer.parameter]))
        exact = leaf.astype(wide(leaf.dtype))
        old = LeafGrid.of(quantizer, exact)
        how = sharing(self.matrices[name], old)
        grid = grid_of_leaf(self.matrices[name], solution.grid, old, how)
        ins = self.matrices[name].sizes[1]
        weight = np.asarray(solution.weight)[:, :ins]
        weight = self.matrices[name].leaf(np.asarray(weight))
        pinned = quantizer.holding(grid.scale, grid.zero_point)
        weight = round_in_numpy(pinned, weight.astype(exact.dtype))
        curve = np.zeros((0,)) if solution.curve is None else np.asarray(solution.curve)
        sums = solution.loss, solution.nearest_loss, solution.inherited
        loss, plain, inherited = (np.asarray(v) for v in sums)
        shift = np.asarray(solution.shift)
        return RoundedWeight(
            weight,
            grid.scale,
            grid.zero_point,
            loss,
            plain,
            inherited,
            shift,
            curve,
        )

    def put(self, wave: Wave, new: Mapping[str, RoundedWeight]) -> None:
        """Give the quantized copy what was chosen."""
        if self.apart:
            return
        leaves = {}
        for layer in wave.layers:
            if layer.node.name in new:
                leaves |= self.updated(layer, new[layer.node.name])
        self.noisy.params = replace_leaves(self.noisy.params, leaves)

    def updated(self, layer: Layer, chosen: RoundedWeight) -> dict[str, Any]:
        """The leaves of a layer that change."""
        old = self.leaves[layer.parameter]
        new = {layer.parameter: replaced(old, chosen.weight)}
        shape = self.matrices[layer.node.name].sizes
        if self.bias and self.bias_of(layer, shape) is not None:
            assert layer.node.bias is not None
            bias = self.leaves[layer.node.bias]
            array = np.asarray(dense(bias))
            dtype = wide(array.dtype, chosen.shift.dtype)
            shift = chosen.shift.astype(dtype).reshape(array.shape)
            moved = array.astype(dtype) + shift
            new[layer.node.bias] = replaced(bias, moved)
        return new


def _filled(problem: Problem, more: int) -> Problem:
    """The same with so many more inputs, always zero, that fill the last block."""
    if not more:
        return problem

    def fill(x: Any, *axes: int) -> Any:
        return np.pad(x, [(0, more if i in axes else 0) for i in range(x.ndim)])

    seen = problem.inputs
    return problem._replace(
        weight=fill(problem.weight, 1),
        inputs=seen._replace(
            products=jax.tree.map(lambda x: fill(x, 1, 2), seen.products),
            mean=fill(seen.mean, 1),
            float_mean=fill(seen.float_mean, 1),
        ),
        rows=jax.tree.map(lambda x: fill(x, 2), problem.rows),
    )


@functools.lru_cache(maxsize=64)
def _computing(formula: Formula) -> Callable:
    """The same function for the same formula: what is compiled for it is found again."""
    return partial(compute, formula)


def _that_count(rows: InputRows) -> list[np.ndarray]:
    """The rows that count, (groups, rows, ins), of the quantized and of the float model."""
    *both, counts = rows
    both = [np.asarray(v).reshape(-1, *v.shape[-2:]) for v in both]
    if counts is None:
        return both
    which = np.flatnonzero(counts)
    return [v[:, which] for v in both]


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
