"""A layer as the problem that a method solves, and the solution as leaves of the tree."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.nodes.scalar_function import Formula, compute
from jaxmet.engine.run.compressed import bounds_of
from jaxmet.layers.layer import WeightMatrix
from jaxmet.layers.leaf_math import replaced
from jaxmet.numerics.precision import wide
from jaxmet.transforms.rounding.input_statistics import InputRows, Inputs
from jaxmet.transforms.rounding.rounded_layers import (
    Layer,
    LeafGrid,
    Sharing,
    grid_in_blocks,
    grid_of_leaf,
    loop_axis,
    sharing,
    sharing_weight,
    why_bias_kept,
)
from jaxmet.transforms.rounding.solvers import (
    Kind,
    Problem,
    RoundingMethod,
    Solution,
)
from jaxmet.tree.host_rounding import round_in_numpy
from jaxmet.tree.leaves import dense, with_weight
from jaxmet.tree.quantizer import Quantizer
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


@dataclasses.dataclass(frozen=True)
class LayerProblems:
    """What the problems of all layers are made of: the float tree, and what is asked for."""

    graph: Graph
    leaves: Mapping[str, Any]
    quantizers: Quantizers
    layers: tuple[Layer, ...]
    matrices: Mapping[str, WeightMatrix]  # of the layers that are rounded
    method: RoundingMethod
    damping: float
    bias: bool
    searched: Mapping[str, bool] | None = None

    @functools.cached_property
    def stated(self) -> dict[str, Quantizer]:
        """The quantizers of weights that a loop slices, with the scales that they have now."""
        found = {}
        for layer in self.layers:
            if layer.why is None and layer.node.loop is not None:
                name = layer.parameter
                leaf = np.asarray(dense(self.leaves[name]))
                quantizer = self.quantizers.weights[name]
                grid = LeafGrid.of(quantizer, leaf.astype(wide(leaf.dtype)))
                found[name] = quantizer.holding(grid.scale, grid.zero_point)
        return found

    def in_turn(self, layers: Sequence[Layer], turn: int) -> "LayerProblems":
        """The same for a turn of a loop: of these layers it knows that turn's slices alone."""
        leaves, weights = dict(self.leaves), dict(self.quantizers.weights)
        matrices, searched = {}, {}
        for layer in layers:
            name, axis = layer.parameter, loop_axis(layer.node)
            assert axis is not None and layer.node.weight is not None
            leaves[name] = slice_of(dense(leaves[name]), turn, axis)
            stated, length = self.stated[name], layer.node.layers
            weights[name] = quantizer_in_turn(stated, turn, axis, length)
            searched[name] = self.searches(name) and has_turns(stated, axis, length)
            shape = tuple(leaves[name].shape)
            matrices[layer.node.name] = WeightMatrix(layer.node, shape)
            if (bias := layer.node.bias) is not None:
                own = self.bias_of(layer) is not None
                leaves[bias] = slice_of(dense(leaves[bias]), turn, 0) if own else None
        return dataclasses.replace(
            self,
            leaves=leaves,
            quantizers=dataclasses.replace(self.quantizers, weights=weights),
            matrices=matrices,
            searched=searched,
        )

    def of_turns(self, layer: Layer, turns: Sequence[RoundedWeight]) -> RoundedWeight:
        """What all turns of a layer came to, in the order of their slices."""
        axis, stated = loop_axis(layer.node), self.stated[layer.parameter]
        assert axis is not None
        along = {"weight": axis, "curve": None}
        if has_turns(stated, axis, layer.node.layers):
            along |= {"scale": axis, "zero_point": axis}
        every = {}
        for field in RoundedWeight._fields:
            arrays = [getattr(one, field) for one in turns]
            at = along.get(field, 0)
            every[field] = (
                np.stack(arrays) if at is None else np.concatenate(arrays, at)
            )
        if "scale" not in along:
            grid = LeafGrid.of(stated, np.asarray(dense(self.leaves[layer.parameter])))
            every |= {"scale": grid.scale, "zero_point": grid.zero_point}
        return RoundedWeight(**every)

    def searches(self, parameter: str) -> bool:
        """Whether the scales of a weight may change."""
        if self.searched is not None:
            return self.searched[parameter]
        follows = self.quantizers.weights[parameter].follows
        return follows or self.method.searches_pinned

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
        bias = self.bias_of(layer)
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
            free=self.searches(layer.parameter),
            activation=activation,
        )
        return kind, _filled(problem, how.blocks * how.length - weight.shape[1])

    def bias_of(self, layer: Layer) -> np.ndarray | None:
        """The layer's own bias as (groups, outs), None where no mean can be put."""
        name = layer.node.bias
        if name is None or self.why_bias_kept(layer):
            return None
        bias = np.asarray(dense(self.leaves[name]))
        groups, _, outs = self.matrices[layer.node.name].sizes
        return bias.astype(wide(bias.dtype)).reshape(groups, outs)

    def why_bias_kept(self, layer: Layer) -> str | None:
        """Why the bias of a layer takes no mean error, None where it does or has none."""
        name = layer.node.bias
        why = why_bias_kept(self.graph, self.layers, layer.node)
        if name is None or why is not None:
            return why
        leaf = self.leaves[name]
        groups, _, outs = self.matrices[layer.node.name].sizes
        loops = layer.node.loop is not None
        if loops and loop_axis(layer.node) != 0:
            return "its loop slices another axis than the first"
        if leaf is None or math.prod(dense(leaf).shape) != groups * outs:
            each = "every turn of its loop adds it"
            return each if loops else "it is not one number for each output"
        return None

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

    def updated(self, layer: Layer, chosen: RoundedWeight) -> dict[str, Any]:
        """The leaves of a layer that change."""
        old = self.leaves[layer.parameter]
        new = {layer.parameter: replaced(old, chosen.weight)}
        if self.bias and self.bias_of(layer) is not None:
            assert layer.node.bias is not None
            bias = self.leaves[layer.node.bias]
            array = np.asarray(dense(bias))
            dtype = wide(array.dtype, chosen.shift.dtype)
            shift = chosen.shift.astype(dtype).reshape(array.shape)
            moved = array.astype(dtype) + shift
            new[layer.node.bias] = replaced(bias, moved)
        return new


def slice_of(array: Any, turn: int, axis: int) -> jax.Array:
    """The slice of an array that a turn of a loop reads, with that axis."""
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), np.int32(turn), 1, axis)


def with_slice(leaf: Any, new: Any, turn: int, axis: int) -> Any:
    """The leaf with another slice for a turn of a loop."""
    old = jnp.asarray(dense(leaf))
    new = jnp.asarray(dense(new), old.dtype)
    new = jax.lax.dynamic_update_slice_in_dim(old, new, np.int32(turn), axis)
    return with_weight(leaf, new)


def has_turns(quantizer: Quantizer, axis: int, length: int | None) -> bool:
    """Whether each turn of a loop that slices the weight along an axis has its own scales."""
    stated = quantizer.maximum if quantizer.scale is None else quantizer.scale
    return np.ndim(stated) > 0 and np.shape(stated)[axis] == length


def quantizer_in_turn(
    quantizer: Quantizer, turn: int, axis: int, length: int | None
) -> Quantizer:
    """The quantizer, whose scales are stated, of the slice that a turn reads."""

    def own(v: Any) -> Any:
        if np.ndim(v) == 0 or np.shape(v)[axis] == 1:
            return v
        at = turn if np.shape(v)[axis] == length else turn // (quantizer.block or 1)
        return slice_of(v, at, axis)

    return jax.tree.map(own, quantizer)


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
